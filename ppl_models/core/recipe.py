"""Objects as JSON: the name of a known class, and the arguments it was made with.

Nothing is ever imported by name: what JSON says is looked up in a table that the caller holds.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution as TorchDistribution

from ppl_models.core.checks import check_known

Names = Mapping[str, Callable[..., Any]]


def encode(
    value: Any,
    names: Names,
    tensors: dict[str, Tensor],
    own: list[str],
    *,
    at: str,
    instead: Mapping[str, Any] | None = None,
) -> Any:
    """Describe an object in JSON.

    What JSON has no word for is the user's own: it is described by its kind alone, and `decode`
    cannot build it.

    Arguments:
        value: A number, text, None, tensor, a sequence or mapping of those, an entry of `names`, or
            an instance of one.
        names: What may be built, by name: classes that are data classes, distributions, or have a
            method `arguments`, as `NamedModule` has.
        tensors: Filled with the tensors in it, which JSON refers to by name.
        own: Filled with what is the user's own: where it is, and its kind.
        at: Where the object is, for messages and for the names of tensors.
        instead: Arguments of the outermost object, in place of those it was made with.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        # A copy in native byte order: torch takes no other, and no negative strides.
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Tensor):
        tensors[at] = value
        return {"tensor": at}
    if isinstance(value, tuple | list):
        return [encode(part, names, tensors, own, at=f"{at}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        parts = {
            key: encode(part, names, tensors, own, at=f"{at}[{key!r}]")
            for key, part in value.items()
        }
        return {"mapping": parts}
    for name, known in names.items():
        if value is known:
            return {"itself": name}
        if type(value) is known:
            arguments = _arguments(value) if instead is None else instead
            described = {
                key: encode(part, names, tensors, own, at=f"{at}.{key}")
                for key, part in arguments.items()
            }
            return {"name": name, "arguments": described}
    kind = getattr(value, "__name__", None) or type(value).__name__
    own.append(f"{at} ({kind})")
    return {"yours": kind}


def decode(spec: Any, names: Names, tensors: Mapping[str, Tensor], **given: Any) -> Any:
    """Build what `encode` described; sequences become tuples, and arrays tensors.

    Arguments:
        spec: The description.
        names: What may be built, by name.
        tensors: The tensors that it refers to.
        given: Arguments for the outermost object that are not in its description.

    Raises:
        ValueError: If it names something that is not in `names`, or is no description.
    """
    if spec is None or isinstance(spec, bool | int | float | str):
        return spec
    if isinstance(spec, list):
        return tuple(decode(part, names, tensors) for part in spec)
    match spec:
        case {"float": str(text)}:
            return float(text)
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"mapping": dict(parts)}:
            return {key: decode(part, names, tensors) for key, part in parts.items()}
        case {"itself": str(name)}:
            check_known("building block", name, names)
            return names[name]
        case {"name": str(name), "arguments": dict(parts)}:
            check_known("building block", name, names)
            arguments = {key: decode(part, names, tensors) for key, part in parts.items()}
            return _call(names[name], arguments | given)
    raise ValueError(f"recipe: cannot build {spec!r}.")


def show(spec: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Write a description out for a reader: two are the same if this is, tensors included."""

    def listed(parts: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={show(part, tensors)}" for key, part in parts.items())

    match spec:
        case list():
            return f"({', '.join(show(part, tensors) for part in spec)})"
        case {"float": str(text)}:
            return text
        case {"tensor": str()} if tensors is None:
            return "a tensor"
        case {"tensor": str(name)} if tensors is not None:
            value = tensors[name]
            numbers = value.flatten().tolist()
            text = ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in numbers)
            return text if value.ndim == 0 else f"tensor {tuple(value.shape)} of {text}"
        case {"mapping": dict(parts)}:
            return f"{{{listed(parts)}}}"
        case {"itself": str(name)}:
            return name
        case {"name": str(name), "arguments": dict(parts)}:
            return f"{name}({listed(parts)})"
        case {"yours": str(kind)}:
            return f"your own {kind}"
    return repr(spec)


def _arguments(value: Any) -> dict[str, Any]:
    """Return what an object was made with, by name."""
    if hasattr(value, "arguments"):
        return value.arguments()
    if isinstance(value, TorchDistribution):
        return {name: getattr(value, name) for name in value.arg_constraints}
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def _call(make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with arguments by name; those that the signature collects, as `**options`, are spread."""
    parameters = inspect.signature(make).parameters
    if unknown := sorted(set(arguments) - set(parameters)):
        raise ValueError(f"recipe: {make.__name__} takes no argument {unknown[0]!r}.")
    spread: dict[str, Any] = {}
    for name, value in arguments.items():
        spread |= value if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return make(**spread)

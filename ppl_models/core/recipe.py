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


class NoRecipe(ValueError):
    """There is no JSON for an object: it, or a part of it, is the user's own."""


def encode(
    value: Any,
    names: Names,
    tensors: dict[str, Tensor],
    *,
    at: str,
    instead: Mapping[str, Any] | None = None,
) -> Any:
    """Describe an object in JSON.

    Arguments:
        value: A number, text, None, tensor, a sequence or mapping of those, an entry of `names`, or
            an instance of one.
        names: What may be built, by name: classes that are data classes, distributions, or have a
            method `arguments`, as `NamedModule` has.
        tensors: Filled with the tensors in it, which JSON refers to by name.
        at: Where the object is, for messages and for the names of tensors.
        instead: Arguments of the outermost object, in place of those it was made with.

    Raises:
        NoRecipe: If a part of it is none of these; the message says which.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.integer | np.floating):
        return encode(value.item(), names, tensors, at=at)
    if isinstance(value, Tensor | np.ndarray):
        tensors[at] = torch.as_tensor(value).detach().cpu().clone().contiguous()
        return {"tensor": at}
    if isinstance(value, tuple | list):
        return [encode(part, names, tensors, at=f"{at}.{i}") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        parts = {k: encode(v, names, tensors, at=f"{at}.{k}") for k, v in value.items()}
        return {"mapping": parts}
    for name, known in names.items():
        if value is known:
            return {"itself": name}
        if type(value) is known:
            arguments = _arguments(value) if instead is None else instead
            described = {
                key: encode(part, names, tensors, at=f"{at}.{key}")
                for key, part in arguments.items()
            }
            return {"name": name, "arguments": described}
    kind = value.__name__ if inspect.isroutine(value) else type(value).__name__
    raise NoRecipe(f"{at} is your own ({kind})")


def decode(spec: Any, names: Names, tensors: Mapping[str, Tensor], **given: Any) -> Any:
    """Build what `encode` described.

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
        case {"tensor": str(name)}:
            return tensors[name]
        case {"mapping": dict(parts)}:
            return {key: decode(part, names, tensors) for key, part in parts.items()}
        case {"itself": str(name)}:
            check_known("building block", name, names)
            return names[name]
        case {"name": str(name), "arguments": dict(parts)}:
            check_known("building block", name, names)
            return _call(
                names[name], {k: decode(v, names, tensors) for k, v in parts.items()} | given
            )
    raise ValueError(f"recipe: cannot read {spec!r}.")


def _arguments(value: Any) -> dict[str, Any]:
    """Return what an object was made with, by name."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, TorchDistribution):
        takes = inspect.signature(type(value)).parameters
        return {name: getattr(value, name) for name in value.arg_constraints if name in takes}
    return value.arguments()


def _call(make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with arguments by name; those that the signature collects, as `**options`, are spread."""
    parameters = inspect.signature(make).parameters
    if unknown := sorted(set(arguments) - set(parameters)):
        raise ValueError(f"recipe: {make.__name__} takes no argument {unknown[0]!r}.")
    spread: dict[str, Any] = {}
    for name, value in arguments.items():
        spread |= value if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return make(**spread)

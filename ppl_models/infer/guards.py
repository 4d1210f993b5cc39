"""What a recorded graph takes for granted: modes, numbers of Python, and which tensors are meant."""

from __future__ import annotations

import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range, Fraction, Decimal, np.generic),
    *(torch.dtype, torch.device, torch.Size),
)
_DEPTH = 50  # of containers, closures and objects that are looked into
_FOREIGN = 5  # the same, within an object of an installed package


def fingerprint(*programs: Any) -> dict[str, Any]:
    """Return, by name, whatever a graph recorded from programs holds as a constant.

    Two equal fingerprints mean that the graph of one serves for the other. Values of tensors are
    no part of it: a graph reads them.

    Arguments:
        programs: Models, guides and objectives: modules, functions or other callables.

    Example:
        >>> model = nn.Dropout(0.5)
        >>> before = fingerprint(model)
        >>> model.p = 0.1
        >>> difference(before, fingerprint(model))
        ['Dropout.p']
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    for program in programs:
        for name, value in _facts(program, _label(program), _DEPTH, seen):
            own = name
            while own in found:  # of another program, or of a class and of its instance
                own += "'"
            found[own] = _identity(value) if isinstance(value, Tensor) else value
    store = pyro.get_param_store()
    for name, value in store.named_parameters():
        found[f"pyro.param '{name}'"] = _identity(value)
    found["torch: default dtype"] = torch.get_default_dtype()
    return found


def reached(*programs: Any) -> list[Tensor]:
    """Return the tensors that programs hold: in modules, attributes, closures and globals.

    Arguments:
        programs: As in `fingerprint`.
    """
    seen: dict[int, Any] = {}
    facts = (fact for program in programs for fact in _facts(program, "", _DEPTH, seen))
    return [value for _, value in facts if isinstance(value, Tensor)]


def objects(*programs: Any) -> list[Any]:
    """Return the objects that programs hold, themselves included, less plain values and tensors.

    Arguments:
        programs: As in `fingerprint`.
    """
    seen: dict[int, Any] = {}
    for program in programs:
        for _ in _facts(program, "", _DEPTH, seen):
            pass
    return list(seen.values())


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name what differs between two fingerprints."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if one.get(name, _ABSENT) != other.get(name, _ABSENT)]


def replaced(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return, by name, the tensors of two fingerprints that differ: the `id` of either."""
    pairs = {name: (one.get(name), other.get(name)) for name in difference(one, other)}
    return {
        name: (before.tensor, after.tensor)
        for name, (before, after) in pairs.items()
        if isinstance(before, _Identity) and isinstance(after, _Identity)
    }


class _Absent:
    pass


_ABSENT = _Absent


def _facts(value: Any, name: str, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _PLAIN):
        yield name, (type(value), repr(value))  # 1 and True and 1.0 make different graphs
        return
    if isinstance(value, Tensor):
        yield name, value
        return
    if value is _ABSENT:
        return
    if isinstance(value, np.ndarray):
        seen[id(value)] = value
        yield name, (value.shape, str(value.dtype), hash(value.tobytes()))
        return
    if isinstance(value, itertools.count):
        yield name, repr(value)
        return
    if depth == 0 or id(value) in seen or isinstance(value, types.ModuleType):
        return
    seen[id(value)] = value
    if isinstance(value, Messenger):
        # A plate of Pyro's, which guides make anew: what it is, not what it has drawn.
        for key in ("name", "size", "subsample_size", "dim"):
            yield f"{name}.{key}", repr(getattr(value, key, None))
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield from _facts(item, f"{name}[{key!r}]", depth - 1, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield f"{name}: length", len(value)
        for place, item in enumerate(value):
            yield from _facts(item, f"{name}[{place}]", depth - 1, seen)
    elif isinstance(value, type):
        yield from _class_facts(value, name, depth, seen)
    elif isinstance(value, nn.Module):
        for path, module in value.named_modules(remove_duplicate=False):
            yield from _module_facts(module, f"{name}.{path}" if path else name, depth, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function_facts(value, name, depth, seen)
    elif isinstance(value, types.MethodType):
        yield from _facts(value.__self__, name, depth, seen)
        yield from _facts(value.__func__, name, depth, seen)
    elif isinstance(value, staticmethod | classmethod):
        yield from _facts(value.__func__, name, depth, seen)
    elif isinstance(value, property | cached_property):
        read = value.fget if isinstance(value, property) else value.func
        yield from _facts(read, name, depth, seen)
    elif isinstance(value, partial):
        yield from _facts(value.func, name, depth, seen)
        yield from _facts(value.args, f"{name} arguments", depth, seen)
        yield from _facts(value.keywords, f"{name} arguments", depth, seen)
    elif (stream := _stream(value)) is not None:
        yield name, hash(stream)
    else:
        if type(value).__module__ == "builtins" and hasattr(value, "__length_hint__"):
            yield name, operator.length_hint(value)  # an iterator: how far it is from its end
        if _installed(type(value).__module__):
            depth = min(depth, _FOREIGN)
        for key, item in _attributes(value).items():
            yield from _facts(item, f"{name}.{key}", depth - 1, seen)
        yield from _facts(type(value), f"{name}.{type(value).__name__}", depth, seen)


def _stream(value: Any) -> Any:
    """Where a generator of random numbers is; None of anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    return repr(value.get_state()) if isinstance(value, np.random.RandomState) else None


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in its slots."""
    if of_a_library(type(value)) and not hasattr(value, "__dict__"):
        return {}  # such as an iterator: looked at, it may move
    slots = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
    held = {name: getattr(value, name, _ABSENT) for name in names if name != "__dict__"}
    return held | dict(getattr(value, "__dict__", {}))


_OF_MODULES = {*vars(nn.Module()), "_given"}


def _class_facts(
    kind: type, name: str, depth: int, seen: dict[int, Any]
) -> Iterator[tuple[str, Any]]:
    """What a class of the user's holds, and what its methods refer to."""
    for owner in kind.__mro__:
        if of_a_library(owner):
            continue
        for key, item in list(vars(owner).items()):
            dunder = key.startswith("__") and not isinstance(item, types.FunctionType)
            if not dunder and key != "_abc_impl":
                yield from _facts(item, f"{name}.{key}", depth - 1, seen)


def of_a_library(value: Any) -> bool:
    """Whether code comes with a library, which does not change while it trains."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


@cache
def _installed(module: str) -> bool:
    """Whether a module is none of the user's own files."""
    if module.partition(".")[0] in _LIBRARIES:
        return True
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


_LIBRARIES = {
    *("torch", "pyro", "ppl_models", "guides", "zuko", "numpy", "scipy"),
    *sys.stdlib_module_names,
} - {"__main__"}


def _module_facts(
    module: nn.Module, name: str, depth: int, seen: dict[int, Any]
) -> Iterator[tuple[str, Any]]:
    seen[id(module)] = module
    yield f"{name}.training", module.training
    for held in (module._parameters, module._buffers):
        for key, value in held.items():
            if value is not None:
                yield f"{name}.{key}", value
    for key, value in list(vars(module).items()):
        if key in _OF_MODULES or key.startswith("_pyro") or isinstance(value, nn.Module):
            continue
        yield from _facts(value, f"{name}.{key}", depth - 1, seen)
    yield from _facts(type(module), name, depth, seen)


def _function_facts(
    function: types.FunctionType, name: str, depth: int, seen: dict[int, Any]
) -> Iterator[tuple[str, Any]]:
    yield f"{name}: code", id(function.__code__)
    for default in (function.__defaults__, function.__kwdefaults__):
        if default:
            yield from _facts(default, f"{name}: defaults", depth - 1, seen)
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # not filled yet
        yield from _facts(value, f"{name}: {key}", depth - 1, seen)
    if of_a_library(function):
        return
    names = dict.fromkeys(names_in(function.__code__))
    for key in names:
        value = function.__globals__.get(key, _ABSENT)
        if (
            isinstance(value, types.ModuleType)
            and value.__name__.partition(".")[0] not in _LIBRARIES
        ):
            for attribute in names:
                item = vars(value).get(attribute, _ABSENT)
                yield from _facts(item, f"{name}: {key}.{attribute}", depth - 1, seen)
        elif value is not _ABSENT:
            yield from _facts(value, f"{name}: {key}", depth - 1, seen)


def names_in(code: types.CodeType) -> Iterator[str]:
    """Globals and attributes that a function names, in what is defined inside of it too."""
    yield from code.co_names
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            yield from names_in(held)


class _Identity(NamedTuple):
    """Which tensor it is, and what of it a graph depends on."""

    tensor: int
    memory: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def _identity(value: Tensor) -> _Identity:
    return _Identity(
        id(value),
        value.data_ptr() if value.layout == torch.strided else None,
        tuple(value.shape),
        value.dtype,
        value.device,
        value.requires_grad,
    )


def _label(program: Any) -> str:
    return getattr(program, "__name__", None) or type(program).__name__

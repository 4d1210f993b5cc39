"""Library calls and Pyro's global parameter store.

Inside a library call the parameters of a module are the module's own, whatever an earlier instance
of the same name left in the store, and afterwards the store is as it was. What a function writes
into the store with `pyro.param` stays there, as its author expects.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints


@contextmanager
def own_parameters(*programs: Any) -> Iterator[None]:
    """Let each module among `programs` use its own parameters, and leave no trace of them."""
    store = pyro.get_param_store()
    modules = [program for program in programs if isinstance(program, nn.Module)]
    claimed: dict[str, tuple[Tensor, Any]] = {}
    for module in modules:
        claimed |= {name: (value, kind) for name, value, kind in _store_names(module)}
    # A guide of Pyro makes its parameters when it first runs: whatever bears its name is its own.
    named = [m._pyro_name for m in modules if isinstance(m, PyroModule) and m._pyro_name]
    prefixes = tuple(f"{name}." for name in named)

    def theirs(name: str, value: Tensor) -> bool:
        late = any(value is parameter for module in modules for parameter in module.parameters())
        return name in claimed or name.startswith(prefixes) or late

    before: Any = store.get_state()
    hidden = [name for name, value in before["params"].items() if theirs(name, value)]
    inside: Any = _without(before, hidden)
    for name, (value, constraint) in claimed.items():
        inside["params"][name] = value
        inside["constraints"][name] = constraint
    store.clear()
    # Entries set as a state keep `requires_grad`; entries that Pyro makes by itself are unfrozen.
    store.set_state(inside)
    try:
        with warnings.catch_warnings():
            # Pyro warns of every frozen parameter that it leaves out: what freezing is for.
            warnings.filterwarnings("ignore", message=".*because requires_grad=False")
            yield
    finally:
        after: Any = store.get_state()
        made = [name for name, value in after["params"].items() if theirs(name, value)]
        after = _without(after, made)
        for kind in ("params", "constraints"):
            after[kind] |= {name: before[kind][name] for name in hidden}
        store.clear()
        store.set_state(after)


def enter_parameters(*programs: Any) -> None:
    """Enter into the store what replaced parameters of modules, as their next run would."""
    store: Any = pyro.get_param_store()
    modules = [program for program in programs if isinstance(program, nn.Module)]
    for module in modules:
        for name, value, constraint in _store_names(module):
            if name not in store._params:
                store._constraints[name] = constraint
                store._params[name], store._param_to_name[value] = value, name


@contextmanager
def scratch_store() -> Iterator[None]:
    """Forget every `pyro.param` statement of a block: for a look at a program, not a run of it."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


@contextmanager
def unchanged_on_error() -> Iterator[None]:
    """Forget the `pyro.param` statements and the draws of a block that fails."""
    store = pyro.get_param_store()
    before = store.get_state()
    stream = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        store.clear()
        store.set_state(before)
        torch.set_rng_state(stream)
        torch.cuda.set_rng_state_all(on_gpu)
        raise


def _without(state: Any, names: list[str]) -> Any:
    return {
        kind: {name: entry for name, entry in entries.items() if name not in names}
        for kind, entries in state.items()
    }


def _store_names(module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield the names under which Pyro would register a module's parameters."""
    if not isinstance(module, PyroModule):
        return
    constrained = module._pyro_params
    for name, parameter in module._parameters.items():
        short = name.removesuffix("_unconstrained")
        is_constrained = name.endswith("_unconstrained") and short in constrained
        constraint = constrained[short][0] if is_constrained else constraints.real
        if parameter is not None:
            yield (
                _join(module._pyro_name, short if is_constrained else name),
                parameter,
                constraint,
            )
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from _store_names(child)
        elif child is not None:
            prefix = _join(module._pyro_name, key)
            for name, parameter in child.named_parameters():
                yield f"{prefix}$$${name}", parameter, constraints.real


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

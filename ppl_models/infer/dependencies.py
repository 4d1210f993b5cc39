"""Which terms of a bound depend on the draw at a site: what its score must be multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import recorded, stochastic_nodes
from ppl_models.infer.capture import unvalidated

#: What makes something of a tensor that is no tensor, or writes to another one.
_WAYS_OUT = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "is_nonzero",
        "equal",
        "allclose",
        "__array__",
        "__dlpack__",
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__setitem__",
        "__set__",
        "index_put_",
    ]
)

#: For each latent the terms that depend on it, "model.x" or "guide.z".
Dependencies = Mapping[str, frozenset[str]]


class _Tracked(Messenger):
    """Mark each draw with its own name, and with those that its distribution depends on."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        above = get_provenance(msg["fn"].log_prob(msg["value"]))
        own = frozenset({msg["name"]})
        msg["value"] = track_provenance(detach_provenance(msg["value"]), own | above)


class _Escaped(Exception):
    """A draw went where it cannot be followed."""


class _Escapes(TorchFunctionMode):
    """Raise where a marked tensor becomes something else, or is written into an unmarked one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if marks := get_provenance([args, kwargs]):
            name = getattr(func, "__name__", "")
            writes = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            target = kwargs.get("out", args[0] if writes and args else None)
            known = marks if target is None else get_provenance(target)
            if name in _WAYS_OUT or not marks <= known:
                raise _Escaped(name)
        return func(*args, **kwargs)


def dependencies(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
) -> Dependencies | None:
    """Trace a guide and its model, and say which terms depend on which latents.

    Operations on tensors are followed. Where a draw goes another way, into a branch of Python, a
    number, an array, or a tensor that is written to, nothing is known.

    Returns:
        None if it cannot be told: then every term may depend on every latent.
    """
    try:
        with evaluating(model, guide), seeded(0), unvalidated():
            with _Escapes(), _Tracked(), recorded(guide) as guided:
                guide(*batch)
            with _Escapes(), recorded(model) as told:
                poutine.replay(model, trace=guided.trace)(*batch)
            found: dict[str, set[str]] = {name: set() for name in _drawn(guided.trace)}
            for half, trace in (("guide", guided.trace), ("model", told.trace)):
                trace.compute_log_prob()
                for name, node in stochastic_nodes(trace):
                    for latent in get_provenance(node["log_prob"]):
                        found[latent].add(f"{half}.{name}")
            for _ in found:  # what hangs on a latent that hangs on this one
                for terms in found.values():
                    below = [name for name in found if f"guide.{name}" in terms]
                    terms.update(*(found[name] for name in below))
    except (_Escaped, RuntimeError, TypeError, NotImplementedError, AttributeError, KeyError):
        return None  # provenance is a tensor subclass, which not every operation takes
    return {latent: frozenset(terms) for latent, terms in found.items()}


def _drawn(trace: Trace) -> dict[str, Tensor]:
    nodes = stochastic_nodes(trace)
    return {name: node["value"] for name, node in nodes if not node["is_observed"]}

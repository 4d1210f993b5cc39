"""Which terms of a bound depend on the draw at a site: what its score must be multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import recorded, stochastic_nodes
from ppl_models.core.traces import draw_latents, replayed_pair

LOOKS = 4  # how often each latent is drawn anew

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


def dependencies(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
) -> Dependencies | None:
    """Trace a guide and its model, and say which terms depend on which latents.

    Operations on tensors are followed; what goes by another way, such as a branch of Python, is
    looked for by drawing each latent anew.

    Returns:
        None if it cannot be told: then every term may depend on every latent.
    """
    try:
        with evaluating(model, guide), seeded(0):
            with _Tracked(), recorded(guide) as guided:
                guide(*batch)
            with recorded(model) as told:
                poutine.replay(model, trace=guided.trace)(*batch)
            found: dict[str, set[str]] = {name: set() for name in _drawn(guided.trace)}
            for half, trace in (("guide", guided.trace), ("model", told.trace)):
                trace.compute_log_prob()
                for name, node in stochastic_nodes(trace):
                    for latent in get_provenance(node["log_prob"]):
                        found[latent].add(f"{half}.{name}")
            for latent, missed in _moved(model, guide, *batch).items():
                found[latent] |= missed
            for _ in found:  # what hangs on a latent that hangs on this one
                for terms in found.values():
                    below = [name for name in found if f"guide.{name}" in terms]
                    terms.update(*(found[name] for name in below))
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, KeyError):
        return None  # provenance is a tensor subclass, which not every operation takes
    return {latent: frozenset(terms) for latent, terms in found.items()}


def _drawn(trace: Trace) -> dict[str, Tensor]:
    nodes = stochastic_nodes(trace)
    return {name: node["value"] for name, node in nodes if not node["is_observed"]}


def _moved(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
) -> dict[str, set[str]]:
    """For each latent the terms that change when it alone is drawn anew."""
    one, *others = (draw_latents(guide, *batch) for _ in range(1 + LOOKS))

    def terms(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pair = replayed_pair(model, guide, *batch, values=values)
        found: dict[str, Tensor] = {}
        for half, trace in (("model", pair.model), ("guide", pair.guide)):
            trace.compute_log_prob()
            found |= {f"{half}.{n}": node["log_prob"] for n, node in stochastic_nodes(trace)}
        return found

    before = terms(one)
    return {
        name: {
            term
            for other in others
            for term, value in terms(one | {name: other[name]}).items()
            if not torch.equal(value, before[term])
        }
        for name in one
    }

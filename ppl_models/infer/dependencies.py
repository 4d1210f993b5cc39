"""Which terms of a bound depend on the draw at a site: what its score must be multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import recorded, stochastic_nodes

#: For each latent the terms that depend on it, "model.x" or "guide.z".
Dependencies = Mapping[str, frozenset[str]]


class _Tracked(Messenger):
    """Mark each draw with its own name, and with those that its distribution depends on."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not isinstance(msg["value"], Tensor):
            return
        above = (
            get_provenance(msg["fn"].log_prob(msg["value"]))
            if not msg["infer"].get("is_auxiliary")
            else frozenset()
        )
        own = frozenset({msg["name"]})
        msg["value"] = track_provenance(detach_provenance(msg["value"]), own | above)


def dependencies(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
) -> Dependencies | None:
    """Trace a guide and its model, and say which terms depend on which latents.

    Returns:
        None if it cannot be told: then every term may depend on every latent.
    """
    try:
        with evaluating(model, guide), seeded(0):
            with _Tracked(), recorded(guide) as guided:
                guide(*batch)
            with recorded(model) as told:
                poutine.replay(model, trace=guided.trace)(*batch)
            found: dict[str, set[str]] = {}
            for half, trace in (("guide", guided.trace), ("model", told.trace)):
                trace.compute_log_prob()
                for name, node in stochastic_nodes(trace):
                    for latent in get_provenance(node["log_prob"]):
                        found.setdefault(latent, set()).add(f"{half}.{name}")
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return None  # provenance is a tensor subclass, which not every operation takes
    return {latent: frozenset(terms) for latent, terms in found.items()}

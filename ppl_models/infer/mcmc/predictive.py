"""Posterior predictive draws, in bounded memory."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_models.core.batch import as_batch
from ppl_models.core.checks import check_count, check_known
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import Site, accepts_size, all_sites, describe_program, recorded
from ppl_models.core.store import own_parameters, scratch_store

MEMORY = 2**28  # bytes that the tensors made for one chunk may take


def predictive(
    posterior: Mapping[str, Tensor],
    model: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    sites: str | Sequence[str] | None = None,
    limit: int = 1000,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Draw what a model observes anew, given draws of its latents: see `Posterior.predictive`."""
    check_count("Posterior.predictive", "limit", limit)
    draws = thinned(posterior, limit)
    device = next(iter(draws.values())).device
    with own_parameters(model), scratch_store(), poutine.block(), seeded(seed), evaluating(model):
        batch = as_batch(tuple(arguments), model, device=device)
        with seeded(0), recorded(model) as record:
            model(*batch)
        found = [site for site, _ in all_sites(record.trace)]
        if _leaves_out(model, len(batch)):  # what is not given is what it would observe
            found = [
                replace(s, observed=True) if s.latent and s.name not in draws else s for s in found
            ]
        names = _wanted(model, found, sites)
        latents = _latents(model, found, draws)

        def once(values: dict[str, Tensor]) -> dict[str, Tensor]:
            # The inner handler forgets what is observed, then the outer one fixes the latents.
            fix, forget = poutine.condition(data=values), poutine.uncondition()
            with poutine.trace() as record, fix, forget:
                if batch and accepts_size(model):
                    model(size=len(batch[0]))
                else:
                    model(*batch)
            nodes: Any = record.trace.nodes
            return {name: nodes[name]["value"] for name in names}

        return _run(once, latents)


def thinned(posterior: Mapping[str, Tensor], limit: int) -> dict[str, Tensor]:
    """Line up the draws of all chains, shape (draws, *batch, *event), and thin them evenly."""
    chains, length = next(iter(posterior.values())).shape[:2]
    total = chains * length
    kept = torch.arange(min(limit, total)) * total // min(limit, total)
    return {
        name: value.detach()[(kept // length).to(value.device), (kept % length).to(value.device)]
        for name, value in posterior.items()
    }


def _wanted(
    model: Callable[..., Any], found: Sequence[Site], sites: str | Sequence[str] | None
) -> list[str]:
    known = [site.name for site in found if site.role in ("observed", "deterministic")]
    names = known if sites is None else [sites] if isinstance(sites, str) else list(sites)
    if not names:
        raise ValueError(
            f"Posterior.predictive: {describe_program(model)} has no observed or deterministic "
            f"site among {[site.name for site in found]}."
        )
    for name in names:
        check_known("observed or deterministic site", name, known)
    return names


def _leaves_out(model: Callable[..., Any], count: int) -> bool:
    """Whether a model was given less than it takes, as in `model(x)` for `model(x, y=None)`."""
    program = model if hasattr(model, "__signature__") else getattr(model, "forward", model)
    rest = list(inspect.signature(program).parameters.values())[count:]
    return any(p.default is None and p.name != "size" for p in rest)


def _latents(
    model: Callable[..., Any], found: Sequence[Site], draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check that the draws are of this model's latents, on these rows."""
    latents = {}
    for site in found:
        if not site.latent:
            continue
        if site.name not in draws:
            raise ValueError(
                f"Posterior.predictive: latent '{site.name}' of {describe_program(model)} has no "
                f"draws; there are draws of {list(draws)}."
            )
        want, got = tuple(site.value.shape), tuple(draws[site.name].shape[1:])
        if want != got:
            raise ValueError(
                f"Posterior.predictive: latent '{site.name}' has shape {want} on these arguments, "
                f"but its draws have {got}. Local latents are known for the rows they were "
                "sampled on only: pass those."
            )
        latents[site.name] = draws[site.name]
    return latents


def _run(
    once: Callable[[dict[str, Tensor]], dict[str, Tensor]], latents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Run a function of one draw on every draw, chunk by chunk."""
    total = len(next(iter(latents.values())))
    with Made() as made:
        first = once({name: value[0] for name, value in latents.items()})
    chunk = max(1, min(total, MEMORY // max(1, made.bytes)))
    results = {name: value.new_empty(total, *value.shape) for name, value in first.items()}
    together = chunk > 1
    for start in range(0, total, chunk):
        part = {name: value[start : start + chunk] for name, value in latents.items()}
        drawn = at_once(once, part) if together else None
        together = drawn is not None  # what `vmap` cannot do, the first chunk tells
        if drawn is not None:
            for name, value in drawn.items():
                results[name][start : start + chunk] = value
            continue
        for draw in range(start, min(start + chunk, total)):
            for name, value in once({key: value[draw] for key, value in latents.items()}).items():
                results[name][draw] = value
    return results


def at_once(
    once: Callable[[dict[str, Tensor]], dict[str, Tensor]], part: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Run a function of one draw on a chunk of them in one go, or return None where that fails."""
    # Checks of arguments look at values, which `vmap` hides; the first draw went through them.
    with suppress(Exception), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations that `vmap` itself loops over
        with _OwnNoise():
            return torch.vmap(once, randomness="different")(part)
    return None


class _OwnNoise(TorchFunctionMode):
    """Lets distributions fill a new tensor with noise under `vmap`: each draw gets its own.

    They write `torch.empty(shape).normal_()`, a tensor without the dimension that is mapped over,
    which `vmap` refuses to fill with different noise. They use what that returns, so it may be
    another tensor; elsewhere that is not known, and the model is run draw by draw.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and _in_distributions(sys._getframe(1)):
            blank = args[0]
            mapped = torch.rand(blank.shape, dtype=blank.dtype, device=blank.device)
            args = (mapped, *args[1:])
        return func(*args, **(kwargs or {}))


_FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_}


def _in_distributions(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module.startswith(("torch.distributions.", "pyro.distributions."))


class Made(TorchDispatchMode):
    """Adds up the size of all tensors made in a block: more than are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.bytes += sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves(made)
            if isinstance(leaf, Tensor)
        )
        return made

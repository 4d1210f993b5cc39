"""Where chains start: anywhere near 0 on the unconstrained space, or at draws of a guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_models.core.random import seeded, stream
from ppl_models.core.types import Batch
from ppl_models.infer.mcmc.density import Density
from ppl_models.infer.mcmc.hashing import streams, uniforms

TRIES = 100  # starts of a chain
FIRST_DRAWS = 100  # of a guide, for the first metric


def anywhere(density: Density, ids: Tensor, seed: int) -> Tensor:
    """Return uniform draws from (-2, 2), and units tossed, at which the density is finite, shape (D, C).

    Arguments:
        density: The target.
        ids: Numbers of the chains' streams, shape (C,).
        seed: Of them all.

    Raises:
        ValueError: If a chain finds no start.
    """
    start = streams(stream(seed, 0), ids)
    u = torch.zeros(density.dim, len(ids), dtype=density.dtype, device=ids.device)
    lost = torch.ones_like(ids, dtype=torch.bool)
    for attempt in range(TRIES):
        drawn = uniforms(start._replace(tick=start.tick + attempt), density.dim).to(u.dtype)
        fresh = torch.where(
            density.binary.unsqueeze(1), (drawn < 0.5).to(u.dtype), 4.0 * drawn - 2.0
        )
        u = torch.where(lost, fresh, u)
        lost = _is_lost(density, u)
        if not bool(lost.any()):
            return u
    value, gradient = density(u)
    raise ValueError(
        f"sample: {int(lost.sum())} of {len(ids)} chains found no start: after {TRIES} draws from "
        f"(-2, 2) on the unconstrained space the log density, now {value[lost][0].item():.4g}, or "
        f"its gradient, of largest element {gradient[:, lost].abs().max().item():.4g}, is still "
        "not finite. Look at the parts of the density with explain(model, *batch), or give a "
        "fitted guide as init=."
    )


def at_guide(
    density: Density, guide: Callable[..., Any], batch: Batch, chains: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return draws of a guide, one for each chain, and more of them for a first metric.

    Arguments:
        density: The target.
        guide: Samples its latents.
        batch: What the guide is called with.
        chains: How many chains.
        seed: Of the draws; each is a function of it and of its number.

    Returns:
        Starts (D, C) with the columns of the density, and draws (targets, n, D).

    Raises:
        ValueError: If the guide leaves a latent out, or draws one where the density is not finite.
    """
    drawn: list[dict[str, Tensor]] = []
    for number in range(max(chains, FIRST_DRAWS)):
        with seeded(stream(seed, 0, number)), torch.no_grad():
            trace = _traced(guide, batch)
        latents: Any = trace.iter_stochastic_nodes()
        drawn.append({name: node["value"].detach() for name, node in latents})
    names = [name for name in drawn[0] if all(name in values for values in drawn)]
    stacked = {name: torch.stack([values[name] for values in drawn]) for name in names}
    try:
        u = density.unconstrain(stacked)
        if u.numel() != len(drawn) * density.targets * density.dim:
            shapes = {name: tuple(value.shape[1:]) for name, value in stacked.items()}
            raise ValueError(f"its draws have shapes {shapes}, which are not the model's.")
    except ValueError as error:
        raise ValueError(
            f"sample: the guide given as init does not fit the model: {error}"
        ) from error
    u = u.reshape(len(drawn), density.targets, density.dim)
    start = u[:chains].permute(2, 0, 1).flatten(1).contiguous()
    if bool(_is_lost(density, start).any()):
        raise ValueError(
            "sample: the guide given as init draws latents at which the log density is not finite; "
            "fit it first, or leave init out."
        )
    return start, u.transpose(0, 1)


def _traced(guide: Callable[..., Any], batch: Batch) -> Any:
    try:
        return poutine.trace(guide).get_trace(*batch)
    except TypeError as error:
        raise ValueError(
            f"sample: the guide given as init must take the arguments of the model, {len(batch)} "
            f"here, but said: {error}"
        ) from error


def _is_lost(density: Density, u: Tensor) -> Tensor:
    value, gradient = density(u)
    return ~(torch.isfinite(value) & torch.isfinite(gradient).all(0))

"""From data to latents, from latents to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_models.core.batch import as_batch, check_model
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded, stream
from ppl_models.core.sites import SiteTable, accepts_size, describe_program, stochastic_nodes
from ppl_models.core.store import own_parameters
from ppl_models.core.traces import run_pair
from ppl_models.core.types import Distribution

ACTIVE = 0.01  # a unit is active if its posterior mean varies more than this over rows


def encode(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    draws: int = 100,
    seed: int | None = None,
    plate: str = "data",
) -> dict[str, Tensor]:
    """Return the guide's posterior mean of each local latent.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        batch: The data.
        draws: Draws that are averaged; one where the mean of the only latent has a closed form.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Returns:
        For each local latent its mean, shape (*plates, *event); probabilities for a categorical.

    Raises:
        ValueError: If the model has no local latent, or the data are not what it describes.
    """
    check_count("encode", "draws", draws)
    totals: dict[str, Tensor] = {}
    with own_parameters(model, guide), seeded(seed), evaluating(model, guide):
        arguments = as_batch(batch, model, guide)
        names = _local_latents("encode", model, guide, arguments, plate)
        for _ in range(draws):
            trace = poutine.trace(guide).get_trace(*arguments)
            exact = len(list(stochastic_nodes(trace))) == 1
            for name in names:
                node: Any = trace.nodes[name]
                mean = mean_of(node["fn"])
                exact = exact and mean is not None
                value = node["value"].to(torch.get_default_dtype()) if mean is None else mean
                totals[name] = totals.get(name, 0.0) + value
            if exact:
                return totals
        return {name: total / draws for name, total in totals.items()}


def reconstruct(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    draws: int = 20,
    seed: int | None = None,
    plate: str = "data",
) -> dict[str, Tensor]:
    """Return what the model expects in place of each observed value, given the guide's latents.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        batch: The data.
        draws: Draws of the latents that are averaged.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Returns:
        For each observed site its mean, in the shape of the data; probabilities for a categorical.

    Raises:
        ValueError: If the model has no local latent, or the data are not what it describes.
    """
    check_count("reconstruct", "draws", draws)
    totals: dict[str, Tensor] = {}
    with own_parameters(model, guide), seeded(seed), evaluating(model, guide):
        arguments = as_batch(batch, model, guide)
        _local_latents("reconstruct", model, guide, arguments, plate)
        for _ in range(draws):
            pair = run_pair(model, guide, *arguments)
            for name, node in stochastic_nodes(pair.model):
                if node["is_observed"] and (mean := mean_of(node["fn"])) is not None:
                    totals[name] = totals.get(name, 0.0) + mean
    return {name: total / draws for name, total in totals.items()}


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    seed: int | None = None,
    plate: str = "data",
) -> tuple[int, int]:
    r"""Count latent units with :math:`\mathrm{var}_x(\mathbb{E}_q[z \mid x]) > 0.01`, and all.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        batch: The data.
        seed: As in `encode`.
        plate: Name of the plate over rows.

    Source:
        Burda, Grosse & Salakhutdinov (2016), section 5.2. https://arxiv.org/abs/1509.00519
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    halves = [
        encode(model, guide, *batch, draws=50, seed=stream(seed, half), plate=plate)
        for half in (0, 1)
    ]
    table = check_model(model, as_batch(batch, model), plate=plate, rows=len(batch[0]))
    units = []
    for name in halves[0]:
        # The covariance of two estimates of the mean: their noise is independent and drops out.
        one, other = (by_row(table, name, half[name]) for half in halves)
        spread = (one - one.mean(0)) * (other - other.mean(0))
        units.append(spread.sum(0) / max(1, len(one) - 1))
    found = torch.cat(units)
    return int((found > ACTIVE).sum()), len(found)


def by_row(table: SiteTable, name: str, value: Tensor) -> Tensor:
    """Lay out values of a site row by row: (*plates, *event) to (N, units)."""
    rows = row_axis(table, name, value)
    return value.movedim(rows, 0).reshape(value.shape[rows], -1)


def row_axis(table: SiteTable, name: str, value: Tensor) -> int:
    """Return the dimension, from the right, along which the values of a site have their rows."""
    return (table[name].data_dim or 0) - _events(table, name, value)


def _events(table: SiteTable, name: str, value: Tensor) -> int:
    return value.ndim - len(table[name].batch_shape)


def generate(model: Callable[..., Any], size: int, *, seed: int | None = None) -> Any:
    """Draw new rows from a generative model: `model(size=size)`, without gradients.

    Arguments:
        model: A Pyro model that takes `size`.
        size: Rows to draw.
        seed: An integer isolates and reproduces; None draws from the global random stream.

    Raises:
        ValueError: If the model takes no `size`, or `size` is not positive.
    """
    if not accepts_size(model):
        raise ValueError(
            f"generate: {describe_program(model)} takes no `size=`, so it cannot draw rows by "
            "itself. Give it the argument, or call it on covariates."
        )
    check_count("generate", "size", size)
    with own_parameters(model), seeded(seed), evaluating(model):
        return model(size=size)


def _local_latents(
    caller: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Tensor, ...],
    plate: str,
) -> list[str]:
    table = check_model(model, batch, plate=plate, rows=len(batch[0]) if batch else 1)
    names = [site.name for site in table.locals]
    if not names:
        raise ValueError(
            f"{caller} needs a latent for each row, but {describe_program(model)} has none inside "
            f"plate '{plate}'; its latents are {[site.name for site in table.latents]}."
        )
    with seeded(0):
        run_pair(model, guide, *batch)  # says what the guide misses, before anything is drawn
    return names


def mean_of(fn: Distribution) -> Tensor | None:
    """Return the mean of a distribution, or its probabilities, or None if neither is known."""
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return None
    if torch.isnan(mean).any():
        return getattr(fn, "probs", None)
    return mean

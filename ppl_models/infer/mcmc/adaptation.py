"""Warm-up: windows, step sizes and metrics.

A *group* of chains shares what is learnt: each chain is one of its own where there are few, so that
it does not depend on the others, and all chains of a target are one where there are many. Step
sizes are adapted by each chain, which sees the answer to its own step at once, and averaged over
its group at the end of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_models.infer.mcmc.hashing import Stream, normals

if TYPE_CHECKING:
    from ppl_models.infer.mcmc.engine import Draws, Engine, Watch
    from ppl_models.infer.mcmc.gibbs import Gibbs

POOLED = 16  # chains of a target, from which on they are one group
ROUNDS = 5  # of the last window, after which a shared step is moved
LOST = 0.003  # share of transitions that diverge, above which a shared step is made shorter
SHORTER = 0.15  # by at least as much, of the log step, in each of the last rounds
FAR = 20.0  # nats of mass that a chain may lack, before it starts again
OUTLIER = 5.0  # robust standard deviations, beyond which a draw of a group is moved in


@dataclass(frozen=True)
class Window:
    """A part of warm-up.

    Attributes:
        transitions: How many each chain makes.
        learns: Whether the metric is learnt from their draws.
        depth: Doublings allowed, if less than otherwise.
    """

    transitions: int
    learns: bool
    depth: int | None = None


def windows(warmup: int) -> list[Window]:
    """Divide warm-up as Stan does: a start, windows of doubling length for the metric, an end.

    Example:
        >>> [window.transitions for window in windows(1000)]
        [75, 25, 50, 100, 200, 500, 50]
        >>> [window.transitions for window in windows(100)]
        [15, 75, 10]
    """
    if warmup < 20:
        return [Window(warmup, learns=False, depth=8)] if warmup else []
    start, end, width = 75, 50, 25
    if start + end + width > warmup:
        start, end = int(0.15 * warmup), int(0.1 * warmup)
        width = warmup - start - end
    middle = [width]
    while sum(middle) + 3 * middle[-1] * 2 <= warmup - start - end:
        middle.append(2 * middle[-1])
    rest = warmup - start - end - sum(middle)
    if rest >= 2 * middle[-1]:
        middle.append(rest)
    else:
        middle[-1] += rest
    found = [Window(start, learns=False, depth=8)]
    return [*found, *(Window(n, learns=True) for n in middle), Window(end, learns=False)]


def warm_up(
    engine: Engine | Gibbs,
    groups: Tensor,
    parts: list[Window],
    watch: Watch,
    after: Callable[[int, Draws], None] = lambda made, draws: None,
) -> bool:
    """Let chains find the bulk of their targets, and learn their step sizes and metric.

    Arguments:
        engine: The chains.
        groups: Of each chain, shape (C,).
        parts: Windows of warm-up.
        watch: Told how many transitions all chains have made; False ends it.
        after: Given that number and the transitions of each window after the first metric.

    Returns:
        Whether it came to its end.
    """
    made, known = 0, False
    shares = len(groups) > int(groups.max()) + 1
    engine.find_step()

    def run(transitions: int, *, adapts: bool, depth: int | None = None) -> Draws | None:
        nonlocal made
        before = made
        draws = engine.run(
            transitions, adapts=adapts, depth=depth, watch=lambda now: watch(before + now)
        )
        made += len(draws)
        return draws if len(draws) == transitions else None

    for number, window in enumerate(parts):
        if shares and number == len(parts) - 1 and window.transitions >= 2 * ROUNDS:
            # One step for all of a group, moved by what all of them answer.
            for turn in range(ROUNDS):
                first, last = (window.transitions * (turn + k) // ROUNDS for k in (0, 1))
                draws = run(last - first, adapts=False)
                if draws is None:
                    return False
                error = pooled(draws.accept.mean(1), groups) - engine.tuning.target
                change = (2.0 / (1 + turn) * error).clamp(-1.0, 1.0)
                # What diverges is where steps are too long, however many are accepted elsewhere.
                lost = pooled(draws.divergent.to(error.dtype).mean(1), groups)
                change = torch.where(lost > LOST, change.clamp(max=-SHORTER), change)
                engine.tuning.step.mul_(torch.exp(change))
                after(made, draws)
            continue
        draws = run(window.transitions, adapts=True, depth=window.depth)
        if draws is None:
            return False
        if known:
            after(made, draws)
        source = None
        if shares and number < len(parts) - 1:
            source = engine.rescue(draws, int(groups.max()) + 1)
        if window.learns:
            known = True
            seen = draws.u if source is None else draws.u[source]
            engine.learn(grouped(seen, groups), groups)
            engine.find_step()
        if shares:
            engine.tuning.step.copy_(torch.exp(pooled(torch.log(engine.tuning.step), groups)))
    return True


def companions(draws: Draws, groups: int) -> Tensor:
    """Return, for each chain, the chain from whose place it is to go on: its own, but for a few.

    A chain may come to rest where next to none of the mass is, as at a spurious mode, and would
    stay. What it is in reach of has a mass of about the density times the volume that it covers.
    Where that is less than e^-20 of what the others of its group have, and far beyond their spread,
    the chain goes on from where another one is.

    Arguments:
        draws: What chains did lately.
        groups: How many there are; chain c is of group c modulo that.

    Returns:
        Shape (C,), int64.
    """
    late = len(draws) // 2
    u, energy = draws.u[:, late:], draws.energy[:, late:]
    mass = torch.log(u.std(1).clamp(min=1e-300)).sum(1) - energy.mean(1)
    mass = mass.nan_to_num(nan=-torch.inf).unflatten(0, (-1, groups))  # (members, groups)
    centre = mass.median(0).values
    spread = (mass - centre).abs().median(0).values.nan_to_num(nan=0.0, posinf=0.0)
    astray = mass < centre - torch.clamp(10.0 * spread, min=FAR)
    astray &= astray.double().mean(0) <= 0.4  # half of all are on their way, not astray
    members = torch.arange(len(mass), device=mass.device).unsqueeze(1).expand_as(mass)
    # Those that are well, in order, and then the others: the k-th of these follows the k-th of those.
    order = torch.argsort(astray.to(torch.int64), dim=0, stable=True)
    rank = (astray.to(torch.int64).cumsum(0) - 1).clamp(min=0)
    source = torch.where(astray, order.gather(0, rank), members)
    return (source * groups + torch.arange(groups, device=mass.device)).flatten()


def groups_of(chains: int, targets: int, device: torch.device) -> Tensor:
    """Return the group of each column, shape (chains * targets,), int64."""
    if chains < POOLED:
        return torch.arange(chains * targets, device=device)
    return torch.arange(targets, device=device).repeat(chains)


def pooled(values: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of each group, at each of its members; over the last dimension."""
    size = int(groups.max()) + 1
    shape = (*values.shape[:-1], size)
    total = values.new_zeros(shape).index_add_(-1, groups, values)
    return (total / torch.bincount(groups, minlength=size)).index_select(-1, groups)


def grouped(draws: Tensor, groups: Tensor) -> Tensor:
    """Put the draws of a group together: from (C, n, D) to (groups, members * n, D)."""
    size = int(groups.max()) + 1
    # Groups have as many members each, one of each block of columns.
    return draws.unflatten(0, (-1, size)).transpose(0, 1).flatten(1, 2)


def scales(draws: Tensor) -> Tensor:
    """Return the scale of each coordinate in each group, shape (D, groups).

    Draws far out are moved in first: one chain that has not arrived must not set the scale of all.

    Arguments:
        draws: Shape (groups, n, D).
    """
    near = _moved_in(draws)
    weight = draws.shape[1] / (draws.shape[1] + 5.0)
    return torch.sqrt(weight * near.var(1) + (1.0 - weight) * 1e-3).T


def factors(draws: Tensor) -> Tensor:
    """Return a Cholesky factor of the covariance in each group, shape (D, D, groups).

    Arguments:
        draws: As in `scales`.
    """
    near = _moved_in(draws)
    total, dim = draws.shape[1:]
    centred = near - near.mean(1, keepdim=True)
    weight = total / (total + 5.0)
    covariance = weight * (centred.mT @ centred) / (total - 1)
    eye = torch.eye(dim, dtype=draws.dtype, device=draws.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + 1e-3 * (1.0 - weight) * eye)
    alone = torch.diag_embed(scales(draws).T)
    return torch.where((failed > 0)[:, None, None], alone, factor).permute(1, 2, 0)


def _moved_in(draws: Tensor) -> Tensor:
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=draws.dtype, device=draws.device)
    few = draws[:, :: -(-draws.numel() // 10_000_000)]  # quantile takes no more
    low, middle, high = few.quantile(quartiles, dim=1, keepdim=True)
    reach = OUTLIER * (high - low) / 1.349
    return torch.where(reach > 0.0, draws.clamp(middle - reach, middle + reach), draws)


def find_step(
    gain: Callable[[Tensor, Tensor], Tensor], stream: Stream, step: Tensor, dim: int, target: float
) -> Tensor:
    """Double or halve step sizes until one leapfrog step is accepted about as often as aimed at.

    Arguments:
        gain: Log of the probability to accept a step: of momenta (D, C) and step sizes (C,).
        stream: Of each chain.
        step: Where to begin, shape (C,).
        dim: Coordinates.
        target: The probability aimed at.
    """

    def direction(attempt: int) -> Tensor:
        momentum = normals(stream._replace(tick=stream.tick + attempt), dim).to(step.dtype)
        return torch.where(gain(momentum, step) > math.log(target), 1.0, -1.0).to(step.dtype)

    first = direction(0)
    searches = torch.ones_like(first, dtype=torch.bool)
    for attempt in range(1, 50):
        step = torch.where(searches, step * 2.0**first, step)
        searches = searches & (direction(attempt) == first)
        if not bool(searches.any()):
            break
    return step

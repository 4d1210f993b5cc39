"""The no-U-turn sampler, one leapfrog of every chain at a time.

A *tick* moves each chain by one leapfrog step of its trajectory. Where that completes a subtree,
the subtree is merged; where it completes the trajectory, a draw is written and the next trajectory
begins. So no chain waits for the trajectory of another one, and nothing is decided in Python.

Positions are whitened: unit scale under the metric, whose only place is the density. Chains are
last in memory: arrays are (D, C), or (K, D, C) with one slot for each level of a tree. Counts are
floats: where compiled code compares an integer beside them, it does so element by element.

Sources:
    Hoffman & Gelman (2014). https://jmlr.org/papers/v15/hoffman14a.html
    Betancourt (2017), appendix A: multinomial sampling, the generalised U-turn.
    https://arxiv.org/abs/1701.02434
    Phan, Pradhan & Jankowiak (2019): the tree without recursion. https://arxiv.org/abs/1912.11554
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_models.infer.mcmc.hashing import Stream, normals, uniforms

DIVERGENCE = 1000.0  # loss of energy, in nats, at which a trajectory is given up

LogDensity = Callable[[Tensor], tuple[Tensor, Tensor]]  # (D, C) to (C,) and (D, C)


class Trajectory(NamedTuple):
    """What the chains are doing: a tree of leaves, to which a subtree is being added.

    The moving end is where the next leaf is added; the far end is where the tree began to grow.
    Energies and weights are in nats.
    """

    q: Tensor  # moving end: position (D, C),
    r: Tensor  # momentum,
    g: Tensor  # gradient of the log density
    far_q: Tensor
    far_r: Tensor
    far_g: Tensor
    tree_q: Tensor  # the proposal of the tree, at the start of a transition the last draw
    tree_g: Tensor
    tree_u: Tensor  # its log density (C,)
    sub_q: Tensor  # the proposal of the subtree
    sub_g: Tensor
    sub_u: Tensor
    tree_rho: Tensor  # sum of the momenta of the tree (D, C)
    sub_rho: Tensor  # and of the subtree
    first_r: Tensor  # momentum of the first leaf of the subtree
    inner_r: Tensor  # and of the leaf of the tree next to it
    tree_weight: Tensor  # log of the summed weights (C,)
    sub_weight: Tensor
    energy: Tensor  # at the start (C,)
    accept: Tensor  # summed acceptance probabilities of the leaves (C,)
    leaves: Tensor  # how many (C,)
    direction: Tensor  # 1.0 where the moving end moves forward in time, else -1.0 (C,)
    depth: Tensor  # doublings done (C,)
    size: Tensor  # leaves of the tree, and of the subtree once it is complete (C,)
    leaf: Tensor  # number of the next leaf in the subtree (C,)
    even_r: Tensor  # at the last even leaf of each level: its momentum (K + 1, D, C),
    even_rho: Tensor  # the sum of the momenta before it,
    even_dot: Tensor  # its momentum times the sum from it on (K, C)
    odd_r: Tensor  # the same at the odd leaf before it
    odd_rho: Tensor
    odd_dot: Tensor


class Record(NamedTuple):
    """What is written at the end of each transition; the last slot takes what nobody asked for."""

    q: Tensor  # (N + 1, D, C)
    energy: Tensor  # (N + 1, C)
    accept: Tensor  # mean acceptance probability of the leaves
    leaves: Tensor
    depth: Tensor
    divergent: Tensor  # 1.0 where it is, else 0.0


def begin(q: Tensor, log_density: LogDensity, stream: Stream, depth_limit: int) -> Trajectory:
    """Return chains about to start a transition from whitened positions q, shape (D, C)."""
    dim, chains = q.shape
    u, g = log_density(q)
    r = normals(stream, dim).to(q.dtype)
    zero = torch.zeros_like(u)
    levels = q.new_zeros(depth_limit + 1, dim, chains)
    dots = q.new_zeros(depth_limit, chains)
    energy = 0.5 * (r * r).sum(0) - u
    direction = _heads(uniforms(stream, 1)[0].to(q.dtype))
    made = Trajectory(
        *(q, r, g, q, r, g, q, g, u, q, g, u),
        *(r, r, r, r, zero, zero, energy, zero, zero, direction, zero, zero + 1.0, zero),
        *(levels, levels, dots, levels, levels, dots),
    )
    return Trajectory(*(value.clone() for value in made))


class Tuning(NamedTuple):
    """The step size of each chain, and its dual averaging; shapes (C,), or () where noted."""

    step: Tensor  # step size, of whitened positions
    centre: Tensor  # log step size that it is drawn to
    average: Tensor  # weighted mean of the log step sizes
    error: Tensor  # weighted mean of target less acceptance
    updates: Tensor  # how many
    slot: Tensor  # draws written
    goal: Tensor  # draws asked for ()
    target: Tensor  # acceptance aimed at ()
    adapts: Tensor  # 1.0 where the step size is adapted, else 0.0 ()
    depth: Tensor  # doublings allowed ()


def tick(
    state: Trajectory, stream: Stream, record: Record, tuning: Tuning, log_density: LogDensity
) -> tuple[Trajectory, Stream, Record, Tuning]:
    """Take one leapfrog step in each chain; marks of levels and the record are changed in place.

    Arguments:
        state: What the chains are doing.
        stream: Their random streams.
        record: What has been written.
        tuning: Step sizes, and what is asked for.
        log_density: The target, of whitened positions.

    Returns:
        All of it afterwards.
    """
    s = state
    dim = len(s.q)
    luck = uniforms(stream, 3).to(s.q.dtype)

    step = s.direction * tuning.step
    r = s.r + 0.5 * step * s.g
    q = s.q + step * r
    u, g = log_density(q)
    r = r + 0.5 * step * g

    # The leaf: its weight, and whether it is the proposal of its subtree.
    gain = s.energy + u - 0.5 * (r * r).sum(0)
    diverges = ~(gain > -DIVERGENCE) | (gain == torch.inf)  # a gain that is no number diverges
    gain = torch.where(diverges, -DIVERGENCE, gain)
    is_first = s.leaf == 0.0
    sub_weight = torch.where(is_first, gain, torch.logaddexp(s.sub_weight, gain))
    takes = luck[0] < torch.exp(gain - sub_weight)
    sub_q, sub_g, sub_u = (
        torch.where(takes, new, old) for new, old in ((q, s.sub_q), (g, s.sub_g), (u, s.sub_u))
    )
    sub_rho = torch.where(is_first, r, s.sub_rho + r)
    first_r = torch.where(is_first, r, s.first_r)
    inner_r = torch.where(is_first, s.r, s.inner_r)
    accept = s.accept + torch.exp(torch.clamp(gain, max=0.0))
    leaves = s.leaves + 1.0

    turns, marks = _turns_within(s, r, sub_rho)

    # The subtree, once it is complete: whether the tree that it would make is one.
    is_complete = s.leaf + 1.0 == s.size
    fails = diverges | turns
    merges = is_complete & ~fails
    tree_rho = s.tree_rho + sub_rho
    near, far = s.tree_rho + first_r, inner_r + sub_rho
    turns = _turns(s.far_r, r, tree_rho) | _turns(s.far_r, first_r, near) | _turns(inner_r, r, far)
    swaps = merges & (luck[1] < torch.exp(sub_weight - s.tree_weight))  # biased to the new half
    tree_q, tree_g, tree_u = (
        torch.where(swaps, new, old)
        for new, old in ((sub_q, s.tree_q), (sub_g, s.tree_g), (sub_u, s.tree_u))
    )
    tree_weight = torch.logaddexp(s.tree_weight, sub_weight)
    depth = torch.where(is_complete, s.depth + 1.0, s.depth)
    ends = fails | (merges & (turns | (depth >= tuning.depth)))

    # The next leaf: of the same subtree, of another one at either end, or of another tree.
    tossed = _heads(luck[2])
    direction = torch.where(is_complete | ends, tossed, s.direction)
    flips = is_complete & (direction != s.direction)
    fresh = normals(stream, dim, first=3).to(q.dtype)
    zero = torch.zeros_like(u)

    def moved(here: Tensor, there: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.where(ends, new, torch.where(flips, there, here))
        return at, torch.where(ends, new, torch.where(flips, here, there))

    def rest(tree: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return torch.where(ends, new, torch.where(merges, tree, old))

    (q, far_q), (r, far_r), (g, far_g) = (
        moved(q, s.far_q, tree_q),
        moved(r, s.far_r, fresh),
        moved(g, s.far_g, tree_g),
    )
    after = Trajectory(
        *(q, r, g, far_q, far_r, far_g, tree_q, tree_g, tree_u, sub_q, sub_g, sub_u),
        tree_rho=rest(tree_rho, s.tree_rho, fresh),
        sub_rho=sub_rho,
        first_r=first_r,
        inner_r=inner_r,
        tree_weight=rest(tree_weight, s.tree_weight, zero),
        sub_weight=sub_weight,
        energy=torch.where(ends, 0.5 * (fresh * fresh).sum(0) - tree_u, s.energy),
        accept=torch.where(ends, zero, accept),
        leaves=torch.where(ends, zero, leaves),
        direction=direction,
        depth=torch.where(ends, zero, depth),
        size=torch.where(ends, 1.0, torch.where(is_complete, 2.0 * s.size, s.size)),
        leaf=torch.where(ends | is_complete, zero, s.leaf + 1.0),
        **marks,
    )
    is_asked = ends & (tuning.slot < tuning.goal)
    rate = accept / leaves
    written = Record(tree_q, s.energy, rate, leaves, depth, diverges.to(u.dtype))
    slot = torch.where(is_asked, tuning.slot, len(record.q) - 1.0).to(torch.int64)
    return (
        after,
        stream._replace(tick=stream.tick + 1),
        Record(*(put(old, slot, new) for old, new in zip(record, written, strict=True))),
        _tuned(tuning, rate, is_asked),
    )


def _heads(luck: Tensor) -> Tensor:
    """Return directions in time, by uniform numbers."""
    return torch.where(luck < 0.5, 1.0, -1.0).to(luck.dtype)


def _turns(start: Tensor, end: Tensor, rho: Tensor) -> Tensor:
    """Whether a trajectory has turned: its momenta at either end against their sum."""
    return ((start * rho).sum(0) <= 0.0) | ((end * rho).sum(0) <= 0.0)


def _turns_within(s: Trajectory, r: Tensor, sub_rho: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether a subtree within the new one turned, as told by its last leaf; and new marks.

    The subtrees that leaf n completes begin at even leaves. Each of these has left a mark at the
    level that is the number of ones in n // 2: a marked momentum m and the sum M of the momenta
    before it. With `dot` the sum of m . r over all leaves since, the trajectory from the mark to
    here has turned if dot <= 0 or r . (rho - M) <= 0. Beside the mark of the even leaf there is one
    of the odd leaf before it, the last of the half that it ended.
    """
    bits = torch.arange(len(s.even_dot), device=r.device).unsqueeze(1)
    levels, leaf = bits.to(r.dtype), s.leaf.to(torch.int64)
    is_odd = (leaf & 1).to(r.dtype) > 0.0
    level = ((leaf >> (bits + 1)) & 1).sum(0).to(r.dtype)
    carried = leaf ^ (leaf + 1)  # ones: as many as ended subtrees, and one more
    ended = ((carried >> bits) & 1).sum(0).to(r.dtype) - 1.0
    even_dot = s.even_dot + (s.even_r[:-1] * r).sum(1)
    odd_dot = s.odd_dot + (s.odd_r[:-1] * r).sum(1)
    whole = (r * sub_rho).sum(0)
    even_turns = (even_dot <= 0.0) | (whole - (s.even_rho[:-1] * r).sum(1) <= 0.0)
    odd_turns = (odd_dot <= 0.0) | (whole - (s.odd_rho[:-1] * r).sum(1) <= 0.0)
    # Subtrees that end here; and, where the second half of one begins, its first half and the leaf.
    ending = is_odd & (levels <= level) & (levels > level - ended)
    beginning = ~is_odd & (levels == level - 1.0)
    # The second half of one that ends here, and the leaf before it.
    across = ending & (levels > level - ended + 1.0)
    turns = ((ending | beginning) & even_turns) | (across & odd_turns)
    slot = torch.where(is_odd, float(len(bits)), level)
    place = slot.to(torch.int64)
    marks = {
        "even_r": put(s.even_r, place, r),
        "even_rho": put(s.even_rho, place, sub_rho - r),
        "even_dot": torch.where(levels == slot, (r * r).sum(0), even_dot),
        "odd_r": put(s.odd_r, place, s.r),
        "odd_rho": put(s.odd_rho, place, sub_rho - r - s.r),
        "odd_dot": torch.where(levels == slot, (s.r * (s.r + r)).sum(0), odd_dot),
    }
    return turns.to(r.dtype).amax(0) > 0.0, marks


def put(slots: Tensor, slot: Tensor, value: Tensor) -> Tensor:
    """Put a value (..., C), in place, into one slot of each chain of slots (K, ..., C)."""
    chains = torch.arange(value.shape[-1], device=value.device)
    if value.ndim == 1:
        return slots.index_put_((slot, chains), value)
    rows = torch.arange(len(value), device=value.device).unsqueeze(1)
    return slots.index_put_((slot, rows, chains), value)


def _tuned(tuning: Tuning, rate: Tensor, ends: Tensor) -> Tuning:
    """Move step sizes by dual averaging, where a transition ends that is asked for."""
    t = tuning
    moves = ends & (t.adapts > 0.0)
    updates = t.updates + moves
    error = t.error + (t.target - rate - t.error) / (updates + 10.0)
    step = t.centre - error * torch.sqrt(updates) / 0.05
    average = t.average + (step - t.average) * torch.pow(updates.clamp(min=1.0), -0.75)
    return t._replace(
        step=torch.where(moves, torch.exp(step), t.step),
        average=torch.where(moves, average, t.average),
        error=torch.where(moves, error, t.error),
        updates=updates,
        slot=t.slot + ends,
    )

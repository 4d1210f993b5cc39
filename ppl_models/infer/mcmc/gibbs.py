"""Gibbs with gradients: binary latents, one flip at a time; NUTS moves the continuous ones.

Which unit is flipped is drawn from all of them, by what the gradient says each flip would gain, or in
a quarter of cases by luck alone; the flip is accepted as Metropolis and Hastings say, so that the draws are those of the posterior however
good that guess is. Where a model has continuous latents too, each draw ends with a transition of
NUTS, given the binary ones.

Source:
    Grathwohl, Swersky, Hashemi, Duvenaud & Maddison (2021). https://arxiv.org/abs/2102.04509
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_models.core.random import stream as substream
from ppl_models.infer.mcmc.density import Density
from ppl_models.infer.mcmc.engine import NARROW, NUMBERS, PART, Draws, Engine, Watch, recorded
from ppl_models.infer.mcmc.hashing import Stream, streams, uniforms
from ppl_models.infer.mcmc.loop import Loop
from ppl_models.infer.mcmc.nuts import LogDensity, put
from ppl_models.infer.mcmc.samplers import GibbsWithGradients

BLIND = 0.25  # share of flips that are proposed without a look at the gradient


class State(NamedTuple):
    """Where the chains are."""

    w: Tensor  # unconstrained numbers, and units, (D, C)
    u: Tensor  # log density (C,)
    g: Tensor  # gradient of it (D, C)
    flips: Tensor  # proposed since the last draw (C,)
    taken: Tensor  # acceptance probabilities since then, summed (C,)


class Written(NamedTuple):
    """What is written at the end of each draw; the last slot takes what nobody asked for."""

    w: Tensor  # (N + 1, D, C)
    accept: Tensor  # (N + 1, C)


def flip(
    state: State, stream: Stream, log_density: LogDensity, binary: Tensor
) -> tuple[State, Stream]:
    """Propose one flip in each chain.

    Arguments:
        state: Where the chains are.
        stream: Their random streams.
        log_density: The target; units are zeros and ones.
        binary: Which coordinates are units, shape (D, 1).

    Returns:
        Both afterwards.
    """
    s = state
    dim = len(s.w)
    luck = uniforms(stream, dim + 1).to(s.w.dtype)

    def choices(w: Tensor, g: Tensor) -> Tensor:
        """Log probabilities of the flips, by half of what each would gain; some of them by luck.

        A gradient that promises what no flip holds, or is none, would else propose it for ever.
        """
        gain = torch.nan_to_num((1.0 - 2.0 * w) * g)
        half = torch.where(binary, 0.5 * gain, -torch.inf)
        half = half - half.amax(0)  # first: beside a huge one the logarithm of a sum is lost
        told = math.log1p(-BLIND) + half - torch.logsumexp(half, 0)
        blind = torch.where(binary, BLIND / binary.sum(), 0.0).log()
        return torch.logaddexp(told, blind.to(told))

    there = choices(s.w, s.g)
    score = there - torch.log(-torch.log(luck[:dim]))
    is_chosen = score == score.amax(0)  # the Gumbel trick: a draw of one unit
    w = torch.where(is_chosen, 1.0 - s.w, s.w)
    u, g = log_density(w)
    back = choices(w, g)
    ratio = u - s.u + torch.where(is_chosen, back - there, 0.0).sum(0)
    ratio = torch.where(ratio.isnan(), -torch.inf, ratio)  # no density there: it stays
    takes = luck[dim] < torch.exp(ratio)
    after = State(
        torch.where(takes, w, s.w),
        torch.where(takes, u, s.u),
        torch.where(takes, g, s.g),
        s.flips + 1.0,
        s.taken + torch.exp(torch.clamp(ratio, max=0.0)),
    )
    return after, stream._replace(tick=stream.tick + 1)


class Gibbs:
    """Chains on binary and continuous latents; it is called as `Engine` is.

    Arguments:
        density: The target, whose `binary` says which coordinates are units.
        positions: Where the chains start, shape (D, C), units at 0 or 1.
        sampler: What is asked for.
        seed: Of all random streams.
        ids: Numbers of the streams of the chains, shape (C,).
        slots: Transitions that will be asked for at once, at most.

    Attributes:
        inner: What moves the continuous latents; None where there are none.
        flips: Proposed for each draw.
        restarted: 0: chains stay where they are.
    """

    restarted = 0

    def __init__(
        self,
        density: Density,
        positions: Tensor,
        *,
        sampler: GibbsWithGradients,
        seed: int,
        ids: Tensor,
        slots: int,
    ) -> None:
        dim, chains = positions.shape
        self._seed, self._ids, self._runs = seed, ids, 0
        self._binary = density.binary.unsqueeze(1)
        self._units = density.binary.nonzero().squeeze(1)
        self._rest = (~density.binary).nonzero().squeeze(1)
        self.flips = sampler.flips or len(self._units)
        self._density = recorded(density, positions)
        zero = positions.new_zeros(chains)
        u, g = self._density(positions)
        self._state = State(positions.clone(), u.clone(), g.clone(), zero, zero.clone())
        many = PART if not len(self._rest) else 1
        self._slots = min(1 << max(0, (slots - 1).bit_length()), many)
        self._slots = max(1, min(self._slots, NUMBERS // (chains * (dim + 1))))
        self._written = Written(
            positions.new_zeros(self._slots + 1, dim, chains),
            positions.new_zeros(self._slots + 1, chains),
        )
        self._stream = streams(0, ids)
        self._slot, self._goal = zero.clone(), positions.new_zeros(())
        counts = positions.new_tensor(float(self.flips))
        self._live = (
            *self._state, *self._stream, *self._written, self._slot, self._goal, counts,
        )  # fmt: skip
        self._loop = Loop(self._tick, self._live)
        self.inner: Engine | None = None
        if len(self._rest):
            self._held = positions.clone()  # what the continuous latents are given
            self.inner = Engine(
                self._given,
                positions[self._rest],
                seed=substream(seed, 0, 2),
                ids=ids,
                depth=sampler.nuts.max_depth,
                target=sampler.nuts.target_accept,
                slots=1,
                dense=sampler.nuts.dense,
                steady=False,
            )

    @property
    def tuning(self) -> Any:
        """Step sizes of the continuous latents."""
        assert self.inner is not None
        return self.inner.tuning

    @property
    def rung(self) -> str:
        """Which rung of the ladder flips run on and, if not the first, why."""
        return self._loop.rung

    def compile(self, wait: Callable[[], bool]) -> None:
        """Go on in compiled loops, where ticks can be compiled."""
        self._loop.compile(wait, narrow=len(self._ids) <= NARROW)
        if self.inner is not None:
            self.inner.compile(wait)

    def learn(self, draws: Tensor, groups: Tensor) -> None:
        """Set the metric of the continuous latents; see `Engine.learn`."""
        if self.inner is not None:
            self.inner.learn(draws[..., self._rest], groups)

    def find_step(self) -> None:
        """Set step sizes by trial."""
        if self.inner is not None:
            self._held.copy_(self._state.w)
            self.inner.find_step()

    def rescue(self, draws: Draws, groups: int) -> None:
        """Leave chains where they are: with other units, another place may be as good."""

    def status(self) -> str:
        """Say how it goes, in a few words."""
        made = max(1, int(self._slot.min()))
        accept = self._written.accept[:made].mean().item()
        rung = self.rung.partition(";")[0].partition(" (")[0]
        return f"acceptance of flips {accept:.2f}, {rung}"

    def run(
        self, transitions: int, *, adapts: bool, depth: int | None = None, watch: Watch
    ) -> Draws:
        """Make draws with each chain; see `Engine.run`."""
        parts: list[Draws] = []
        made = 0
        if adapts and self.inner is not None:
            self.inner.begin(transitions)
        with suppress(KeyboardInterrupt):  # what has been drawn so far is kept
            while made < transitions:
                goal = min(self._slots, transitions - made)
                part = self._flipped(goal, lambda now, made=made: watch(made + now))
                if len(part) == goal and self.inner is not None:
                    part = self._moved(part, adapts, depth)
                parts.append(part)
                made += len(part)
                if len(part) < goal:
                    break
        if adapts and self.inner is not None and made == transitions:
            self.inner.settle()
        if not parts:
            parts.append(self._draws(0))
        pairs = ((getattr(part, name) for part in parts) for name in Draws.__annotations__)
        return Draws(*(torch.cat(list(values), 1) for values in pairs))

    def _flipped(self, goal: int, watch: Watch) -> Draws:
        """Make draws by flips alone."""
        self._runs += 1
        fresh = streams(substream(self._seed, self._runs, 3), self._ids)
        for old, new in zip(self._stream, fresh, strict=True):
            old.copy_(new)
        self._slot.zero_()
        self._goal.fill_(goal)
        for value in self._state[3:]:
            value.zero_()
        while not self._loop.is_done() and watch(int(self._slot.min())):
            pass
        return self._draws(min(goal, int(self._slot.min())))

    def _draws(self, made: int) -> Draws:
        w, accept = (value[:made] for value in self._written)
        accept = accept.T.contiguous()
        blank = torch.zeros_like(accept, dtype=torch.int64)
        return Draws(
            w.permute(2, 0, 1).clone(), torch.zeros_like(accept), accept,
            blank + self.flips, blank, blank.bool(),
        )  # fmt: skip

    def _moved(self, part: Draws, adapts: bool, depth: int | None) -> Draws:
        """Move the continuous latents by a transition, given the units."""
        assert self.inner is not None
        self._held.copy_(self._state.w)
        move = self.inner.run(1, adapts=adapts, goes_on=True, depth=depth, watch=lambda _: True)
        if not len(move):
            raise KeyboardInterrupt
        self._state.w.index_copy_(0, self._rest, move.u[:, 0].T)
        u, g = self._density(self._state.w)
        self._state.u.copy_(u)
        self._state.g.copy_(g)
        w = part.u.clone()
        w[:, -1] = self._state.w.T
        return Draws(
            w, move.energy, move.accept, part.leaves + move.leaves, move.depth, move.divergent
        )

    def _given(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of the continuous latents, given the units, and its gradient."""
        u, g = self._density(self._held.index_copy(0, self._rest, rest))
        return u, g.index_select(0, self._rest)

    def _tick(self, *live: Tensor) -> tuple[Tensor]:
        """Propose a flip, in place; return how many draws all have made, NaN once they are done."""
        state, stream = State(*live[:5]), Stream(*live[5:8])
        written, (slot, goal, flips) = Written(*live[8:10]), live[10:]
        after, stream_after = flip(state, stream, self._density, self._binary)
        is_full = after.flips >= flips
        place = torch.where(is_full & (slot < goal), slot, len(written.w) - 1.0).to(torch.int64)
        put(written.w, place, after.w)
        put(written.accept, place, after.taken / after.flips)
        zero = torch.zeros_like(after.flips)
        after = after._replace(
            flips=torch.where(is_full, zero, after.flips),
            taken=torch.where(is_full, zero, after.taken),
        )
        made = slot + is_full.to(slot.dtype)
        for old, new in zip(live, (*after, *stream_after), strict=False):
            if new is not old:
                old.copy_(new)
        slot.copy_(made)
        least = made.min()
        return (torch.where(least >= goal, torch.nan, least.double()),)

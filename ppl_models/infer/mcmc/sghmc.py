"""Stochastic gradient Hamiltonian Monte Carlo: a gradient of a few rows, friction, and noise.

Sources:
    Chen, Fox & Guestrin (2014), equation 15. https://arxiv.org/abs/1402.4102
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_models.core.random import stream as substream
from ppl_models.infer.mcmc.engine import NARROW, NUMBERS, PART, Draws, Watch, recorded
from ppl_models.infer.mcmc.hashing import Stream, normals, streams, uniforms
from ppl_models.infer.mcmc.loop import Loop
from ppl_models.infer.mcmc.nuts import put
from ppl_models.infer.mcmc.samplers import NOISE, SGHMC

PROBES = 32  # minibatches of each chain, by which their noise is measured

# Log density (C,) and gradient (D, C) of positions (D, C), and where not all rows are taken of
# rows (B, C).
Gradient = Callable[..., tuple[Tensor, Tensor]]


class State(NamedTuple):
    """Where the chains are."""

    u: Tensor  # positions (D, C)
    v: Tensor  # velocities (D, C): what a step adds to them
    steps: Tensor  # taken (C,)


class Settings(NamedTuple):
    """How they move."""

    scale: Tensor  # of each coordinate (D, C)
    step: Tensor  # of each chain, in units of the scale (C,)
    friction: Tensor  # ()
    thin: Tensor  # steps to each draw ()


def move(
    state: State,
    stream: Stream,
    settings: Settings,
    density: Gradient,
    *,
    rows: tuple[int, int] | None = None,
    resample: int | None = None,
) -> tuple[State, Stream]:
    """Take one step in each chain.

    Arguments:
        state: Where the chains are.
        stream: Their random streams.
        settings: How they move.
        density: The target.
        rows: Rows of a minibatch, and of the data set; None where all are taken.
        resample: Steps after which velocities are drawn anew; None for never.

    Returns:
        Both afterwards.
    """
    u, v, steps = state
    pairs = len(u) + len(u) % 2  # places in a stream that as many normal numbers take
    spread = settings.step * settings.scale  # of a velocity
    if resample is not None:
        fresh = spread * normals(stream, len(u)).to(u.dtype)
        v = torch.where(torch.remainder(steps, resample) == 0.0, fresh, v)
    if rows is None:
        _, g = density(u)
    else:
        _, g = density(u, minibatches(stream, *rows, first=2 * pairs))
    noise = (
        torch.sqrt(2.0 * settings.friction) * spread * normals(stream, len(u), pairs).to(u.dtype)
    )
    v = (1.0 - settings.friction) * v + spread * spread * g + noise
    return State(u + v, v, steps + 1.0), stream._replace(tick=stream.tick + 1)


def minibatches(stream: Stream, many: int, size: int, first: int = 0) -> Tensor:
    """Draw rows of a data set for each chain, with replacement, shape (many, C), int64."""
    return (uniforms(stream, many, first) * size).to(torch.int64)


class Chains:
    """Chains of SGHMC; called as `Engine` is, but for what an engine adapts.

    Arguments:
        density: The target.
        positions: Where the chains start, shape (D, C).
        sampler: What is asked for.
        size: Rows of the data set.
        seed: Of all random streams.
        ids: Numbers of the streams of the chains, shape (C,).
        slots: Transitions that will be asked for at once, at most.

    Attributes:
        restarted: 0: chains stay where they are.
    """

    restarted = 0

    def __init__(
        self,
        density: Gradient,
        positions: Tensor,
        *,
        sampler: SGHMC,
        size: int,
        seed: int,
        ids: Tensor,
        slots: int,
    ) -> None:
        dim, chains = positions.shape
        self._seed, self._ids, self._runs = seed, ids, 0
        self._rows = None if sampler.batch_size == size else (sampler.batch_size, size)
        self._stream = streams(0, ids)
        inputs = () if self._rows is None else (minibatches(self._stream, *self._rows),)
        self._density = recorded(density, positions, *inputs)
        self._free = sampler.step_size is None
        number = positions.new_tensor
        self._settings = Settings(
            torch.full_like(positions, 1.0 / math.sqrt(size)),
            positions.new_full((chains,), sampler.step(size)),
            number(float(sampler.friction)),
            number(float(sampler.thin)),
        )
        self._resample = sampler.resample
        zero = positions.new_zeros(chains, dtype=torch.float64)
        self._state = State(positions.clone(), torch.zeros_like(positions), zero)
        self._slots = min(1 << max(6, (slots - 1).bit_length()), PART)
        self._slots = max(1, min(self._slots, NUMBERS // (chains * dim)))
        self._written = positions.new_zeros(self._slots + 1, dim, chains)
        self._slot, self._goal = zero.clone(), zero.new_zeros(())
        self._live = (
            *self._state, *self._stream, *self._settings, self._written, self._slot, self._goal,
        )  # fmt: skip
        self._loop = Loop(self._tick, self._live)
        for value, start in zip(self._state, (positions, 0.0, 0.0), strict=True):
            value.copy_(torch.as_tensor(start))  # to be recorded, it took steps

    @property
    def rung(self) -> str:
        """Which rung of the ladder steps run on and, if not the first, why."""
        return self._loop.rung

    @property
    def step_size(self) -> Tensor:
        """Of each chain, in units of the scale, shape (C,)."""
        return self._settings.step.clone()

    def compile(self, wait: Callable[[], bool]) -> None:
        """Go on in a compiled loop, where steps can be compiled."""
        self._loop.compile(wait, narrow=len(self._ids) <= NARROW)

    def learn(self, draws: Tensor, groups: Tensor) -> None:
        """Set scales to those of draws of a guide, where these differ; see `Engine.learn`."""
        found, scale = draws.std(1).T.index_select(-1, groups), self._settings.scale
        scale.copy_(torch.where(found > 0.0, found, scale))

    def status(self) -> str:
        """Say how it goes, in a few words."""
        lost = int((~torch.isfinite(self._state.u).all(0)).sum())
        rung = self.rung.partition(";")[0].partition(" (")[0]
        return f"step {self.step_size.median().item():.2g}, {lost} chains lost, {rung}"

    def settle(self) -> None:
        """Shorten a step that was not asked for, where minibatches are louder than they should be."""
        if self._free and self._rows is not None:
            longer = torch.sqrt(self._shares().amax(0) / NOISE).clamp(min=1.0)
            self._settings.step.div_(longer)
            self._state.v.div_(longer)

    def noise(self) -> float:
        """Return the variance that minibatches add to that of the noise injected, as a share.

        In the worst coordinate, in the mean over chains.
        """
        if self._rows is None:
            return 0.0
        share = self._shares()
        fine = torch.isfinite(share).all(0)
        return share[:, fine].mean(1).max().item() if bool(fine.any()) else math.inf

    def _shares(self) -> Tensor:
        r"""Measure :math:`\eta \hat V / 2 \alpha` by minibatches where the chains are, (D, C).

        :math:`\hat V` is the variance of the gradient.
        """
        assert self._rows is not None
        stream = streams(substream(self._seed, self._runs, 5), self._ids)
        gradients = torch.stack(
            [
                self._density(
                    self._state.u,
                    minibatches(stream._replace(tick=stream.tick + probe), *self._rows),
                )[1]
                for probe in range(PROBES)
            ]
        )
        spread = self._settings.step * self._settings.scale
        return spread.square() * gradients.var(0) / (2.0 * self._settings.friction)

    def run(self, transitions: int, *, adapts: bool, watch: Watch) -> Draws:
        """Make draws with each chain; see `Engine.run`. There is nothing that adapts."""
        parts: list[Tensor] = [self._written[:0]]
        made = 0
        with suppress(KeyboardInterrupt):  # what has been drawn so far is kept
            while made < transitions:
                goal = min(self._slots, transitions - made)
                self._begin(goal)
                while not self._loop.is_done() and watch(made + int(self._slot.min())):
                    pass
                now = min(goal, int(self._slot.min()))
                parts.append(self._written[:now].clone())
                made += now
                if now < goal:
                    break
        u = torch.cat(parts).permute(2, 0, 1)
        blank = u.new_zeros(u.shape[:2], dtype=torch.int64)
        unknown = u.new_full(u.shape[:2], math.nan)
        lost = ~torch.isfinite(u).all(-1)
        leaves = blank + int(self._settings.thin)
        return Draws(u, unknown, unknown, leaves, blank, lost)

    def _begin(self, goal: int) -> None:
        self._runs += 1
        fresh = streams(substream(self._seed, self._runs, 4), self._ids)
        for old, new in zip(self._stream, fresh, strict=True):
            old.copy_(new)
        self._slot.zero_()
        self._goal.fill_(goal)

    def _tick(self, *live: Tensor) -> tuple[Tensor]:
        """Take a step, in place; return how many draws all have made, NaN once they are done."""
        state, stream, settings = State(*live[:3]), Stream(*live[3:6]), Settings(*live[6:10])
        written, slot, goal = live[10:]
        after, stream_after = move(
            state, stream, settings, self._density, rows=self._rows, resample=self._resample
        )
        is_full = torch.remainder(after.steps, settings.thin) == 0.0
        place = torch.where(is_full & (slot < goal), slot, len(written) - 1.0).to(torch.int64)
        put(written, place, after.u)
        made = slot + is_full.to(slot.dtype)
        for old, new in zip(live, (*after, *stream_after), strict=False):
            if new is not old:
                old.copy_(new)
        slot.copy_(made)
        least = made.min()
        return (torch.where(least >= goal, torch.nan, least.double()),)

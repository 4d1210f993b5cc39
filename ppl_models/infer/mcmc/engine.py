"""Runs chains of the no-U-turn sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_models.core.random import stream as substream
from ppl_models.infer.capture import Untraceable, record, recordable
from ppl_models.infer.mcmc import nuts
from ppl_models.infer.mcmc.adaptation import companions, factors, find_step, scales
from ppl_models.infer.mcmc.hashing import Stream, streams
from ppl_models.infer.mcmc.loop import Loop
from ppl_models.infer.mcmc.nuts import LogDensity, Record, Trajectory, Tuning

PART = 512  # transitions, after which chains wait for each other and go on afresh
NUMBERS = 2**28  # that the record of a part may hold
TALL = 4  # rows for each column
NARROW = 8  # chains that leave wide vectors half empty
ADAPTED = ("step", "centre", "average", "error", "updates")  # of tuning, what is of each chain
BOLD = 15  # transitions of a window that is long

# Called now and then with transitions made by all chains; False ends the run.
Watch = Callable[[int], bool]


@dataclass(frozen=True)
class Draws:
    """What chains have written, in the order of time.

    Attributes:
        u: Positions on the unconstrained space (C, n, D).
        energy: At the start of each transition, nats (C, n).
        accept: Mean acceptance probability of the leaves of each.
        leaves: Leapfrog steps of each, int64.
        depth: Doublings of each, int64.
        divergent: Whether each diverged, bool.
    """

    u: Tensor
    energy: Tensor
    accept: Tensor
    leaves: Tensor
    depth: Tensor
    divergent: Tensor

    def __len__(self) -> int:
        return self.u.shape[1]


class Engine:
    """Chains, and where they are.

    Arguments:
        log_density: Of unconstrained positions: (D, C) to values (C,) and gradients (D, C).
        positions: Where the chains start, shape (D, C).
        seed: Of all random streams.
        ids: Numbers of the streams of the chains, shape (C,).
        depth: Doublings allowed.
        target: Acceptance probability aimed at.
        slots: Transitions that will be asked for at once, at most.
        dense: Whether the metric is a matrix.
        steady: Whether what the density reads besides positions stays as it is: then it may be copied.
        rows: Of a `Density` of rows, how many a compiled loop takes at a time; 0 for all.

    Attributes:
        restarted: How often a chain went on from the place of another one.
    """

    def __init__(
        self,
        log_density: LogDensity,
        positions: Tensor,
        *,
        seed: int,
        ids: Tensor,
        depth: int,
        target: float,
        slots: int,
        dense: bool,
        steady: bool,
        rows: int = 0,
    ) -> None:
        dim, chains = positions.shape
        self._log_density: Any = log_density
        self._rows = rows
        self._block: Engine | None = None  # made by `compile`
        self._seed = seed
        self._ids = ids
        self._depth = depth
        self._runs = 0
        self.restarted = 0
        self._positions = positions.clone()
        scale = torch.ones_like(positions)
        self._scale = torch.diag_embed(scale.T).permute(1, 2, 0).contiguous() if dense else scale
        self._density = recorded(log_density, positions, steady=steady)
        start = nuts.begin(positions, self._white, streams(0, ids), depth)
        # Round numbers, so that one compiled tick serves for many a number of draws; and no more
        # than a part of them, so that where a part ends does not depend on the number of chains.
        self._slots = min(1 << max(6, (slots - 1).bit_length()), PART)
        self._slots = max(1, min(self._slots, NUMBERS // (chains * (dim + 4))))
        blank = (_blank_record(positions, self._slots), _blank_tuning(positions, depth, target))
        self._live: tuple[Tensor, ...] = (*start, *streams(0, ids), *blank[0], *blank[1])
        self._state, self._stream, self._record, self.tuning = _parts(self._live)
        self._loop = Loop(self._tick, self._live)

    def compile(self, wait: Callable[[], bool]) -> None:
        """Go on in a compiled loop, where ticks can be compiled; see `Loop.compile`."""
        if not self._rows:
            self._loop.compile(wait, narrow=len(self._ids) <= NARROW)
            return
        if self._block is None:
            self._block = self._some_rows()
        self._block.compile(wait)
        self._loop.rung = self._block.rung

    @property
    def _compiled_block(self) -> Engine | None:
        """What runs some of the rows at a time: only a compiled loop is the faster for it."""
        return self._block if self._block is not None and self._block._loop.compiled else None

    @property
    def rung(self) -> str:
        """Which rung of the ladder ticks run on and, if not the first, why."""
        return self._loop.rung

    def learn(self, draws: Tensor, groups: Tensor) -> None:
        """Set the metric.

        Arguments:
            draws: Of the target of each group, shape (groups, n, D).
            groups: Of each chain, shape (C,).
        """
        found = scales(draws) if self._scale.ndim == 2 else factors(draws)
        self._scale.copy_(found.index_select(-1, groups))

    def rescue(self, draws: Draws, groups: int) -> Tensor | None:
        """Let chains astray go on from the places, and with the step sizes, of other ones.

        Arguments:
            draws: What they did lately.
            groups: How many groups of chains there are.

        Returns:
            For each chain the one that it goes on from, or itself, shape (C,).
        """
        source = companions(draws, groups)
        own = torch.arange(len(source), device=source.device)
        self.restarted += int((source != own).sum())
        self._positions = self._positions[:, source]
        self.tuning.step.copy_(self.tuning.step[source])
        return source

    def status(self) -> str:
        """Say how it goes, in a few words."""
        if block := self._compiled_block:
            return block.status()
        made = max(1, int(self.tuning.slot.min()))
        accept = self._record.accept[:made].mean().item()
        lost = int(self._record.divergent[:made].sum())
        return (
            f"step {self.tuning.step.median().item():.2g}, acceptance {accept:.2f}, "
            f"{lost} divergences, {self.rung.partition(';')[0].partition(' (')[0]}"
        )

    def find_step(self) -> None:
        """Set step sizes by trial."""
        q = self._whitened(self._positions)
        u, g = self._white(q)

        def gain(momentum: Tensor, step: Tensor) -> Tensor:
            half = momentum + 0.5 * step * g
            u_after, g_after = self._white(q + step * half)
            after = half + 0.5 * step * g_after
            return u_after - u - 0.5 * ((after * after).sum(0) - (momentum * momentum).sum(0))

        tuning, stream = self.tuning, streams(substream(self._seed, self._runs, 1), self._ids)
        tuning.step.copy_(find_step(gain, stream, tuning.step, len(q), float(tuning.target)))

    def run(
        self,
        transitions: int,
        *,
        adapts: bool,
        goes_on: bool = False,
        depth: int | None = None,
        part: int = PART,
        watch: Watch,
    ) -> Draws:
        """Make transitions with each chain.

        Arguments:
            transitions: How many of each.
            adapts: Whether step sizes are adapted.
            goes_on: Whether adaptation goes on: then who calls says when to `begin` and `settle`.
            depth: Doublings allowed, if fewer than otherwise.
            part: Transitions, after which chains wait for each other.
            watch: Told how far all chains are; ends the run.

        Returns:
            The transitions: as many of each chain as all have made, if the run was ended.
        """
        parts: list[Draws] = []
        made = 0
        while made < transitions:
            goal = min(self._slots, part, transitions - made)
            if adapts and not goes_on:
                self.begin(goal)
            some = self._run(
                goal, adapts, depth or self._depth, lambda now, made=made: watch(made + now)
            )
            parts.append(some)
            made += len(some)
            if len(some) < goal:
                break
            if adapts and not goes_on:
                self.settle()
        pairs = ((getattr(some, name) for some in parts) for name in Draws.__annotations__)
        return Draws(*(torch.cat(list(values), 1) for values in pairs))

    def settle(self) -> None:
        """Leave step sizes at their mean."""
        self.tuning.step.copy_(torch.exp(self.tuning.average))

    def begin(self, transitions: int) -> None:
        """Begin to adapt step sizes anew, for some transitions."""
        tuning = self.tuning
        # A long window begins with bold steps; a short one could not come back from them.
        tuning.centre.copy_(torch.log((10.0 if transitions >= BOLD else 1.0) * tuning.step))
        for value in (tuning.average, tuning.error, tuning.updates):
            value.zero_()

    def _run(self, goal: int, adapts: bool, depth: int, watch: Watch) -> Draws:
        if block := self._compiled_block:
            return self._run_by_rows(block, goal, adapts, depth, watch)
        self._runs += 1
        stream = streams(substream(self._seed, self._runs), self._ids)
        start = nuts.begin(self._whitened(self._positions), self._white, stream, self._depth)
        for old, new in zip((*self._state, *self._stream), (*start, *stream), strict=True):
            old.copy_(new)
        tuning = self.tuning
        self._stream.tick.fill_(1)
        tuning.slot.zero_()
        tuning.goal.fill_(goal)
        tuning.depth.fill_(min(depth, self._depth))
        tuning.adapts.fill_(1.0 if adapts else 0.0)
        with suppress(KeyboardInterrupt):  # what has been drawn so far is kept
            while not self._loop.is_done() and watch(int(tuning.slot.min())):
                pass
        made = min(goal, int(tuning.slot.min()))
        written = self._record
        u = self._unwhitened(written.q[:made].permute(1, 2, 0)).permute(1, 2, 0)
        if made:
            chains = torch.arange(len(self._ids), device=self._ids.device)
            last = written.q[tuning.slot.long().clamp(max=goal) - 1, :, chains]
            self._positions = self._unwhitened(last.T)
        energy, accept, *counts = (value[:made].T.contiguous() for value in written[1:])
        leaves, doublings, divergent = (value.long() for value in counts)
        return Draws(u, energy, accept, leaves, doublings, divergent.bool())

    def _some_rows(self) -> Engine:
        """Return chains of as many rows as are taken at a time, the first ones."""
        columns = self._columns(0)
        return Engine(
            self._log_density.some(self._rows),
            self._positions[:, columns],
            seed=self._seed,
            ids=self._ids[columns],
            depth=self._depth,
            target=float(self.tuning.target),
            slots=self._slots,
            dense=self._scale.ndim == 3,
            steady=False,
        )

    def _columns(self, first: int) -> Tensor:
        """Columns of the rows from some number on, the last row in place of those beyond it."""
        rows = torch.arange(first, first + self._rows, device=self._ids.device)
        rows = rows.clamp(max=self._log_density.targets - 1)
        chains = torch.arange(0, len(self._ids), self._log_density.targets, device=rows.device)
        return (chains.unsqueeze(1) + rows).flatten()

    def _run_by_rows(
        self, block: Engine, goal: int, adapts: bool, depth: int, watch: Watch
    ) -> Draws:
        """Make the transitions of some rows after those of others."""
        rows, targets = self._rows, self._log_density.targets
        firsts = range(0, targets, rows)
        whole: Draws | None = None
        for number, first in enumerate(firsts):
            columns = self._columns(first)
            block._take(self, columns)
            made = block._run(
                goal,
                adapts,
                depth,
                lambda now, number=number: watch((number * goal + now) // len(firsts)),
            )
            own = torch.arange(len(columns), device=columns.device)  # those that stand for no other
            own = own.unflatten(0, (-1, rows))[:, : targets - first].flatten()
            if whole is None:
                pairs = (getattr(made, name) for name in Draws.__annotations__)
                whole = Draws(*(v.new_empty(len(self._ids), *v.shape[1:]) for v in pairs))
            if len(made) < goal:  # ended, before the other rows have moved
                whole = Draws(*(getattr(whole, name)[:, :0] for name in Draws.__annotations__))
                break
            for name in Draws.__annotations__:
                getattr(whole, name)[columns[own]] = getattr(made, name)[own]
            self._positions[:, columns[own]] = block._positions[:, own]
            for name in ADAPTED:
                getattr(self.tuning, name)[columns[own]] = getattr(block.tuning, name)[own]
        self._runs += 1
        assert whole is not None
        return whole

    def _take(self, whole: Engine, columns: Tensor) -> None:
        """Go on with some columns of other chains."""
        rows = columns[: self._log_density.targets]  # those of the first chain
        self._log_density.take(rows, whole._log_density)
        self._runs = whole._runs
        self._ids = whole._ids[columns]
        self._positions = whole._positions[:, columns]
        self._scale.copy_(whole._scale[..., columns])
        for name in ADAPTED:
            getattr(self.tuning, name).copy_(getattr(whole.tuning, name)[columns])

    def _tick(self, *live: Tensor) -> tuple[Tensor]:
        """Run a tick, in place; return how many transitions all have made, NaN once they are done."""
        state, stream, record, tuning = _parts(live)
        after = nuts.tick(state, stream, record, tuning, self._white)
        for old, new in zip(live, (value for part in after for value in part), strict=True):
            if new is not old:
                old.copy_(new)
        made = after[3].slot.min()
        return (torch.where(made >= tuning.goal, torch.nan, made.double()),)

    def _white(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of whitened positions, and its gradient."""
        u, g = self._density(self._unwhitened(q))
        if self._scale.ndim == 2:
            return u, self._scale * g
        return u, (self._scale * g.unsqueeze(1)).sum(0)

    def _unwhitened(self, q: Tensor) -> Tensor:
        """Return positions (D, C) or (D, C, n) as the density has them."""
        scale = self._scale if q.ndim == 2 else self._scale.unsqueeze(-1)
        return scale * q if self._scale.ndim == 2 else (scale * q.unsqueeze(0)).sum(1)

    def _whitened(self, u: Tensor) -> Tensor:
        if self._scale.ndim == 2:
            return u / self._scale
        lower = self._scale.permute(2, 0, 1)
        return torch.linalg.solve_triangular(lower, u.T.unsqueeze(2), upper=False).squeeze(2).T


def recorded(
    log_density: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor, steady: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a density that needs no handlers, if it can be recorded on some inputs.

    Arguments:
        log_density: What is recorded.
        inputs: What it is recorded on.
        steady: Whether all else that it reads stays as it is: then it may be copied.
    """
    try:
        graph = record(log_density, *inputs)
    except Untraceable:

        def evaluate(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            with recordable():
                return log_density(*inputs)

        return evaluate

    held = [
        _by_columns(value) if steady and place not in graph.changed else value
        for place, value in enumerate(graph.tensors)
    ]

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = graph.module(*held, *inputs)
        return value, gradient

    return run


def _by_columns(value: Tensor) -> Tensor:
    """Lay a tall matrix out by columns, along which products with few chains go the faster."""
    is_tall = value.ndim == 2 and value.shape[0] >= TALL * value.shape[1] > TALL
    return value.detach().t().contiguous().t() if is_tall else value


def _parts(live: Sequence[Tensor]) -> tuple[Trajectory, Stream, Record, Tuning]:
    rest = iter(live)

    def next_of(kind: Any) -> Any:
        return kind(*(next(rest) for _ in kind._fields))

    return next_of(Trajectory), next_of(Stream), next_of(Record), next_of(Tuning)


def _blank_record(like: Tensor, slots: int) -> Record:
    dim, chains = like.shape
    rest = (like.new_zeros(slots + 1, chains) for _ in Record._fields[1:])
    return Record(like.new_zeros(slots + 1, dim, chains), *rest)


def _blank_tuning(like: Tensor, depth: int, target: float) -> Tuning:
    zeros = [like.new_zeros(like.shape[1]) for _ in range(4)]
    return Tuning(
        torch.ones_like(zeros[0]),
        *zeros,
        slot=torch.zeros_like(zeros[0]),
        goal=like.new_zeros(()),
        target=like.new_tensor(target),
        adapts=like.new_zeros(()),
        depth=like.new_tensor(float(depth)),
    )

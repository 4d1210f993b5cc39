"""Runs chains: in a compiled loop, by a recorded graph, or by the program itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_models.core.random import stream as substream
from ppl_models.infer import backend, compile
from ppl_models.infer.capture import Graph, Untraceable, record, recordable
from ppl_models.infer.mcmc import nuts
from ppl_models.infer.mcmc.adaptation import factors, find_step, scales
from ppl_models.infer.mcmc.hashing import Stream, streams
from ppl_models.infer.mcmc.nuts import LogDensity, Record, Trajectory, Tuning

BLOCK = 0.05  # seconds that one call may take: Ctrl-C waits for it
PART = 512  # transitions, after which chains wait for each other and go on afresh
NUMBERS = 2**28  # that the record of a part may hold
NARROW = 8  # chains that leave wide vectors half empty
MAGNIFIED = 100.0  # times the effect of a few roundings of the state, that a result may be off
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

    Attributes:
        rung: Which rung of the ladder ticks run on and, if not the first, why.
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
    ) -> None:
        dim, chains = positions.shape
        self._seed = seed
        self._ids = ids
        self._depth = depth
        self._runs = 0
        self.restarted = 0
        self._speed = 0.0
        self._positions = positions.clone()
        scale = torch.ones_like(positions)
        self._scale = torch.diag_embed(scale.T).permute(1, 2, 0).contiguous() if dense else scale
        self._density = _recorded(log_density, positions)
        start = nuts.begin(positions, self._white, streams(0, ids), depth)
        # Round numbers, so that one compiled tick serves for many a number of draws; and no more
        # than a part of them, so that where a part ends does not depend on the number of chains.
        self._slots = min(1 << max(6, (slots - 1).bit_length()), PART)
        self._slots = max(1, min(self._slots, NUMBERS // (chains * (dim + 4))))
        blank = (_blank_record(positions, self._slots), _blank_tuning(positions, depth, target))
        self._live: tuple[Tensor, ...] = (*start, *streams(0, ids), *blank[0], *blank[1])
        self._state, self._stream, self._record, self.tuning = _parts(self._live)
        self._library: backend.Library | backend.Replay | None = None
        self._graph: Graph | None = None
        self.rung = "traced graph"
        try:
            self._graph = record(self._tick, *self._live)
        except Untraceable as error:
            self.rung = f"the program itself; {error}"

    def compile(self, wait: Callable[[], bool]) -> None:
        """Go on in a compiled loop, where ticks can be compiled.

        Arguments:
            wait: Called over and over while the compiler is waited for; False if that is to end.
        """
        if self._graph is None or self._library is not None:
            return
        narrow = len(self._ids) <= NARROW
        plan = compile.Plan(self._graph, self._live, None, [], [], (), 0, narrow)
        try:
            if reason := compile.refusal(plan):
                raise backend.Unsupported(reason)
            built = compile.compiled(plan)
            while not built.done():
                if not wait():
                    self.rung = "traced graph; the compiler was not waited for"
                    return
            self._library = _loaded(plan, built.result())
        except backend.Unsupported as error:
            self.rung = f"traced graph; not compiled: {error}"
        else:
            self.rung = f"compiled (torch {torch.__version__})"
            self._speed = 0.0

    def learn(self, draws: Tensor, groups: Tensor) -> None:
        """Set the metric.

        Arguments:
            draws: Of the target of each group, shape (groups, n, D).
            groups: Of each chain, shape (C,).
        """
        found = scales(draws) if self._scale.ndim == 2 else factors(draws)
        self._scale.copy_(found.index_select(-1, groups))

    def start_again(self, source: Tensor) -> None:
        """Let each chain go on from the place, and with the step size, of one that is named.

        Arguments:
            source: For each chain another one, or itself, shape (C,).
        """
        own = torch.arange(len(source), device=source.device)
        self.restarted += int((source != own).sum())
        self._positions = self._positions[:, source]
        self.tuning.step.copy_(self.tuning.step[source])

    def status(self) -> str:
        """Say how it goes, in a few words."""
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
        self, transitions: int, *, adapts: bool, depth: int | None = None, watch: Watch
    ) -> Draws:
        """Make transitions with each chain.

        Arguments:
            transitions: How many of each.
            adapts: Whether step sizes are adapted, and left at their mean in the end.
            depth: Doublings allowed, if fewer than otherwise.
            watch: Told how far all chains are; ends the run.

        Returns:
            The transitions: as many of each chain as all have made, if the run was ended.
        """
        parts: list[Draws] = []
        made = 0
        while made < transitions:
            goal = min(self._slots, transitions - made)
            part = self._run(
                goal, adapts, depth or self._depth, lambda now, made=made: watch(made + now)
            )
            parts.append(part)
            made += len(part)
            if len(part) < goal:
                break
        pairs = ((getattr(part, name) for part in parts) for name in Draws.__annotations__)
        return Draws(*(torch.cat(list(values), 1) for values in pairs))

    def _run(self, goal: int, adapts: bool, depth: int, watch: Watch) -> Draws:
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
        if adapts:
            # A long window begins with bold steps; a short one could not come back from them.
            tuning.centre.copy_(torch.log((10.0 if goal >= BOLD else 1.0) * tuning.step))
            for value in (tuning.average, tuning.error, tuning.updates):
                value.zero_()
        with suppress(KeyboardInterrupt):  # what has been drawn so far is kept
            while not self._is_done() and watch(int(tuning.slot.min())):
                pass
        made = min(goal, int(tuning.slot.min()))
        if adapts and made == goal:
            tuning.step.copy_(torch.exp(tuning.average))
        written = self._record
        u = self._unwhitened(written.q[:made].permute(1, 2, 0)).permute(1, 2, 0)
        if made:
            chains = torch.arange(len(self._ids), device=self._ids.device)
            last = written.q[tuning.slot.long().clamp(max=goal) - 1, :, chains]
            self._positions = self._unwhitened(last.T)
        energy, accept, *counts = (value[:made].T.contiguous() for value in written[1:])
        leaves, doublings, divergent = (value.long() for value in counts)
        return Draws(u, energy, accept, leaves, doublings, divergent.bool())

    def _is_done(self) -> bool:
        """Run a block of ticks, and say whether all chains have done what was asked."""
        start = time.perf_counter()
        many = max(1, min(10_000, int(BLOCK / self._speed))) if self._speed else 10
        if self._library is not None:
            values, error = self._library.run(None, None, torch.zeros(0), torch.zeros(many, 0))
            if error:
                raise RuntimeError(f"a compiled tick failed: {error}")
            many = len(values)
            done = not bool(torch.isfinite(values[-1]))
        else:
            done = False
            for _ in range(many):
                (value,) = (
                    self._tick(*self._live) if self._graph is None else self._graph(*self._live)
                )
                done = bool(value.isnan())
                if done:
                    break
        took = (time.perf_counter() - start) / many
        self._speed = took if not self._speed else 0.8 * self._speed + 0.2 * took
        return done

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


def _recorded(log_density: LogDensity, positions: Tensor) -> LogDensity:
    """Return a density that needs no handlers, if it can be recorded."""
    try:
        graph = record(log_density, positions)
    except Untraceable:

        def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
            with recordable():
                return log_density(u)

        return evaluate

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = graph.module(*graph.tensors, u)
        return value, gradient

    return run


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


def _loaded(plan: compile.Plan, path: Path | None) -> backend.Library | backend.Replay:
    """Load a compiled tick, once it has done the same as the graph.

    Raises:
        backend.Unsupported: If it has not, or does not load.
    """
    ticks = 2
    compiled, traced, nudged = ([value.clone() for value in plan.passed] for _ in range(3))
    for value in nudged:
        if value.is_floating_point():
            value.mul_(1.0 + 4.0 * torch.finfo(value.dtype).eps)
    held = [value.detach() for value in plan.graph.tensors]
    try:
        library = _load(plan, path, [*held, *compiled])
        for _ in range(ticks):
            _, error = library.run(None, None, torch.zeros(0), torch.zeros(1, 0))
            if error:
                raise backend.Unsupported(error)
            plan.graph(*traced)
            plan.graph(*nudged)
    except (OSError, RuntimeError, AttributeError) as failure:
        raise backend.Unsupported(str(failure).splitlines()[0]) from failure
    slack = (
        1e-3 if "float32" in plan.graph.module.code or compiled[0].dtype != torch.float64 else 1e-9
    )
    if not all(_close(*values, slack) for values in zip(compiled, traced, nudged, strict=True)):
        raise backend.Unsupported("the compiled tick computes something else than the graph")
    return _load(plan, path, plan.inputs)


def _load(
    plan: compile.Plan, path: Path | None, inputs: Sequence[Tensor]
) -> backend.Library | backend.Replay:
    return backend.Replay(plan.step, inputs) if path is None else backend.Library(path, inputs)


def _close(one: Tensor, other: Tensor, nudged: Tensor, slack: float) -> bool:
    """Whether two results are the same, but for rounding and for what the graph makes of it."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    if torch.allclose(one, other, rtol=slack, atol=slack, equal_nan=True):
        return True
    magnified = MAGNIFIED * (other - nudged).abs().max()  # as by a matrix that is near singular
    return bool(((one - other).abs() <= slack * (1.0 + other.abs()) + magnified).all())

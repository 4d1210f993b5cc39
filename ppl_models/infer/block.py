"""Blocks of compiled steps: many steps in one call, and a way back when one of them fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ppl_models.core.random import seeded
from ppl_models.core.types import Batch
from ppl_models.infer import backend, updates
from ppl_models.infer.capture import Graph
from ppl_models.infer.compile import Plan

Single = Callable[[Tensor | None, int], float]  # rows and number of a step, to its bound

CHECKPOINT = 0.25  # seconds of steps that are done again, at most, when one fails
BLOCK = 0.05  # seconds that one call may take: Ctrl-C waits for it


@dataclass
class _Checkpoint:
    """Where training was, and what has been done since."""

    values: list[tuple[Tensor, Tensor]]
    streams: list[Tensor]
    ahead: int
    taken: int
    time: float
    told: int = 0  # steps since that the optimiser's counters do know of
    blocks: list[tuple[Loaded, Tensor | None, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A compiled step that has been checked.

    Attributes:
        plan: What it computes.
        library: Its machine code.
        index: The input that tells its rows; None where it takes them all.
    """

    plan: Plan
    library: backend.Library | backend.Replay
    index: Tensor | None


class Blocks:
    """Runs compiled steps on the tensors of an optimiser, in place.

    Arguments:
        leaves: What is trained.
        optimizer: Its optimiser, which has made its state.
    """

    def __init__(self, leaves: Sequence[Tensor], optimizer: Optimizer) -> None:
        self._leaves = leaves
        self._optimizer = optimizer
        self._device = leaves[0].device
        groups = len(optimizer.param_groups)
        self._rates = torch.zeros(groups, dtype=torch.float64, device=self._device)
        self._powers: list[Tensor] = []
        self._stale = True  # the powers do not know of steps that others took
        self._ahead = 0  # steps that the optimiser's counters do not know of
        self._stepped: list[Tensor] = []  # what those steps moved
        self._told: list[tuple[Any, float]] = []  # counters, as others were let read them
        self._graph: Graph | None = None  # whose steps are taken
        self._speed = 0.0  # seconds a step
        self._checkpoint: _Checkpoint | None = None
        self._changing: dict[int, Tensor] = {}  # by address: whatever a loaded step changes
        self._compiled_state: list[tuple[Tensor, str, Tensor]] = []
        told = _options_of(optimizer)
        self.reason = told if isinstance(told, str) else None
        self._kind, self._options = (None, []) if isinstance(told, str) else told

    @property
    def many(self) -> int:
        """How many steps to take in one call."""
        if self._kind is None:
            return 1
        return max(1, min(10_000, int(BLOCK / self._speed))) if self._speed else 10

    def ready(self, graph: Graph) -> bool:
        """Whether the optimiser has made its state for each leaf of its that the graph moves."""
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        leaves = (self._leaves[i] for i in graph.leaves if id(self._leaves[i]) in own)
        return all(self._optimizer.state.get(leaf) for leaf in leaves) or not self._names()

    def moved(self) -> bool:
        """Whether the optimiser is another one than was compiled: its options, or its state."""
        if self._kind is None:
            return False
        told = _options_of(self._optimizer)
        if any(float(state.get("step", -1)) != count for state, count in self._told):
            return True
        return told != (self._kind, self._options) or any(
            self._optimizer.state.get(leaf, {}).get(name) is not tensor
            for leaf, name, tensor in self._compiled_state
        )

    def _names(self) -> tuple[str, ...]:
        momentum = any(options.get("momentum", 1.0) for options in self._options)
        return updates.STATE[self._kind] if momentum and self._kind is not None else ()

    def turn_to(self, graph: Graph, one: Single) -> None:
        """Prepare for steps of a graph.

        Arguments:
            graph: It.
            one: As in `run`.

        Raises:
            backend.Unsupported: If the optimiser would treat members of a group in different ways.
        """
        if graph is self._graph:
            return
        moved = [self._leaves[i] for i in graph.leaves]
        if [*map(id, moved)] != [*map(id, self._stepped)]:
            self.check(one)
            self.settle()
        if any(len(self._steps(group, moved)) > 1 for group in self._optimizer.param_groups):
            raise backend.Unsupported(
                f"{self._kind} corrects its averages by the number of steps, and parameters of one "
                "group have taken different numbers; give those that join later a group of their own"
            )
        self._graph, self._stepped = graph, moved

    def plan(self, graph: Graph, index: Tensor | None, data: Batch) -> Plan:
        """Say what is to be compiled for a graph."""
        passed = data if index is None else (torch.zeros_like(index), *data)
        if self._kind is None:
            buffers = tuple(torch.empty_like(self._leaves[i]) for i in graph.leaves)
            return Plan(graph, passed, None, [], [], buffers, 0)
        if not self._powers:
            ones = torch.ones(2, dtype=torch.float64, device=self._device)
            self._powers = [ones.clone() for _ in self._options]
        where = {id(self._leaves[leaf]): number for number, leaf in enumerate(graph.leaves)}
        groups = self._optimizer.param_groups
        members = [[where[id(p)] for p in g["params"] if id(p) in where] for g in groups]
        names = self._names()
        states: list[Tensor] = [self._rates]
        for powers, group in zip(self._powers, members, strict=True):
            states.append(powers)
            for member in group:
                leaf = self._leaves[graph.leaves[member]]
                state = self._optimizer.state.get(leaf, {})
                states.extend(state[name] for name in names)
                self._compiled_state += [(leaf, name, state[name]) for name in names]
        return Plan(graph, passed, self._kind, self._options, members, tuple(states), len(names))

    def load(self, plan: Plan, path: Path | None, index: Tensor | None) -> Loaded:
        """Load a compiled step, once it has done the same as the graph.

        Arguments:
            plan: What it computes.
            path: Its shared object; None on a GPU, where the graph is captured and replayed.
            index: Rows to try it with; None where it takes them all.

        Raises:
            backend.Unsupported: If it has not, or does not load.
        """
        try:
            _check(plan, path, index)
            library = _load(plan, path, plan.inputs)
        except (OSError, RuntimeError, AttributeError) as error:
            raise backend.Unsupported(str(error).splitlines()[0]) from error
        self._checkpoint = None  # it does not know of what this step changes
        for value in plan.changing:
            self._changing[value.data_ptr()] = value
        return Loaded(plan, library, None if index is None else plan.passed[0])

    def gradients(self, loaded: Loaded, order: Tensor | None) -> tuple[float, list[Tensor | None]]:
        """Evaluate a compiled gradient whose optimiser steps outside: the bound and the gradients."""
        bounds = self._call(loaded, order, torch.zeros(1, 0, dtype=torch.float64))
        found: list[Tensor | None] = [None] * len(self._leaves)
        for leaf, buffer in zip(loaded.plan.graph.leaves, loaded.plan.states, strict=True):
            found[leaf] = buffer
        return bounds.item(), found

    def run(
        self,
        loaded: Loaded,
        order: Tensor | None,
        count: int,
        *,
        taken: int,
        schedule: Callable[[], None] | None,
        one: Single,
    ) -> list[float]:
        """Take steps, and return the bound of each.

        They are fewer than asked for if the schedule moves more than rates, or one was repeated.

        Arguments:
            loaded: The step.
            order: The rows of all of them.
            count: How many.
            taken: Steps taken before.
            schedule: Moves the learning rates on by a step, if there is a schedule.
            one: Takes one step with care, and raises if it fails. The steps before a failure, and
                the failure, are repeated with it.
        """
        start = time.perf_counter()
        if self._checkpoint is None or start - self._checkpoint.time > CHECKPOINT:
            self.check(one)
            if self._stale:
                self._recount()
            self._checkpoint = self._here(start, taken)
        rates = self._next_rates(count, schedule)
        self._checkpoint.blocks.append((loaded, order, rates))
        self._told = []
        bounds = self._call(loaded, order, rates)
        self._ahead += len(bounds)
        if not torch.isfinite(bounds[-1]):
            return self._again(one, careful=2, failed=len(rates) - len(bounds))[-len(bounds) :]
        took = (time.perf_counter() - start) / len(rates)
        self._speed = took if not self._speed else 0.8 * self._speed + 0.2 * took
        return bounds.tolist()

    def check(self, one: Single) -> None:
        """Find the step, if there is one, that left a parameter not finite; begin a new count."""
        if self._checkpoint is not None and self._checkpoint.blocks:
            total = sum(len(rates) for _, _, rates in self._checkpoint.blocks)
            if not all(bool(torch.isfinite(leaf).all()) for leaf in self._leaves):
                self._again(one, careful=total, failed=0)
        self._checkpoint = None

    def settle(self) -> None:
        """Tell the optimiser's own counters of the steps taken here, before others take one."""
        self._count(self._ahead)
        self._ahead = 0
        self._told = []
        self._stale = True
        self._graph = None

    def tell(self) -> None:
        """Let others read, and change, the optimiser's counters before the next steps."""
        self._count(self._ahead)
        if self._checkpoint is not None:
            self._checkpoint.told += self._ahead
        self._ahead = 0
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._stepped]
        self._told = [(state, float(state["step"])) for state in states if "step" in state]

    def _count(self, steps: int) -> None:
        for parameter in self._stepped if steps else ():
            state = self._optimizer.state.get(parameter)
            if state and "step" in state:
                state["step"] += steps

    def _call(self, loaded: Loaded, order: Tensor | None, rates: Tensor) -> Tensor:
        bounds, error = loaded.library.run(loaded.index, order, self._rates, rates)
        if error:
            raise RuntimeError(f"a compiled step failed: {error}")
        return bounds

    def _recount(self) -> None:
        """Set the powers of the decay rates to the steps that the optimiser has counted."""
        groups = self._optimizer.param_groups
        for group, powers, options in zip(groups, self._powers, self._options, strict=True):
            steps = max(self._steps(group, self._stepped), default=0.0)
            for place, beta in enumerate(options.get("betas", ())):
                powers[place] = beta ** (steps + self._ahead)
        self._stale = False

    def _steps(self, group: dict[str, Any], moved: Sequence[Tensor]) -> set[float]:
        """How often the optimiser has moved each of some leaves that are in a group."""
        own = {id(parameter) for parameter in group["params"]}
        if self._kind is None:
            return set()
        states = (self._optimizer.state.get(leaf) for leaf in moved if id(leaf) in own)
        return {float(state.get("step", 0)) for state in states if state}

    def _next_rates(self, count: int, schedule: Callable[[], None] | None) -> Tensor:
        """Learning rates of the next steps, shape (count, groups)."""
        groups = self._optimizer.param_groups
        if schedule is None and self._kind != "ClippedAdam":
            now = torch.tensor([[float(group["lr"]) for group in groups]], dtype=torch.float64)
            return now.expand(count, -1).contiguous()
        rates = []
        for _ in range(count):
            if self._kind == "ClippedAdam":
                for group in groups:
                    group["lr"] *= group["lrd"]
            rates.append([float(group["lr"]) for group in groups])
            if schedule is not None:
                schedule()
                if self.moved():  # a schedule of more than the rate: the next step is another one
                    break
        return torch.tensor(rates, dtype=torch.float64)

    def _here(self, now: float, taken: int) -> _Checkpoint:
        return _Checkpoint(
            values=[(value, value.clone()) for value in self._changing.values()],
            streams=_streams(self._device),
            ahead=self._ahead,
            taken=taken,
            time=now,
        )

    def _again(self, one: Single, *, careful: int, failed: int) -> list[float]:
        """Go back to the checkpoint and take the steps since again, the last of them with care."""
        checkpoint, self._checkpoint = self._checkpoint, None
        assert checkpoint is not None
        for value, before in checkpoint.values:
            value.copy_(before)
        torch.set_rng_state(checkpoint.streams[0])
        for stream in checkpoint.streams[1:]:
            torch.cuda.set_rng_state(stream, self._device)
        self._count(-checkpoint.told)
        self._ahead = checkpoint.ahead
        left = sum(len(rates) for _, _, rates in checkpoint.blocks) - failed
        quick = max(0, left - careful)
        bounds: list[float] = []
        for loaded, order, rates in checkpoint.blocks:
            rows = 0 if loaded.index is None else len(loaded.index)
            count = min(len(rates), left)
            fast = min(count, quick)
            if fast:
                bounds += self._call(loaded, order, rates[:fast]).tolist()
                self._ahead += fast
            for step in range(fast, count):
                self.settle()
                for group, rate in zip(self._optimizer.param_groups, rates[step], strict=True):
                    group["lr"] = rate.item()
                part = None if order is None else order[step * rows :][:rows]
                bounds.append(one(part, checkpoint.taken + len(bounds) + 1))
            left, quick = left - count, quick - fast
        return bounds


def _load(
    plan: Plan, path: Path | None, inputs: Sequence[Tensor]
) -> backend.Library | backend.Replay:
    return backend.Replay(plan.step, inputs) if path is None else backend.Library(path, inputs)


def _options_of(optimizer: Optimizer) -> tuple[str, list[dict[str, Any]]] | str:
    if backend.is_hooked(optimizer):
        return f"hooks of {type(optimizer).__name__} run outside the graph, and so does its step"
    return updates.options_of(optimizer)


def _streams(device: torch.device) -> list[Tensor]:
    """Where the random streams are that a step draws from."""
    gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *gpu]


def _check(plan: Plan, path: Path | None, index: Tensor | None) -> None:
    """Let a compiled step and the graph take the same step, on copies, and compare."""
    start = [_copy(value) for value in plan.inputs]
    place = len(plan.graph.tensors)
    if index is not None:
        start[place].copy_(index)
    rates = torch.ones(1, len(plan.options), dtype=torch.float64)  # so that a step is seen
    first_state = place + len(plan.passed)
    roles: dict[int, Any] = dict.fromkeys(plan.graph.positions, "parameter")
    at = first_state + 1
    for members in plan.members:
        start[at].copy_(torch.tensor([0.7, 0.9], dtype=torch.float64))
        own = range(at + 1, at + 1 + plan.per_member * len(members))
        roles |= {i: (i - at - 1) % plan.per_member for i in own}
        at += 1 + len(own)
    if plan.per_member == 2:  # where a second moment is nearly 0, rounding is made large
        squares = [start[i] for i, role in roles.items() if role == 1]
        floor = max((_size(value) for value in squares), default=0.0) + 1e-8
        for value in squares:
            value.add_(floor)
    compiled, graph = ([_copy(value) for value in start] for _ in range(2))
    if plan.kind is not None:
        graph[first_state].copy_(rates[0])
    with seeded(3):
        library = _load(plan, path, compiled)
        bounds, error = library.run(
            None if index is None else compiled[place],
            index,
            compiled[first_state] if plan.kind is not None else rates,
            rates,
        )
        if error:
            raise backend.Unsupported(f"the compiled step fails: {error}")
        streams = _streams(start[0].device)
    with seeded(3), torch.no_grad():
        bound = plan.step(*graph).cpu()
        same = all(map(torch.equal, streams, _streams(start[0].device)))
    same = same and _close(bounds[0], bound, bound, 0.0)
    changes = [
        (_change(one, old), _change(other, old))
        for old, one, other in zip(start, compiled, graph, strict=True)
    ]
    scales: dict[Any, float] = {}
    for i, (_, other) in enumerate(changes):
        scales[roles.get(i, i)] = max(scales.get(roles.get(i, i), 0.0), _size(other))
    if not same or not all(
        _close(one, other, old, scales[roles.get(i, i)])
        for i, (old, (one, other)) in enumerate(zip(start, changes, strict=True))
    ):
        raise backend.Unsupported("the compiled step computes something else than the graph")


def _change(new: Tensor, old: Tensor) -> Tensor:
    return new ^ old if new.dtype == torch.bool else new - old


def _size(value: Tensor) -> float:
    if not value.is_floating_point() or not value.numel():
        return 0.0
    return value.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def _copy(value: Tensor) -> Tensor:
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(value)


def _close(one: Tensor, other: Tensor, old: Tensor, scale: float) -> bool:
    """Whether two changes of a tensor differ by rounding only.

    A gradient that is 0 is rounding alone: so a change may also be small beside the `scale` of the
    changes of all tensors in the same role.
    """
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    coarse = old.dtype != torch.float64 or old.ndim == 0
    own, among, rounding = (2e-3, 1e-4, 1e-5) if coarse else (1e-7, 1e-9, 1e-12)
    slack = max(own * _size(other), among * scale) + rounding * _size(old)
    return torch.allclose(one, other, rtol=0.0, atol=slack, equal_nan=True)

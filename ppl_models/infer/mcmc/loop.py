"""Runs ticks of chains: in a compiled loop, by a recorded graph, or by the program itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppl_models.infer import backend, compile
from ppl_models.infer.capture import Graph, Untraceable, record

BLOCK = 0.05  # seconds that one call may take: Ctrl-C waits for it
MAGNIFIED = 100.0  # times the effect of a few roundings of the state, that a result may be off

# Changes what it is given in place; returns how far all chains are, NaN once they are done.
Tick = Callable[..., tuple[Tensor]]


class Loop:
    """A tick, over and over.

    Arguments:
        tick: What is run.
        live: What it is given, and changes.

    Attributes:
        rung: Which rung of the ladder it runs on and, if not the first, why.
    """

    def __init__(self, tick: Tick, live: Sequence[Tensor]) -> None:
        self._tick, self._live = tick, tuple(live)
        self._speed = 0.0
        self._library: backend.Library | backend.Replay | None = None
        self._graph: Graph | None = None
        self.rung = "traced graph"
        try:
            self._graph = record(tick, *live)
        except Untraceable as error:
            self.rung = f"the program itself; {error}"

    def compile(self, wait: Callable[[], bool], *, narrow: bool) -> None:
        """Go on in a compiled loop, where ticks can be compiled.

        Arguments:
            wait: Called over and over while the compiler is waited for; False if that is to end.
            narrow: Whether there are so few chains that wide vectors would be half empty.
        """
        if self._graph is None or self._library is not None:
            return
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

    @property
    def compiled(self) -> bool:
        """Whether it is a compiled one."""
        return self._library is not None

    def is_done(self) -> bool:
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
                run = self._tick if self._graph is None else self._graph
                (value,) = run(*self._live)
                done = bool(value.isnan())
                if done:
                    break
        took = (time.perf_counter() - start) / many
        self._speed = took if not self._speed else 0.8 * self._speed + 0.2 * took
        return done


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

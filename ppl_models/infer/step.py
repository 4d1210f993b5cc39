"""Optimisation steps, each taken on the highest rung of a ladder that is known to be right.

The rungs: a compiled graph of the whole step; a recorded graph of the gradient; the Pyro program
itself. Each has been checked against the one below it, with the same seed, before it serves.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from ppl_models.core.minibatch import minibatch
from ppl_models.core.random import seeded
from ppl_models.core.store import enter_parameters
from ppl_models.core.types import Batch
from ppl_models.infer import backend, compile
from ppl_models.infer.block import Blocks, Loaded
from ppl_models.infer.capture import Graph, Untraceable, capture
from ppl_models.infer.guards import difference, fingerprint, reached, replaced
from ppl_models.infer.undo import objects_undone

Compile = bool | Literal["now"]

RECORDING = 150  # steps of a program that recording it costs
RETRACES = 5  # kinds of steps, after which changing numbers of Python are no exception


@dataclass(frozen=True)
class Evaluation:
    """A bound and its gradient: a function of chosen rows, of the data and of the parameters.

    Attributes:
        model: The model.
        guide: The guide.
        objective: What is ascended.
        leaves: What gradients are taken of.
        plate: Name of the plate over rows.
        size: Rows of the data set.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    objective: Any
    leaves: list[Tensor]
    plate: str
    size: int
    _handlers: dict[int, minibatch] = field(default_factory=dict, repr=False)

    @property
    def programs(self) -> tuple[Any, Any, Any]:
        """All that it runs."""
        return self.model, self.guide, self.objective

    def __call__(self, index: Tensor | None, *data: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the bound, nats per row, and the gradient of minus the bound.

        Arguments:
            index: The rows, shape (B,), or None for all.
            data: All rows.
        """
        if index is None:
            return self._evaluate(data)
        part = tuple(value.index_select(0, index) for value in data)
        rows = len(index)
        if rows not in self._handlers:
            with backend.untraced():  # its checks look at values
                some = torch.arange(rows)
                self._handlers[rows] = minibatch(some, self.size, plate=self.plate)
        handler = self._handlers[rows]
        handler.index = index  # rows of a permutation, which need no second look
        with handler:
            return self._evaluate(part)

    def _evaluate(self, part: Batch) -> tuple[Tensor, list[Tensor | None]]:
        if not isinstance(self.objective, PyroELBO):
            surrogate, bound = self.objective(self.model, self.guide, *part)
            trained = [leaf for leaf in self.leaves if leaf.requires_grad]
            found = torch.autograd.grad(-surrogate / self.size, trained, allow_unused=True)
            by_leaf = dict(zip(map(id, trained), found, strict=True))
            return bound.detach() / self.size, [by_leaf.get(id(leaf)) for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        elbo: Any = self.objective
        loss = elbo.loss_and_grads(self.model, self.guide, *part)
        loss = loss[0] if isinstance(loss, tuple) else loss
        gradients = [None if v.grad is None else v.grad / self.size for v in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return -torch.as_tensor(loss, dtype=torch.float64).detach() / self.size, gradients


@dataclass
class _Rung:
    """How steps of a certain number of rows are taken, while nothing else changes."""

    graph: Graph | None = None
    index: Tensor | None = None  # rows to try it with
    start: int | None = None  # the step from which on it is compiled, if it is to be
    plan: compile.Plan | None = None
    built: Future[Path | None] | None = None
    loaded: Loaded | None = None


class Diverged(FloatingPointError):
    """A bound or its gradient is not finite.

    Attributes:
        step: The number of the step, from 1; 0 for the one that was asked for.
    """

    def __init__(self, text: str, step: int = 0) -> None:
        super().__init__(text)
        self.step = step


class Steps:
    """The steps of one training.

    Arguments:
        evaluate: The bound and its gradient.
        data: All rows, on the device.
        optimizer: A torch optimiser of the leaves.
        schedule: A learning-rate scheduler, stepped after each step.
        rows: Rows of a step, but for the last one of an epoch; None if it takes all rows.
        total: Steps that are planned.
        compile: Whether to leave the bottom rung; "now" waits for the compiler at the first step.
        wait: Called over and over while the compiler is waited for; False if that is to end.

    Attributes:
        taken: Steps taken.
        rung: Which rung the last one was taken on.
    """

    def __init__(
        self,
        evaluate: Evaluation,
        data: Batch,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        *,
        rows: int | None,
        total: int,
        compile: Compile,
        wait: Callable[[], bool],
    ) -> None:
        self.taken = 0
        self._wait = wait
        self._rows = rows
        self._in_epoch = 1 if rows is None else -(-evaluate.size // rows)
        self._evaluate = evaluate
        self._data = data
        self._optimizer = optimizer
        self._schedule = schedule
        self._total = total
        self._compile = compile
        self._since = 0
        self._rungs: dict[Any, _Rung] = {}
        self._blocks: Blocks | None = None
        self._used = {"compiled": 0, "traced graph": 0, "vanilla step": 0}
        self.rung = ""
        self._reasons: dict[str, str] = {}  # by kind, the first of each
        self._facts: dict[str, Any] = {}
        self._changes: dict[str, list[str]] = {}  # the last ones of either kind
        self._new = {"numbers": 0, "tensors": 0}  # how often they made another kind of step
        self._version = 0
        self._versions: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """Look whether modes, numbers of Python or tensors changed: after code of the user's ran."""
        enter_parameters(*self._evaluate.programs)
        facts = fingerprint(*self._evaluate.programs)
        if facts == self._facts:
            return
        self.renew()  # by the steps that it knows
        known, version = len(self._versions), repr(sorted(facts.items()))
        self._version = self._versions.setdefault(version, known)
        tensors = replaced(self._facts, facts)
        if self._facts and self._version == known:
            numbers = [name for name in difference(self._facts, facts) if name not in tensors]
            self._changes["numbers" if numbers else "tensors"] = numbers or [*tensors]
            self._new["numbers" if numbers else "tensors"] += 1
        self._facts = facts
        leaves = {id(leaf) for leaf in self._evaluate.leaves}
        lost = [name for name, (old, new) in tensors.items() if old in leaves and new not in leaves]
        if lost := [name for name in lost if not name.startswith("pyro.param")]:
            self._reasons["replaced"] = (
                f"{', '.join(lost[:3])} became another tensor, which is not trained: copy_ into "
                "the one that is, as load_state_dict does without assign=True"
            )

    def tell(self) -> None:
        """Bring the optimiser up to date, before code of the user's runs."""
        if self._blocks is not None:
            self._blocks.tell()

    def renew(self) -> None:
        """Finish what is under way: before the data change, or the training ends."""
        if self._blocks is not None:
            self._blocks.check(self._alone)
            self._blocks.settle()

    def most(self, rows: int | None) -> int:
        """Return how many steps of so many rows can be taken in one call."""
        rung = self._rungs.get((self._version, rows))
        if rung is None or rung.loaded is None or self._blocks is None:
            return 1
        return 1 if isinstance(self._schedule, ReduceLROnPlateau) else self._blocks.many

    def take(self, order: Tensor | None, rows: int | None, count: int) -> list[float]:
        """Take steps, and return the bound of each, nats per row.

        Arguments:
            order: The rows of all of them, shape (>= count * rows,), or None for all rows each time.
            rows: Rows of a step, None with `order`.
            count: How many: 1, or up to what `most` says.

        Raises:
            FloatingPointError: If a bound or its gradient is not finite. The parameters are those
                before that step.
        """
        order = None if order is None or rows is None else order[: count * rows]
        rung = self._rung(order, rows)
        if not self._is_compiled(rung):
            return [self._single(rung, None if order is None else order[:rows])]
        assert rung.loaded is not None
        assert self._blocks is not None
        if rung.loaded.plan.kind is None:
            bound, gradients = self._blocks.gradients(rung.loaded, order)
            self._apply(bound, gradients)
            self._count("compiled", 1)
            return [bound]
        plateau = isinstance(self._schedule, ReduceLROnPlateau)
        moves = None if plateau or self._schedule is None else self._schedule.step
        bounds = self._blocks.run(
            rung.loaded, order, count, taken=self.taken, schedule=moves, one=self._alone
        )
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(-bounds[-1])
        self.taken += len(bounds)
        self._count("compiled", len(bounds))
        return bounds

    def describe(self) -> str:
        """Say which rungs ran and, if not the first one, why."""
        used = [name for name, count in self._used.items() if count]
        if not used:
            return "no step was taken"
        text = used[0]
        if text == "compiled":
            text += f" from step {self._since} (torch {torch.__version__})"
        counts = self._used | {"vanilla step": self._used["vanilla step"] - 1}  # the first one is
        others = [f"{name}: {counts[name]}" for name in used[1:] if counts[name] > 0]
        if others:
            text += f" ({', '.join(others)} of {self.taken})"
        return "; ".join((text, *self._reasons.values()))

    def _rung(self, order: Tensor | None, rows: int | None) -> _Rung:
        if self.taken == 0:
            return _Rung()  # the first run of a program may make what later ones use
        if self.taken == 1:
            self.look()
        key = (self._version, rows)
        if key not in self._rungs:
            self._rungs[key] = self._record(order, rows)
        return self._rungs[key]

    def _record(self, order: Tensor | None, rows: int | None) -> _Rung:
        """Record a step, and decide whether it is to be compiled."""
        if self._compile is False:
            return self._because("compile=False")
        is_usual = rows is None or rows == self._rows
        left = self._total - self.taken + 1
        uses = left if is_usual else left // self._in_epoch
        if uses < RECORDING and self._compile is True:
            reason = f"{uses} steps are over before recording one pays"
            return self._because(reason, rows, kind="short")
        if self._new["numbers"] >= RETRACES:
            return self._because(
                f"{', '.join(self._changes['numbers'][:3])} changed between steps; numbers of "
                "Python are baked into a graph, so make it a tensor, and fill_ it"
            )
        if self._new["tensors"] >= RETRACES:
            return self._because(
                f"{', '.join(self._changes['tensors'][:3])} became other tensors between steps; "
                "copy_ into the ones that were there"
            )
        index = None if order is None or rows is None else order[:rows].clone()
        inputs = self._data if index is None else (index, *self._data)

        def evaluate(*values: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            return self._evaluate(*values) if index is not None else self._evaluate(None, *values)

        try:
            with self._undone():
                graph = capture(evaluate, self._evaluate.leaves, *inputs)
            with self._undone():
                self._compare(graph, evaluate, index)
        except Untraceable as error:
            return self._because(str(error))
        rung = _Rung(graph, index)
        on_gpu = inputs[-1].device.type == "cuda" if inputs else False
        if self._compile == "now" or on_gpu:
            rung.start = self.taken
            return rung
        with self._undone():
            ahead = _takeover(graph, inputs)
        if uses >= (2 if is_usual else 1) * ahead:
            waiting = sum(r.start is not None and r.loaded is None for r in self._rungs.values())
            rung.start = self.taken + (1 + waiting) * ahead  # they are compiled one by one
        elif is_usual:
            reason = (
                f"{uses} steps are over before a compiler pays, at about {2 * ahead}; "
                "compile='now' waits for it"
            )
            self._reasons.setdefault("no compiler", reason)
        return rung

    def _because(self, reason: str, rows: int | None = None, *, kind: str = "") -> _Rung:
        if rows is None or rows == self._rows:  # not of the last batch of an epoch
            self._reasons.setdefault(kind or reason, reason)
        return _Rung()

    def _tell(self, reason: str) -> None:
        self._reasons[reason] = reason

    def _compare(self, graph: Graph, evaluate: Callable[..., Any], index: Tensor | None) -> None:
        """Compare a graph with the program, at other parameters and other rows, with the same seed.

        Raises:
            Untraceable: If they differ.
        """
        with seeded(1), torch.no_grad():
            for leaf in self._evaluate.leaves:
                leaf.add_((leaf.abs() + 0.01) * torch.randn_like(leaf) * 0.01)
            if index is not None:
                index = torch.randperm(self._evaluate.size)[: len(index)].to(index.device)
        inputs = self._data if index is None else (index, *self._data)
        with self._undone() as changes, seeded(2):
            facts = fingerprint(*self._evaluate.programs)
            others = _other_streams()
            try:
                bound, gradients = evaluate(*inputs)
            except (ValueError, RuntimeError) as error:
                raise Untraceable(f"a trial step failed ({str(error).splitlines()[0]})") from error
            changed = difference(facts, fingerprint(*self._evaluate.programs))
            changed = [name for name in changed if "__baseline" not in name]  # Pyro's averages
            if _other_streams() != others:
                raise Untraceable(
                    "the program draws numbers by `random` or numpy, which a graph holds as "
                    "constants; draw them by torch"
                )
            if changed:
                raise Untraceable(f"each run of the program changes {', '.join(changed[:3])}")
            expected = [bound, *(g for g in gradients if g is not None), torch.get_rng_state()]
            expected_changes = changes()
        with self._undone() as changes, seeded(2):
            try:
                got = [*graph(*inputs), torch.get_rng_state()]
            except RuntimeError as error:
                raise Untraceable(
                    "a shape depends on values, or on which rows are drawn"
                ) from error
            got_changes = changes()
        expected += [expected_changes[key] for key in sorted(expected_changes)]
        got += [got_changes[key] for key in sorted(got_changes)]
        if expected_changes.keys() != got_changes.keys() or not all(
            one.shape == other.shape and _close(one, other)
            for one, other in itertools.zip_longest(expected, got, fillvalue=torch.empty(0))
        ):
            raise Untraceable(
                "the graph computes something else than the program, which may use a value that is "
                "no tensor: a number drawn by `random`, or computed from data or parameters"
            )

    def _is_compiled(self, rung: _Rung) -> bool:
        """Whether a step is compiled by now: from a fixed step on, for which it waits."""
        if self._blocks is not None and self._blocks.moved():
            self._blocks.check(self._alone)
            self._blocks.settle()
            self._blocks = None
            self._tell("options or state of the optimiser changed: it steps outside the graph")
            for other in self._rungs.values():
                other.loaded, other.start = None, None
        if rung.start is None or rung.graph is None or not self.taken:
            return False  # the optimiser makes its state at the first step
        try:
            if self._blocks is None:
                self._blocks = Blocks(self._evaluate.leaves, self._optimizer)
            if rung.plan is not None or self._blocks.ready(rung.graph):
                self._blocks.turn_to(rung.graph, self._alone)
            if rung.loaded is not None:
                return True
            if rung.plan is None and not self._blocks.ready(rung.graph):
                return False
            if rung.plan is None:
                rung.plan = self._blocks.plan(rung.graph, rung.index, self._data)
                if reason := compile.refusal(rung.plan):
                    raise backend.Unsupported(reason)
                rung.built = compile.compiled(rung.plan)
            if self.taken < rung.start or rung.built is None:
                return False
            while not rung.built.done():
                if not self._wait():
                    return False  # the training is to end: this step is not what ends it
            rung.loaded = self._blocks.load(rung.plan, rung.built.result(), rung.index)
        except backend.Unsupported as error:
            rung.start, rung.loaded = None, None
            self._tell(f"not compiled: {error}")
            return False
        if self._blocks.reason:
            self._tell(self._blocks.reason)
        return True

    def _alone(self, order: Tensor | None, step: int) -> float:
        """Take a step again, with care, when a compiled one failed."""
        rung = self._rungs.get((self._version, None if order is None else len(order)), _Rung())
        return self._single(rung, order, again=step)

    def _single(self, rung: _Rung, order: Tensor | None, *, again: int = 0) -> float:
        if self._blocks is not None and not again:
            self._blocks.check(self._alone)
            self._blocks.settle()
        if rung.graph is not None:
            try:
                bound, gradients = self._by_graph(rung.graph, order)
            except RuntimeError:
                rung.graph, rung.start = None, None
                self._tell("a shape depends on values, or on which rows are drawn")
                bound, gradients = self._evaluate(order, *self._data)
        else:
            bound, gradients = self._evaluate(order, *self._data)
        value = bound.item()
        self._apply(value, gradients, again=again)
        if not again:
            self._count("traced graph" if rung.graph is not None else "vanilla step", 1)
        return value

    def _by_graph(self, graph: Graph, order: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        bound, *found = graph(*(self._data if order is None else (order, *self._data)))
        gradients: list[Tensor | None] = [None] * len(self._evaluate.leaves)
        for leaf, gradient in zip(graph.leaves, found, strict=True):
            gradients[leaf] = gradient
        return bound, gradients

    def _count(self, rung: str, steps: int) -> None:
        if rung == "compiled" and not self._used[rung]:
            self._since = self.taken - steps + 1
        self.rung = rung
        self._used[rung] += steps

    def _apply(self, bound: float, gradients: list[Tensor | None], *, again: int = 0) -> None:
        """Let the optimiser step, unless the bound or its gradient is not finite."""
        present = [gradient for gradient in gradients if gradient is not None]
        norm = torch.nn.utils.get_total_norm(present).item()
        if not (abs(bound) < float("inf") and norm < float("inf")):
            raise Diverged(
                f"the bound is {bound:.4g} and the norm of its gradient {norm:.4g}", again
            )
        for leaf, gradient in zip(self._evaluate.leaves, gradients, strict=True):
            # In the layout of the leaf: fused optimisers read both as flat memory, unchecked.
            leaf.grad = None if gradient is None else torch.empty_like(leaf).copy_(gradient)
        self._optimizer.step()
        if again:
            return
        self.taken += 1
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(-bound)
        elif self._schedule is not None:
            self._schedule.step()

    @contextmanager
    def _undone(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Run a block that leaves tensors, gradients, objects and random numbers as they were.

        It is given a function that returns copies of the tensors that have changed in it.
        """
        store: Any = pyro.get_param_store()
        before = store.get_state()
        held = self._held()
        saved = {name: value.detach().clone() for name, value in held.items()}
        gradients = [(value, value.grad) for value in held.values() if _is_leaf(value)]
        for value, _ in gradients:
            value.grad = None

        def changes() -> dict[str, Tensor]:
            now = held | dict(store.named_parameters())  # where an entry may be another tensor
            pairs = ((name, now[name].detach(), old) for name, old in saved.items())
            return {name: value.clone() for name, value, old in pairs if not _same(value, old)}

        try:
            with seeded(0), objects_undone(*self._evaluate.programs):
                yield changes
        finally:
            with torch.no_grad():
                for name, old in saved.items():
                    if not _same(held[name], old):
                        held[name].copy_(old)
            for value, gradient in gradients:
                value.grad = gradient
            store.clear()
            store.set_state(before)

    def _held(self) -> dict[str, Tensor]:
        """What a step may change: Pyro's store, what the programs hold, and what is trained."""
        store = dict(pyro.get_param_store().named_parameters())
        found = [*reached(*self._evaluate.programs), *self._evaluate.leaves]
        others = {id(v): v for v in found if v.layout == torch.strided}
        for value in store.values():
            others.pop(id(value), None)
        return store | {f"tensor {place}": value for place, value in enumerate(others.values())}


def _other_streams() -> tuple[int, int]:
    """Where the random numbers are that are no torch's."""
    state: Any = np.random.get_state()  # noqa: NPY002 - the one that programs use without asking
    return hash(random.getstate()), hash((state[1].tobytes(), *state[2:]))


def _is_leaf(value: Tensor) -> bool:
    """Whether a gradient may lie beside a tensor."""
    try:
        return value.is_leaf
    except RuntimeError:  # a view, made without gradients, of a parameter that has moved since
        return False


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    slack = 1e-4 if torch.float32 in (one.dtype, other.dtype) else 1e-9
    one, other = one.double(), other.double()
    scale = one.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=slack, atol=slack * scale, equal_nan=True)


def _takeover(graph: Graph, inputs: tuple[Tensor, ...]) -> int:
    """The step from which a compiled graph is to serve: the same whenever the graph is the same.

    By then the recorded graph has worked for about as long as a compiler takes, so nobody waits.
    It is an estimate from operations, not a clock, so that results stay reproducible.
    """
    with FlopCounterMode(display=False) as counter:
        graph(*inputs)
    seconds = 1.2e-6 * graph.nodes + counter.get_total_flops() / 6e10 + 3e-5
    return int((4.0 + 0.01 * graph.nodes) / seconds)

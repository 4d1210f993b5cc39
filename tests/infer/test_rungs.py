"""The rungs of a step: the recorded graph is the program, the compiled one is the graph."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized
from guides.registry import PAIRS
from ppl_models import VAE
from ppl_models.core.batch import as_batch, moved
from ppl_models.core.minibatch import minibatch
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.store import own_parameters
from ppl_models.core.types import Batch
from ppl_models.infer import ELBO, backend, compile, fit
from ppl_models.infer.capture import capture
from ppl_models.infer.step import Evaluation
from ppl_models.infer.svi import _leaves

from .odd_models import CASES, Case, Decoder, LinearGuide, Programs, real


def _pair(pair: Any) -> Programs:
    model = pair.model().to(torch.get_default_dtype())
    return model, pair.guide(model, 10), pair.batch(model, 10)


OF_PAIRS = [Case(p.name, partial(_pair, p), ELBO, 4 if p.row_wise else None) for p in PAIRS]
NAMED = {case.name: case for case in [*CASES, *OF_PAIRS]}

LATE = "a baseline that is a decaying average"


def of(cases: list[Case]) -> Any:
    """Run a test on each of some cases."""
    listed = [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]
    return pytest.mark.parametrize("case", listed)


def made(case: Case) -> Programs:
    torch.manual_seed(1)
    pyro.clear_param_store()
    return case.make()


@contextmanager
def evaluation(case: Case, rows: int | None) -> Iterator[tuple[Evaluation, Batch]]:
    """What `fit` evaluates at each step of so many rows, where it evaluates it."""
    model, guide, data = made(case)
    batch = as_batch(data, model, guide)
    size = len(batch[0]) if batch else 1
    objective = case.objective()
    with moved(None, model, guide), own_parameters(model, guide), torch.enable_grad():
        part = tuple(value[:rows] for value in batch)
        scaled = nullcontext() if rows is None else minibatch(torch.arange(rows), size)
        with scaled, evaluation_mode(model, guide):
            leaves, _ = _leaves(model, guide, part, fixed_model=False, enumerates=True)
            if isinstance(objective, ELBO):
                objective = objective.prepare(model, guide, *part)
        evaluate = Evaluation(model, guide, objective, leaves, "data", size)
        evaluate(None if rows is None else torch.arange(rows), *batch)  # the first step of a fit
        yield evaluate, batch


def state(evaluate: Evaluation) -> dict[str, Tensor]:
    found = {f"pyro.param {k}": v for k, v in pyro.get_param_store().named_parameters()}
    for program in (evaluate.model, evaluate.guide):
        if isinstance(program, nn.Module):
            found |= {f"{id(program)} {k}": v for k, v in program.named_parameters()}
            found |= {f"{id(program)} {k}": v for k, v in program.named_buffers()}
    return found


@contextmanager
def undone(evaluate: Evaluation) -> Iterator[None]:
    """Run a block, and put parameters, buffers, store and random numbers back."""
    store: Any = pyro.get_param_store()
    entries, stream = store.get_state(), torch.get_rng_state()
    before = [(value, value.detach().clone()) for value in state(evaluate).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in before:
                value.copy_(old)
        store.clear()
        store.set_state(entries)
        torch.set_rng_state(stream)


def outcome(evaluate: Evaluation, seed: int, run: Callable[[], Any]) -> dict[str, Tensor | None]:
    """All that an evaluation leaves behind."""
    with undone(evaluate):
        torch.manual_seed(seed)
        bound, gradients = run()
        told = {"bound": bound, "stream": torch.get_rng_state()}
        told |= {f"gradient {place}": value for place, value in enumerate(gradients)}
        return told | {name: value.detach().clone() for name, value in state(evaluate).items()}


def agree(case: Case, rows: int | None) -> None:
    """Record an evaluation, change parameters and rows, and compare it with the program."""
    with evaluation(case, rows) as (evaluate, batch):
        shape = () if rows is None else (torch.randperm(evaluate.size)[:rows],)

        def run(*inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            return evaluate(*inputs) if shape else evaluate(None, *inputs)

        with undone(evaluate):
            graph = capture(run, evaluate.leaves, *shape, *batch)

        def replay(*inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            bound, *found = graph(*inputs)
            gradients: list[Tensor | None] = [None] * len(evaluate.leaves)
            for place, gradient in zip(graph.leaves, found, strict=True):
                gradients[place] = gradient
            return bound, gradients

        with torch.no_grad():
            for leaf in evaluate.leaves:
                leaf.add_(0.1 * torch.randn_like(leaf))
        if shape:
            inputs = (torch.randperm(evaluate.size)[:rows], *batch)
        else:
            again = torch.randint(evaluate.size, (evaluate.size,))
            local = "local" in case.name  # a parameter for each row: others come in their places
            inputs = batch if local else tuple(value[again] for value in batch)
        for seed in (2, 3):
            want = outcome(evaluate, seed, partial(run, *inputs))
            got = outcome(evaluate, seed, partial(replay, *inputs))
            assert got.keys() == want.keys()
            for name, value in want.items():
                other = got[name]
                if value is None or other is None:
                    assert value is other, name
                else:
                    assert value.dtype == other.dtype, name
                    assert torch.equal(value, other), name
            assert bool(torch.isfinite(want["bound"]).all())  # pyright: ignore[reportArgumentType]


@of([case for case in CASES if case.rows is None] + OF_PAIRS)
def test_a_recorded_evaluation_is_the_program_at_other_parameters_and_rows(case: Case) -> None:
    agree(case, None)


@of([case for case in [*CASES, *OF_PAIRS] if case.rows is not None])
def test_a_recorded_minibatch_is_the_program_on_other_rows(case: Case) -> None:
    agree(case, case.rows)


IN_SINGLE = (
    "batch norm and dropout",
    "a gamma latent",
    "a mixture, enumerated in the model",
    "functions with pyro.param, Trace_ELBO",
    "correlations and a multivariate normal",
    "vae-maf",
)


@of([NAMED[name] for name in IN_SINGLE])
def test_a_recorded_minibatch_is_the_program_in_single_precision(case: Case) -> None:
    torch.set_default_dtype(torch.float32)
    agree(case, case.rows)


def test_another_program_than_the_recorded_one_is_told_apart() -> None:
    factor = [1.0]

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        factor[0] *= 1.0 + 1e-15
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc * factor[0], 1.0), obs=x)

    case = Case("", lambda: (model, lambda x: None, (real(7),)), ELBO, None)
    with pytest.raises(AssertionError, match="bound|gradient"):
        agree(case, None)


# What follows goes through `fit`. Without a compiler, "now" is the recorded graph at every step.


@pytest.fixture
def recorded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")


def trained(
    case: Case,
    compile: Any,
    *,
    change: Callable[[Any], None] | None = None,
    after: tuple[int, ...] = (),
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Fit from the same start, with a change after some steps; return what all values are then."""
    model, guide, data = made(case)
    batch_size = case.rows or (len(data[0]) if data else None)
    chosen = {"objective": case.objective(), "batch_size": batch_size, "steps": 7, "lr": 0.01}

    def callback(step: int, bound: float) -> None:
        if change is not None and step in after:
            change(model)

    chosen |= {"callbacks": [callback]} if change is not None else {}
    result = fit(model, guide, data, seed=0, compile=compile, **(chosen | options))
    values = dict(pyro.get_param_store().named_parameters())
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            values |= {f"{role} {name}": value for name, value in program.state_dict().items()}
    return result, {name: value.detach().clone() for name, value in values.items()}


def same_training(case: Case, **options: Any) -> Any:
    """Train by the program and by its recorded graph, and compare; return the latter."""
    by_program, want = trained(case, False, **options)
    recorded, got = trained(case, "now", **options)
    assert torch.equal(recorded.bounds, by_program.bounds)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    return recorded


IN_FIT = (
    "a module with a constraint and a prior",
    "functions with pyro.param, ELBO",
    "a parameter of the store shared by model and guide",
    "frozen parameters",
    "a parameter without a gradient",
    "no arguments",
    "AutoNormal",
    "AutoStructured",
    "batch norm and dropout",
    "a plate that subsamples by itself",
    "a mixture, enumerated in the model",
    "a baseline that is a network",
    "a decaying average that an earlier fit left",
    LATE,
    "ReweightedWakeSleep",
    "ELBO with analytic KL, of particles at once",
    "vae-local",
)


@pytest.mark.usefixtures("recorded_only")
@of([NAMED[name] for name in IN_FIT])
def test_training_by_recorded_graphs_is_training_by_the_program(case: Case) -> None:
    told = same_training(case).compiled
    assert told.startswith("traced graph; not compiled: PPL_MODELS_COMPILER=none")


@pytest.mark.usefixtures("recorded_only")
def test_a_training_that_waits_for_nothing_is_recorded_if_it_is_long_enough() -> None:
    case = NAMED["two arguments"]
    by_program, want = trained(case, False, steps=160, batch_size=11)
    recorded, got = trained(case, True, steps=160, batch_size=11)
    short, _ = trained(case, True, steps=5, batch_size=11)
    assert torch.equal(recorded.bounds, by_program.bounds)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert recorded.compiled.startswith("traced graph")
    assert short.compiled == "vanilla step; 5 steps are over before recording one pays"


@pytest.mark.usefixtures("recorded_only")
def test_what_functions_reach_is_as_if_nothing_had_been_recorded() -> None:
    calls = torch.zeros(())
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def model(x: Tensor) -> None:
        calls.add_(1)
        decoder: Any = pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", lambda: torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, 0.5).to_event(1))

    counts = []
    for rung in (False, "now"):
        pyro.clear_param_store()
        calls.zero_()
        net[1].reset_running_stats()
        told = fit(model, guide, real(11, 2), steps=7, seed=0, compile=rung).compiled
        counts.append((int(calls), int(net[1].num_batches_tracked)))
    assert told.startswith("traced graph")
    assert counts[0] == counts[1]


# Refusals: the program runs, and the reason names what to change.


def _refused(body: Callable[[Tensor, Tensor], Any]) -> Programs:
    """A model that does something odd with a latent of each row and the data."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * body(z, x), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, 0.5))

    return model, guide, (real(11),)


def _branch(z: Tensor, x: Tensor) -> float:
    if z.mean() > 0:
        return 0.5
    return 0.7


def _number(z: Tensor, x: Tensor) -> float:
    return 1.0 + 0.1 * float(x.sum())


def _listed(z: Tensor, x: Tensor) -> float:
    return 1.0 + 0.1 * sum(x.tolist())


def _random(z: Tensor, x: Tensor) -> float:
    return 1.0 + random.random()


class Counting(LinearGuide):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, *rest: Tensor) -> None:
        self.calls += 1
        super().forward(x)


def _circular() -> Programs:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.VonMises(gain * x, 2.0))

    return model, guide, (real(11),)


def _some_in_a_loop() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for row in pyro.plate("some", len(x), subsample_size=3):
            pyro.sample(f"x_{int(row)}", dist.Normal(loc, 1.0), obs=x[int(row)])

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("centre", torch.tensor(0.1)), 0.5))

    return model, guide, (real(11),)


REFUSED: dict[str, tuple[Callable[[], Programs], tuple[str, ...]]] = {
    "rejection": (_circular, ("VonMises", "a loop whose length depends on the values", '"angle"')),
    "if": (partial(_refused, _branch), ("test_rungs.py:", "if z.mean() > 0", "torch.where")),
    "float": (partial(_refused, _number), ("test_rungs.py:", "float(x.sum())", "Python number")),
    "tolist": (partial(_refused, _listed), ("test_rungs.py:", "x.tolist()")),
    "random": (partial(_refused, _random), ("draws numbers by `random`",)),
    "counter": (
        lambda: (Decoder(), Counting(), (real(11, 2),)),
        ("each run of the program changes Counting.calls",),
    ),
    "loop over some rows": (
        _some_in_a_loop,
        ("plate 'some' draws 3 of its 11 rows", "with pyro.plate"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(what: str) -> None:
    make, words = REFUSED[what]
    objective = Trace_ELBO if what == "loop over some rows" else ELBO
    case = Case(what, make, objective, None)
    random.seed(0)
    by_program, want = trained(case, False)
    random.seed(0)
    tried, got = trained(case, "now")
    assert tried.compiled.startswith("vanilla step; ")
    for word in words:
        assert word in tried.compiled
    assert torch.equal(tried.bounds, by_program.bounds)
    assert all(torch.equal(got[name], want[name]) for name in want)


class Moving(LinearGuide):
    """A guide that moves whatever it holds; none of it makes a difference to its first runs."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.total = torch.zeros(())
        self.register_buffer("seen", torch.zeros(()))
        self.steps = iter(range(1000))
        self.own = np.random.default_rng(0)
        self.shared = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor, *rest: Tensor) -> None:
        type(self).made += 1
        self.log.append(next(self.steps))
        self.total = self.total + 1
        self.seen = self.seen + 1
        self.last = (self.own.random(), random.random())
        super().forward(x)


def test_recording_a_program_on_trial_leaves_the_objects_that_it_holds() -> None:
    ends = []
    for mode in (False, "now"):
        random.seed(0)
        torch.manual_seed(0)
        Moving.made, guide = 0, Moving()
        case = Case(
            "moving", partial(lambda *made: made, Decoder(), guide, (real(11, 2),)), ELBO, None
        )
        result, _ = trained(case, mode)
        ends.append((guide.made, guide.log, guide.total, guide.seen, guide.last, next(guide.steps)))
        assert result.compiled.startswith("vanilla step")
    assert ends[0] == ends[1]


# Guards: what a callback changes between steps is seen at the next one.


class Annealed(Decoder):
    """A decoder with what users change between steps: a mode, a number, a tensor."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
        )
        self.weight = 1.0
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor) -> None:
        with poutine.scale(scale=self.weight), poutine.scale(scale=self.temperature):
            super().forward(x)


class AnnealedGuide(LinearGuide):
    def __init__(self, model: Annealed) -> None:
        super().__init__()
        self.decoder = [model]  # no part of the guide: it reads the same numbers

    def forward(self, x: Tensor, *rest: Tensor) -> None:
        model = self.decoder[0]
        with poutine.scale(scale=model.weight), poutine.scale(scale=model.temperature):
            super().forward(x)


def _rebound(model: Annealed) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.detach() + 0.1


def _assigned(model: Annealed) -> None:
    state = {name: value.detach() + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _loaded(model: Annealed) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def _evaluated(model: Annealed) -> None:
    model.train(not model.training)


def _number_changed(model: Annealed) -> None:
    model.weight = 0.5


def _tensor_filled(model: Annealed) -> None:
    model.temperature.fill_(0.5)  # pyright: ignore[reportCallIssue]


def _buffer_replaced(model: Annealed) -> None:
    model.temperature = torch.tensor(0.5)


def _frozen(model: Annealed) -> None:
    model.log_scale.requires_grad_(not model.log_scale.requires_grad)


def _layer_replaced(model: Annealed) -> None:
    model.net[1] = nn.ReLU()  # pyright: ignore[reportIndexIssue]


CHANGES = (
    _rebound,
    _assigned,
    _loaded,
    _evaluated,
    _number_changed,
    _tensor_filled,
    _buffer_replaced,
    _layer_replaced,
)


def _annealed() -> Programs:
    model = Annealed()
    return model, AnnealedGuide(model), (real(11, 2),)


@pytest.mark.usefixtures("recorded_only")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_between_steps_is_seen_by_the_next_step(change: Callable[[Any], None]) -> None:
    case = Case("", _annealed, ELBO, None)
    changed = same_training(case, steps=9, change=change, after=(4,))
    assert changed.compiled.startswith("traced graph")
    assert "vanilla step" not in changed.compiled
    left, _ = trained(case, False, steps=9)
    assert torch.equal(left.bounds[:4], changed.bounds[:4])
    assert not torch.equal(left.bounds[4], changed.bounds[4])


@pytest.mark.usefixtures("recorded_only")
@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO,
        ELBO,
    ],
)
def test_a_parameter_frozen_for_some_steps_stays_for_these(objective: Any) -> None:
    case = Case("", _annealed, objective, None)
    changed = same_training(case, steps=9, change=_frozen, after=(3, 6))
    assert changed.compiled.startswith("traced graph; not compiled: PPL_MODELS_COMPILER=none")
    left, _ = trained(case, False, steps=9)
    assert torch.equal(left.bounds[:4], changed.bounds[:4])
    assert not torch.equal(left.bounds[4], changed.bounds[4])


@pytest.mark.usefixtures("recorded_only")
def test_an_entry_of_the_store_that_is_replaced_is_seen_by_the_next_step() -> None:
    def change(model: Any) -> None:
        store = pyro.get_param_store()
        store["scale"] = store["scale"].detach() * 1.5

    case = NAMED["functions with pyro.param, ELBO"]
    changed = same_training(case, change=change, after=(3,))
    left, _ = trained(case, False)
    assert torch.equal(left.bounds[:3], changed.bounds[:3])
    assert not torch.equal(left.bounds[3], changed.bounds[3])


@pytest.mark.usefixtures("recorded_only")
def test_what_goes_back_and_forth_finds_its_graphs_again() -> None:
    case = Case("", _annealed, ELBO, 4)
    told = same_training(case, steps=20, change=_evaluated, after=tuple(range(1, 20)))
    assert told.compiled.startswith("traced graph; not compiled: PPL_MODELS_COMPILER=none")


@pytest.mark.usefixtures("recorded_only")
def test_a_number_that_changes_at_every_step_is_named_and_the_program_runs() -> None:
    def anneal(model: Annealed) -> None:
        model.weight *= 0.9

    case = Case("", _annealed, ELBO, 4)
    told = same_training(case, steps=12, change=anneal, after=tuple(range(1, 12))).compiled
    assert "Annealed.weight changed between steps" in told
    assert "make it a tensor, and fill_ it" in told


@pytest.mark.usefixtures("recorded_only")
def test_a_tensor_that_is_filled_at_every_step_needs_one_graph() -> None:
    def anneal(model: Annealed) -> None:
        model.temperature.mul_(0.9)  # pyright: ignore[reportCallIssue]

    case = Case("", _annealed, ELBO, 4)
    told = same_training(case, steps=12, change=anneal, after=tuple(range(1, 12))).compiled
    assert told.startswith("traced graph; not compiled: PPL_MODELS_COMPILER=none")


def test_a_change_is_seen_when_the_compiler_is_not_waited_for() -> None:
    case = Case("", _annealed, ELBO, 4)
    by_program, _ = trained(case, False, steps=160, change=_rebound, after=(80,))
    recorded, _ = trained(case, True, steps=160, change=_rebound, after=(80,))
    assert recorded.compiled.startswith("traced graph")
    assert torch.equal(recorded.bounds, by_program.bounds)


# Under the compiler: to rounding.


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache of compiled steps."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        pytest.skip("there is no C++ compiler here: g++ or clang++")
    if reason := backend.compiles_here():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PPL_MODELS_COMPILER", raising=False)
        patch.setenv("PPL_MODELS_CACHE", str(folder))
        compile.folder.cache_clear()
        yield folder
    compile.folder.cache_clear()


def _whole(name: str) -> Case:
    """A case with all rows in each step: one graph to compile."""
    return replace(NAMED[name], rows=None)


def _vae_and_smaller_last_batch() -> Programs:
    model = VAE(data_dim=6, latent_dim=2, hidden=(8,))
    return model, Amortized(model, hidden=(8,)), (torch.bernoulli(torch.full((11, 6), 0.4)),)


COMPILED: dict[str, tuple[Case, Callable[..., Any]]] = {
    "vae, Adam": (Case("", _vae_and_smaller_last_batch, ELBO, 4), torch.optim.Adam),
    "mixture, SGD": (
        _whole("a mixture, enumerated in the model"),
        partial(torch.optim.SGD, momentum=0.9),
    ),
    "batch norm, SGD": (_whole("batch norm and dropout"), partial(torch.optim.SGD, momentum=0.5)),
    "gamma, Adam": (_whole("a gamma latent"), torch.optim.Adam),
    "pyro.param, ClippedAdam": (_whole("functions with pyro.param, ELBO"), ClippedAdam),
    "pyro.param, RMSprop": (_whole("functions with pyro.param, ELBO"), torch.optim.RMSprop),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "what",
    COMPILED,
)
def test_training_by_compiled_steps_is_training_by_the_program(what: str) -> None:
    case, make = COMPILED[what]
    kept: list[Any] = []

    def optimizer(parameters: Any, lr: float) -> Any:
        kept.append(make(parameters, lr=lr))
        return kept[-1]

    by_program, want = trained(case, False, steps=30, optimizer=optimizer)
    compiled, got = trained(case, "now", steps=30, optimizer=optimizer)
    assert compiled.compiled.startswith("compiled from step 2")
    assert ("RMSprop steps outside" in compiled.compiled) == ("RMSprop" in what)
    close(compiled.bounds, by_program.bounds)
    assert got.keys() == want.keys()
    for name, value in want.items():
        close(got[name], value)
    states = [list(one.state_dict()["state"].values()) for one in kept]
    assert states[0]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            close(torch.as_tensor(other[name]), torch.as_tensor(value))


def close(got: Tensor, want: Tensor) -> None:
    """Equal to rounding, of a tensor as a whole."""
    scale = 1e-8 * max(1e-6, want.abs().max().item())
    assert_close(got, want, rtol=0.0, atol=scale)


def test_a_compiled_training_sees_what_is_changed_between_steps(compiler: Path) -> None:
    case = Case("", _vae_and_smaller_last_batch, ELBO, 4)

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.detach() * 1.1

    by_program, want = trained(case, False, steps=30, change=change, after=(10, 20))
    compiled, got = trained(case, "now", steps=30, change=change, after=(10, 20))
    assert compiled.compiled.startswith("compiled")
    close(compiled.bounds, by_program.bounds)
    for name, value in want.items():
        close(got[name], value)


def test_parameters_that_joined_later_are_counted_by_themselves(compiler: Path) -> None:
    kept: list[Any] = []

    def optimizer(parameters: Any, lr: float) -> Any:
        kept.append(torch.optim.Adam(parameters, lr=lr))
        return kept[-1]

    case = Case("", _annealed, ELBO, None)
    options = {"steps": 20, "change": _frozen, "after": (6, 12), "optimizer": optimizer}
    by_program, want = trained(case, False, **options)
    compiled, got = trained(case, "now", **options)
    assert compiled.compiled.startswith("compiled from step 2")
    assert "have taken different numbers" in compiled.compiled
    assert "traced graph: 8 of 20" in compiled.compiled
    close(compiled.bounds, by_program.bounds)
    for name, value in want.items():
        close(got[name], value)
    counts = [[float(s["step"]) for s in one.state.values()] for one in kept]
    assert counts[0] == counts[1]
    assert set(counts[0]) == {14.0, 20.0}

"""Steps on the rungs of the ladder: which one serves, from when, and what a failure leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.testing import assert_close

from guides import Amortized
from ppl_models import VAE
from ppl_models.infer import Fit, compile, fit, step


def trained(**options: Any) -> tuple[Fit, list[Tensor]]:
    """Train a tiny VAE, the same one each time, on 20 rows, by default 10 at a time."""
    torch.manual_seed(0)
    model = VAE(data_dim=5, latent_dim=2, hidden=(4,))
    guide = Amortized(model, hidden=(4,))
    x = torch.bernoulli(torch.full((20, 5), 0.4))
    options = {"steps": 40, "batch_size": 10, "lr": 0.02, "seed": 3} | options
    result = fit(model, guide, x, **options)
    return result, [value.detach() for value in (*model.parameters(), *guide.parameters())]


def assert_same(one: tuple[Fit, list[Tensor]], other: tuple[Fit, list[Tensor]]) -> None:
    assert_close(one[0].bounds, other[0].bounds, rtol=1e-9, atol=1e-9)
    assert_close(one[1], other[1], rtol=1e-7, atol=1e-9)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled graph take over after 10 steps, and record at once."""
    monkeypatch.setattr(step, "_takeover", lambda graph, inputs: 10)
    monkeypatch.setattr(step, "RECORDING", 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "a smaller last batch": {"batch_size": 8},
    "all rows": {"batch_size": 20},
    "sgd with momentum": {"optimizer": partial(torch.optim.SGD, momentum=0.9)},
    "adamw": {"optimizer": partial(torch.optim.AdamW, weight_decay=0.1)},
    "clipped adam, decaying": {"optimizer": partial(ClippedAdam, clip_norm=0.1, lrd=0.9)},
    "outside the graph": {"optimizer": torch.optim.RMSprop},
    "a schedule": {"schedule": partial(CosineAnnealingLR, T_max=40)},
    "a schedule that looks at the bound": {
        "schedule": partial(ReduceLROnPlateau, patience=2, factor=0.5)
    },
    "two groups": {
        "optimizer": lambda leaves, lr: torch.optim.Adam(
            [{"params": leaves[:3], "lr": lr}, {"params": leaves[3:], "lr": lr / 5}]
        )
    },
    "some of the parameters": {"optimizer": lambda leaves, lr: torch.optim.Adam(leaves[:3], lr=lr)},
    "callbacks": {"callbacks": (lambda number, bound: None,)},
    "the guide only": {"fixed_model": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_steps_are_vanilla_steps_to_rounding(name: str) -> None:
    compiled = trained(compile="now", **OPTIONS[name])
    assert compiled[0].compiled.startswith("compiled from step 2 (torch")
    assert_same(compiled, trained(compile=False, **OPTIONS[name]))


@pytest.mark.usefixtures("early")
def test_a_step_taken_over_from_is_fixed_so_that_a_cold_and_a_warm_cache_give_the_same_bits(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPL_MODELS_CACHE", str(tmp_path))
    cold, warm = trained(compile=True), trained(compile=True)
    assert cold[0].compiled.startswith("compiled from step 12 (torch")
    assert torch.equal(cold[0].bounds, warm[0].bounds)
    assert all(map(torch.equal, cold[1], warm[1]))
    assert_same(cold, trained(compile=False))


def test_nobody_waits_for_what_does_not_pay() -> None:
    asked: list[Any] = []
    result, _ = trained(steps=20)
    assert result.compiled == "vanilla step; 20 steps are over before recording one pays"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "compiled", asked.append)
        result, _ = trained(steps=400)
    assert result.compiled.startswith("traced graph; 400 steps are over before a compiler pays")
    assert not asked


@pytest.mark.usefixtures("early")
def test_without_a_compiler_the_traced_graph_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")
    traced = trained(compile=True)
    assert traced[0].compiled == "traced graph; not compiled: PPL_MODELS_COMPILER=none"
    vanilla = trained(compile=False)
    assert torch.equal(traced[0].bounds, vanilla[0].bounds)
    assert all(map(torch.equal, traced[1], vanilla[1]))


@pytest.mark.usefixtures("early")
def test_on_a_torch_that_is_not_tested_the_traced_graph_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    result, _ = trained(compile=True)
    assert "the compiler is tested on torch 2.13, this is 2.99.0" in result.compiled


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fit: compile must be True, False or 'now', got 'yes'\."):
        trained(compile="yes")


class Failing(nn.Module):
    """A bound that stops being finite when a number, which falls with each step, is negative."""

    def __init__(self, gradient_only: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.tensor(10.05))
        self.gradient_only = gradient_only

    def forward(self) -> None:
        pyro.module("failing", self)
        # The second one is 0 where `left` is negative, with a gradient of 0 times infinity.
        root = (self.left * (self.left > 0)).sqrt() if self.gradient_only else self.left.sqrt()
        pyro.factor("cost", -root - self.left)
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _guide() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("mode", [False, "now"])
def test_a_step_that_is_not_finite_leaves_the_parameters_from_before_it(
    gradient_only: bool, mode: Any
) -> None:
    """SGD of slope 1 or more goes down by its own steps, and fails at the same one on each rung."""
    model = Failing(gradient_only)
    sgd = partial(torch.optim.SGD)
    with pytest.raises(FloatingPointError, match=r"fit: at step \d+") as caught:
        fit(model, _guide, steps=500, lr=0.05, optimizer=sgd, seed=0, compile=mode)
    number = int(str(caught.value).split("at step ")[1].split()[0])
    again = Failing(gradient_only)
    fit(again, _guide, steps=number - 1, lr=0.05, optimizer=sgd, seed=0, compile=False)
    assert number > 50
    assert_close(model.left, again.left, rtol=1e-9, atol=1e-12)
    assert model.left.grad is None


def test_a_gradient_that_fails_at_the_last_step_is_told_though_no_bound_shows_it() -> None:
    numbers = []
    for mode in (False, "now"):
        with pytest.raises(FloatingPointError, match=r"fit: at step \d+") as caught:
            fit(Failing(True), _guide, steps=500, lr=0.05, optimizer=torch.optim.SGD, compile=mode)
        numbers.append(int(str(caught.value).split("at step ")[1].split()[0]))
    last = numbers[0]
    model = Failing(True)
    with pytest.raises(FloatingPointError, match=rf"fit: at step {last} "):
        fit(model, _guide, steps=last, lr=0.05, optimizer=torch.optim.SGD, compile="now")
    assert numbers == [last, last]
    assert torch.isfinite(model.left)


class Overflowing(nn.Module):
    """A bound that stays finite where the norm of its gradient does not: Adam would stand still."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.tensor([10.05, 10.05]))

    def forward(self) -> None:
        pyro.module("overflowing", self)
        steep = 1e200 * (self.left - 9.0).clamp(max=0.0)
        pyro.factor("cost", (steep - self.left).sum())
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("steps", [22, 23, 60])
def test_a_gradient_that_is_not_finite_ends_the_training_on_each_rung_though_the_bound_is(
    steps: int,
) -> None:
    ends = []
    for mode in (False, "now"):
        model = Overflowing()
        said = ""
        try:
            fit(model, _guide, steps=steps, lr=0.05, seed=0, compile=mode)
        except FloatingPointError as error:
            said = str(error)
        ends.append((said, model.left.detach()))
    assert ("the norm of its gradient inf" in ends[0][0]) == (steps > 22)
    assert ends[0][0] == ends[1][0]
    assert_close(ends[0][1], ends[1][1], rtol=1e-9, atol=1e-12)


def test_ctrl_c_ends_the_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    never: Future[Any] = Future()
    monkeypatch.setattr(compile, "compiled", lambda plan: never)
    timer = threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    result, _ = trained(compile="now")
    timer.join()
    assert result.interrupted
    assert result.steps == 2


def test_the_optimiser_counts_compiled_steps() -> None:
    made: list[torch.optim.Optimizer] = []

    def factory(leaves: list[Tensor], lr: float) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(leaves, lr=lr))
        return made[-1]

    trained(compile="now", optimizer=factory)
    trained(compile=False, optimizer=factory)
    for one, other in zip(*(list(o.state.values()) for o in made), strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-12)
        assert one["step"] == 40


def test_data_that_are_drawn_anew_each_epoch_are_drawn_for_compiled_steps_too() -> None:
    from ppl_models.core.dynamic import Dynamic

    def run(mode: Any) -> Tensor:
        torch.manual_seed(0)
        model = VAE(data_dim=5, latent_dim=2, hidden=(4,))
        x = Dynamic(torch.full((20, 5), 0.4))
        guide = Amortized(model, hidden=(4,))
        return fit(model, guide, x, steps=40, batch_size=10, seed=1, compile=mode).bounds

    assert_close(run("now"), run(False), rtol=1e-9, atol=1e-9)


def test_a_callback_that_ends_the_training_ends_it_at_that_step() -> None:
    result, _ = trained(compile="now", callbacks=(lambda number, bound: number == 25,))
    assert (result.steps, result.interrupted) == (25, True)


def annealed(mode: Any, change: Callable[[Any, int], None]) -> tuple[Tensor, str]:
    class Tempered(VAE):
        beta = 1.0

        def likelihood(self, z: Tensor) -> Any:
            return super().likelihood(self.beta * z)

    torch.manual_seed(0)
    model = Tempered(data_dim=5, latent_dim=2, hidden=(4,))
    model.beta = 1.0
    x = torch.bernoulli(torch.full((20, 5), 0.4))
    result = fit(
        model,
        Amortized(model, hidden=(4,)),
        x,
        steps=60,
        seed=1,
        compile=mode,
        callbacks=(lambda number, bound: change(model, number),),
    )
    return result.bounds, result.compiled


def test_a_number_that_changes_once_is_recorded_again() -> None:
    def change(model: Any, number: int) -> None:
        model.beta = 0.3 if number >= 30 else 1.0

    bounds, told = annealed("now", change)
    assert told.startswith("compiled from step 2")
    assert_close(bounds, annealed(False, change)[0], rtol=1e-9, atol=1e-9)


def test_parameters_that_are_replaced_are_told_once_as_no_longer_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")

    def change(model: Any, number: int) -> None:
        if number in (20, 25, 30):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)

    bounds, told = annealed("now", change)
    assert told.startswith("traced graph; ")
    assert told.count("which is not trained: copy_ into the one that is") == 1
    assert "pyro.param" not in told
    assert "numbers of Python" not in told
    assert_close(bounds, annealed(False, change)[0], rtol=1e-9, atol=1e-9)


def test_a_number_that_changes_with_every_step_is_named_and_the_programs_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")

    def change(model: Any, number: int) -> None:
        model.beta = number / 60

    bounds, told = annealed("now", change)
    assert "Tempered.beta changed between steps" in told
    assert_close(bounds, annealed(False, change)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_replayed_on_a_gpu_are_vanilla_steps_to_rounding(name: str) -> None:
    replayed = trained(compile=True, device="cuda", steps=200, **OPTIONS[name])
    assert replayed[0].compiled.startswith("compiled")
    vanilla = trained(compile=False, device="cuda", steps=200, **OPTIONS[name])
    assert_same(replayed, vanilla)


@pytest.fixture(autouse=True)
def _fresh_folder() -> Iterator[None]:
    compile.folder.cache_clear()
    yield
    compile.folder.cache_clear()


def test_a_schedule_of_more_than_the_rate_steps_outside_the_compiled_graph() -> None:
    options = {"schedule": partial(OneCycleLR, max_lr=0.1, total_steps=80)}
    compiled = trained(compile="now", **options)
    assert "options or state of the optimiser changed" in compiled[0].compiled
    assert_same(compiled, trained(compile=False, **options))


def test_options_that_a_callback_changes_are_followed() -> None:
    def run(mode: Any) -> tuple[Fit, list[Tensor]]:
        made: list[torch.optim.Optimizer] = []

        def factory(leaves: list[Tensor], lr: float) -> torch.optim.Optimizer:
            made.append(torch.optim.Adam(leaves, lr=lr))
            return made[-1]

        def change(number: int, bound: float) -> None:
            if number == 20:
                made[0].param_groups[0]["weight_decay"] = 1.0

        return trained(compile=mode, optimizer=factory, callbacks=(change,))

    assert_same(run("now"), run(False))


@pytest.mark.parametrize("reset", [False, True])
def test_callbacks_read_and_set_the_counters_of_the_optimiser(reset: bool) -> None:
    def run(mode: Any) -> tuple[tuple[Fit, list[Tensor]], list[float]]:
        made: list[torch.optim.Optimizer] = []
        seen: list[float] = []

        def factory(leaves: list[Tensor], lr: float) -> torch.optim.Optimizer:
            made.append(torch.optim.Adam(leaves, lr=lr))
            return made[-1]

        def change(number: int, bound: float) -> None:
            for state in made[0].state.values():
                seen.append(state["step"].item())
                if reset and number == 20:
                    state["step"].zero_()

        return trained(compile=mode, optimizer=factory, callbacks=(change,)), seen

    (compiled, seen), (vanilla, want) = run("now"), run(False)
    assert seen == want
    assert ("state of the optimiser changed" in compiled[0].compiled) == reset
    assert_same(compiled, vanilla)


def test_a_counter_under_any_name_is_seen_though_it_changes_nothing_at_first() -> None:
    class Warmed(VAE):
        _runs = 0

        def likelihood(self, z: Tensor) -> Any:
            self._runs += 1
            return super().likelihood(z * (1.0 if self._runs < 20 else 0.5))

    torch.manual_seed(0)
    model = Warmed(data_dim=5, latent_dim=2, hidden=(4,))
    x = torch.bernoulli(torch.full((20, 5), 0.4))
    told = fit(model, Amortized(model, hidden=(4,)), x, steps=5, seed=1, compile="now").compiled
    assert told == "vanilla step; each run of the program changes Warmed._runs"

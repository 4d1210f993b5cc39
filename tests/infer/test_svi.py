"""Fitting: what is learnt, what is left alone, and what is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.testing import assert_close

from guides import Amortized, Exact
from ppl_models import PPCA, VAE
from ppl_models.data import linear_gaussian, load
from ppl_models.infer import ELBO, fit
from ppl_models.infer.svi import BATCH


def breast_cancer() -> Tensor:
    bunch: Any = load_breast_cancer()
    x = torch.tensor(bunch.data)
    return (x - x.mean(0)) / x.std(0, correction=0)


def gap(x: Tensor, latent_dim: int, guide: str, steps: int, lr: float, **options: Any) -> float:
    """Nats per row that a fit stays below the maximum of the likelihood."""
    model = PPCA(x.shape[-1], latent_dim)
    made = Exact(model) if guide == "exact" else Amortized(model, hidden=())
    schedule = partial(CosineAnnealingLR, T_max=steps)
    fit(model, made, x, steps=steps, lr=lr, schedule=schedule, seed=0, **options)
    best = PPCA.maximum_likelihood(x, latent_dim).log_evidence(x).mean()
    with torch.no_grad():
        return (best - model.log_evidence(x).mean()).item()


@pytest.mark.parametrize(
    ("guide", "steps", "options"),
    [("exact", 500, {}), ("amortized", 3000, {"objective": ELBO(analytic_kl=True)})],
)
@pytest.mark.parametrize("data", ["simulated", "breast cancer"])
def test_ppca_reaches_its_maximum_likelihood_at_full_batch(
    data: str, guide: str, steps: int, options: dict[str, Any]
) -> None:
    x, latent_dim = (linear_gaussian(500).x, 2) if data == "simulated" else (breast_cancer(), 5)
    found = gap(x, latent_dim, guide, steps, 0.05, batch_size=len(x), **options)
    assert -1e-9 < found < 1e-3


@pytest.mark.parametrize(
    ("guide", "steps", "options"),
    [
        ("exact", 1500, {}),
        ("amortized", 3500, {"objective": ELBO(analytic_kl=True)}),
    ],
)
def test_ppca_reaches_its_maximum_likelihood_on_digits_by_minibatches(
    guide: str, steps: int, options: dict[str, Any]
) -> None:
    x = load("digits").x.double()
    found = gap(x, 8, guide, steps, 0.03 if guide == "exact" else 0.02, batch_size=256, **options)
    assert -1e-9 < found < 1e-2


def conjugate(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def its_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale))


@pytest.mark.parametrize("batch_size", [7])
@pytest.mark.parametrize(
    "objective",
    [ELBO(analytic_kl=True, particles=5), Trace_ELBO(num_particles=5), TraceMeanField_ELBO()],
)
def test_a_function_style_pair_learns_and_its_parameters_stay_in_the_store(
    objective: Any, batch_size: int
) -> None:
    x = torch.randn(20) + 2.0
    fit(
        conjugate,
        its_guide,
        x,
        objective=objective,
        steps=800,
        lr=0.05,
        batch_size=batch_size,
        schedule=partial(CosineAnnealingLR, T_max=800),
        seed=0,
    )
    store = pyro.get_param_store()
    assert sorted(store.keys()) == ["loc", "scale"]
    assert abs(store["loc"].item() - x.sum().item() / 21) < 0.03
    assert abs(store["scale"].item() - 21**-0.5) < 0.02


def test_enumerated_mixtures_are_fitted_by_traceenum() -> None:
    """Two far components: the means of the two clusters, by any order."""
    x = torch.cat([torch.randn(30) * 0.1 - 3.0, torch.randn(20) * 0.1 + 2.0])

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[k], 0.5), obs=x)

    fit(
        model,
        lambda x: None,
        x,
        objective=TraceEnum_ELBO(max_plate_nesting=1),
        steps=400,
        lr=0.05,
        batch_size=50,
        seed=0,
    )
    store = pyro.get_param_store()
    assert_close(store["loc"], torch.stack([x[:30].mean(), x[30:].mean()]), atol=1e-3, rtol=0)
    share = torch.tensor([0.6, 0.4])
    assert_close(store["logits"].softmax(-1).detach(), share, atol=1e-3, rtol=0)


class Recorder(PyroModule):
    """A model that notes which rows it saw."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor) -> None:
        self.seen.append(x.long().tolist())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)


def nothing(*_: Tensor) -> None:
    pass


def test_each_epoch_sees_each_row_once_and_the_last_smaller_batch_is_used() -> None:
    model = Recorder()
    result = fit(model, nothing, torch.arange(10.0), epochs=3, batch_size=4, seed=0)
    assert (result.steps, result.epochs, result.batch_size) == (9, 3.0, 4)
    seen = model.seen[-9:]
    assert [len(rows) for rows in seen] == [4, 4, 2] * 3
    epochs = [[n for rows in seen[i : i + 3] for n in rows] for i in (0, 3, 6)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]


def test_steps_may_end_within_an_epoch() -> None:
    result = fit(Recorder(), nothing, torch.arange(10.0), steps=4, batch_size=4, seed=0)
    assert result.steps == 4
    assert result.epochs == pytest.approx(4 / 3)
    assert result.bounds.shape == (4,)


@pytest.mark.parametrize(("rows", "want"), [(BATCH + 5, BATCH), (BATCH - 5, BATCH - 5)])
def test_the_default_batch_is_a_part_of_many_rows_and_all_of_few(rows: int, want: int) -> None:
    assert fit(Recorder(), nothing, torch.randn(rows), steps=1, seed=0).batch_size == want


def test_bounds_are_per_row_and_scaled_up_from_the_minibatch() -> None:
    model = Recorder()
    x = torch.arange(5.0)
    result = fit(model, nothing, x, steps=3, batch_size=2, lr=1e-12, seed=0)
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob
    want = [log_prob(torch.tensor(rows, dtype=torch.float64)).mean() for rows in model.seen[-3:]]
    assert_close(result.bounds, torch.stack(want))


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_one_step_of_gradient_descent_is_the_gradient_per_row(objective: Any) -> None:
    model = PPCA(data_dim=3, latent_dim=2)
    x = model(size=6).detach()
    start = [p.detach().clone() for p in model.parameters()]
    want = torch.autograd.grad(model.log_evidence(x).mean(), list(model.parameters()))
    options = {"objective": objective, "optimizer": torch.optim.SGD}
    fit(model, Exact(model), x, steps=1, lr=0.1, seed=0, **options)
    moved = [(p.detach() - s) / 0.1 for p, s in zip(model.parameters(), start, strict=True)]
    assert_close(moved, list(want))


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_the_default_optimiser_is_adam_whatever_the_layout_of_gradients(objective: Any) -> None:
    """Fused Adam reads gradients as flat memory: they must be laid out as their leaves are."""
    ends = []
    x = linear_gaussian(40).x
    for optimizer in (None, torch.optim.Adam, partial(torch.optim.Adam, foreach=False)):
        torch.manual_seed(0)
        model = PPCA(data_dim=8, latent_dim=2)
        options = {"objective": objective, "optimizer": optimizer}
        fit(model, Exact(model), x, steps=20, lr=0.05, seed=0, **options)
        ends.append([p.detach() for p in model.parameters()])
    assert_close(ends[0], ends[1])
    assert_close(ends[1], ends[2])


def test_a_schedule_is_stepped_at_every_step() -> None:
    rates: list[float] = []
    held: dict[str, Any] = {}

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        held["it"] = torch.optim.SGD(parameters, lr=lr)
        return held["it"]

    fit(
        Recorder(),
        nothing,
        torch.randn(4),
        steps=5,
        lr=0.8,
        optimizer=optimizer,
        schedule=partial(StepLR, step_size=2, gamma=0.5),
        callbacks=[lambda *_: rates.append(held["it"].param_groups[0]["lr"])],
        seed=0,
    )
    assert rates == [0.8, 0.4, 0.4, 0.2, 0.2]  # as it stands after each step


def vae_and_data() -> tuple[VAE, Tensor]:
    torch.manual_seed(0)
    model = VAE(data_dim=5, latent_dim=2, hidden=(4,))
    return model, model(size=20).detach()


def ends(seed: int | None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    model, x = vae_and_data()
    guide = Amortized(model, hidden=(4,))
    if seed is None:
        torch.manual_seed(7)
    result = fit(model, guide, x, steps=6, batch_size=8, seed=seed, **options)
    return result.bounds, [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]


def test_a_seed_reproduces_bit_for_bit_and_leaves_the_global_stream_as_it_was() -> None:
    bounds, parameters = ends(3)
    before = torch.get_rng_state()
    model, x = vae_and_data()
    guide = Amortized(model, hidden=(4,))
    torch.set_rng_state(before)
    torch.randn(17)  # elsewhere in the global stream
    state = torch.get_rng_state()
    result = fit(model, guide, x, steps=6, batch_size=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(result.bounds, bounds)
    again = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again, parameters, strict=True))
    assert not torch.equal(ends(4)[0], bounds)


def test_without_a_seed_the_global_stream_is_used_and_advanced() -> None:
    bounds, _ = ends(None)
    after = torch.get_rng_state()
    again, _ = ends(None)
    assert torch.equal(bounds, again)  # the same place in the global stream
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(7)
    assert not torch.equal(torch.get_rng_state(), after)


class Child(PyroModule):
    """A namesake: Pyro calls every instance of it the same."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.net = PyroModule[nn.Linear](1, 1)

    def forward(self, x: Tensor) -> None:
        loc = self.loc + self.shift + 0 * self.net(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_frozen_parameters_stay_frozen(objective: Any) -> None:
    model = Child()
    model.shift.requires_grad_(False)
    model.net.requires_grad_(False)
    before = [p.detach().clone() for p in (model.shift, *model.net.parameters())]
    fit(model, nothing, torch.ones(4), objective=objective, steps=5, lr=0.1, seed=0)
    after = [model.shift, *model.net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not any(p.requires_grad for p in after)
    assert model.loc.item() > 0.1
    assert model.loc.requires_grad


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_a_fixed_model_stays_and_no_gradient_is_left_behind(objective: Any) -> None:
    for fixed in (True, False):
        model, x = vae_and_data()
        guide = Amortized(model, hidden=(4,))
        both = [*model.parameters(), *guide.parameters()]
        before = [p.detach().clone() for p in both]
        fit(model, guide, x, objective=objective, steps=3, lr=0.1, fixed_model=fixed, seed=0)
        changed = [not torch.equal(p, b) for p, b in zip(both, before, strict=True)]
        count = len(list(model.parameters()))
        assert changed[:count] == [not fixed] * count
        assert all(changed[count:])
        assert all(p.grad is None for p in both)
        assert all(p.requires_grad for p in both)


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_two_modules_of_the_same_name_both_learn_and_leave_nothing_in_the_store(
    objective: Any,
) -> None:
    pyro.param("mine", torch.tensor(3.0))
    for target in (1.0, -2.0):
        model = Child()
        x = torch.full((6,), target)
        fit(model, nothing, x, objective=objective, steps=300, lr=0.1, seed=0)
        assert (model.loc + model.shift).item() == pytest.approx(target, abs=1e-3)
    assert list(pyro.get_param_store().keys()) == ["mine"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background begins without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_returns_what_was_learnt() -> None:
    model = Recorder()
    result = fit(
        model,
        nothing,
        torch.full((4,), 3.0),
        steps=50,
        lr=0.1,
        callbacks=[lambda step, _: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None],
        seed=0,
    )
    assert result.interrupted
    assert result.steps == len(result.bounds) <= 4
    assert model.loc.item() > 0.2
    assert model.loc.grad is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_interrupts_at_once() -> None:
    def twice(step: int, _: float) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    model = Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(model, nothing, torch.ones(4), steps=50, callbacks=[twice], seed=0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.loc.grad is None


def test_a_callback_sees_each_step_and_true_ends_the_training() -> None:
    calls: list[tuple[int, float]] = []
    result = fit(
        Recorder(),
        nothing,
        torch.randn(4),
        steps=9,
        callbacks=[lambda *call: calls.append(call), lambda step, _: step == 3],
        seed=0,
    )
    assert result.interrupted
    assert [step for step, _ in calls] == [1, 2, 3]
    assert [bound for _, bound in calls] == result.bounds.tolist()
    assert not fit(Recorder(), nothing, torch.randn(4), steps=2, seed=0).interrupted


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")  # Pyro's own, before ours
@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_a_bound_that_is_not_finite_stops_with_the_parameters_before_that_step(
    objective: Any,
) -> None:
    class Breaks(Recorder):
        calls = 0

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)
            pyro.factor("odd", torch.where(self.loc > 0.35, -torch.inf, 0.0 * self.loc))

    model = Breaks()
    values: list[float] = []
    with pytest.raises(FloatingPointError, match=r"at step 5 the bound is -inf.*smaller lr"):
        fit(
            model,
            nothing,
            torch.full((4,), 9.0),
            objective=objective,
            steps=20,
            lr=0.1,
            seed=0,
            callbacks=[lambda *_: values.append(model.loc.item())],
        )
    assert len(values) == 4
    assert model.loc.item() == values[-1]
    assert model.loc.grad is None
    assert len(pyro.get_param_store()) == 0


def test_a_fit_says_what_it_did() -> None:
    model, x = vae_and_data()
    guide = Amortized(model, hidden=(4,))
    result = fit(model, guide, x, epochs=2, seed=0)
    assert result.model is model
    assert result.guide is guide
    assert (result.steps, result.batch_size) == (2, 20)
    assert result.compiled.startswith("vanilla step; 2 steps are over")
    assert result.seconds > 0
    assert result.bounds.dtype == torch.float64


def test_arrays_and_data_sets_are_data_and_float32_models_get_float32() -> None:
    model, x = vae_and_data()
    model.float()
    guide = Amortized(model, hidden=(4,))
    runs = []
    for data in (x, x.numpy(), torch.utils.data.TensorDataset(x), (x,)):
        torch.manual_seed(1)
        for module in guide.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        runs.append(fit(model, guide, data, steps=2, lr=1e-9, fixed_model=True, seed=0).bounds)
    for other in runs[1:]:
        assert_close(other, runs[0])


def test_models_without_data_are_fitted_too() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(2.0, 0.5))
        pyro.factor("half", -0.5 * (z - 2.0) ** 2 / 0.25)

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    schedule = partial(CosineAnnealingLR, T_max=800)
    objective = ELBO(particles=100)
    fit(model, guide, steps=800, lr=0.05, schedule=schedule, objective=objective, seed=0)
    store = pyro.get_param_store()
    assert store["loc"].item() == pytest.approx(2.0, abs=5e-3)
    assert store["scale"].item() == pytest.approx(0.125**0.5, abs=5e-3)


def bad(index: tuple[int, int], value: float) -> Tensor:
    x = torch.ones(20, 5)
    x[index] = value
    return x


ONES = torch.ones(20, 5)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (bad((2, 1), torch.nan), {}, r"argument 'x' must be finite.*first at \(2, 1\)"),
        (bad((19, 4), torch.inf), {}, r"argument 'x' must be finite.*first at \(19, 4\)"),
        (ONES[:, :4], {}, r"shape \(20, 5\).*got \(20, 4\)"),
        (ONES[:, None], {}, r"shape \(20, 5\).*got \(20, 1, 5\)"),
        (ONES[:, 0], {}, r"shape \(20, 5\).*got \(20,\)"),
        (ONES[:0], {}, r"at least one row, got shape \(0, 5\)"),
        (ONES * 0.5, {}, "Bernoulli has support 'boolean vector', but 100.00%.*Binarise first"),
        (bad((19, 4), 0.5), {"batch_size": 4}, "but 5.00% of the values are outside"),
        ((ONES, ONES[:3]), {}, "same number of rows, got x: 20, .*: 3"),
        (ONES.long(), {}, "Bernoulli needs floating point values, got torch.int64"),
        ([["a"] * 5] * 20, {}, "argument 'x' must hold numbers, got list of dtype <U1"),
        (ONES, {"batch_size": 0}, "fit: batch_size must be an integer >= 1, got 0"),
        (ONES, {"batch_size": 2.0}, "fit: batch_size must be an integer >= 1, got 2.0"),
        (ONES, {"epochs": 2, "steps": 3}, "fit: give either steps or epochs, got both, steps=3"),
        (ONES, {"steps": 0}, "fit: steps must be an integer >= 1, got 0"),
        (ONES, {"epochs": -1}, "fit: epochs must be an integer >= 1, got -1"),
        (ONES, {"lr": 0.0}, "fit: lr must be a finite number > 0, got 0.0"),
        (ONES, {"lr": torch.nan}, "fit: lr must be a finite number > 0, got nan"),
        (ONES, {"seed": -1}, "seed must be None or an integer from 0 to .*, got -1"),
        (ONES, {"device": "nowhere"}, "device: torch knows no device 'nowhere'"),
        (ONES, {"plate": "people", "batch_size": 3}, "no site is inside plate 'people'"),
        pytest.param(
            ONES,
            {"device": "cuda"},
            "device: 'cuda' was asked for, but torch .* finds 0 CUDA devices here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_input_is_refused_and_nothing_has_changed(
    data: Any, options: dict[str, Any], message: str
) -> None:
    model, _ = vae_and_data()
    guide = Amortized(model, hidden=(4,))
    both = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in both]
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=message):
        fit(model, guide, data, **({"seed": 0} | options))
    assert all(torch.equal(p, b) for p, b in zip(both, before, strict=True))
    assert all(p.grad is None and p.requires_grad for p in both)
    assert len(pyro.get_param_store()) == 0


def no_latents(x: Tensor) -> None:
    pyro.param("loc", torch.tensor(0.0))


def observed_too(x: Tensor) -> None:
    its_guide(x)
    pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))


def one_too_many(x: Tensor) -> None:
    its_guide(x)
    pyro.sample("more", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (no_latents, r"guide: it must sample every latent of conjugate, \['w'\].*\['w'\] missing"),
        (observed_too, r"guide: it samples \['x'\], which the model observes"),
        (one_too_many, r"guide: it samples \['more'\], which conjugate does not have"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_and_the_store_is_as_it_was(
    guide: Any, message: str, objective: Any
) -> None:
    pyro.param("mine", torch.tensor(1.0))
    with pytest.raises(ValueError, match=message):
        fit(conjugate, guide, torch.randn(5), objective=objective, seed=0)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_nothing_to_train_is_said() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    x = model(size=4).detach()
    with pytest.raises(ValueError, match="nothing to train.*fixed_model=True"):
        fit(model, Exact(model), x, fixed_model=True, seed=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train. Neither PPCA nor Exact has"):
        fit(model, Exact(model), x, seed=0)


def test_minibatches_need_a_plain_plate_over_rows() -> None:
    def no_plate(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0).expand([len(x)]).to_event(1), obs=x)

    def subsamples(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as chosen:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[chosen])

    x = torch.randn(6)
    with pytest.raises(ValueError, match=r"batch_size=2 of 6 rows needs a model with a plate over"):
        fit(no_plate, its_guide, x, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"'data' subsamples by itself, so batch_size=3 of 6"):
        fit(subsamples, its_guide, x, batch_size=3, seed=0)
    big = torch.randn(BATCH + 40)
    assert fit(no_plate, its_guide, big, steps=1, seed=0).batch_size == BATCH + 40
    assert fit(subsamples, its_guide, big, steps=1, seed=0).batch_size == BATCH + 40


def test_autoguides_serve_full_batches_and_are_refused_for_parts_of_the_rows() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    x = model(size=6).detach()
    with pytest.raises(ValueError, match=r"AutoNormal ties the parameters of \['z'\].*must be 6"):
        fit(model, AutoNormal(model), x, batch_size=2, seed=0)
    guide = AutoNormal(model)
    guide(x)
    result = fit(model, guide, x, steps=400, lr=0.05, fixed_model=True, seed=0)
    assert result.bounds[-50:].mean() > result.bounds[:50].mean()


def test_a_distribution_that_gets_nonsense_is_told_in_a_line() -> None:
    model = VAE(6, 2, hidden=(4,))
    with pytest.raises(FloatingPointError, match="at step .* training diverged") as caught:
        fit(model, Amortized(model), model(size=40), steps=50, lr=1e9, seed=0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("Try a smaller lr.")

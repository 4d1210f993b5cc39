"""Chains that are run: by any rung of the ladder, in parts, alone or together."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Exact
from ppl_models import PPCA, VAE
from ppl_models.infer import NUTS, Posterior, backend, sample
from ppl_models.infer.mcmc import engine, loop, run
from ppl_models.infer.mcmc.nuts import Tuning


def schools() -> None:
    """Eight schools, in the form that has no funnel."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mean + scale * z, errors), obs=effects)


def of(model: Any, *batch: Any, **options: Any) -> Posterior:
    return sample(model, *batch, **({"chains": 3, "draws": 20, "warmup": 40, "seed": 2} | options))


def same(one: Posterior, other: Posterior, chains: int | None = None) -> bool:
    return all(torch.equal(one[name][:chains], other[name][:chains]) for name in one)


def test_the_same_call_gives_the_same_draws() -> None:
    assert same(of(schools), of(schools))
    assert not same(of(schools), of(schools, seed=3))


def test_a_chain_does_not_depend_on_how_many_there_are() -> None:
    few, many = of(schools), of(schools, chains=7)
    assert same(few, many, chains=3)


def test_a_row_does_not_depend_on_the_other_rows_nor_on_the_parts_they_are_done_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=7).detach()
    whole = of(model, x, rows=True)
    monkeypatch.setattr(run, "_rows_at_once", lambda *_: 3)
    parts = of(model, x, rows=True)
    assert whole["z"].shape == parts["z"].shape == (3, 20, 7, 2)
    assert_close(parts["z"], whole["z"])
    for name, value in whole.statistics().items():
        assert_close(getattr(parts, name), value)
    assert_close(parts.step_size, whole.step_size)


def test_draws_in_several_parts_are_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PART", 50)
    posterior = of(schools, draws=400, warmup=200)
    assert posterior["mean"].shape == (3, 400)
    for name, mean, scale in (("mean", 4.4, 3.3), ("scale", 3.6, 3.2)):
        error = 5.0 * posterior.mcse()[name]
        assert abs(posterior.mean()[name] - mean) < error + 0.1
        assert abs(posterior.scale()[name] - scale) < 1.0


@pytest.mark.parametrize("chains", [2, 16])
def test_ranks_of_the_truth_are_uniform(chains: int) -> None:
    """Simulation-based calibration, a thousand replicates at once: each is a row."""

    def normal(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def gamma(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def beta(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Binomial(5, z), obs=x)

    priors = {normal: dist.Normal(1.0, 2.0), gamma: dist.Gamma(2.0, 1.0), beta: dist.Beta(2.0, 3.0)}
    data = {
        normal: lambda z: dist.Normal(z, 1.0),
        gamma: dist.Poisson,
        beta: lambda z: dist.Binomial(5, z),
    }
    count = 1000 if chains == 2 else 100
    for model, prior in priors.items():
        z = prior.sample(torch.Size([count]))
        x = data[model](z).sample()
        posterior = of(model, x, rows=True, chains=chains, draws=190, warmup=150)
        few = posterior["z"][0, ::10]  # far enough from each other
        ranks = (few < z).sum(0)
        counts = torch.bincount(ranks // 2, minlength=10).double()
        assert len(counts) == 10
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_moments_of_rows_are_those_of_the_exact_posterior() -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=50).detach()
    posterior = of(model, x, rows=True, chains=4, draws=400, warmup=200)
    exact: Any = model.posterior(x)
    z = (posterior.mean()["z"] - exact.mean) / posterior.mcse()["z"]
    assert z.abs().max() < 5.0
    assert z.pow(2).mean() < 1.6
    ratio = posterior.scale()["z"] / exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (ratio - 1.0).abs().max() < 0.1


@pytest.mark.parametrize("chains", [4, 32])
def test_step_sizes_meet_the_acceptance_that_is_aimed_at(chains: int) -> None:
    posterior = of(schools, chains=chains, draws=300, warmup=300)
    accept = posterior.accept.mean().item()
    assert 0.77 < accept < (0.93 if chains < 16 else 0.84)
    assert posterior.step_size is not None
    assert (len(posterior.step_size.unique()) == 1) == (chains >= 16)


@pytest.mark.parametrize("chains", [4, 20])
@pytest.mark.parametrize("dense", [False, True])
def test_a_metric_makes_scales_equal(chains: int, dense: bool) -> None:
    scales = torch.tensor([0.1, 1.0, 10.0])

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), scales).to_event(1))

    posterior = of(model, chains=chains, draws=150, warmup=150, sampler=NUTS(dense=dense))
    assert posterior.leapfrogs is not None
    assert posterior.leapfrogs.double().mean() < 8.0
    assert ((posterior.scale()["z"] / scales).log().abs() < 0.25).all()


def test_a_dense_metric_undoes_correlation() -> None:
    covariance = torch.tensor([[1.0, 0.99], [0.99, 1.0]])

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    diagonal, dense = (
        of(model, chains=20, draws=40, warmup=120, sampler=NUTS(dense=d)).leapfrogs
        for d in (False, True)
    )
    assert dense is not None
    assert diagonal is not None
    assert 3 * dense.double().mean() < diagonal.double().mean()


def test_single_precision_is_single_precision() -> None:
    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float32)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    posterior = of(model, x, sampler=NUTS(float32=True), draws=400, warmup=100)
    assert posterior["loc"].dtype == torch.float32
    assert posterior.energy is not None
    assert posterior.energy.dtype == torch.float32
    assert abs(posterior.mean()["loc"]) < 5 * posterior.mcse()["loc"]


@pytest.mark.parametrize("chains", [8, 64])
@pytest.mark.parametrize("warmup", [5, 20, 30])
def test_a_short_warm_up_ends_on_a_step_that_moves(chains: int, warmup: int) -> None:
    def model() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    posterior = of(model, chains=chains, draws=50, warmup=warmup)
    assert posterior.accept.min() > 0.4
    assert not posterior.stuck.any()


# The ladder.


@pytest.fixture
def compiles() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        pytest.skip("there is no C++ compiler here: g++ or clang++")
    if reason := backend.compiles_here():
        pytest.skip(reason)


def check_compiled(model: Any, **options: Any) -> Tensor:
    """Compare draws of a compiled loop with those of the graph; return how long trajectories are."""
    traced, compiled = (of(model, warmup=0, compile=c, **options) for c in (False, "now"))
    assert traced.compiled == "traced graph"
    assert compiled.compiled.startswith("compiled")
    for name, value in traced.items():
        assert_close(compiled[name], value, rtol=1e-6, atol=1e-6)
    assert traced.leapfrogs is not None
    assert compiled.leapfrogs is not None
    assert torch.equal(traced.leapfrogs, compiled.leapfrogs)
    return compiled.leapfrogs


@pytest.mark.usefixtures("compiles")
def test_compiled_chains_are_those_of_the_graph() -> None:
    check_compiled(schools, draws=6)


@pytest.mark.usefixtures("compiles")
def test_compiled_rows_of_a_network_are_those_of_the_graph() -> None:
    model = VAE(data_dim=6, latent_dim=2, hidden=(4,)).float()
    x = torch.bernoulli(torch.full((5, 6), 0.4, dtype=torch.float32))
    traced, compiled = (
        of(model, x, rows=True, draws=4, warmup=0, compile=c) for c in (False, "now")
    )
    assert compiled.compiled.startswith("compiled")
    assert_close(compiled["z"], traced["z"], rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("compiles")
def test_rows_that_are_run_in_turn_draw_what_they_do_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten rows in blocks of four: the last has two rows, and two that stand for no other."""
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=10).detach()
    sampler = NUTS(dense=True, max_depth=3)
    options: dict[str, Any] = {"rows": True, "draws": 7, "warmup": 20, "sampler": sampler}
    monkeypatch.setattr(run, "CACHED", 0)
    monkeypatch.setattr(run, "COLUMNS", 3 * 4)
    monkeypatch.setattr(run, "ROUND", 5)
    together = of(model, x, compile=False, **options)
    sizes = []
    begun = engine.Engine._take

    def take(self: Any, whole: Any, columns: Tensor) -> None:
        sizes.append(len(columns))
        begun(self, whole, columns)

    monkeypatch.setattr(engine.Engine, "_take", take)
    in_turn = of(model, x, compile="now", **options)
    assert in_turn.compiled.startswith("compiled")
    assert set(sizes) == {3 * 4}
    assert len(sizes) % 3 == 0
    assert_close(in_turn["z"], together["z"], rtol=1e-6, atol=1e-6)
    for name, value in together.statistics().items():
        assert_close(getattr(in_turn, name), value, rtol=1e-6, atol=1e-6)
    assert_close(in_turn.step_size, together.step_size, rtol=1e-6, atol=1e-6)


def test_without_a_compiler_all_rows_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=10).detach()
    monkeypatch.setattr(run, "CACHED", 0)
    monkeypatch.setattr(run, "COLUMNS", 3 * 4)
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")
    made = []
    some = engine.Engine._some_rows
    monkeypatch.setattr(engine.Engine, "_some_rows", lambda self: made.append(self) or some(self))
    asked = of(model, x, rows=True, draws=5, compile="now")
    assert asked.compiled.startswith("traced graph; not compiled")
    assert same(asked, of(model, x, rows=True, draws=5, compile=False))
    assert len(made) == 1


@pytest.mark.usefixtures("compiles")
def test_ctrl_c_keeps_the_draws_that_all_rows_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=10).detach()
    options: dict[str, Any] = {"rows": True, "draws": 30, "warmup": 5, "compile": "now"}
    monkeypatch.setattr(run, "CACHED", 0)
    monkeypatch.setattr(run, "COLUMNS", 3 * 4)
    monkeypatch.setattr(run, "ROUND", 10)
    whole = of(model, x, **options)
    begun, rounds = engine.Engine._take, []

    def take(self: Any, all_rows: Any, columns: Tensor) -> None:
        begun(self, all_rows, columns)
        if bool(self.tuning.goal == 10.0):
            rounds.append(len(columns))

    def is_done(self: loop.Loop) -> bool:
        if len(rounds) == 5:  # the second block of the second round
            raise KeyboardInterrupt
        return ended(self)

    ended = loop.Loop.is_done
    monkeypatch.setattr(engine.Engine, "_take", take)
    monkeypatch.setattr(loop.Loop, "is_done", is_done)
    part = of(model, x, **options)
    assert part.interrupted
    assert part.draws == 10
    assert torch.equal(part["z"], whole["z"][:, :10])


def regression() -> None:
    """So many rows that the products are left to a library of matrix products."""
    x = torch.sin(torch.arange(1500 * 12.0) ** 2).reshape(1500, 12)
    y = (x[:, 0] > x[:, 1] - 0.5).double()
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([12]).to_event(1))
    with pyro.plate("rows", 1500):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def network() -> None:
    """Activations that are used twice, and a scale that all rows share."""
    x = torch.linspace(-2.0, 2.0, 80).unsqueeze(-1) ** torch.arange(1.0, 5.0)
    first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([4, 30]).to_event(2))
    second = pyro.sample("second", dist.Normal(0.0, 0.2).expand([30]).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    outputs = torch.tanh(x @ first) @ second
    pyro.sample("y", dist.Normal(outputs, scale).to_event(1), obs=torch.sin(x[:, 0]))


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(("model", "chains"), [(regression, 4), (network, 9)])
def test_compiled_chains_with_products_are_those_of_the_graph(model: Any, chains: int) -> None:
    lengths = check_compiled(model, chains=chains, draws=4, sampler=NUTS(max_depth=5))
    assert lengths.sum(1).max() > 4  # ticks in one call of the loop


def test_what_may_change_is_read_anew_by_a_recorded_density() -> None:
    held = torch.ones(8, 2)

    def density(u: Tensor) -> tuple[Tensor, Tensor]:
        return (held.T @ u).sum(0), held.sum(1, keepdim=True).expand_as(u)

    u = torch.ones(8, 3)
    anew, once = (engine.recorded(density, u, steady=steady) for steady in (False, True))
    assert_close(anew(u), once(u))
    held.mul_(2.0)
    assert_close(anew(u)[0], torch.full((3,), 32.0))
    assert_close(once(u)[0], torch.full((3,), 16.0))


def test_short_sampling_waits_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> Any:
        raise AssertionError("the compiler was asked")

    monkeypatch.setattr(loop.compile, "compiled", asked)
    assert of(schools).compiled == "traced graph"


def test_without_a_compiler_the_graph_serves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPL_MODELS_COMPILER", "none")
    told = of(schools, compile="now", draws=4, warmup=0).compiled
    assert told == "traced graph; not compiled: PPL_MODELS_COMPILER=none"


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.factor("half", torch.tensor(0.0))
        else:
            pyro.factor("half", torch.tensor(-1.0))

    posterior = of(model, draws=100, warmup=30, chains=2)
    assert posterior.compiled.startswith("the program itself")
    assert "if z > 0" in posterior.compiled
    share = (posterior["z"] > 0).double().mean().item()
    assert abs(share - 1.0 / (1.0 + torch.e**-1.0)) < 0.2


# Starts.


def test_chains_start_at_draws_of_a_guide() -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=5).detach()
    posterior = of(model, x, rows=True, init=Exact(model), warmup=0, draws=300)
    exact: Any = model.posterior(x)
    gap = (posterior.mean()["z"] - exact.mean).abs()
    assert (gap < 5 * posterior.mcse()["z"]).all()
    assert same(posterior, of(model, x, rows=True, init=Exact(model), warmup=0, draws=300))


def test_a_guide_that_leaves_a_latent_out_is_refused() -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=5).detach()
    with pytest.raises(ValueError, match="'z' is missing"):
        of(model, x, init=lambda x: None)


def test_a_density_that_is_finite_nowhere_is_told_before_sampling() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", torch.where(z > 1e3, 0.0, -torch.inf))

    with pytest.raises(ValueError, match="3 of 3 chains found no start: after 100 draws"):
        of(model)


def test_bad_starts_are_drawn_again() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0.0, 0.0, -torch.inf))

    posterior = of(model, draws=300, warmup=100)
    assert (posterior["z"] > 0.0).all()
    assert abs(posterior.mean()["z"].item() - (2 / torch.pi) ** 0.5) < 0.15


@pytest.mark.parametrize(
    "poison",
    [
        lambda z: torch.log(z),  # no number below 0
        lambda z: torch.where(z > 1.0, torch.inf, 0.0),
        lambda z: torch.linalg.cholesky(torch.eye(2) * z).sum(),
    ],
)
def test_a_trajectory_into_what_is_no_number_diverges(poison: Any) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.factor("poison", poison(z))

    posterior = of(model, draws=60, warmup=30)
    assert posterior.divergences.sum() > 0
    assert torch.isfinite(posterior["z"]).all()


# Bad requests.


def test_draws_that_do_not_fit_into_memory_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"draws of all chains need about \d+ GiB"):
        of(schools, draws=10**12)


def test_ctrl_c_keeps_the_draws_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of(schools, draws=300, warmup=20)
    is_done = loop.Loop.is_done

    def interrupted(self: loop.Loop) -> bool:
        tuning = Tuning(*self._live[-len(Tuning._fields) :])
        if bool(tuning.adapts == 0.0) and int(tuning.slot.min()) > 10:
            raise KeyboardInterrupt
        return is_done(self)

    monkeypatch.setattr(loop.Loop, "is_done", interrupted)
    part = of(schools, draws=300, warmup=20)
    assert part.interrupted
    assert 10 < part.draws < 300
    assert torch.equal(part["mean"], whole["mean"][:, : part.draws])
    assert "interrupted" in str(part).lower()


def test_ctrl_c_before_any_draw_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: loop.Loop) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "is_done", interrupted)
    with pytest.raises(KeyboardInterrupt):
        of(schools)


def test_parameters_are_left_as_they_were() -> None:
    model = VAE(data_dim=6, latent_dim=2, hidden=(4,))
    x = torch.bernoulli(torch.full((5, 6), 0.4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of(model, x, rows=True, init=Amortized(model, hidden=(4,)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert isinstance(model, nn.Module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chains", [4, 64])
def test_chains_on_a_gpu_agree_with_those_on_the_cpu(chains: int) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=50).detach()
    exact: Any = model.posterior(x)
    posterior = of(model, x, rows=True, chains=chains, draws=200, warmup=100, device="cuda")
    assert posterior["z"].is_cuda
    assert posterior.compiled.startswith("compiled")
    gap = (posterior.mean()["z"].cpu() - exact.mean.cpu()).abs()
    assert (gap < 5 * posterior.mcse()["z"].cpu()).all()

"""Sampling a posterior: its draws, its seeds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor

from ppl_models import PPCA, VAE, bayesian
from ppl_models.infer import NUTS, Posterior, sample
from ppl_models.infer.mcmc import run
from ppl_models.infer.mcmc.engine import Engine


def within_errors(posterior: Posterior, site: str, mean: Tensor) -> None:
    gap = (posterior.mean()[site] - mean).abs()
    assert (gap < 5 * posterior.mcse()[site]).all()


@pytest.mark.parametrize("rows", [False, True])
def test_the_moments_of_ppca_are_those_of_its_posterior(rows: bool) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=3).detach()
    posterior = sample(model, x, chains=2, draws=250, warmup=100, rows=rows, seed=0)
    assert posterior["z"].shape == (2, 250, 3, 2)
    assert not posterior["z"].requires_grad
    exact: Any = model.posterior(x)
    within_errors(posterior, "z", exact.mean.detach())
    centred = posterior["z"] - exact.mean.detach()
    squares = Posterior({"zz": centred[..., :, None] * centred[..., None, :]})
    within_errors(squares, "zz", exact.covariance_matrix.detach().expand(3, 2, 2))


def test_global_and_local_latents_are_sampled_jointly() -> None:
    """w ~ N(0, 1), z_n ~ N(w, 1), x_n ~ N(z_n, 1): all of it is one normal."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, -0.5])
    posterior = sample(model, x, chains=2, draws=250, warmup=100, seed=1)
    assert {name: tuple(v.shape) for name, v in posterior.items()} == {
        "w": (2, 250),
        "z": (2, 250, 3),
    }
    # Row by row x_n ~ N(w, 2): w has precision 1 + 3/2; given w, z_n is halfway to x_n.
    w = x.sum() / 2 / 2.5
    within_errors(posterior, "w", w)
    within_errors(posterior, "z", (w + x) / 2)
    within_errors(Posterior({"v": (posterior["w"] - w) ** 2}), "v", torch.tensor(1 / 2.5))


def test_the_time_of_warm_up_and_of_draws_is_told_apart() -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=3).detach()
    for rows in (False, True):
        few, many = (
            sample(model, x, chains=2, draws=draws, warmup=warmup, rows=rows, compile=False, seed=0)
            for draws, warmup in ((4, 200), (200, 4))
        )
        for posterior in (few, many):
            assert 0 < posterior.warmup_seconds + posterior.sampling_seconds < posterior.seconds
        assert few.warmup_seconds > few.sampling_seconds
        assert many.sampling_seconds > many.warmup_seconds


def test_long_trajectories_are_compiled_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight leaves a transition are expected; what a metric leaves of longer ones is seen."""

    def model(given: Tensor) -> None:
        covariance = given * torch.ones(2, 2) + (1.0 - given) * torch.eye(2)
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    asked: list[int] = []
    monkeypatch.setattr(Engine, "compile", lambda self, wait: asked.append(1))
    monkeypatch.setattr(run, "LEAPFROGS", 1500)
    monkeypatch.setattr(run, "TICKS", 700)
    found: list[bool] = []
    for correlation in (0.0, 0.9999):
        asked.clear()
        sample(model, torch.tensor([correlation]), chains=2, draws=40, warmup=40, seed=0)
        found.append(bool(asked))
    assert found == [False, True]


def test_constrained_latents_come_back_in_their_support() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([3.0, 1.0, 4.0, 2.0])
    posterior = sample(model, x, chains=2, draws=250, warmup=100, seed=0)
    assert (posterior["rate"] > 0).all()
    within_errors(posterior, "rate", torch.tensor(12.0 / 5.0))  # Gamma(2 + 10, 1 + 4)


def test_a_model_without_arguments_is_sampled() -> None:
    """Schools that share a mean: given the group scale, every posterior mean is closed form."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0])

    def schools() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 4):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + 6.0 * effect, sigma), obs=y)

    posterior = sample(schools, chains=2, draws=250, warmup=100, seed=0)
    assert posterior["effect"].shape == (2, 250, 4)
    weight = 1 / (36.0 + sigma**2)
    mu = (weight * y).sum() / (1 / 25.0 + weight.sum())
    within_errors(posterior, "mu", mu)
    within_errors(posterior, "effect", 6.0 * weight * (y - mu))


def test_discrete_latents_that_are_marked_are_summed_out() -> None:
    """Two rows of a mixture with known components: only its weight is left, a Beta mixture."""

    def model(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    x = torch.tensor([0.5, 2.5])
    posterior = sample(model, x, chains=2, draws=250, warmup=100, seed=0)
    assert list(posterior) == ["share"]
    s = (torch.arange(200000) + 0.5) / 200000
    normal = torch.distributions.Normal
    density = dist.Beta(2.0, 1.0).log_prob(s).exp()
    for value in x:
        one, zero = normal(2.0, 1.0).log_prob(value).exp(), normal(0.0, 1.0).log_prob(value).exp()
        density = density * (s * one + (1 - s) * zero)
    within_errors(posterior, "share", (s * density).sum() / density.sum())


def small(model: Any, *batch: Any, **options: Any) -> Posterior:
    return sample(model, *batch, **({"chains": 2, "draws": 6, "warmup": 6, "seed": 3} | options))


def ppca() -> tuple[PPCA, Tensor]:
    torch.manual_seed(0)
    model = PPCA(data_dim=3, latent_dim=1)
    return model, model(size=2).detach()


def test_a_seed_reproduces_and_leaves_the_global_stream_as_it_was() -> None:
    model, x = ppca()
    state = torch.get_rng_state()
    first = small(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(small(model, x)["z"], first["z"])
    assert not torch.equal(small(model, x, seed=4)["z"], first["z"])


def test_without_a_seed_the_global_stream_is_used_and_advanced() -> None:
    model, x = ppca()
    torch.manual_seed(8)
    first = small(model, x, seed=None)
    second = small(model, x, seed=None)
    torch.manual_seed(8)
    assert torch.equal(small(model, x, seed=None)["z"], first["z"])
    assert not torch.equal(second["z"], first["z"])


def test_a_chain_does_not_depend_on_how_many_there_are() -> None:
    model, x = ppca()
    one, three = small(model, x, chains=1), small(model, x, chains=3)
    assert torch.equal(one["z"][0], three["z"][0])
    assert torch.equal(small(model, x, chains=2)["z"], three["z"][:2])
    assert len(torch.unique(three["z"][:, 0], dim=0)) == 3


def test_the_model_is_left_as_it_was() -> None:
    model = VAE(data_dim=4, latent_dim=1, hidden=(3,))
    frozen = next(model.parameters())
    x = model(size=2).detach()
    frozen.requires_grad_(False)
    pyro.clear_param_store()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small(model, x)
    assert model.training
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_parameters_are_held_and_in_evaluation_mode_while_chains_run() -> None:
    seen: set[tuple[bool, bool]] = set()

    class Watched(PPCA):
        def prior(self) -> Any:
            seen.add((self.loading.requires_grad, self.training))
            return super().prior()

    model = Watched(data_dim=3, latent_dim=1)
    small(model, torch.zeros(2, 3))
    assert seen == {(False, False)}
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_of_a_bayesian_model_are_sampled() -> None:
    model = bayesian(PPCA(data_dim=3, latent_dim=1), dist.Normal(0.0, 1.0))
    x = model(size=4).detach()
    posterior = small(model, x)
    assert {name: tuple(v.shape) for name, v in posterior.items()} == {
        "loading": (2, 6, 3, 1),
        "loc": (2, 6, 3),
        "log_noise_scale": (2, 6),
        "z": (2, 6, 4, 1),
    }


def funnel() -> None:
    scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (scale / 2).exp()).to_event(1))


def test_transitions_are_told_one_by_one() -> None:
    sampler = NUTS(target_accept=0.6, max_depth=4)
    posterior = sample(funnel, sampler=sampler, chains=10, draws=150, warmup=50, seed=8)
    assert posterior.warmup == 50
    assert posterior.divergent is not None
    assert posterior.depth is not None
    assert posterior.leapfrogs is not None
    assert posterior.divergences.sum() > 0
    assert torch.equal(posterior.divergences, posterior.divergent.sum(1))
    assert posterior.depth.max() == 4
    assert (posterior.leapfrogs < 2 ** (posterior.depth + 1)).all()
    assert ((posterior.accept > 0.0) & (posterior.accept < 1.0)).all()


def test_the_sampler_takes_a_dense_mass_matrix() -> None:
    model, x = ppca()
    dense, diagonal = (
        small(model, x, sampler=NUTS(dense=d), draws=20, warmup=120) for d in (True, False)
    )
    assert not torch.equal(dense["z"], diagonal["z"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 0}, "sample: chains must be an integer >= 1, got 0"),
        ({"draws": 3}, "sample: draws must be an integer >= 4, got 3"),
        ({"warmup": -1}, "sample: warmup must be an integer >= 0, got -1"),
        ({"warmup": 2.0}, "sample: warmup must be an integer >= 0, got 2.0"),
        ({"seed": "a"}, "seed must be None or an integer from 0 to .*, got 'a'"),
        ({"rows": True, "plate": "people"}, "no site of PPCA is inside plate 'people'"),
        ({"device": "nowhere"}, "device: torch knows no device 'nowhere'"),
        pytest.param(
            {"device": "cuda"},
            "device: 'cuda' was asked for, but torch .* finds 0 CUDA devices here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model, x = ppca()
    with pytest.raises(ValueError, match=message):
        small(model, x, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 3), torch.nan), "argument 'x' must be finite, but 6 of 6"),
        (torch.zeros(2, 4), r"shape \(2, 3\).*got \(2, 4\)"),
        (torch.zeros(2, 1, 3), r"shape \(2, 3\).*got \(2, 1, 3\)"),
        (torch.zeros(0, 3), "argument 'x' must have at least one row"),
        (torch.zeros(2, 3, dtype=torch.long), "Normal needs floating point values"),
        ([["a", "b", "c"]], "argument 'x' must hold numbers"),
    ],
)
def test_wrong_data_are_refused_and_nothing_has_changed(x: Any, message: str) -> None:
    model, _ = ppca()
    pyro.clear_param_store()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        small(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())
    assert len(pyro.get_param_store()) == 0


def test_rows_are_refused_where_latents_are_shared_or_there_are_none() -> None:
    model, x = ppca()
    shared = bayesian(model, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"rows=True.*'loading'.*shared by all rows.*rows=False"):
        small(shared, x, rows=True)
    with pytest.raises(ValueError, match=r"rows=True needs a model with a plate over rows.*funnel"):
        small(funnel, rows=True)


def test_discrete_latents_are_refused_by_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'k' is discrete \(boolean\).*'enumerate': 'parallel'"):
        small(model, torch.zeros(3))


def test_a_model_without_latents_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"model has no latent left to sample.*\['x'\]"):
        small(model, torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_accept": 0.0}, r"target_accept must be in \(0, 1\), got 0.0"),
        ({"target_accept": 1.0}, r"target_accept must be in \(0, 1\), got 1.0"),
        ({"max_depth": 0}, "max_depth must be from 1 to 20, got 0"),
    ],
)
def test_wrong_settings_of_nuts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NUTS(**options)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (dist.Bernoulli(torch.full((2,), 0.5)).to_event(1), "fit a guide instead, as in"),
        (dist.Bernoulli(0.5), "Mark it to be summed out"),
    ],
)
def test_discrete_latents_are_refused_with_what_can_be_done(fn: Any, words: str) -> None:
    def model() -> None:
        pyro.sample("h", fn)

    with pytest.raises(ValueError, match=words):
        sample(model, chains=1, draws=4, warmup=4)

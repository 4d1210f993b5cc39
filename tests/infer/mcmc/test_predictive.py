"""Posterior predictive draws against closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ppl_models import PPCA, bayesian
from ppl_models.infer import Posterior
from ppl_models.infer.mcmc import predictive


def within_errors(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Whether independent draws have these moments, element by element."""
    n = len(draws)
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    squares = (draws - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / n**0.5).all()


def normal_mean(x: Tensor) -> None:
    """w ~ N(0, 1), x_n ~ N(w, 2)."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 2.0), obs=x)


def exact_mean(x: Tensor, chains: int = 4, draws: int = 1000) -> tuple[Posterior, Tensor, Tensor]:
    """Independent draws of w given x, and its moments."""
    variance = 1 / (1 + torch.tensor(len(x) / 4.0))
    mean = variance * x.sum() / 4
    return Posterior({"w": mean + variance.sqrt() * torch.randn(chains, draws)}), mean, variance


def test_a_conjugate_model_predicts_its_closed_form() -> None:
    x = torch.tensor([1.0, 3.0, 0.5])
    posterior, mean, variance = exact_mean(x)
    found = posterior.predictive(normal_mean, x, limit=4000, seed=0)
    assert list(found) == ["twice", "x"]
    assert found["x"].shape == (4000, 3)
    within_errors(found["x"], mean.expand(3), (variance + 4).expand(3))
    assert_close(found["twice"], 2 * posterior["w"].flatten())
    # Two rows share w, and nothing else.
    products = (found["x"][:, 0] - mean) * (found["x"][:, 1] - mean)
    assert abs(products.mean() - variance) < 5 * products.std() / 4000**0.5


def test_other_rows_are_predicted_where_no_latent_is_local() -> None:
    posterior, mean, variance = exact_mean(torch.tensor([1.0, 3.0, 0.5]))
    found = posterior.predictive(normal_mean, torch.zeros(5), limit=4000, seed=0, sites="x")
    assert list(found) == ["x"]
    within_errors(found["x"], mean.expand(5), (variance + 4).expand(5))


def test_a_generative_model_predicts_row_by_row() -> None:
    model = PPCA(data_dim=3, latent_dim=2)
    x = model(size=4).detach()
    exact: Any = model.posterior(x)
    z = exact.sample((2, 2000))
    found = Posterior({"z": z}).predictive(model, x, limit=4000, seed=1)["x"]
    loading, noise = model.loading.detach(), model.noise_scale.detach()
    mean = model.loc.detach() + exact.mean.detach() @ loading.mT
    spread = loading @ exact.covariance_matrix.detach().expand(4, 2, 2) @ loading.mT
    assert not found.requires_grad
    within_errors(found, mean, spread.diagonal(dim1=-2, dim2=-1) + noise**2)


def test_global_latents_of_a_bayesian_model_are_put_in_place() -> None:
    model = bayesian(PPCA(data_dim=3, latent_dim=1), dist.Normal(0.0, 1.0))
    x = model(size=4).detach()
    draws = {
        "loading": torch.zeros(2, 300, 3, 1),
        "loc": torch.tensor([1.0, -2.0, 3.0]).expand(2, 300, 3),
        "log_noise_scale": torch.full((2, 300), -1.0),
        "z": torch.randn(2, 300, 4, 1),
    }
    found = Posterior(draws).predictive(model, x, seed=1)["x"]
    scale = torch.tensor(-1.0).exp()
    within_errors(found, draws["loc"][0, 0].expand(4, 3), (scale**2).expand(4, 3))


def test_covariates_stay_and_the_response_is_not_needed() -> None:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.tensor([1.0, 10.0])
    posterior = Posterior({"slope": 2.0 + 0.3 * torch.randn(2, 1000)})
    for arguments in ((x, torch.zeros(2)), (x,)):
        found = posterior.predictive(regression, *arguments, limit=2000, seed=0)["y"]
        within_errors(found, 2.0 * x, 0.09 * x**2 + 0.01)


def test_a_model_without_arguments_predicts_what_it_holds() -> None:
    y = torch.tensor([28.0, 8.0, -3.0])

    def schools() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.factor("tilt", -mu.square())
        with pyro.plate("schools", 3):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    posterior = Posterior({"mu": 1.0 + torch.randn(2, 1000)})
    found = posterior.predictive(schools, limit=2000, seed=0)
    assert list(found) == ["y"]
    within_errors(found["y"], torch.ones(3), torch.full((3,), 5.0))


def test_discrete_latents_that_are_summed_out_are_drawn_from_their_prior() -> None:
    def mixture(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)

    posterior = Posterior({"share": torch.full((2, 2000), 0.25)})
    found = posterior.predictive(mixture, torch.zeros(2), limit=4000, seed=0)["x"]
    within_errors(found, torch.full((2,), 0.75), torch.full((2,), 1 + 9 * 0.25 * 0.75))


FAMILIES = {
    "Bernoulli": (dist.Bernoulli, lambda r: (r / (1 + r), r / (1 + r) ** 2)),
    "Poisson": (dist.Poisson, lambda r: (r, r)),
    "Exponential": (dist.Exponential, lambda r: (1 / r, 1 / r**2)),
    "Gamma": (dist.Gamma, lambda r: (r, r)),
    "Normal": (dist.Normal, lambda r: (r, torch.ones_like(r))),
    "Laplace": (dist.Laplace, lambda r: (r, torch.full_like(r, 2.0))),
}


def likelihood(family: str, rate: Tensor) -> Any:
    kind = FAMILIES[family][0]
    if family == "Bernoulli":
        return kind(rate / (1 + rate))
    return kind(rate) if family in ("Poisson", "Exponential") else kind(rate, torch.ones(()))


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_drawn_anew_for_each_draw_all_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(family, rate), obs=x)

    drawn: list[Any] = []
    run = predictive.at_once
    monkeypatch.setattr(predictive, "at_once", lambda *a: drawn.append(run(*a)) or drawn[-1])
    posterior = Posterior({"rate": torch.full((2, 2000), 1.5)})
    found = posterior.predictive(model, torch.ones(2), limit=4000, seed=0)["x"]
    assert all(chunk is not None for chunk in drawn)
    mean, variance = FAMILIES[family][1](torch.full((2,), 1.5))
    within_errors(found, mean, variance)
    a, b = (found - mean).T
    assert abs((a * b).mean()) < 5 * (a * b).std() / 4000**0.5  # rows are independent
    assert abs((a[1:] * a[:-1]).mean()) < 5 * (a[1:] * a[:-1]).std() / 4000**0.5  # so are draws


def test_a_model_that_looks_at_values_is_run_draw_by_draw() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        loc = 10.0 if w.item() > 0 else -10.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    w = torch.randn(2, 20)
    found = Posterior({"w": w}).predictive(model, torch.zeros(3), seed=0)["x"]
    assert torch.equal(found > 0, (w > 0).flatten()[:, None].expand(40, 3))


def test_chunks_keep_within_the_memory_and_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1.0, 3.0, 0.5])
    posterior, mean, variance = exact_mean(x)
    sizes: list[int] = []
    run = predictive.at_once

    def watched(once: Any, part: dict[str, Tensor]) -> Any:
        sizes.append(len(part["w"]))
        return run(once, part)

    monkeypatch.setattr(predictive, "at_once", watched)
    posterior.predictive(normal_mean, x, limit=4000, seed=0)
    monkeypatch.setattr(predictive, "MEMORY", 100_000)
    found = posterior.predictive(normal_mean, x, limit=4000, seed=0)
    assert sizes[0] == 4000
    assert sum(sizes[1:]) == 4000
    assert 1 < sizes[1] < 1000
    within_errors(found["x"], mean.expand(3), (variance + 4).expand(3))
    assert_close(found["twice"], 2 * posterior["w"].flatten())


def test_draws_are_thinned_evenly() -> None:
    w = torch.arange(12.0).reshape(3, 4)
    assert predictive.thinned({"w": w}, 6)["w"].tolist() == [0, 2, 4, 6, 8, 10]
    assert predictive.thinned({"w": w}, 5)["w"].tolist() == [0, 2, 4, 7, 9]
    assert predictive.thinned({"w": w}, 100)["w"].tolist() == list(range(12))


def test_a_seed_reproduces_and_the_model_is_left_alone() -> None:
    model = PPCA(data_dim=3, latent_dim=2)
    x = model(size=4).detach()
    posterior = Posterior({"z": torch.randn(2, 10, 4, 2)})
    pyro.clear_param_store()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = posterior.predictive(model, x, seed=3)["x"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(posterior.predictive(model, x, seed=3)["x"], first)
    assert not torch.equal(posterior.predictive(model, x, seed=4)["x"], first)
    assert not torch.equal(posterior.predictive(model, x)["x"], posterior.predictive(model, x)["x"])
    assert len(pyro.get_param_store()) == 0
    assert model.training


def test_draws_of_other_rows_and_unknown_sites_are_refused() -> None:
    model = PPCA(data_dim=3, latent_dim=2)
    posterior = Posterior({"z": torch.randn(2, 10, 4, 2)})
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"'z' has shape \(5, 2\).*draws have \(4, 2\)"):
        posterior.predictive(model, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"latent 'z' of PPCA has no draws.*\['w'\]"):
        Posterior({"w": torch.zeros(2, 5)}).predictive(model, x)
    with pytest.raises(ValueError, match="no observed or deterministic site 'y'"):
        posterior.predictive(model, x, sites="y")
    with pytest.raises(ValueError, match="limit must be an integer >= 1, got 0"):
        posterior.predictive(model, x, limit=0)

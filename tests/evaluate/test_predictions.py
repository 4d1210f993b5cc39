"""Predictions, against the closed form of Bayesian linear regression and sums written out."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.testing import assert_close

from ppl_models import BayesianNeuralNetwork
from ppl_models.evaluate import predict, predictions
from ppl_models.infer import Posterior, sample
from ppl_models.parts.likelihoods import Bernoulli, Classes, Counts

NOISE = 0.5


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w[..., :, None].squeeze(-1), NOISE), obs=y)


def exact(x: Tensor, y: Tensor) -> dist.MultivariateNormal:
    precision = x.T @ x / NOISE**2 + torch.eye(2) / 4.0
    covariance = torch.linalg.inv(precision)
    return dist.MultivariateNormal(covariance @ x.T @ y / NOISE**2, covariance)


def data(rows: int = 12, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + NOISE * torch.randn(rows, generator=generator)


def closed_form(q: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x @ q.mean
    epistemic = torch.einsum("nd,de,ne->n", x, q.covariance_matrix, x).sqrt()
    log_density = dist.Normal(mean, (epistemic**2 + NOISE**2).sqrt()).log_prob(y)
    return mean, epistemic, log_density


def check_moments(found: Any, q: Any, x: Tensor, y: Tensor, effective: float) -> None:
    mean, epistemic, log_density = closed_form(q, x, y)
    assert bool(((found.mean - mean).abs() < 5 * epistemic / effective**0.5).all())
    # The scale of n independent normal draws has relative error 1 / sqrt(2 n).
    assert bool(((found.epistemic / epistemic - 1).abs() < 5 / (2 * effective) ** 0.5).all())
    assert_close(found.aleatoric, torch.full_like(mean, NOISE))
    assert_close(found.scale, (found.epistemic**2 + NOISE**2).sqrt())
    estimate = found.log_density
    assert bool(((estimate.rows - log_density).abs() < 5 * estimate.rows_se).all())
    assert abs(estimate.mean - log_density.mean().item()) < 5 * estimate.se


def test_moments_and_density_by_a_guide_are_those_of_the_closed_form() -> None:
    x, y = data()
    q = exact(x, y)
    x_new, y_new = data(rows=20, seed=4)
    found = predict(line, lambda x: pyro.sample("w", q), x_new, y_new, draws=4000, seed=0)
    check_moments(found, q, x_new, y_new, effective=4000)
    assert found.draws == found.log_density.particles == 4000


def test_moments_and_density_by_nuts_are_those_of_the_closed_form() -> None:
    x, y = data()
    posterior = sample(
        line, x, y, chains=4, draws=500, warmup=200, seed=0, compile=False, progress=False
    )
    x_new, y_new = data(rows=20, seed=4)
    found = predict(line, posterior, x_new, y_new, draws=2000, seed=0)
    effective = min(posterior.ess()["w"].min().item(), 2000)
    check_moments(found, exact(x, y), x_new, y_new, effective)


def test_errors_of_the_density_are_as_large_as_it_varies() -> None:
    x, y = data()
    q = exact(x, y)
    guide = lambda x: pyro.sample("w", q)
    found = [predict(line, guide, x, y, draws=200, seed=i).log_density for i in range(200)]
    for values, errors in (
        (torch.stack([f.rows for f in found]), torch.stack([f.rows_se for f in found])),
        (torch.tensor([f.mean for f in found]), torch.tensor([f.se for f in found])),
    ):
        ratio = values.std(0) / errors.square().mean(0).sqrt()
        # Relative error of a scale from 200 values: 1 / sqrt(400); and of the errors themselves.
        assert bool(((ratio - 1).abs() < 5 / 400**0.5).all())
    # The log of a mean is too low by half its variance.
    for one in found[:3]:
        assert one.bias == pytest.approx(-one.rows_se.square().mean().item() / 2.0)


def test_rows_that_are_the_same_err_together() -> None:
    x, y = data()
    q = exact(x, y)
    x, y = x[:1].expand(6, 2), y[:1].expand(6)
    found = predict(line, lambda x: pyro.sample("w", q), x, y, draws=200, seed=0).log_density
    assert found.se == pytest.approx(found.rows_se[0].item())


def test_errors_know_that_neighbours_of_a_chain_hang_together() -> None:
    x, y = data()
    q = exact(x, y)
    ratios = []
    for seed in range(60):
        torch.manual_seed(seed)
        few = q.sample((100,))
        same = Posterior({"w": few.repeat_interleave(20, 0)[None]})  # 2000 draws, 100 of them new
        ratios.append(predict(line, same, x, y, draws=2000, seed=0).log_density)
    spread = torch.stack([f.rows for f in ratios]).std(0)
    told = torch.stack([f.rows_se for f in ratios]).square().mean(0).sqrt()
    assert bool(((spread / told - 1).abs() < 5 / 120**0.5).all())


CASES: dict[str, Any] = {
    "classes": (Classes(3), torch.tensor([0, 2, 1, 1]), None),
    "binary": (Bernoulli(), torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64), None),
    "counts": (Counts(), torch.tensor([0.0, 2.0, 5.0, 1.0], dtype=torch.float64), None),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_over_a_few_draws_are_those_written_out(case: str) -> None:
    likelihood, y, _ = CASES[case]
    model = BayesianNeuralNetwork(2, hidden=(3,), likelihood=likelihood)
    x = torch.randn(4, 2)
    shapes = {"0.weight": (3, 2), "0.bias": (3,)}
    shapes |= {"2.weight": (likelihood.size, 3), "2.bias": (likelihood.size,)}
    draws = {name: torch.randn(2, 5, *shape) for name, shape in shapes.items()}
    found = predict(model, Posterior(draws), x, y, draws=10, seed=0)
    w = {name: value.flatten(0, 1).numpy() for name, value in draws.items()}
    h = np.tanh(np.einsum("nd,shd->snh", x.numpy(), w["0.weight"]) + w["0.bias"][:, None])
    out = np.einsum("snh,soh->sno", h, w["2.weight"]) + w["2.bias"][:, None]
    if case == "classes":
        mean = scipy.special.softmax(out, -1)
        variance = mean * (1 - mean)
        density = mean[:, np.arange(4), y.numpy()]
    elif case == "binary":
        mean = scipy.special.expit(out[..., 0])
        variance = mean * (1 - mean)
        density = np.where(y.numpy() == 1, mean, 1 - mean)
    else:
        mean = variance = np.exp(out[..., 0])
        density = scipy.stats.poisson(mean).pmf(y.numpy())
    np.testing.assert_allclose(found.mean, mean.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.aleatoric, variance.mean(0) ** 0.5, rtol=1e-10)
    np.testing.assert_allclose(found.epistemic, mean.std(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(found.log_density.rows, np.log(density.mean(0)), rtol=1e-10)
    if case == "counts":
        assert found.levels.shape == y.shape
    else:
        want = np.eye(3)[y.numpy()] if case == "classes" else y.numpy()
        np.testing.assert_array_equal(found.hits, want)


def test_chunks_give_what_one_draw_after_the_other_gives(monkeypatch) -> None:
    x, y = data()
    q = exact(x, y)
    posterior = Posterior({"w": q.sample((2, 50))})
    whole = predict(line, posterior, x, y, draws=100, seed=0)
    for memory in (1, 5000):
        monkeypatch.setattr("ppl_models.evaluate.predictions.MEMORY", memory)
        part = predict(line, posterior, x, y, draws=100, seed=0)
        for name in ("mean", "aleatoric", "epistemic"):
            assert_close(getattr(part, name), getattr(whole, name))
        assert_close(part.log_density.rows, whole.log_density.rows)
        assert_close(part.log_density.rows_se, whole.log_density.rows_se)


def test_memory_does_not_grow_with_the_draws(monkeypatch) -> None:
    x, y = data()
    sizes = []
    monkeypatch.setattr(predictions, "MEMORY", 100_000)
    real = predictions.at_once
    monkeypatch.setattr(
        predictions, "at_once", lambda once, part: sizes.append(len(part["w"])) or real(once, part)
    )
    q = exact(x, y)
    for draws in (100, 1000):
        predict(line, lambda x: pyro.sample("w", q), x, y, draws=draws, seed=0)
    assert len(sizes) > 2
    assert max(sizes) < 200


def test_levels_are_uniform_where_the_model_is_true() -> None:
    levels = []
    for seed in range(60):
        torch.manual_seed(seed)
        x, w = torch.randn(12, 2), 2.0 * torch.randn(2)
        y = x @ w + NOISE * torch.randn(12)
        q = exact(x[:6], y[:6])
        found = predict(
            line, lambda x, q=q: pyro.sample("w", q), x[6:7], y[6:7], draws=99, seed=seed
        )
        levels.append(found.levels.item())
    assert scipy.stats.kstest(levels, "uniform").pvalue > 1e-4
    edges = [2 * abs(level - 0.5) for level in levels]  # neither too wide nor too narrow
    assert scipy.stats.kstest(edges, "uniform").pvalue > 1e-4


def test_levels_are_uniform_even_with_one_draw() -> None:
    x, y = torch.ones(400, 2), NOISE * torch.randn(400)
    found = predict(line, Posterior({"w": torch.zeros(1, 1, 2)}), x, y, draws=1, seed=0)
    assert found.levels is not None
    assert scipy.stats.kstest(found.levels.numpy(), "uniform").pvalue > 1e-4


def test_a_large_mean_leaves_the_scale_what_it_is() -> None:
    w = torch.randn(1, 50, 2)
    w[..., 0] += 1e8
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = predict(line, Posterior({"w": w}), x, seed=0)
    assert_close(found.epistemic, (w[0] @ x.T).std(0), rtol=1e-6, atol=0.0)


def test_levels_of_counts_are_spread_over_ties() -> None:
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Poisson((0.3 * w.exp()).expand(len(x))), obs=y)

    y = dist.Poisson(0.3).sample((400,))
    posterior = Posterior({"w": torch.zeros(1, 50)})
    found = predict(model, posterior, torch.zeros(400, 1), y, draws=50, seed=0)
    assert scipy.stats.kstest(found.levels.numpy(), "uniform").pvalue > 1e-4


def test_a_seed_isolates_and_reproduces() -> None:
    x, y = data()
    q = exact(x, y)
    guide = lambda x: pyro.sample("w", q)
    state = torch.get_rng_state()
    one, two = (predict(line, guide, x, y, draws=20, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.levels, two.levels)
    without = predict(line, guide, x, draws=20, seed=5)
    assert without.log_density is None
    assert without.mean.shape == (12,)


def test_rows_may_be_lists() -> None:
    x, y = data()
    posterior = Posterior({"w": torch.randn(1, 9, 2)})
    want = predict(line, posterior, x, y, seed=0)
    for rows in (x.tolist(), (x.tolist(),), [x]):
        found = predict(line, posterior, rows, y.tolist(), seed=0)
        assert torch.equal(found.mean, want.mean)
        assert torch.equal(predict(line, posterior, rows).mean, want.mean)


def test_what_does_not_fit_is_refused() -> None:
    x, y = data()
    posterior = Posterior({"w": torch.zeros(1, 9, 2)})
    with pytest.raises(ValueError, match=r"'y'.*shape \(12,\).*but got \(12, 1\)"):
        predict(line, posterior, x, y[:, None])
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) on these rows.*have \(3,\)"):
        predict(line, Posterior({"w": torch.zeros(1, 9, 3)}), x, y)
    with pytest.raises(ValueError, match=r"latent \['w'\] of line has no draws.*\['v'\]"):
        predict(line, Posterior({"v": torch.zeros(1, 9)}), x, y)
    with pytest.raises(ValueError, match="no latent 'v'"):
        predict(line, Posterior({"w": torch.zeros(1, 9, 2), "v": torch.zeros(1, 9)}), x, y)
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        predict(line, posterior, x, y, draws=0)
    with pytest.raises(ValueError, match="there is no observed site 'x'"):
        predict(line, posterior, x, y, site="x")
    with pytest.raises(ValueError, match="give y to `predict`"):
        predict(line, posterior, x).plot()
    with pytest.raises(ValueError, match="posterior must hold draws of the latents, got none"):
        predict(line, {}, x, y)
    with pytest.raises(ValueError, match=r"line cannot be run on this data.*x \(12, 3\)"):
        predict(line, posterior, torch.randn(12, 3))

    def heavy(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Cauchy(x @ w, 1.0), obs=y)

    with pytest.raises(ValueError, match="y must have a mean, but 12 of 12 are NaN"):
        predict(heavy, posterior, x, y)
    only = predict(line, posterior, x, y, draws=1)
    assert math.isnan(only.log_density.se)


def test_the_picture_shows_the_levels_and_the_frequencies() -> None:
    x, y = data()
    q = exact(x, y)
    found = predict(line, lambda x: pyro.sample("w", q), x, y, draws=50, seed=0)
    figure = found.plot()
    figure.savefig(io.BytesIO())
    (curve,) = [one for one in figure.axes[0].lines if one.get_label() == "12 rows"]
    np.testing.assert_allclose(curve.get_xdata()[1:-1], found.levels.sort().values)
    np.testing.assert_allclose(curve.get_ydata()[1:-1], np.arange(1, 13) / 12)

    model = BayesianNeuralNetwork(2, hidden=(3,), likelihood=Bernoulli())
    prior = lambda x: {
        k: pyro.sample(k, dist.Normal(torch.zeros_like(v), 1.0).to_event(v.ndim))
        for k, v in model.net.starts().items()
    }
    classes = predict(model, prior, x, (y > 0).double(), draws=5, seed=0)
    figure = classes.plot()
    figure.savefig(io.BytesIO())
    bars = figure.axes[0].containers[0].lines[0]
    shares = np.asarray(bars.get_ydata())
    counts = np.bincount((classes.mean.numpy() * 10).astype(int), minlength=10)
    assert (shares * counts[counts > 0]).sum() == pytest.approx((y > 0).sum().item())

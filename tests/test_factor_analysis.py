"""Factor analysis against formulas written out again, and against scikit-learn."""

from __future__ import annotations

import math
import warnings
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn import decomposition
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.testing import assert_close

from guides import Exact
from ppl_models import PPCA, FactorAnalysis
from ppl_models.data import load
from ppl_models.factor_analysis import ecme
from ppl_models.infer import fit


def standardised(bunch: Any) -> Tensor:
    x = torch.tensor(bunch.data)
    return (x - x.mean(0)) / x.std(0, correction=0)


def simulated(size: int = 500) -> Tensor:
    """Draw rows with two factors and noise from 0.3 to 1.5."""
    random = np.random.default_rng(0)
    loading, noise = random.normal(size=(2, 8)), np.linspace(0.3, 1.5, 8)
    rows = random.normal(size=(size, 2)) @ loading + noise * random.normal(size=(size, 8))
    return torch.tensor(rows + random.normal(size=8))


def breast_cancer() -> Tensor:
    return standardised(load_breast_cancer())


def wine() -> Tensor:
    return standardised(load_wine())


def diabetes() -> Tensor:
    return standardised(load_diabetes())


def some_model(data_dim: int = 5, latent_dim: int = 2) -> FactorAnalysis:
    model = FactorAnalysis(data_dim, latent_dim, noise_scale=0.7)
    model.loc.data.normal_()
    model.log_noise_scale.data.normal_()
    return model


def numbers(model: FactorAnalysis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return loading, loc and noise scale, the last from the stored parameter."""
    noise = model.min_scale + np.exp(model.log_noise_scale.detach().numpy())
    return model.loading.detach().numpy(), model.loc.detach().numpy(), noise


def covariance(model: FactorAnalysis) -> np.ndarray:
    loading, _, noise = numbers(model)
    return loading @ loading.T + np.diag(noise**2)


def mean_evidence(model: FactorAnalysis, x: Tensor) -> float:
    return model.log_evidence(x).mean().item()


def scikit_learns(x: Tensor, latent_dim: int, steps: int = 20000) -> decomposition.FactorAnalysis:
    theirs = decomposition.FactorAnalysis(
        latent_dim, tol=1e-12, max_iter=steps, svd_method="lapack"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return theirs.fit(x.numpy())


def test_the_evidence_is_the_dense_gaussian() -> None:
    model = some_model()
    x = model(size=20).detach()
    dense = multivariate_normal(numbers(model)[1], covariance(model)).logpdf(x.numpy())
    assert_close(model.log_evidence(x).detach(), torch.tensor(dense))


def test_the_evidence_is_the_score_of_scikit_learn_at_the_same_parameters() -> None:
    model = some_model()
    x = model(size=20).detach()
    theirs = decomposition.FactorAnalysis(2)
    loading, theirs.mean_, noise = numbers(model)
    theirs.components_, theirs.noise_variance_ = loading.T, noise**2
    assert_close(model.log_evidence(x).detach(), torch.tensor(theirs.score_samples(x.numpy())))
    assert_close(model.posterior(x).mean.detach(), torch.tensor(theirs.transform(x.numpy())))


def test_the_posterior_is_bayes_rule_for_the_joint_gaussian() -> None:
    model = some_model(5, 3)
    loading, loc, _ = numbers(model)
    x = model(size=4).detach()
    # Condition the joint of (z, x): cov(z, x) = W^T, cov(x) = W W^T + Psi.
    gain = loading.T @ np.linalg.inv(covariance(model))
    posterior = model.posterior(x)
    assert_close(posterior.mean.detach(), torch.tensor((x.numpy() - loc) @ gain.T))
    want = torch.tensor(np.eye(3) - gain @ loading)
    assert_close(posterior.covariance_matrix.detach(), want.expand(4, 3, 3))


def test_joint_is_posterior_times_evidence_at_any_point() -> None:
    model = some_model()
    x, z = model(size=6).detach(), torch.randn(6, 2)
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    assert_close(joint, model.posterior(x).log_prob(z) + model.log_evidence(x))


def test_the_posterior_is_what_completing_the_square_of_the_joint_gives() -> None:
    model = some_model()
    x = model(size=4).detach()
    quadratic = Exact(lambda x: model(x), example=x)  # a function hides the method `posterior`
    assert_close(quadratic.q("z", x).mean, model.posterior(x).mean)
    assert_close(quadratic.q("z", x).covariance_matrix, model.posterior(x).covariance_matrix)


def test_with_the_same_noise_in_each_column_it_is_ppca() -> None:
    model, ppca = FactorAnalysis(5, 2, noise_scale=0.7), PPCA(5, 2, noise_scale=0.7)
    ppca.loading.data.copy_(model.loading.data)
    x = model(size=6).detach()
    assert_close(model.log_evidence(x), ppca.log_evidence(x))
    assert_close(model.posterior(x).mean, ppca.posterior(x).mean)
    assert_close(model.posterior(x).covariance_matrix, ppca.posterior(x).covariance_matrix)


def test_parameters_may_have_leading_dimensions() -> None:
    singles = [some_model() for _ in range(3)]
    x = singles[0](size=6).detach()
    z = torch.randn(3, 6, 2)
    stacked = some_model()
    for name, parameter in list(stacked.named_parameters()):
        values = torch.stack([getattr(single, name).data for single in singles])
        setattr(stacked, name, nn.Parameter(values.unsqueeze(1)))  # 3 particles, a plate of rows
        assert getattr(stacked, name).shape == (3, 1, *parameter.shape)
    want = torch.stack([single.log_evidence(x) for single in singles])
    assert_close(stacked.log_evidence(x), want)
    means = torch.stack([single.posterior(x).mean for single in singles])
    assert_close(stacked.posterior(x).mean, means)
    scored = [single.likelihood(part).log_prob(x) for single, part in zip(singles, z, strict=True)]
    assert_close(stacked.likelihood(z).log_prob(x), torch.stack(scored))


@pytest.mark.parametrize(
    ("data", "latent_dim"),
    [(simulated, 1), (simulated, 2), (wine, 2), (wine, 3), (breast_cancer, 2)],
)
def test_maximum_likelihood_agrees_with_scikit_learn(data: Any, latent_dim: int) -> None:
    x = data()
    model = FactorAnalysis.maximum_likelihood(x, latent_dim, tolerance=1e-13)
    theirs = scikit_learns(x, latent_dim)
    assert mean_evidence(model, x) >= theirs.score(x.numpy()) - 1e-10
    np.testing.assert_allclose(covariance(model), theirs.get_covariance(), rtol=0, atol=1e-5)
    assert_close(model.loc.detach(), torch.tensor(theirs.mean_))
    # So it is within the documented tolerance at the default settings.
    default = FactorAnalysis.maximum_likelihood(x, latent_dim)
    assert mean_evidence(default, x) >= theirs.score(x.numpy()) - 1e-7


@pytest.mark.parametrize(
    ("data", "latent_dim", "more"),
    # Where scikit-learn stays at a lower maximum, or takes ever smaller steps to a noise of zero.
    [
        (breast_cancer, 1, 0.07),
        (breast_cancer, 3, 0.9),
        (breast_cancer, 5, 1e-4),
        (wine, 5, 0.05),
        (diabetes, 1, 1e-4),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Heywood case")
def test_maximum_likelihood_is_above_scikit_learn_where_that_stays_below(
    data: Any, latent_dim: int, more: float
) -> None:
    x = data()
    model = FactorAnalysis.maximum_likelihood(x, latent_dim)
    assert mean_evidence(model, x) > scikit_learns(x, latent_dim, 2000).score(x.numpy()) + more


@pytest.mark.parametrize("data", [simulated, wine, breast_cancer])
def test_the_gradient_of_the_evidence_vanishes_at_the_maximum(data: Any) -> None:
    x = data()
    model = FactorAnalysis.maximum_likelihood(x, 2, tolerance=1e-14)
    model.log_evidence(x).mean().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), msg=name, atol=1e-6, rtol=0)


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 10])
@pytest.mark.parametrize("start", [0.02, 0.5, 1.0])
def test_no_step_of_ecme_lowers_the_likelihood(latent_dim: int, start: float) -> None:
    x = breast_cancer()
    root, ones = x / math.sqrt(len(x)), torch.ones(30)
    steps = list(islice(ecme(root, latent_dim, start * ones, 1e-6 * ones), 60))
    for loading, variance, value in (steps[0], steps[1], steps[-1]):
        dense = MultivariateNormal(torch.zeros(30), loading @ loading.mT + variance.diag())
        assert_close(dense.log_prob(x).mean(), value, rtol=1e-9, atol=1e-9)
    values = torch.stack([value for _, _, value in steps])
    assert values.diff().min() > -1e-11
    assert values[1] > values[0]


def test_an_em_step_leaves_the_loading_of_ecme_alone() -> None:
    # The textbook step of EM, from moments of the posterior, at a W that is best given psi.
    x = wine()
    covariance = x.mT @ x / len(x)
    (loading, variance, _), *_ = islice(
        ecme(x / math.sqrt(len(x)), 3, torch.full((13,), 0.4), torch.full((13,), 1e-6)), 1
    )
    gain = loading.mT @ torch.linalg.inv(loading @ loading.mT + variance.diag())
    second = torch.eye(3) - gain @ loading + gain @ covariance @ gain.mT
    assert_close(covariance @ gain.mT @ torch.linalg.inv(second), loading)
    assert_close(
        (covariance - loading @ gain @ covariance).diagonal(),
        covariance.diagonal() - loading.square().sum(-1),
    )


@pytest.mark.filterwarnings("ignore:.*Heywood case")
@pytest.mark.parametrize(("data", "latent_dim"), [(wine, 5), (breast_cancer, 5)])
def test_a_noise_scale_at_the_minimum_could_only_gain_by_going_below(
    data: Any, latent_dim: int
) -> None:
    x = data()
    model = FactorAnalysis.maximum_likelihood(x, latent_dim, tolerance=1e-12)
    _, _, noise = numbers(model)
    at_minimum = torch.tensor(noise <= model.min_scale * (1 + 1e-12))
    assert at_minimum.sum() == 2
    scale = torch.tensor(noise, requires_grad=True)
    loading = model.loading.detach().requires_grad_()
    dense = MultivariateNormal(model.loc.detach(), loading @ loading.mT + scale.square().diag())
    dense.log_prob(x).mean().backward()
    assert bool((scale.grad[at_minimum] < 0).all())
    assert scale.grad[~at_minimum].abs().max() < 1e-4
    assert loading.grad.abs().max() < 1e-4


def test_other_units_give_other_parameters_of_the_same_model() -> None:
    x, units = simulated(), torch.logspace(-6, 6, 8)
    options = {"tolerance": 1e-13, "min_scale": 1e-12}
    model = FactorAnalysis.maximum_likelihood(x, 2, **options)
    other = FactorAnalysis.maximum_likelihood(units * x, 2, **options)
    assert_close(other.noise_scale, units * model.noise_scale, rtol=1e-5, atol=0)
    want = units[:, None] * (model.loading @ model.loading.mT) * units
    assert_close((other.loading @ other.loading.mT) / want, torch.ones(8, 8), rtol=1e-4, atol=0)
    evidence = mean_evidence(model, x) - units.log().sum().item()
    assert_close(mean_evidence(other, units * x), evidence)


def test_more_factors_and_noise_by_column_never_cost_likelihood() -> None:
    x = simulated()
    values = [mean_evidence(FactorAnalysis.maximum_likelihood(x, k), x) for k in (1, 2)]
    assert values[1] > values[0]
    assert values[1] > PPCA.maximum_likelihood(x, 2).log_evidence(x).mean() + 0.1


def test_it_finds_the_parameters_that_made_the_data() -> None:
    random = torch.Generator().manual_seed(0)
    truth = FactorAnalysis(6, 1)
    truth.loading.data = torch.linspace(-2, 2, 6)[:, None]
    truth.log_noise_scale.data = torch.linspace(0.3, 1.5, 6).log()
    z = torch.randn(50_000, 1, generator=random)
    noise = truth.noise_scale.detach() * torch.randn(50_000, 6, generator=random)
    model = FactorAnalysis.maximum_likelihood(z @ truth.loading.detach().mT + noise, 1)
    assert_close(model.noise_scale, truth.noise_scale, rtol=0.03, atol=0)
    assert_close(
        (model.loading @ model.loading.mT), truth.loading @ truth.loading.mT, rtol=0, atol=0.1
    )


def test_svi_with_the_exact_posterior_reaches_the_maximum() -> None:
    x = simulated()
    model = FactorAnalysis(8, 2)
    schedule = partial(CosineAnnealingLR, T_max=500)
    fit(model, Exact(model), x, steps=500, batch_size=len(x), lr=0.05, schedule=schedule, seed=0)
    best = mean_evidence(FactorAnalysis.maximum_likelihood(x, 2), x)
    assert -1e-8 < best - mean_evidence(model, x) < 1e-3


def test_constant_columns_are_named_and_the_numbers_finite() -> None:
    digits = load("digits")
    x = torch.cat([digits.x, digits.x_test]).double()
    with pytest.warns(UserWarning, match=r"3 of 64 columns \(0, 32, 39\) are constant.*Drop them"):
        model = FactorAnalysis.maximum_likelihood(x, 2)
    constant = torch.tensor([0, 32, 39])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert bool(torch.isfinite(model.log_evidence(x)).all())
    assert_close(model.noise_scale[constant].detach(), torch.full((3,), 1e-3))
    assert model.loading[constant].abs().max() < 1e-15
    # The other columns get what they get without them.
    keep = x.amax(0) > x.amin(0)
    without = FactorAnalysis.maximum_likelihood(x[:, keep], 2)
    assert_close(without.noise_scale, model.noise_scale[keep], rtol=1e-4, atol=0)
    peak = -math.log(1e-3) - 0.5 * math.log(2 * math.pi)  # log density of a column at its mean
    assert_close(mean_evidence(model, x), mean_evidence(without, x[:, keep]) + 3 * peak)


def test_one_constant_column_far_from_zero_is_named() -> None:
    x = simulated()
    x[:, 4] = 0.1
    with pytest.warns(UserWarning, match="column 4 of 8 is constant"):
        FactorAnalysis.maximum_likelihood(x.float(), 2)


def test_many_constant_columns_are_counted_and_the_first_named() -> None:
    x = torch.cat([simulated(), torch.zeros(500, 10)], -1)
    with pytest.warns(UserWarning, match=r"10 of 18 columns \(8, 9, .*, 15, \.\.\.\) are constant"):
        FactorAnalysis.maximum_likelihood(x, 2)


def test_columns_that_the_factors_explain_are_named_and_get_the_minimum() -> None:
    x = simulated()
    x[:, 3] = x[:, 1] + 2 * x[:, 0]
    with pytest.warns(UserWarning, match=r"min_scale=0.05 \(a Heywood case\)"):
        model = FactorAnalysis.maximum_likelihood(x, 4, min_scale=0.05)
    assert model.min_scale == 0.05
    assert_close(model.noise_scale.min().item(), 0.05)
    assert bool((model.noise_scale >= 0.05).all())


def test_data_in_a_subspace_have_a_maximum_by_the_minimum() -> None:
    flat = torch.randn(50, 2) @ torch.randn(2, 5)
    with pytest.warns(UserWarning, match="Heywood case"):
        model = FactorAnalysis.maximum_likelihood(flat, 2)
    assert_close(model.noise_scale.detach(), torch.full((5,), 1e-3))
    dense = MultivariateNormal(model.loc, torch.tensor(covariance(model)))
    assert_close(model.log_evidence(flat), dense.log_prob(flat), rtol=1e-6, atol=1e-5)


def test_a_minimum_beyond_double_precision_is_raised_to_what_it_can_hold() -> None:
    flat = torch.randn(50, 2) @ torch.randn(2, 5)
    with pytest.warns(UserWarning, match="Heywood case"):
        model = FactorAnalysis.maximum_likelihood(flat, 2, min_scale=1e-200)
    assert_close(model.noise_scale.detach(), 1e-7 * flat.std(0, correction=0))


def test_fewer_rows_than_factors_are_fitted_too() -> None:
    with pytest.warns(UserWarning, match="Heywood case"):
        model = FactorAnalysis.maximum_likelihood(wine()[:3], 5)
    assert model.loading.shape == (13, 5)
    assert bool(torch.isfinite(model.log_evidence(wine())).all())


def test_too_few_steps_are_told() -> None:
    with pytest.warns(UserWarning, match=r"stopped after 3 steps, the last of which gained \d"):
        FactorAnalysis.maximum_likelihood(simulated(), 2, steps=3)


def test_a_loose_tolerance_stops_early() -> None:
    x = simulated()
    loose = mean_evidence(FactorAnalysis.maximum_likelihood(x, 2, tolerance=0.01), x)
    gap = mean_evidence(FactorAnalysis.maximum_likelihood(x, 2), x) - loose
    assert 1e-6 < gap < 0.1


def test_maximum_likelihood_is_deterministic_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, two = (FactorAnalysis.maximum_likelihood(simulated(), 2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)


def test_maximum_likelihood_takes_the_precision_of_the_data() -> None:
    x = simulated()
    double = FactorAnalysis.maximum_likelihood(x, 2)
    single = FactorAnalysis.maximum_likelihood(x.float(), 2)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert_close(single.noise_scale.double(), double.noise_scale, rtol=1e-5, atol=0)
    assert_close(single.log_evidence(x.float()).double(), double.log_evidence(x), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.*Heywood case")
def test_the_evidence_keeps_its_digits_in_single_precision_where_noise_is_small() -> None:
    x = breast_cancer()
    model = FactorAnalysis.maximum_likelihood(x, 5)
    want = model.log_evidence(x).mean().item()
    assert abs(model.float().log_evidence(x.float()).double().mean().item() - want) < 1e-3


def test_whole_numbers_and_arrays_are_data() -> None:
    counts = (10 * simulated()).round()
    want = FactorAnalysis.maximum_likelihood(counts, 2)
    for data in (counts.long(), counts.numpy()):
        model: Any = FactorAnalysis.maximum_likelihood(data, 2)
        assert_close(model.noise_scale, want.noise_scale)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latent_dim": 0}, "latent_dim must be an integer >= 1, got 0"),
        ({"latent_dim": 6}, r"latent_dim must be in \[1, 5\], got 6"),
        ({"latent_dim": 2, "noise_scale": 0.0}, "must be > min_scale=0.001 and finite, got 0.0"),
        ({"latent_dim": 2, "noise_scale": 0.1, "min_scale": 0.1}, "noise_scale must be > min_sca"),
        ({"latent_dim": 2, "min_scale": 0.0}, "min_scale must be > 0, got 0.0"),
        ({"latent_dim": 2, "min_scale": "1"}, "min_scale must be > 0, got '1'"),
    ],
)
def test_wrong_sizes_and_scales_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FactorAnalysis(5, **options)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (9, {"latent_dim": 8}, r"latent_dim in \[1, 7\], fewer than there are columns; got 8"),
        (9, {"latent_dim": 0}, r"latent_dim in \[1, 7\], fewer than there are columns; got 0"),
        (1, {"latent_dim": 2}, "at least 2 rows, got 1"),
        (9, {"latent_dim": 2, "min_scale": 0.0}, "min_scale must be > 0, got 0.0"),
        (9, {"latent_dim": 2, "tolerance": 0.0}, "tolerance must be a finite number > 0, got 0.0"),
        (9, {"latent_dim": 2, "steps": 0}, "steps must be an integer >= 1, got 0"),
    ],
)
def test_maximum_likelihood_refuses_what_cannot_be(
    rows: int, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        FactorAnalysis.maximum_likelihood(simulated()[:rows], **options)


def test_maximum_likelihood_refuses_what_is_no_matrix_of_numbers() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        FactorAnalysis.maximum_likelihood(torch.full((5, 3), torch.nan), 2)
    with pytest.raises(ValueError, match=r"shape \(N, D\), got \(5,\)"):
        FactorAnalysis.maximum_likelihood(torch.zeros(5), 2)

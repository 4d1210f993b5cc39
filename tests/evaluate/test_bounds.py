"""Bounds and evidence against closed forms, quadrature and numpy on the same weights."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.testing import assert_close

from guides import Amortized, Exact, Local
from ppl_models import PPCA
from ppl_models.evaluate import bounds, elbo, iwae_bound, log_evidence


def setting(rows=20, latent_dim=2, noise_scale=0.7) -> Any:
    model = PPCA(data_dim=5, latent_dim=latent_dim, noise_scale=noise_scale)
    return model, model(size=rows).detach()


def stretched(model, scale=1.5, shift=0.0) -> Any:
    """Return the exact posterior of PPCA with its scale multiplied and its mean moved."""

    def guide(x):
        exact = model.posterior(x)
        factor = exact.scale_tril
        loc = exact.loc + (factor @ torch.full((model.latent_dim,), float(shift)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale * factor))

    return guide


def relative_entropy(scale, latent_dim) -> Any:
    """KL(N(0, scale^2 I), N(0, I)): the gap of `stretched`, whatever the row."""
    return latent_dim * (scale**2 - 1 - math.log(scale**2)) / 2


@pytest.fixture
def weights(monkeypatch) -> Any:
    """Log weights of every block that the bounds draw, once the checks are over."""
    seen = []
    original = bounds.log_weights

    def record(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(bounds, "log_weights", record)
    return seen


def stacked(weights) -> Any:
    return torch.cat([rows for rows, _ in weights]).double().numpy()


@pytest.mark.parametrize("particles", [1, 2, 37])
def test_the_elbo_meets_the_evidence_at_the_exact_posterior(particles) -> None:
    model, x = setting()
    bound = elbo(model, Exact(model), x, particles=particles)
    assert_close(bound.rows, model.log_evidence(x).detach())
    assert bound.mean == pytest.approx(model.log_evidence(x).mean().item())
    assert bound.particles == particles
    assert bound.bias == 0.0


def test_the_elbo_falls_short_of_the_evidence_by_the_relative_entropy() -> None:
    model, x = setting()
    bound = elbo(model, stretched(model), x, particles=4000, seed=1)
    truth = model.log_evidence(x).detach() - relative_entropy(1.5, 2)
    assert abs(bound.mean - truth.mean().item()) < 5 * bound.se
    assert ((bound.rows - truth).abs() < 5 * bound.rows_se).all()
    # The log weight is a constant + (s^2 - 1) e^2 / 2 in each dimension, e^2 of variance 2.
    theory = (1.5**2 - 1) / 2 * math.sqrt(2 * 2 / 4000)
    assert_close(bound.rows_se, torch.full_like(truth, theory), rtol=0.15, atol=0.0)


@pytest.mark.parametrize("elements", [2**21, 300, 1])
def test_the_elbo_and_its_error_are_those_of_numpy_on_the_same_weights(
    weights, monkeypatch, elements
) -> None:
    monkeypatch.setattr(bounds, "ELEMENTS", elements)
    model, x = setting(rows=1)
    bound = elbo(model, stretched(model, shift=1.0), x, particles=61, seed=2)
    values = stacked(weights)
    assert values.shape == (61, 1)
    assert len(weights) == {2**21: 1, 300: 2, 1: 61}[elements]
    np.testing.assert_allclose(bound.rows, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(bound.rows_se, values.std(0, ddof=1) / math.sqrt(61), rtol=1e-9)
    assert bound.se == pytest.approx(bound.rows_se.item())


def test_the_error_of_the_mean_over_rows_is_that_of_independent_rows() -> None:
    model, x = setting(rows=9)
    for estimate in (elbo, iwae_bound, log_evidence):
        bound = estimate(model, stretched(model), x, particles=50, seed=0)
        assert bound.mean == pytest.approx(bound.rows.mean().item())
        expected = np.sqrt((bound.rows_se.numpy() ** 2).sum()) / 9
        assert bound.se == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimate", "options"),
    [
        (elbo, {"particles": 100}),
        (log_evidence, {"particles": 100}),
        (iwae_bound, {"particles": 10, "repeats": 3}),
    ],
)
def test_the_reported_error_is_the_spread_over_seeds(estimate, options) -> None:
    model, x = setting(rows=5)
    runs = [estimate(model, stretched(model), x, seed=s, **options) for s in range(200)]
    values = torch.stack([run.rows for run in runs])
    reported = torch.stack([run.rows_se for run in runs]).square().mean(0).sqrt()
    # The relative error of a standard deviation from R normal values is 1 / sqrt(2 (R - 1)).
    assert_close(reported, values.std(0), rtol=5 / math.sqrt(2 * 199), atol=0.0)
    means = torch.tensor([run.mean for run in runs])
    se = math.sqrt(sum(run.se**2 for run in runs) / 200)
    assert se == pytest.approx(means.std().item(), rel=5 / math.sqrt(2 * 199))


def test_a_single_particle_has_no_error() -> None:
    model, x = setting()
    for bound in (
        elbo(model, stretched(model), x, particles=1),
        log_evidence(model, stretched(model), x, particles=1),
        log_evidence(model, stretched(model), x, particles=1, jackknife=True),
        iwae_bound(model, stretched(model), x, particles=3, repeats=1),
    ):
        assert math.isnan(bound.se)
        assert bound.rows_se.isnan().all()
        assert bound.rows.isfinite().all()


def hierarchy(x) -> Any:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchy_posterior(x) -> Any:
    precision = 1 + len(x) / 2
    w = pyro.sample("w", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((w + x) / 2, 0.5**0.5))


def hierarchy_evidence(x) -> Any:
    covariance = 2 * np.eye(len(x)) + 1
    return scipy.stats.multivariate_normal(np.zeros(len(x)), covariance).logpdf(x.numpy())


def test_with_global_latents_the_bound_is_the_total_over_the_number_of_rows() -> None:
    x = torch.randn(6)
    bound = elbo(hierarchy, hierarchy_posterior, x, particles=5)
    assert bound.rows is None
    assert bound.rows_se is None
    assert bound.mean * 6 == pytest.approx(hierarchy_evidence(x))
    assert bound.se < 1e-12


def test_the_error_with_global_latents_is_that_of_the_total_over_the_rows(weights) -> None:
    def guide(x):
        pyro.sample("w", dist.Normal(0.3, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(6)
    bound = elbo(hierarchy, guide, x, particles=300, seed=3)
    totals = np.concatenate([(whole + rows.sum(1)).numpy() for rows, whole in weights])
    assert totals.shape == (300,)
    assert bound.mean == pytest.approx(totals.mean() / 6)
    assert bound.se == pytest.approx(totals.std(ddof=1) / math.sqrt(300) / 6)
    assert bound.mean < hierarchy_evidence(x) / 6 - 5 * bound.se
    assert math.isnan(elbo(hierarchy, guide, x, particles=1).se)


def test_a_model_without_a_plate_has_a_bound_in_total() -> None:
    inputs, y = torch.randn(7, 2), torch.randn(7)

    def regression(inputs, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (inputs * w.unsqueeze(-2)).sum(-1)
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    covariance = (inputs @ inputs.T + 0.25 * torch.eye(7)).numpy()
    truth = scipy.stats.multivariate_normal(np.zeros(7), covariance).logpdf(y.numpy())
    bound = elbo(regression, Exact(regression, example=(inputs, y)), inputs, y, particles=3)
    assert bound.rows is None
    assert bound.mean * 7 == pytest.approx(truth)


def test_a_model_without_data_has_a_bound() -> None:
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=torch.tensor(0.8))

    bound = elbo(model, lambda: pyro.sample("w", dist.Normal(0.4, 0.5**0.5)), particles=4)
    assert bound.mean == pytest.approx(scipy.stats.norm(0, 2**0.5).logpdf(0.8))


def test_a_sequential_plate_has_the_bound_of_a_vectorised_one() -> None:
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    x = torch.randn(4)
    bound = elbo(model, guide, x, particles=2)
    assert bound.rows is None
    assert bound.mean == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(x).mean().item())


def subsampled(x) -> Any:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampled_posterior(x) -> Any:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))


def test_a_plate_that_subsamples_by_itself_has_an_unbiased_bound_on_all_rows() -> None:
    x = torch.randn(6)
    bound = elbo(subsampled, subsampled_posterior, x, particles=2000, seed=0)
    assert bound.rows is None
    rows = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert abs(bound.mean - rows.mean().item()) < 5 * bound.se
    # The mean of two rows out of six, drawn without replacement.
    theory = rows.std().item() * math.sqrt((1 - 2 / 6) / 2 / 2000)
    assert bound.se == pytest.approx(theory, rel=0.15)


def no_plate(x) -> Any:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(w.unsqueeze(-1), torch.ones(len(x))).to_event(1), obs=x)


def loop(x) -> Any:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])


def loop_guide(x) -> Any:
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))


@pytest.mark.parametrize("estimate", [log_evidence, iwae_bound])
@pytest.mark.parametrize(
    ("model", "guide", "reason"),
    [
        (no_plate, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)), r"site 'w' .* shape \(\)"),
        (hierarchy, hierarchy_posterior, r"site 'w' .* shape \(\), not \(6,\)"),
        (loop, loop_guide, r"site 'z0' .* or in a sequential one"),
        (subsampled, subsampled_posterior, r"plate 'data' of subsampled subsamples by itself"),
    ],
)
def test_a_row_wise_function_names_the_site_that_has_no_rows(
    estimate, model, guide, reason
) -> None:
    with pytest.raises(ValueError, match=f"{estimate.__name__} scores rows.*{reason}.*`elbo`"):
        estimate(model, guide, torch.randn(6), particles=5)


def test_the_iwae_bound_of_two_particles_is_that_of_quadrature() -> None:
    model, x = setting(rows=400, latent_dim=1)
    scale = 1.8
    nodes, mass = np.polynomial.hermite_e.hermegauss(60)
    mass = mass / mass.sum()
    log_ratio = math.log(scale) - scale**2 * nodes**2 / 2 + nodes**2 / 2  # log p(z|x) - log q(z)
    pairs = np.logaddexp(log_ratio[:, None], log_ratio[None]) - math.log(2)
    gap = (mass[:, None] * mass[None] * pairs).sum()
    bound = iwae_bound(model, stretched(model, scale), x, particles=2, repeats=200, seed=0)
    errors = bound.rows - model.log_evidence(x).detach() - gap
    assert abs(errors.mean().item()) < 5 * bound.se
    assert bound.se < abs(gap) / 50


def test_the_iwae_bound_rises_from_the_elbo_to_the_evidence() -> None:
    model, x = setting(rows=50)
    truth = model.log_evidence(x).mean().item()
    guide = stretched(model, 2.0)
    counts = (1, 2, 5, 20, 1000)
    found = [iwae_bound(model, guide, x, particles=k, repeats=50, seed=k) for k in counts]
    assert abs(found[0].mean - (truth - relative_entropy(2.0, 2))) < 5 * found[0].se
    for low, high in itertools.pairwise(found):
        assert high.mean - low.mean > 5 * math.hypot(low.se, high.se)
    for bound in found:
        assert bound.mean - truth < 5 * bound.se
    # The ratio of weights has second moment (s^2 / sqrt(2 s^2 - 1))^2 in two dimensions.
    variance = 2.0**4 / (2 * 2.0**2 - 1) - 1
    assert abs(found[-1].mean - (truth - variance / 2 / 1000)) < 5 * found[-1].se


def test_the_evidence_agrees_with_the_closed_form() -> None:
    model, x = setting(rows=40)
    truth = model.log_evidence(x).detach()
    for jackknife in (False, True):
        found = log_evidence(model, stretched(model), x, jackknife=jackknife, seed=0)
        assert abs(found.bias) < found.se / 10
        assert abs(found.mean - truth.mean().item()) < 3 * found.se
        assert ((found.rows - truth).abs() < 5 * found.rows_se).all()
        # var(w) / mean(w)^2 = (s^2 / sqrt(2 s^2 - 1))^2 - 1 in two dimensions.
        theory = math.sqrt((1.5**4 / (2 * 1.5**2 - 1) - 1) / 1000)
        assert_close(found.rows_se, torch.full_like(truth, theory), rtol=0.15, atol=0.0)


def test_the_evidence_is_exact_at_the_exact_posterior() -> None:
    model, x = setting()
    for jackknife in (False, True):
        found = log_evidence(model, Exact(model), x, particles=7, jackknife=jackknife)
        assert_close(found.rows, model.log_evidence(x).detach())
        assert found.se < 1e-6


@pytest.mark.parametrize("particles", [1, 3, 30, 300])
def test_the_evidence_never_exceeds_the_truth_in_expectation(particles) -> None:
    model, x = setting(rows=500)
    truth = model.log_evidence(x).detach()
    guide = stretched(model, 1.3, shift=0.7)
    errors = torch.cat(
        [log_evidence(model, guide, x, particles=particles).rows - truth for _ in range(20)]
    )
    se = errors.std().item() / math.sqrt(len(errors))
    assert errors.mean().item() < 5 * se
    if particles < 300:  # where the bias is large beside the error
        assert errors.mean().item() < -5 * se


def bias_of(errors) -> Any:
    """Mean of log(u) with its error, where E[u] = 1: u - 1 is a control variate."""
    rest = errors - errors.expm1()
    return rest.mean().item(), rest.std().item() / math.sqrt(len(rest))


def test_the_reported_bias_is_the_bias_and_the_jackknife_takes_it_off() -> None:
    model, x = setting(rows=2000, latent_dim=4)
    truth = model.log_evidence(x).detach()
    plain, jackknifed, reported = [], [], []
    for seed in range(20):
        found = log_evidence(model, stretched(model), x, particles=100, seed=seed)
        plain.append(found.rows - truth)
        reported.append(found.rows_bias)
        assert found.bias == pytest.approx(found.rows_bias.mean().item())
        other = log_evidence(model, stretched(model), x, particles=100, seed=seed, jackknife=True)
        assert other.bias == 0.0
        assert (other.rows_bias == 0.0).all()
        jackknifed.append(other.rows - truth)
    bias, se = bias_of(torch.cat(plain))
    said = torch.cat(reported)
    assert bias < -100 * se  # visible
    error = math.hypot(se, said.std().item() / math.sqrt(len(said)))
    # Beyond first order the two differ by a share of about 1 / K.
    assert abs(said.mean().item() - bias) < 5 * error + abs(bias) / 100
    # The draws are the same, so the jackknife moves each row by about minus the bias.
    moved = torch.cat(jackknifed) - torch.cat(plain)
    left = (torch.cat(plain) - torch.cat(plain).expm1() + moved).mean().item()
    assert abs(left) < 5 * se + abs(bias) / 100


def test_the_intervals_cover_the_truth_95_times_in_100() -> None:
    model, x = setting(rows=8)
    truth = model.log_evidence(x).detach()
    hits = []
    for seed in range(600):  # at 200 a true 95 % would leave 90 to 98 in one row of forty
        found = log_evidence(model, stretched(model, 1.5, shift=0.5), x, seed=seed)
        hits.append((found.rows - truth).abs() < 1.96 * found.rows_se)
    coverage = torch.stack(hits).double().mean(0)
    assert coverage.min() >= 0.90
    assert coverage.max() <= 0.98


@pytest.mark.parametrize("elements", [2**21, 7 * 37, 7])
@pytest.mark.parametrize("particles", [2, 40, 100, 250])
def test_evidence_error_and_jackknife_are_those_of_numpy_on_the_same_weights(
    weights, monkeypatch, elements, particles
) -> None:
    model, x = setting(rows=1)
    guide = stretched(model, 1.5, shift=1.0)
    monkeypatch.setattr(bounds, "ELEMENTS", elements)
    for jackknife in (False, True):
        weights.clear()
        found = log_evidence(model, guide, x, particles=particles, jackknife=jackknife, seed=4)
        logs = stacked(weights)[:, 0]
        assert len(logs) == particles
        assert len(weights) == {2**21: 1, 7 * 37: -(-particles // 37), 7: particles}[elements]
        plain = scipy.special.logsumexp(logs) - math.log(particles)
        ratio = np.exp(logs - plain)  # weights over their mean
        se = ratio.std(ddof=1) / math.sqrt(particles)
        assert found.rows_se.item() == pytest.approx(se)
        if not jackknife:
            assert found.rows.item() == pytest.approx(plain)
            assert found.rows_bias.item() == pytest.approx(-(se**2) / 2)
            continue
        groups = min(particles, 100)
        owner = np.arange(particles) % groups
        without = [
            scipy.special.logsumexp(logs[owner != g]) - math.log((owner != g).sum())
            for g in range(groups)
        ]
        expected = groups * plain - (groups - 1) * np.mean(without)
        assert found.rows.item() == pytest.approx(expected)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_rows_with_extreme_densities_neither_underflow_nor_overflow(level) -> None:
    model, x = setting(rows=6)
    lift = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, -0.3]) * level

    def lifted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model.prior())
            pyro.factor("lift", lift)
            pyro.sample("x", model.likelihood(z), obs=x)

    guide = stretched(model)
    for estimate, options in (
        (elbo, {}),
        (iwae_bound, {}),
        (log_evidence, {}),
        (log_evidence, {"jackknife": True}),
    ):
        plain = estimate(model, guide, x, particles=200, seed=0, **options)
        moved = estimate(lifted, guide, x, particles=200, seed=0, **options)
        assert_close(moved.rows, plain.rows + lift, rtol=0.0, atol=1e-8)
        assert_close(moved.rows_se, plain.rows_se, rtol=1e-6, atol=0.0)
        if estimate is log_evidence:
            assert_close(moved.rows_bias, plain.rows_bias, rtol=1e-6, atol=0.0)


def test_a_particle_that_carries_all_the_weight_leaves_the_jackknife_finite(weights) -> None:
    model, x = setting(rows=3, noise_scale=0.01)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.prior())

    found = log_evidence(model, prior, x, particles=50, seed=0, jackknife=True)
    logs = stacked(weights)
    assert (np.sort(logs, axis=0)[-1] - np.sort(logs, axis=0)[-2] > 40).any()
    plain = scipy.special.logsumexp(logs, axis=0)
    without = [scipy.special.logsumexp(np.delete(logs, k, axis=0), axis=0) for k in range(50)]
    expected = 50 * (plain - math.log(50)) - 49 * (np.mean(without, axis=0) - math.log(49))
    np.testing.assert_allclose(found.rows, expected, rtol=1e-9)


@pytest.mark.parametrize("elements", [2**21, 4])
def test_particles_of_weight_zero_count_and_do_no_harm(monkeypatch, elements) -> None:
    def truncated(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(z > 0, 0.0, -torch.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    monkeypatch.setattr(bounds, "ELEMENTS", elements)
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    above = dist.Normal(0.0, 1.0).cdf(x / 2 / math.sqrt(0.5))  # P(z > 0 | x)
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(x) + above.log()
    found = log_evidence(truncated, guide, x, particles=1000, seed=0)
    assert ((found.rows - truth).abs() < 5 * found.rows_se).all()


@pytest.mark.parametrize("estimate", [elbo, log_evidence, iwae_bound])
@pytest.mark.parametrize("elements", [1, 60, 300])
def test_chunks_of_rows_and_particles_change_nothing_but_the_draws(
    monkeypatch, estimate, elements
) -> None:
    model, x = setting(rows=13)
    options = {"particles": 12, "repeats": 5} if estimate is iwae_bound else {"particles": 60}
    whole = estimate(model, stretched(model), x, seed=0, **options)
    monkeypatch.setattr(bounds, "ELEMENTS", elements)
    parts = estimate(model, stretched(model), x, seed=1, **options)
    assert parts.rows.shape == (13,)
    assert parts.particles == options["particles"]
    errors = (whole.rows - parts.rows) / torch.hypot(whole.rows_se, parts.rows_se)
    # With 5 repeats an error bar has 4 degrees of freedom: hence the quantile of Student's t.
    degrees = 4 if estimate is iwae_bound else 59
    assert errors.abs().max() < scipy.stats.t(degrees).isf(1e-6)
    assert abs(whole.mean - parts.mean) < 5 * math.hypot(whole.se, parts.se)


@pytest.mark.parametrize("elements", [1, 30, 100, 2**21])
def test_chunks_of_rows_stay_with_their_data_and_their_parameters(monkeypatch, elements) -> None:
    model, x = setting(rows=13, latent_dim=1)
    local = Local(model, rows=13)
    exact = model.posterior(x)
    with torch.no_grad():  # the posterior of one latent is a diagonal normal
        numbers = torch.cat([exact.loc, exact.scale_tril[..., 0].log() * 2], -1)
        local.row_parameters["site_z"].copy_(numbers)
    monkeypatch.setattr(bounds, "ELEMENTS", elements)
    truth = model.log_evidence(x).detach()
    for guide in (Exact(model), local):
        assert_close(elbo(model, guide, x, particles=3).rows, truth)
        assert_close(log_evidence(model, guide, x, particles=3).rows, truth)
        assert_close(iwae_bound(model, guide, x, particles=3, repeats=2).rows, truth)


def test_a_model_that_cannot_carry_particles_is_run_once_for_each() -> None:
    model, x = setting(rows=4)
    runs = []

    def rigid(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model.prior())
            runs.append(z.shape)
            mean = model.loc + z.reshape(len(x), 2) @ model.loading.mT
            pyro.sample("x", dist.Normal(mean, model.noise_scale).to_event(1), obs=x)

    found = log_evidence(rigid, stretched(model), x, particles=300, seed=0)
    assert runs[-300:] == [torch.Size([4, 2])] * 300
    truth = model.log_evidence(x).detach()
    assert ((found.rows - truth).abs() < 5 * found.rows_se).all()


MEMORY = """
import resource, torch
from guides import Amortized
from ppl_models import PPCA
from ppl_models.evaluate import elbo, log_evidence
torch.set_num_threads(1)
torch.manual_seed(0)
model = PPCA(data_dim=3, latent_dim=1)
guide = Amortized(model, hidden=())
x = model(size=10_000).detach()
log_evidence(model, guide, x[:10], particles=10)
status = lambda: open('/proc/self/status').read()
peak = lambda: int(status().split('VmHWM:')[1].split()[0]) / 1024
before = peak()
elbo(model, guide, x, particles=1000, seed=0)
log_evidence(model, guide, x, particles=5000, jackknife=True, seed=0)
print(before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_bounded_for_ten_thousand_rows_and_five_thousand_particles() -> None:
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(float, run.stdout.split())
    assert peak < 2048
    # One number for each row and particle would take 381 MiB in double precision.
    assert peak - before < 10_000 * 5000 * 8 / 2**20


def mixed(x, y) -> Any:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(logits=w + rate.log()))
        z = pyro.sample("z", dist.Normal(w + kind, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(rate, 0.5 + kind), obs=y)


def test_the_elbo_of_a_function_with_global_local_and_discrete_latents_is_that_of_brute_force() -> (
    None
):
    x, y = torch.randn(5), torch.rand(5)
    guide = Amortized(mixed, hidden=(6,), example=(x, y))
    bound = elbo(mixed, guide, x, y, particles=4000, seed=0)
    assert bound.rows is None
    totals = []
    with torch.no_grad():
        for _ in range(600):
            drawn = {}
            log_q = torch.zeros(())
            for name in ("w", "rate", "kind", "z"):
                conditional = guide.q(name, x, y, **drawn)
                drawn[name] = conditional.sample()
                log_q = log_q + conditional.log_prob(drawn[name]).sum()
            w, rate, kind, z = (value.numpy() for value in drawn.values())
            one = scipy.stats.bernoulli(scipy.special.expit(w + np.log(rate)))
            log_p = (
                scipy.stats.norm.logpdf(w)
                + scipy.stats.gamma(2.0).logpdf(rate).sum()
                + one.logpmf(kind).sum()
                + scipy.stats.norm(w + kind).logpdf(z).sum()
                + scipy.stats.norm(z).logpdf(x.numpy()).sum()
                + scipy.stats.norm(rate, 0.5 + kind).logpdf(y.numpy()).sum()
            )
            totals.append(log_p - log_q.item())
    brute, se = np.mean(totals) / 5, np.std(totals, ddof=1) / math.sqrt(600) / 5
    assert abs(bound.mean - brute) < 5 * math.hypot(bound.se, se)


@pytest.mark.parametrize("estimate", [elbo, log_evidence, iwae_bound])
def test_a_seed_reproduces_and_isolates(estimate) -> None:
    model, x = setting(rows=5)
    guide = Amortized(model, hidden=(4,))
    state = torch.get_rng_state()
    first = estimate(model, guide, x, particles=10, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    second = estimate(model, guide, x, particles=10, seed=7)
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.rows, estimate(model, guide, x, particles=10, seed=8).rows)
    free = estimate(model, guide, x, particles=10)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(free.rows, estimate(model, guide, x, particles=10).rows)


@pytest.mark.parametrize("estimate", [elbo, log_evidence, iwae_bound])
def test_scoring_leaves_modes_gradients_and_the_store_as_they_were(estimate) -> None:
    model, x = setting(rows=5)
    guide = Amortized(model, hidden=(4,))
    model.train()
    guide.eval()
    pyro.param("mine", torch.ones(2))
    names = set(pyro.get_param_store())
    before = {k: v.clone() for k, v in [*model.state_dict().items(), *guide.state_dict().items()]}
    found = estimate(model, guide, x, particles=10)
    assert model.training
    assert not guide.training
    assert set(pyro.get_param_store()) == names
    assert not found.rows.requires_grad
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    after = {**model.state_dict(), **guide.state_dict()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_float32_models_are_scored_in_float32_and_summed_in_double() -> None:
    model, x = setting(rows=5)
    small = PPCA(data_dim=5, latent_dim=2).float()
    small.load_state_dict(model.state_dict())
    found = log_evidence(small, Exact(small), x, particles=20)
    assert found.rows.dtype == torch.float64
    assert_close(found.rows, model.log_evidence(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_particles_must_be_a_positive_integer(value) -> None:
    model, x = setting(rows=2)
    for estimate in (elbo, log_evidence, iwae_bound):
        with pytest.raises(ValueError, match=rf"particles must be an integer >= 1, got {value}"):
            estimate(model, Exact(model), x, particles=value)
    with pytest.raises(ValueError, match=rf"repeats must be an integer >= 1, got {value}"):
        iwae_bound(model, Exact(model), x, repeats=value)

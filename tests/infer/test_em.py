"""Expectation maximisation: it reaches the maximum of the likelihood, by every way there is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.testing import assert_close

from guides import Amortized, Exact, Local
from ppl_models import PPCA, SigmoidBeliefNetwork, bayesian
from ppl_models.infer import (
    ELBO,
    GibbsWithGradients,
    MonteCarloE,
    VariationalE,
    expectation_maximization,
    fit,
)

ROWS, D, K = 200, 5, 2
FREE = D * K + D + 1  # parameters of PPCA


def rows() -> Tensor:
    torch.manual_seed(0)
    return PPCA(D, K, noise_scale=0.5)(size=ROWS).detach()


def start() -> PPCA:
    torch.manual_seed(1)
    return PPCA(D, K)


def gaps(x: Tensor, e_step: Any, model: PPCA, **options: Any) -> list[float]:
    """Nats per row below the maximum of the likelihood, after each iteration."""
    best = PPCA.maximum_likelihood(x, K).log_evidence(x).mean()
    found: list[float] = []

    def look(iteration: int, complete: float) -> None:
        found.append((best - model.log_evidence(x).mean()).item())

    expectation_maximization(model, x, e_step, seed=0, callbacks=[look], **options)
    return found


def noise(draws: int) -> float:
    r"""Bound the mean gap that S draws leave, nats per row.

    With missing fraction :math:`r` of information in a direction, the noise of an M-step has variance
    :math:`r / S` in units of the complete information; it settles at :math:`r / (S (1 - r^2))`, and
    half of that times :math:`1 - r` is :math:`r / (2 S (1 + r)) \le 1 / (4 S)` nats in total.
    """
    return FREE / (4 * draws * ROWS)


@pytest.mark.parametrize("draws", [4, 64])
def test_the_known_posterior_leaves_the_noise_of_the_draws(draws: int) -> None:
    model = start()
    found = gaps(
        rows(),
        VariationalE(Exact(model), draws=draws),
        model,
        iterations=80,
        m_step=PPCA.maximize,
    )
    settled = np.array(found[30:])
    assert settled.min() > 0
    assert settled.mean() < noise(draws)


def test_variational_em_reaches_the_maximum() -> None:
    model = start()
    inner = VariationalE(
        Local(model, rows=ROWS), objective=ELBO(4, analytic_kl=True), draws=8, lr=0.03
    )
    found = gaps(rows(), inner, model, iterations=120, m_step=PPCA.maximize)
    assert 0 < np.mean(found[-40:]) < 2 * noise(8)


def test_gradient_steps_for_the_parameters_reach_it_too() -> None:
    model = start()
    found = gaps(rows(), VariationalE(Exact(model)), model, iterations=60, lr=0.02)
    assert 0 < np.mean(found[-20:]) < 2 * noise(8)


def moments(model: PPCA, x: Tensor) -> Tensor:
    """Return 2 K points for each row with the mean and the covariance of its posterior."""
    posterior = model.posterior(x)
    arms = math.sqrt(K) * posterior.scale_tril.mT.movedim(-2, 0).detach()  # type: ignore[attr-defined]
    return torch.cat([posterior.mean.detach() + arms, posterior.mean.detach() - arms])


def test_a_monte_carlo_step_loses_the_noise_of_its_draws_to_the_exact_one() -> None:
    """In Q of the exact posterior, which is quadratic in z: r / (2 S) nats a direction on average."""
    x, model, exact, losses = rows(), start(), start(), []
    points = moments(exact, x)
    exact.maximize(x, z=points)

    def look(iteration: int, complete: float) -> None:
        nonlocal points
        told, best = (
            (m.prior().log_prob(points) + m.likelihood(points).log_prob(x)).mean().item()
            for m in (model, exact)
        )
        losses.append(best - told)
        points = moments(model, x)
        exact.maximize(x, z=points)

    inner = MonteCarloE(chains=8, draws=4, warmup=8)
    expectation_maximization(
        model, x, inner, iterations=5, m_step=PPCA.maximize, seed=0, callbacks=[look]
    )
    assert min(losses) > 0
    assert np.mean(losses) < 2 * noise(8)  # at least the draws of different chains are independent


def test_monte_carlo_em_stays_at_the_maximum() -> None:
    x = rows()
    model = PPCA.maximum_likelihood(x, K)
    inner = MonteCarloE(chains=8, draws=4, warmup=8)
    found = gaps(x, inner, model, iterations=6, m_step=PPCA.maximize)
    assert 0 < np.mean(found) < noise(8)


def test_amortised_inference_reaches_the_same_maximum() -> None:
    x, model = rows(), start()
    schedule = partial(CosineAnnealingLR, T_max=1500)
    guide = Amortized(model, hidden=())
    objective = ELBO(analytic_kl=True)
    fit(model, guide, x, objective=objective, steps=1500, lr=0.05, schedule=schedule, seed=0,
        batch_size=ROWS)  # fmt: skip
    best = PPCA.maximum_likelihood(x, K).log_evidence(x).mean()
    assert 0 < (best - model.log_evidence(x).mean()).item() < noise(8)


def test_the_closed_form_is_where_the_slope_is_zero() -> None:
    x, model, z = rows(), start(), torch.randn(5, ROWS, K)
    model.maximize(x, z=z)
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    slopes = torch.autograd.grad(joint.mean(), list(model.parameters()))
    for slope in slopes:
        assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0.0)
    design = np.concatenate([z.numpy().reshape(-1, K), np.ones((5 * ROWS, 1))], 1)
    best, residual, *_ = np.linalg.lstsq(design, np.tile(x.numpy(), (5, 1)), rcond=None)
    assert_close(model.loading.detach().mT, torch.as_tensor(best[:-1]))
    assert model.noise_scale.item() ** 2 == pytest.approx(residual.sum() / (5 * ROWS * D))


def test_the_complete_data_log_density_is_that_of_its_formula() -> None:
    """With parameters that do not move: its mean is the evidence less the entropy of the posterior."""
    x, model = rows(), start()
    inner = VariationalE(Exact(model), draws=50)
    result = expectation_maximization(
        model, x, inner, iterations=1, m_step=lambda model, x, z: None, seed=0
    )
    posterior = model.posterior(x)
    exact = model.log_evidence(x).mean() - posterior.entropy().mean()
    error = math.sqrt(K / 2 / (50 * ROWS))  # of -log q(z | x) under q, in closed form
    assert abs(result.complete.item() - exact.item()) < 5 * error
    assert result.bounds is not None
    assert result.bounds.item() == pytest.approx(model.log_evidence(x).mean().item())


def test_binary_latents_are_sampled_by_gibbs() -> None:
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(data_dim=4, latent_dims=(2,))
    x = model(size=60).detach()
    before = model.log_evidence(x).mean().item()
    inner = MonteCarloE(GibbsWithGradients(), chains=4, draws=8, warmup=10)
    expectation_maximization(model, x, inner, iterations=6, lr=0.05, seed=0)
    assert model.log_evidence(x).mean().item() > before


def _scaled(x: Tensor) -> None:
    loc = pyro.param("em_loc", torch.tensor(3.0))
    scale = pyro.param("em_scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        assert z.ndim == 1  # not written for leading dimensions
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_function_with_parameters_of_its_own_is_trained_draw_by_draw() -> None:
    """Its evidence is that of N(loc, scale^2 + 1): at the maximum these are the sample's moments."""
    torch.manual_seed(0)
    x = 1.0 + 1.5 * torch.randn(100)

    def guide(x: Tensor) -> None:
        loc, scale = pyro.param("em_loc").detach(), pyro.param("em_scale").detach()
        precision = 1.0 + scale**-2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + loc / scale**2) / precision, precision**-0.5))

    with pyro.get_param_store().scope():
        poutine.trace(_scaled).get_trace(x)
        inner = VariationalE(guide, draws=4)
        result = expectation_maximization(_scaled, x, inner, iterations=60, lr=0.03, seed=0)
        loc, scale = pyro.param("em_loc").item(), pyro.param("em_scale").item()
    total = math.sqrt(scale**2 + 1)
    best = dist.Normal(x.mean(), x.std(correction=0)).log_prob(x).mean()
    evidence = dist.Normal(torch.tensor(loc), total).log_prob(x).mean()
    assert 0 <= (best - evidence).item() < 5 * 2 / (4 * 4 * 100)
    entropy = dist.Normal(0.0, (1.0 + scale**-2) ** -0.5).entropy()
    error = math.sqrt(0.5 / (4 * 100))  # of -log q(z | x) under q
    assert abs(result.complete[-1] - (evidence - entropy)).item() < 5 * error


def test_a_seed_reproduces_and_isolates() -> None:
    x, ends = rows()[:20], []
    for _ in range(2):
        model = start()
        stream = torch.get_rng_state()
        result = expectation_maximization(
            model, x, MonteCarloE(chains=1, draws=4, warmup=4), iterations=1, seed=3
        )
        assert torch.equal(torch.get_rng_state(), stream)
        assert result.bounds is None
        assert all(value.grad is None for value in model.parameters())
        ends.append(model.loading.detach().clone())
    assert torch.equal(*ends)


def test_a_callback_ends_it() -> None:
    model = start()
    result = expectation_maximization(
        model, rows(), VariationalE(Exact(model)), callbacks=[lambda i, value: i == 3], seed=0
    )
    assert (result.iterations, len(result.complete), result.interrupted) == (3, 3, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"e_step": Exact}, "must be VariationalE"),
        ({"e_step": MonteCarloE(draws=2)}, "draws must be an integer >= 4"),
        ({"iterations": 0}, "iterations must be"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": math.inf}, "lr must be a finite number > 0"),
        ({"e_step": VariationalE(cast(Any, None))}, "guide must be"),
        ({"e_step": VariationalE(cast(Any, 3))}, "guide must be"),
        ({"optimizer": torch.optim.LBFGS}, "steps without a closure, got LBFGS"),
        ({"optimizer": 3}, "optimizer must make a torch optimiser"),
        ({"m_step": 1}, "m_step must be called"),
        ({"rows": 7}, "rows must be 20"),
        ({"frozen": True}, "nothing to train"),
        ({"model": bayesian}, "are global. Use VariationalE"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    model: Any = start()
    guide = Local(model, rows=change.pop("rows", 20))
    if change.pop("frozen", False):
        model.requires_grad_(False)
    if "model" in change:
        del change["model"]
        prior = dist.Normal(torch.zeros(D), 1.0).to_event(1)
        model = bayesian(model, lambda name, value: prior if name == "loc" else None)
        change["e_step"] = MonteCarloE()
    options: dict[str, Any] = {"e_step": VariationalE(guide)} | change
    before = [value.clone() for value in model.parameters()]
    with pytest.raises(ValueError, match=words):
        expectation_maximization(model, rows()[:20], **options)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_the_objective_of_the_e_step_is_a_bound() -> None:
    model = start()
    inner = VariationalE(Local(model, rows=ROWS), objective=cast(Any, "elbo"))
    with pytest.raises(
        ValueError, match=r"objective of the E-step .* such as ELBO\(\), got 'elbo'"
    ):
        expectation_maximization(model, rows(), inner)


def test_a_bound_that_is_not_finite_stops_it() -> None:
    model = start()
    with pytest.raises(FloatingPointError, match=r"at iteration \d+ .*Try a smaller lr"):
        expectation_maximization(model, rows(), VariationalE(Exact(model)), lr=1e6, seed=0)
    assert all(bool(value.isfinite().all()) for value in model.parameters())


def test_a_gradient_that_is_not_finite_stops_it() -> None:
    theta = torch.zeros((), requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("theta", theta).sqrt(), 1.0), obs=x)

    with pytest.raises(
        FloatingPointError, match="at iteration 1 Q is .* of its gradient (inf|nan)"
    ):
        expectation_maximization(model, torch.ones(3), MonteCarloE(), seed=0)
    assert theta.item() == 0.0


def test_parameters_that_a_distribution_refuses_name_the_iteration() -> None:
    model = start()

    def m_step(model: Any, x: Tensor, z: Tensor) -> None:
        model.loc.fill_(math.nan)

    with pytest.raises(FloatingPointError, match=r"at iteration 1 training diverged .*loc"):
        expectation_maximization(model, rows(), VariationalE(Exact(model)), m_step=m_step, seed=0)


def test_draws_are_in_the_precision_of_the_model_and_none_underflows() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.param("rate", torch.ones((), dtype=torch.float32))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full_like(x, 0.01), 1.0))
            pyro.sample("x", dist.Poisson(rate + z), obs=x)

    seen: list[Tensor] = []

    def m_step(model: Any, x: Tensor, z: Tensor) -> None:
        seen.append(z)

    x = torch.zeros(50, dtype=torch.float32)
    found = expectation_maximization(
        model, x, MonteCarloE(warmup=100), m_step=m_step, iterations=2, seed=0
    )
    assert all(z.dtype == torch.float32 and bool((z > 0).all()) for z in seen)
    assert min(z.min().item() for z in seen) < 1e-35
    assert bool(found.complete.isfinite().all())

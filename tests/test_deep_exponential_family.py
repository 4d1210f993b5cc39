"""Deep exponential families against SciPy, quadrature and the negative binomial distribution."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro import poutine
from scipy import integrate, stats
from scipy.special import expit, gammaln
from torch import Tensor
from torch.testing import assert_close

from guides import Amortized, Local, families
from guides.base import key
from ppl_models import DeepExponentialFamily
from ppl_models.core.traces import vectorizes
from ppl_models.evaluate import elbo, gradient_variance, log_evidence
from ppl_models.infer import ELBO, fit, sample
from ppl_models.infer.gradients import LeaveOneOut, Reinforce, RunningAverage

LAYOUTS: list[tuple[Any, str]] = [
    ("gamma", "poisson"),
    ("gamma", "bernoulli"),
    ("gamma", "normal"),
    ("normal", "normal"),
    ("poisson", "poisson"),
    ("bernoulli", "bernoulli"),
    (("gamma", "normal", "bernoulli"), "poisson"),
    (("poisson", "gamma", "gamma"), "normal"),
    (("bernoulli", "poisson", "gamma"), "poisson"),
]

every_layout = pytest.mark.parametrize(("family", "observation"), LAYOUTS, ids=str)


def network(family: Any, observation: str, **options: Any) -> DeepExponentialFamily:
    """Return one whose parameters are away from their start."""
    torch.manual_seed(1)
    model = DeepExponentialFamily(5, (4, 3, 2), family, observation=observation, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def softplus(a: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(a))) + np.maximum(a, 0.0)


def log_density(kind: str, eta: Any, value: np.ndarray, *, shape: float, scale: float) -> Any:
    """Log density of a layer: by its mean if that is positive, by logits, or by loc."""
    if kind == "gamma":
        return stats.gamma(shape, scale=eta / shape).logpdf(value)
    if kind == "poisson":
        return stats.poisson(eta).logpmf(value)
    if kind == "bernoulli":
        return value * eta - softplus(eta)
    return stats.norm(eta, scale).logpdf(value)


def log_joint(model: DeepExponentialFamily, values: dict[str, np.ndarray]) -> float:
    """Log p(x, z, w), from the docstring."""
    kinds = model.families
    top = len(kinds) - 1
    start = {"gamma": 1.0, "poisson": 1.0, "bernoulli": 0.0, "normal": 0.0}[kinds[top]]
    total = log_density(kinds[top], start, values[f"z{top}"], shape=model.shape, scale=1.0).sum()
    for level in range(top):
        below = values["x" if level == 0 else f"z{level}"]
        positive = kinds[level + 1] == "gamma" and kinds[level] in ("gamma", "poisson")
        free = model.free_weights[str(level)].detach().numpy() if model.free_weights else None
        w = values.get(f"w{level}", np.exp(free) if positive and free is not None else free)
        eta = values[f"z{level + 1}"] @ w
        if not positive:
            eta = eta + model.intercepts[str(level)].detach().numpy()
            eta = softplus(eta) if kinds[level] in ("gamma", "poisson") else eta
        scale = math.exp(model.log_noise_scale.item()) if kinds[0] == "normal" else 1.0
        scale = scale if level == 0 else 1.0
        total += log_density(kinds[level], eta, below, shape=model.shape, scale=scale).sum()
        if model.latent_weights:
            prior = stats.norm(0.0, model.weight_scale)
            if positive:
                prior = stats.gamma(model.weight_shape, scale=1.0 / model.weight_rate)
            total += prior.logpdf(w).sum()
    return total


@every_layout
@pytest.mark.parametrize("latent_weights", [True, False])
def test_the_story_has_the_density_of_its_formula(
    family: Any, observation: str, latent_weights: bool
) -> None:
    options = {"shape": 0.7, "weight_shape": 0.6, "weight_rate": 0.2, "weight_scale": 1.5}
    model = network(family, observation, latent_weights=latent_weights, **options)
    x = model(size=6).detach()
    trace = poutine.trace(model).get_trace(x)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    values = {n: s["value"].detach().numpy() for n, s in sites.items() if n != "data"}
    assert set(values) == {"x", "z1", "z2", "z3"} | (
        {"w0", "w1", "w2"} if latent_weights else set()
    )
    assert_close(trace.log_prob_sum().item(), log_joint(model, values))


def test_the_sparse_gamma_family_of_the_paper() -> None:
    model = DeepExponentialFamily(7, (5, 4, 3))
    assert not list(model.parameters())
    torch.manual_seed(0)
    trace = poutine.trace(model).get_trace(size=6)
    names = ("x", "z1", "z2", "z3", "w0", "w1", "w2")
    x, z1, z2, z3, w0, w1, w2 = (trace.nodes[name]["value"].numpy() for name in names)
    total = sum(stats.gamma(0.1, scale=1 / 0.3).logpdf(w).sum() for w in (w0, w1, w2))
    total += stats.gamma(0.1, scale=1 / 0.1).logpdf(z3).sum()
    total += stats.gamma(0.1, scale=(z3 @ w2) / 0.1).logpdf(z2).sum()
    total += stats.gamma(0.1, scale=(z2 @ w1) / 0.1).logpdf(z1).sum()
    total += stats.poisson(z1 @ w0).logpmf(x).sum()
    assert_close(trace.log_prob_sum().item(), total)


@every_layout
def test_leading_dimensions_change_no_density(family: Any, observation: str) -> None:
    model = network(family, observation)
    x = model(size=6).detach()
    for guide in (Local(model, rows=6), Amortized(model, hidden=(4,))):
        assert vectorizes(model, guide, x, dim=-2)
    for level, (below, above) in enumerate([(5, 4), (4, 3), (3, 2)]):
        z, w = torch.rand(8, 7, 6, above), torch.rand(8, 7, 1, above, below)
        value = model.conditional(level, z, w).sample()
        found = model.conditional(level, z, w).log_prob(value)
        assert found.shape == (8, 7, 6)
        for w_of_rows in (w.expand(8, 7, 6, above, below), w[5, 2, 0]):
            again = model.conditional(level, z, w_of_rows).log_prob(value)
            assert_close(again[5, 2], found[5, 2])


def test_the_mean_goes_from_layer_to_layer() -> None:
    model = network("gamma", "poisson", latent_weights=False, shape=2.0)
    w0, w1, w2 = (model.free_weights[str(level)].detach().exp() for level in range(3))
    x = model(size=20_000).detach()
    want = torch.ones(2) @ w2 @ w1 @ w0
    assert bool(((x.mean(0) - want).abs() < 5 * x.std(0) / math.sqrt(len(x))).all())


def test_products_too_small_for_a_number_leave_a_finite_density() -> None:
    model = DeepExponentialFamily(3, (2, 2), shape=5.0)
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).tiny
        z = torch.full((1, 2), tiny, dtype=dtype, requires_grad=True)
        w = torch.full((2, 2), tiny, dtype=dtype)
        value = torch.full((1, 2), tiny, dtype=dtype)
        found = model.conditional(1, z, w).log_prob(value)
        assert bool(torch.isfinite(found).all())
        assert bool(torch.isfinite(torch.autograd.grad(found.sum(), z)[0]).all())
        x = torch.tensor([[255.0, 0.0, 1.0]], dtype=dtype)
        assert bool(
            torch.isfinite(model.conditional(0, z, torch.zeros(2, 3).to(dtype)).log_prob(x))
        )


def test_small_means_are_what_they_are() -> None:
    """What keeps rates off zero is far below anything that a product can mean."""
    model = DeepExponentialFamily(1, (1, 1))
    z, w = np.array([[1e-140]]), np.array([[1e-160]])
    value = np.array([[3e-299]])
    found = model.conditional(1, torch.tensor(z), torch.tensor(w)).log_prob(torch.tensor(value))
    rate = math.log(0.1) - math.log(1e-140) - math.log(1e-160)
    want = 0.1 * rate - gammaln(0.1) - 0.9 * math.log(3e-299) - 0.1 * 30.0
    assert_close(found.item(), want)
    counts = torch.tensor([[2.0]])
    found = model.conditional(0, torch.tensor(z), torch.tensor(w)).log_prob(counts)
    assert_close(found.item(), 2.0 * (math.log(1e-140) + math.log(1e-160)) - math.log(2.0))


def test_draws_of_the_prior_are_positive_and_finite_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model = DeepExponentialFamily(50, (40, 30, 20))
    for seed in range(5):
        torch.manual_seed(seed)
        trace = poutine.trace(model).get_trace(size=100)
        trace.compute_log_prob()
        for name in ("z1", "z2", "z3", "w0", "w1", "w2", "x"):
            node = trace.nodes[name]
            assert node["value"].dtype == torch.float32
            assert bool(torch.isfinite(node["log_prob"]).all()), name
            assert name == "x" or bool((node["value"] > 0.0).all()), name


# One unit, weights that are known: z ~ Gamma(a, a), x_d ~ Poisson(z w_d). The sum of x is negative
# binomial, what it is made of multinomial, and the posterior Gamma(a + sum x, a + sum w).


def one_unit(shape: float = 0.4) -> tuple[DeepExponentialFamily, Tensor]:
    torch.manual_seed(2)
    model = DeepExponentialFamily(3, (1,), latent_weights=False, shape=shape)
    with torch.no_grad():
        model.free_weights["0"].copy_(torch.tensor([[0.5, 2.0, 1.0]]).log())
    model.requires_grad_(False)
    return model, torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 3.0, 0.0], [7.0, 20.0, 11.0], [0.0, 1.0, 0.0]]
    )


def evidence_of_one_unit(model: DeepExponentialFamily, x: Tensor) -> Tensor:
    w = model.free_weights["0"].exp().numpy()[0]
    totals = x.sum(1).numpy()
    value = stats.nbinom(model.shape, model.shape / (model.shape + w.sum())).logpmf(totals)
    parts = zip(x.numpy(), totals, strict=True)
    value = value + [stats.multinomial(n, w / w.sum()).logpmf(row) for row, n in parts]
    return torch.tensor(value)


def exact_guide(model: DeepExponentialFamily, x: Tensor) -> Local:
    guide = Local(model, rows=len(x), family=families.Gamma(min_concentration=0.0))
    total = model.free_weights["0"].exp().sum()
    numbers = [model.shape + x.sum(1), (model.shape + total).expand(len(x))]
    with torch.no_grad():
        guide.row_parameters[key("z1")].copy_(torch.stack(numbers, 1).log())
    return guide


def test_one_unit_has_the_negative_binomial_evidence_for_every_draw_of_its_posterior() -> None:
    model, x = one_unit()
    bound = elbo(model, exact_guide(model, x), x, particles=5, seed=0)
    assert_close(bound.rows, evidence_of_one_unit(model, x))
    assert float(bound.rows_se.max()) < 1e-10


@pytest.mark.parametrize("family", [families.Gamma(), families.Normal()], ids=str)
def test_importance_sampling_finds_the_negative_binomial_evidence(family: Any) -> None:
    model, x = one_unit()
    guide = Local(model, rows=len(x), family=family).refine(x, steps=600, lr=0.1, seed=0)
    found = log_evidence(model, guide, x, particles=20_000, seed=0)
    truth = evidence_of_one_unit(model, x)
    assert bool(((found.rows - truth).abs() < 5 * found.rows_se + 1e-9).all())
    assert float(found.rows_se.max()) < 0.05
    bound = elbo(model, guide, x, particles=2000, seed=0)
    assert bool((bound.rows < truth + 5 * bound.rows_se).all())
    assert bound.mean > truth.mean().item() - 0.3


def test_nuts_finds_the_gamma_posterior_of_one_unit() -> None:
    model, x = one_unit()
    x = x[1:3]
    posterior = sample(model, x, rows=True, chains=4, draws=600, warmup=300, seed=0, compile=False)
    truth = dist.Gamma(model.shape + x.sum(1), model.shape + model.free_weights["0"].exp().sum())
    error = (posterior.mean()["z1"].squeeze(-1) - truth.mean) / posterior.mcse()["z1"].squeeze(-1)
    assert float(error.abs().max()) < 5
    error = posterior.scale()["z1"].squeeze(-1) - truth.stddev
    assert bool((error.abs() < 5 * posterior.mcse("sd")["z1"].squeeze(-1)).all())


def closed_form(model: DeepExponentialFamily, guide: Local, x: Tensor) -> Tensor:
    """The bound of one unit under a gamma guide, with no draws: E z = a / b, E log z = psi(a) - log b."""
    a, b = guide.row_parameters[key("z1")].exp().unbind(1)
    a = 0.05 + a
    mean, mean_log = a / b, torch.digamma(a) - b.log()
    w, shape = model.free_weights["0"].exp().squeeze(0), torch.tensor(model.shape)
    likelihood = (x * (mean_log[:, None] + w.log()) - torch.lgamma(x + 1)).sum(1) - mean * w.sum()
    prior = shape * shape.log() - torch.lgamma(shape) + (shape - 1) * mean_log - shape * mean
    return (likelihood + prior + dist.Gamma(a, b).entropy()).mean()


ESTIMATORS = {
    "path": ELBO(),
    "score": ELBO(score=Reinforce(everywhere=True)),
    "score, all terms": ELBO(score=Reinforce(rao_blackwell=False, everywhere=True)),
    "average": ELBO(score=RunningAverage(everywhere=True)),
    "leave one out": ELBO(4, score=LeaveOneOut(everywhere=True)),
}


def test_every_estimator_has_the_mean_gradient_of_the_closed_form() -> None:
    model, x = one_unit()
    guide = Local(model, rows=len(x), family=families.Gamma())
    with torch.no_grad():
        table = guide.row_parameters[key("z1")]
        table.copy_(torch.tensor([[-0.5, 1.0], [0.5, -0.5], [2.0, 0.5], [-1.0, 0.0]]))
    bound = closed_form(model, guide, x)
    assert abs(elbo(model, guide, x, particles=20_000, seed=1).mean - bound.item()) < 0.1
    (truth,) = torch.autograd.grad(bound, list(guide.parameters()))
    found = gradient_variance(model, guide, x, objectives=ESTIMATORS, draws=3000, seed=0)
    for name in ESTIMATORS:
        ((mean, se),) = zip(found.mean[name].values(), found.se[name].values(), strict=True)
        assert bool(((mean - truth).abs() < 5 * se).all()), name
    noise = {name: found.total(name, "guide") for name in ESTIMATORS}
    assert noise["path"] < 0.1 * noise["score"]
    assert noise["average"] < noise["score"]
    assert noise["leave one out"] < noise["score"]


def test_estimators_by_score_agree_with_the_path_where_weights_are_latent() -> None:
    torch.manual_seed(3)
    model = DeepExponentialFamily(3, (2, 2), shape=1.0, weight_shape=1.0)
    x = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 3.0]])
    sites = ("w0", "w1", "z1", "z2")
    guide = Local(model, rows=2, family=dict.fromkeys(sites, families.Gamma()))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0 + 0.3 * torch.randn_like(parameter))
    draws = {"path": 2000, "score": 6000, "average": 6000, "leave one out": 3000}
    moments = {}
    for name, count in draws.items():
        own = {name: ESTIMATORS[name]}
        found = gradient_variance(model, guide, x, objectives=own, draws=count, seed=4)
        parts = (
            torch.cat([v.flatten() for v in by[name].values()]) for by in (found.mean, found.se)
        )
        moments[name] = tuple(parts)
    mean, se = moments.pop("path")
    for name, (other, other_se) in moments.items():
        error = (other - mean) / (se.square() + other_se.square()).sqrt()
        assert float(error.abs().max()) < 5, name


def grid(log_joint: Any, low: float, high: float) -> tuple[float, float, float]:
    """Integrate exp(log_joint(u, v)) over logs of two latents: log evidence, and their means."""
    u = np.linspace(low, high, 1601)
    value = log_joint(u[:, None], u[None, :]) + u[:, None] + u[None, :]
    top = value.max()
    weight = np.exp(value - top)
    integral = lambda f: integrate.trapezoid(integrate.trapezoid(f, u, axis=1), u)
    total = integral(weight)
    means = (integral(weight * np.exp(v)) / total for v in (u[:, None], u[None, :]))
    return (top + math.log(total), *means)


def test_two_layers_of_one_unit_agree_with_quadrature() -> None:
    model = DeepExponentialFamily(1, (1, 1), latent_weights=False, shape=0.8)
    with torch.no_grad():
        model.free_weights["0"].fill_(math.log(3.0))
        model.free_weights["1"].fill_(math.log(0.7))
    model.requires_grad_(False)
    x = torch.tensor([[4.0], [0.0]])
    guide = Local(model, rows=2, family=families.Gamma()).refine(x, steps=400, seed=0)
    found = log_evidence(model, guide, x, particles=20_000, seed=0)
    posterior = sample(model, x, rows=True, chains=4, draws=800, warmup=400, seed=0, compile=False)
    for row, count in enumerate([4.0, 0.0]):

        def joint(log_z1: np.ndarray, log_z2: np.ndarray, count: float = count) -> np.ndarray:
            z1, z2 = np.exp(log_z1), np.exp(log_z2)
            return (
                stats.gamma(0.8, scale=1 / 0.8).logpdf(z2)
                + stats.gamma(0.8, scale=0.7 * z2 / 0.8).logpdf(z1)
                + stats.poisson(3.0 * z1).logpmf(count)
            )

        evidence, mean1, mean2 = grid(joint, -40.0, 6.0)
        assert found.rows_se[row] < 0.05
        assert abs(found.rows[row] - evidence) < 5 * found.rows_se[row]
        for name, mean in (("z1", mean1), ("z2", mean2)):
            error = posterior.mean()[name][row, 0] - mean
            assert abs(error) < 5 * posterior.mcse()[name][row, 0], (name, row)


def test_nuts_agrees_with_quadrature_where_the_weight_is_latent() -> None:
    model = DeepExponentialFamily(1, (1,), shape=1.5, weight_shape=1.2)
    x = torch.tensor([[5.0]])
    posterior = sample(model, x, chains=4, draws=800, warmup=400, seed=0, compile=False)

    def joint(log_z: np.ndarray, log_w: np.ndarray) -> np.ndarray:
        z, w = np.exp(log_z), np.exp(log_w)
        prior = stats.gamma(1.5, scale=1 / 1.5).logpdf(z) + stats.gamma(1.2, scale=1 / 0.3).logpdf(
            w
        )
        return prior + stats.poisson(z * w).logpmf(5.0)

    _, mean_z, mean_w = grid(joint, -20.0, 6.0)
    for name, mean in (("z1", mean_z), ("w0", mean_w)):
        error = posterior.mean()[name].flatten() - mean
        assert bool((error.abs() < 5 * posterior.mcse()[name].flatten()).all()), name


def test_a_normal_layer_agrees_with_quadrature() -> None:
    model = DeepExponentialFamily(2, (1,), "normal", observation="bernoulli", latent_weights=False)
    w, b = np.array([1.5, -2.0]), np.array([0.3, 0.5])
    with torch.no_grad():
        model.free_weights["0"].copy_(torch.tensor(w))
        model.intercepts["0"].copy_(torch.tensor(b))
    model.requires_grad_(False)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    terms = stats.bernoulli(expit(z[:, None] * w + b)).logpmf(x.numpy()[:, None, :]).sum(-1)
    truth = np.log((np.exp(terms) * weight).sum(-1) / math.sqrt(2 * math.pi))
    guide = Local(model, rows=3).refine(x, steps=300, seed=0)
    found = log_evidence(model, guide, x, particles=20_000, seed=0)
    assert bool(((found.rows - torch.tensor(truth)).abs() < 5 * found.rows_se).all())
    assert float(found.rows_se.max()) < 0.02


def test_nuts_runs_on_the_sparse_family_of_a_few_units() -> None:
    torch.manual_seed(5)
    model = DeepExponentialFamily(3, (2, 1))
    x = torch.tensor([[9.0, 0.0, 4.0], [0.0, 6.0, 1.0]])
    posterior = sample(model, x, chains=2, draws=100, warmup=150, seed=0)
    assert set(posterior) == {"w0", "w1", "z1", "z2"}
    rates = posterior["z1"] @ posterior["w0"]
    assert bool((posterior["z1"] > 0).all())
    # Counts far from 0 are what their rates are: shapes of .1 say little beside them.
    mean = rates.mean((0, 1))
    assert bool(((mean - x).abs() < 2.0 * (x + 1.0).sqrt()).all())


def test_no_concentration_lifts_the_bound_over_the_evidence_in_single_precision() -> None:
    """Draws kept at the smallest number must not be what a guide makes its bound of."""
    torch.set_default_dtype(torch.float32)
    model, x = one_unit(shape=0.1)
    truth = evidence_of_one_unit(model, x.double())
    for number in (-80.0, -20.0, -5.0, -2.0):
        bounds = {}
        for least in (0.0, 0.05):
            guide = Local(model, rows=4, family=families.Gamma(min_concentration=least))
            with torch.no_grad():
                guide.row_parameters[key("z1")].copy_(torch.tensor([number, -2.0]).expand(4, 2))
            bounds[least] = elbo(model, guide, x, particles=4000, seed=0)
        found = bounds[0.05]
        assert bool((found.rows < truth + 5 * found.rows_se).all())
        if number == -80.0:  # what it is for
            assert bounds[0.0].rows[0] > truth[0] + 50.0


@pytest.mark.parametrize("family", [families.Normal(), families.Gamma()], ids=str)
def test_training_finds_the_words_of_topics(family: Any) -> None:
    torch.manual_seed(6)
    topics = torch.tensor([[9.0, 9.0, 9.0, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 9.0, 9.0, 9.0]])
    x = torch.poisson(dist.Gamma(0.3, 0.3).sample((60, 2)) @ topics)
    model = DeepExponentialFamily(6, (2,), shape=0.3)
    guide = Local(model, rows=60, family=dict.fromkeys(("z1", "w0"), family))
    result = fit(model, guide, x, steps=500, lr=0.05, seed=0)
    assert result.bounds[-50:].mean() > result.bounds[:50].mean()
    words = model.top_words("abcdef", 3, weights=guide.q("w0").mean)
    assert sorted(sorted(row) for row in words) == [["a", "b", "c"], ["d", "e", "f"]]


def test_top_words_are_those_of_the_largest_weights() -> None:
    model = DeepExponentialFamily(4, (2,), latent_weights=False)
    weights = torch.tensor([[0.1, 3.0, 2.0, 0.5], [5.0, 1.0, 0.2, 9.0]])
    with torch.no_grad():
        model.free_weights["0"].copy_(weights.log())
    assert model.top_words(["a", "b", "c", "d"], 2) == [["b", "c"], ["d", "a"]]
    assert model.top_words("abcd", 1, weights=weights.flip(0)) == [["d"], ["b"]]
    with pytest.raises(ValueError, match="a word for each of the 4 columns, got 3 words"):
        model.top_words("abc")
    with pytest.raises(ValueError, match="n must be at most 4 words, got 10"):
        model.top_words("abcd")
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 4\), got \(4, 2\)"):
        model.top_words("abcd", 2, weights=weights.mT)
    with pytest.raises(ValueError, match=r"weights= is required.*guide\.q"):
        DeepExponentialFamily(4, (2,)).top_words("abcd", 2)
    assert model.top_words("abcd", 1, weights=weights.tolist()) == [["b"], ["d"]]
    weights[1, 2] = math.nan
    with pytest.raises(ValueError, match="weights must be finite, got 1 numbers that are not"):
        model.top_words("abcd", 2, weights=weights)
    for vocabulary in (dict(enumerate("abcd")), set("abcd")):
        with pytest.raises(ValueError, match="a sequence of words.* got a (dict|set)"):
            model.top_words(cast(Any, vocabulary), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_dim": 0}, "data_dim must be an integer >= 1, got 0"),
        ({"latent_dims": ()}, r"latent_dims must be positive integers.*one or more, got \(\)"),
        ({"latent_dims": (3, 0)}, r"latent_dims must be positive integers.*got \(3, 0\)"),
        ({"latent_dims": "32"}, "latent_dims must be positive integers.*got '32'"),
        ({"latent_dims": 3}, "latent_dims must be positive integers.*got 3"),
        ({"family": ("gamma",)}, "one for each of the 2 layers, from the data upwards"),
        ({"family": "gama"}, "no family of a layer 'gama'. Did you mean 'gamma'"),
        ({"family": ("gamma", "beta")}, "no family of a layer 'beta'"),
        ({"observation": "gamma"}, "no observation 'gamma'"),
        ({"shape": 0.0}, "shape must be a finite number > 0, got 0.0"),
        ({"weight_shape": True}, "weight_shape must be a finite number > 0, got True"),
        ({"weight_rate": math.nan}, "weight_rate must be a finite number > 0"),
        ({"weight_scale": math.inf}, "weight_scale must be a finite number > 0"),
    ],
    ids=str,
)
def test_what_makes_no_model_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DeepExponentialFamily(**({"data_dim": 4, "latent_dims": (3, 2)} | options))


def test_sparse_counts_train_as_dense_ones() -> None:
    torch.manual_seed(7)
    x = torch.poisson(torch.rand(12, 5))
    bounds = []
    for form in (x, x.to_sparse(), scipy.sparse.csr_matrix(x.numpy())):
        torch.manual_seed(8)
        model = DeepExponentialFamily(5, (3,))
        guide = Local(model, rows=12)
        bounds.append(fit(model, guide, form, steps=3, batch_size=4, seed=0).bounds)
    assert torch.equal(bounds[0], bounds[1])
    assert torch.equal(bounds[0], bounds[2])


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.tensor([[1.0, -2.0, 0.0]]), r"'x'.*non-negative integer.*range from -2 to 1"),
        (torch.tensor([[1.0, 0.5, 0.0]]), r"'x'.*non-negative integer"),
        (torch.ones(2, 4), r"shape \(N, 3\).*data_dim=3 columns, got \(2, 4\)"),
        (torch.ones(3), r"shape \(N, 3\).*got \(3,\)"),
    ],
    ids=["negative", "fractional", "columns", "no rows"],
)
def test_what_is_no_count_is_refused(x: Tensor, said: str) -> None:
    model = DeepExponentialFamily(3, (2,))
    guide = Amortized(model, hidden=(4,))
    for call in (fit, elbo):
        with pytest.raises(ValueError, match=said):
            call(model, guide, x)

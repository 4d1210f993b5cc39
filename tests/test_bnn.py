"""Bayesian neural networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Local, families
from ppl_models import BayesianNeuralNetwork
from ppl_models.core.sites import site_table
from ppl_models.evaluate import elbo, predict
from ppl_models.infer import ELBO, fit, sample
from ppl_models.infer.gradients import StickingTheLanding
from ppl_models.parts.likelihoods import Bernoulli, Classes, Counts, Gaussian, Homoscedastic
from ppl_models.parts.priors import hierarchical, normal, scale_mixture

NOISE = 0.4
PRIOR = 1.5


def data(rows: int = 30, features: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, features, generator=generator)
    slope = torch.arange(1.0, features + 1.0)
    return x, x @ slope + NOISE * torch.randn(rows, generator=generator)


def linear(features: int = 3) -> BayesianNeuralNetwork:
    """One site holds all weights, so that a family of that site holds all of their covariance."""
    return BayesianNeuralNetwork(
        features,
        net=nn.Linear(features, 1, bias=False),
        likelihood=Homoscedastic(NOISE),
        prior=normal(PRIOR),
    )


def conjugate(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the weights of Bayesian linear regression."""
    a, b = x.numpy(), y.numpy()
    covariance = np.linalg.inv(a.T @ a / NOISE**2 + np.eye(a.shape[1]) / PRIOR**2)
    return covariance @ a.T @ b / NOISE**2, covariance


def written_out(values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the outputs of the tanh network."""
    h = np.tanh(x @ values["0.weight"].T + values["0.bias"])
    return h @ values["2.weight"].T + values["2.bias"]


def traced(model: Any, *batch: Tensor) -> tuple[float, dict[str, np.ndarray]]:
    trace: Any = poutine.trace(model).get_trace(*batch)
    latents = {site.name: site.value for site in site_table(model, *batch).latents}
    values = {name: trace.nodes[name]["value"].detach().numpy() for name in latents}
    return trace.log_prob_sum().item(), values


X = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64).reshape(5, 2)
Y = torch.tensor([-0.4, 0.3, 1.1, -0.7, 0.2], dtype=torch.float64)
RESPONSES: dict[str, tuple[Any, Tensor, Any]] = {
    "known scale": (
        Homoscedastic(0.3),
        Y,
        lambda out, y, v: scipy.stats.norm(out[:, 0], 0.3).logpdf(y).sum(),
    ),
    "inferred scale": (
        Homoscedastic(dist.Gamma(2.0, 3.0)),
        Y,
        lambda out, y, v: (
            scipy.stats.norm(out[:, 0], v["noise_scale"]).logpdf(y).sum()
            + scipy.stats.gamma(2.0, scale=1 / 3.0).logpdf(v["noise_scale"])
        ),
    ),
    "a scale for each row": (
        Gaussian(min_scale=0.1),
        Y,
        lambda out, y, v: scipy.stats.norm(out[:, 0], 0.1 + np.exp(out[:, 1] / 2)).logpdf(y).sum(),
    ),
    "classes": (
        Classes(3),
        torch.tensor([0, 2, 1, 1, 0]),
        lambda out, y, v: np.log(scipy.special.softmax(out, 1)[np.arange(5), y]).sum(),
    ),
    "binary": (
        Bernoulli(),
        Y.gt(0).double(),
        lambda out, y, v: scipy.stats.bernoulli(scipy.special.expit(out[:, 0])).logpmf(y).sum(),
    ),
    "counts": (
        Counts(),
        torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0], dtype=torch.float64),
        lambda out, y, v: scipy.stats.poisson(np.exp(out[:, 0])).logpmf(y).sum(),
    ),
    "one's own": (
        lambda outputs: dist.StudentT(4.0, outputs[..., 0], 0.2),
        Y,
        lambda out, y, v: scipy.stats.t(4.0, out[:, 0], 0.2).logpdf(y).sum(),
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_the_density_is_the_joint_written_out(name: str) -> None:
    likelihood, y, density = RESPONSES[name]
    model = BayesianNeuralNetwork(2, hidden=(4,), likelihood=likelihood, prior=normal(0.7))
    got, values = traced(model, X, y)
    weights = [v for site, v in values.items() if site != "noise_scale"]
    want = sum(scipy.stats.norm(0.0, 0.7).logpdf(w).sum() for w in weights)
    want += density(written_out(values, X.numpy()), y.numpy(), values)
    assert got == pytest.approx(want, rel=1e-9)


def test_the_mixture_and_the_hierarchy_are_the_priors_of_their_formulas() -> None:
    n = scipy.stats.norm
    y = torch.zeros(5)
    assert scale_mixture() == scale_mixture(0.5, 1.0, math.exp(-6.0))  # of the paper
    for prior in (scale_mixture(0.25, 1.5, 0.1), hierarchical(0.8)):
        model = BayesianNeuralNetwork(2, hidden=(4,), likelihood=Homoscedastic(0.3), prior=prior)
        got, values = traced(model, X, y)
        want = n(written_out(values, X.numpy())[:, 0], 0.3).logpdf(0.0).sum()
        for layer in ("0", "2"):
            weights = [values[f"{layer}.{leaf}"] for leaf in ("weight", "bias")]
            if isinstance(prior, hierarchical):
                scale = values[f"{layer}.prior_scale"]
                want += scipy.stats.halfnorm(scale=0.8).logpdf(scale)
                want += sum(n(0.0, scale).logpdf(w).sum() for w in weights)
            else:
                mixed = [0.25 * n(0, 1.5).pdf(w) + 0.75 * n(0, 0.1).pdf(w) for w in weights]
                want += sum(np.log(p).sum() for p in mixed)
        assert got == pytest.approx(want, rel=1e-9)


def test_particles_of_inferred_scales_are_a_loop() -> None:
    model = BayesianNeuralNetwork(2, hidden=(4,), prior=hierarchical())
    y = torch.randn(5)
    with pyro.plate("particles", 3, dim=-2), poutine.trace() as tracer:
        model(X, y)
    together: Any = tracer.trace
    together.compute_log_prob()
    names = [site.name for site in site_table(model, X, y).latents]
    assert {"noise_scale", "0.prior_scale", "2.prior_scale"} < set(names)
    for particle in range(3):
        own = {name: together.nodes[name]["value"][particle, 0] for name in names}
        alone: Any = poutine.trace(poutine.condition(model, data=own)).get_trace(X, y)
        alone.compute_log_prob()
        assert_close(together.nodes["y"]["log_prob"][particle], alone.nodes["y"]["log_prob"])
        for name in names:
            got = together.nodes[name]["log_prob"][particle, 0]
            assert_close(got, alone.nodes[name]["log_prob"])


def test_a_chosen_subset_is_latent_and_the_rest_is_trained() -> None:
    last = lambda name, value: normal()(name, value) if name.startswith("2") else None
    model = BayesianNeuralNetwork(2, hidden=(4,), likelihood=Homoscedastic(0.3), prior=last)
    y = X[:, 0].sin()
    assert [site.name for site in site_table(model, X, y).latents] == ["2.weight", "2.bias"]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert sorted(name.rpartition("net.")[2] for name in before) == ["0.bias", "0.weight"]
    fit(model, Local(model, example=(X, y)), (X, y), steps=3, lr=0.1, seed=0, progress=False)
    for name, value in model.named_parameters():
        assert not torch.equal(value, before[name])


def test_a_convolutional_network_reads_images() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    model = BayesianNeuralNetwork((1, 3, 3), net=net, likelihood=Classes(3))
    x = torch.randn(6, 1, 3, 3)
    starts = model.net.starts()
    with pyro.plate("particles", 2, dim=-2), poutine.trace() as tracer:
        poutine.condition(
            model, data={k: v[None, None].expand(2, 1, *v.shape) for k, v in starts.items()}
        )(x)
    node: Any = tracer.trace.nodes["y"]
    assert_close(node["fn"].logits, net(x).log_softmax(-1).expand(2, 6, 3))


def test_nuts_finds_the_posterior_of_conjugate_regression() -> None:
    x, y = data()
    mean, covariance = conjugate(x, y)
    posterior = sample(
        linear(), x, y, chains=4, draws=400, warmup=200, seed=0, compile=False, progress=False
    )
    got = posterior.mean()["weight"][0].numpy()
    error = posterior.mcse()["weight"][0].numpy()
    assert (np.abs(got - mean) < 5 * error).all()
    spread = posterior.scale()["weight"][0].numpy()
    error = posterior.mcse("sd")["weight"][0].numpy()
    assert (np.abs(spread - np.sqrt(np.diag(covariance))) < 5 * error).all()
    draws = posterior["weight"].flatten(0, 1)[:, 0].numpy()
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None, :]
    ess = min(value.min().item() for value in posterior.ess().values())
    assert ess > 400
    gap = np.abs(products.mean(0) - covariance)
    assert (gap < 5 * products.std(0) / ess**0.5).all()


def test_a_full_rank_guide_finds_the_posterior_of_conjugate_regression() -> None:
    x, y = data()
    mean, covariance = conjugate(x, y)
    model = linear()
    guide = Local(model, example=(x, y), family=families.FullNormal())
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=1500)
    fit(
        model, guide, (x, y), objective=ELBO(16, path=StickingTheLanding()), steps=1500, lr=0.05, schedule=schedule, seed=0,
        progress=False,
    )  # fmt: skip
    q: Any = guide.q("weight", x, y)
    parts = q.base_dist
    assert np.abs(parts.mean.detach().numpy() / mean - 1).max() < 0.01
    got = parts.covariance_matrix.detach().numpy()
    assert np.linalg.norm(got - covariance) < 0.01 * np.linalg.norm(covariance)
    evidence = scipy.stats.multivariate_normal(
        np.zeros(len(y)), PRIOR**2 * (x @ x.T).numpy() + NOISE**2 * np.eye(len(y))
    ).logpdf(y.numpy())
    bound = elbo(model, guide, x, y, particles=100, seed=0)
    assert bound.mean * len(y) == pytest.approx(evidence, abs=0.01)


def test_a_guide_starts_around_the_weights_of_the_network() -> None:
    model = BayesianNeuralNetwork(2, hidden=(4,))
    starts = model.net.starts() | {"noise_scale": torch.tensor(0.2)}
    for family in (families.Normal(), families.LowRankNormal(rank=1), families.FullNormal()):
        guide = Local(model, example=(X, Y), family=family)
        guide.start_around(starts, scale=0.02)
        with pyro.plate("draws", 2000, dim=-2):
            drawn = guide(X, Y)
        for name, value in starts.items():
            got, want = drawn[name][:, 0], value
            if name == "noise_scale":  # normal on the unconstrained space
                got, want = got.log(), want.log()
            error = got.std(0) / 2000**0.5
            assert bool(((got.mean(0) - want).abs() < 5 * error).all())
            if not isinstance(family, families.LowRankNormal):  # whose factor adds to it
                # The scale of n normal draws has relative error 1 / sqrt(2 n).
                assert bool(((got.std(0) / 0.02 - 1).abs() < 5 / 4000**0.5).all())
    flow = Local(model, example=(X, Y), family={"2.bias": families.Flow(hidden_features=(4,))})
    with pytest.raises(ValueError, match="'2.bias' is global latent with family Flow"):
        flow.start_around(model.net.starts())
    for values, scale, said in (
        ({"weight": torch.zeros(1)}, 0.1, "no latent 'weight'"),
        ({"2.bias": torch.zeros(2)}, 0.1, r"'2.bias' must have shape \(1,\), got \(2,\)"),
        ({}, 0.0, "scale must be a finite number > 0, got 0.0"),
        (torch.zeros(3), 0.1, "takes a dict with a tensor for each site.*got Tensor"),
        ({"2.bias": 0.0}, 0.1, "takes a dict with a tensor for each site.*got {'2.bias': 0.0}"),
    ):
        with pytest.raises(ValueError, match=said):
            guide.start_around(values, scale=scale)


BAD: dict[str, tuple[Any, Any, str]] = {
    "constant": (None, torch.full((6,), 2.5), r"all 6 rows are the same, 2\.5.*Homoscedastic\(scale="),
    "too high a class": (Classes(3), torch.tensor([0, 1, 2, 3, 0, 1]), "'integers 0 to 2'.*from 0 to 3"),
    "a class below 0": (Classes(3), torch.tensor([0, 1, 2, -1, 0, 1]), "'integers 0 to 2'.*from -1 to 2"),
    "a negative count": (Counts(), torch.tensor([0.0, 1, -1, 2, 3, 4]), "non-negative integer.*from -1"),
    "a fractional count": (Counts(), torch.tensor([0.0, 1.5, 1, 2, 3, 4]), "non-negative integer.*16.67%"),
    "a column": (None, torch.randn(6, 1), r"'y'.*shape \(\d,\).*but got \(\d, 1\)"),
    "rows": (None, torch.randn(5), "same number of rows, got x: 6, y: 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", ["fit", "sample"])
def test_bad_targets_are_refused(case: str, how: str) -> None:
    likelihood, y, said = BAD[case]
    model = BayesianNeuralNetwork(2, hidden=(3,), likelihood=likelihood)
    x = torch.randn(6, 2)
    guide = Local(model, example=(x, model(x)))
    call = {
        "fit": lambda: fit(model, guide, (x, y), steps=1, batch_size=2, progress=False),
        "sample": lambda: sample(model, x, y, chains=1, draws=4, warmup=1, progress=False),
    }[how]
    with pytest.raises(ValueError, match=f"(?s){said}"):
        call()


def test_constant_targets_are_fine_with_a_known_scale_and_in_a_minibatch() -> None:
    x, y = torch.randn(6, 2), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    known = BayesianNeuralNetwork(2, hidden=(3,), likelihood=Homoscedastic(0.1))
    guide = Local(known, example=(x, y))
    fit(known, guide, (x, torch.ones(6)), steps=1, progress=False)
    inferred = BayesianNeuralNetwork(2, hidden=(3,))
    guide = Local(inferred, example=(x, y))
    fit(inferred, guide, (x, y), steps=3, batch_size=2, progress=False)
    elbo(inferred, guide, x[:2], y[:2], particles=2)


def test_networks_that_cannot_serve_are_refused() -> None:
    make: Any = BayesianNeuralNetwork
    with pytest.raises(ValueError, match="must have parameters to infer, but Tanh has none"):
        make(2, net=nn.Tanh())
    for layer in (nn.BatchNorm1d(4), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(4)):
        net = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))
        with pytest.raises(ValueError, match=r"\['1'\] is batch norm.*LayerNorm"):
            make(2, net=net)
    with pytest.raises(ValueError, match=r"net must put out 3 numbers a row \(what Classes takes"):
        make(2, net=nn.Linear(2, 1), likelihood=Classes(3))
    with pytest.raises(ValueError, match=r"net must map \(rows, 2\) .* it said:"):
        make(2, net=nn.Linear(3, 1))
    for options in (
        {"data_dim": 0},
        {"data_dim": "2"},
        {"data_dim": 2.0},
        {"data_dim": True},
        {"data_dim": 2, "hidden": (0,)},
        {"data_dim": 2, "hidden": (2.5,)},
        {"data_dim": 2, "hidden": 5},
    ):
        with pytest.raises(ValueError, match="(data_dim|hidden) must be .*positive integer"):
            make(**options)
    with pytest.raises(ValueError, match=r"takes one number for data_dim, got \(1, 3, 3\)"):
        make((1, 3, 3))
    assert make(np.int64(2), hidden=[np.int64(3)]).data_shape == (2,)
    for net in (nn.Linear, lambda x: x):
        with pytest.raises(ValueError, match=r"net must be an instance of torch\.nn\.Module"):
            make(2, net=net)
    for name in ("y", "data", "noise_scale"):
        net = nn.Linear(2, 1)
        net.register_parameter(name, nn.Parameter(torch.zeros(1)))
        with pytest.raises(ValueError, match=rf"parameters \['{name}'\] of net have names"):
            make(2, net=net)
    assert make(2, net=net, likelihood=Homoscedastic(0.1)).net.starts().keys() >= {"noise_scale"}
    for likelihood in (Counts, dist.Normal(0.0, 1.0), "normal", 0.1):
        with pytest.raises(ValueError, match=r"likelihood must be one of ppl_models\.parts"):
            make(2, likelihood=likelihood)


@pytest.mark.parametrize("shape", [(2,), (6,), (6, 3), (1, 6, 2)])
def test_covariates_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    # One row without its first dimension has as many values as there are features.
    model = BayesianNeuralNetwork(2, hidden=(3,))
    x = torch.randn(6, 2)
    guide = Local(model, example=(x, model(x)))
    other, y = torch.randn(shape), torch.randn(shape[0])
    said = r"x must have shape \(rows, 2\), got "
    for call in (
        lambda: model(other),
        lambda: fit(model, guide, (other, y), steps=1, progress=False),
        lambda: sample(model, other, y, chains=1, draws=4, warmup=1, progress=False),
        lambda: predict(model, guide, other),
        lambda: predict(model, guide, other, y),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_parts_with_bad_numbers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Homoscedastic: scale must be > 0 and finite, one number, got -1"
    ):
        Homoscedastic(-1.0)
    for scale in (math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match=r"scale must be > 0 and finite, one number, got"):
            Homoscedastic(scale)  # pyright: ignore[reportArgumentType]
    for prior in (dist.Normal(0.0, 1.0), dist.Gamma(torch.ones(2), 1.0), dist.Uniform(-1.0, 1.0)):
        with pytest.raises(ValueError, match="distribution of one positive number"):
            Homoscedastic(prior)
    bounded = BayesianNeuralNetwork(2, likelihood=Homoscedastic(dist.Uniform(0.1, 1.0)))
    assert (
        0.1
        < poutine.trace(bounded).get_trace(torch.randn(3, 2)).nodes["noise_scale"]["value"]
        < 1.0
    )
    for count in (1, 2.5, True):
        with pytest.raises(
            ValueError, match=f"Classes: classes must be an integer >= 2, got {count}"
        ):
            Classes(count)  # pyright: ignore[reportArgumentType]
    for options in ((0.0,), (0.5, 1.0, 2.0), (0.5, -1.0, -2.0)):
        with pytest.raises(ValueError, match="weight must be between 0 and 1, and 0 < narrow"):
            scale_mixture(*options)
    with pytest.raises(ValueError, match="hierarchical: scale must be > 0 and finite, got 0"):
        hierarchical(0.0)

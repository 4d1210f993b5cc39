"""Deep latent Gaussian models against linear algebra, written out again."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy.stats import multivariate_normal, norm
from torch import nn
from torch.testing import assert_close

from guides import Amortized, Exact, Ladder, Local
from ppl_models import PPCA, DeepLatentGaussian, FactorAnalysis
from ppl_models.core.traces import vectorizes
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.infer import ELBO, fit
from ppl_models.parts.likelihoods import Bernoulli, Gaussian


def linear(latent_dims: tuple[int, ...], data_dim: int = 4) -> DeepLatentGaussian:
    """Return one whose every parameter is away from its start."""
    torch.manual_seed(1)
    model = DeepLatentGaussian(data_dim, latent_dims, hidden=(), noise_scale=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().mul_(0.7)
    return model


def affine(model: DeepLatentGaussian, level: int) -> tuple[np.ndarray, np.ndarray]:
    (layer,) = (m for m in model.layers[level].modules() if isinstance(m, nn.Linear))
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def joint(model: DeepLatentGaussian) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Mean and covariance of each layer, from the top down to the data."""
    assert model.log_noise_scale is not None
    scales = [model.log_noise_scale.exp().expand(model.data_dim)]
    scales += [value.exp() for value in model.log_scales]
    mean, covariance = np.zeros(model.latent_dims[-1]), np.eye(model.latent_dims[-1])
    means, covariances = [mean], [covariance]
    for level in range(len(model.latent_dims) - 1, -1, -1):
        weight, bias = affine(model, level)
        mean = weight @ mean + bias
        noise = np.diag(scales[level].detach().numpy() ** 2)
        covariance = weight @ covariance @ weight.T + noise
        means.append(mean)
        covariances.append(covariance)
    return means, covariances


@pytest.mark.parametrize("latent_dims", [(2,), (3, 2), (2, 3, 2)], ids=str)
def test_linear_layers_have_the_evidence_of_one_normal(latent_dims: tuple[int, ...]) -> None:
    model = linear(latent_dims)
    x = model(size=6).detach()
    means, covariances = joint(model)
    exact = multivariate_normal(means[-1], covariances[-1]).logpdf(x.numpy())
    bound = elbo(model, Exact(model), x, particles=2, seed=0)  # the same for every draw
    assert bound.rows is not None
    assert_close(bound.rows, torch.as_tensor(exact), rtol=1e-6, atol=1e-6)


def test_one_linear_layer_is_ppca() -> None:
    model = linear((2,), data_dim=5)
    weight, bias = (torch.as_tensor(value) for value in affine(model, 0))
    assert model.log_noise_scale is not None
    ppca = PPCA(data_dim=5, latent_dim=2)
    with torch.no_grad():
        ppca.loading.copy_(weight)
        ppca.loc.copy_(bias)
        ppca.log_noise_scale.copy_(model.log_noise_scale)
    x = ppca(size=7).detach()
    guide = Exact(model)
    one, other = guide.q("z1", x), ppca.posterior(x)
    assert_close(one.mean, other.mean)
    assert_close(one.covariance_matrix, other.covariance_matrix.expand(7, 2, 2))
    estimate = log_evidence(model, Amortized(model, hidden=(4,)), x, particles=20_000, seed=0)
    assert abs(estimate.mean - ppca.log_evidence(x).mean().item()) < 5 * estimate.se + 1e-3


def test_one_linear_layer_with_a_noise_scale_for_each_column_is_factor_analysis() -> None:
    analysis = FactorAnalysis(data_dim=5, latent_dim=2)
    model = DeepLatentGaussian(5, (2,), hidden=(), likelihood=Gaussian(min_scale=0.0))
    (layer,) = (m for m in model.layers[0].modules() if isinstance(m, nn.Linear))
    torch.manual_seed(1)
    with torch.no_grad():
        analysis.loc.normal_()
        analysis.log_noise_scale.normal_().mul_(0.5)
        layer.weight.copy_(torch.cat([analysis.loading, torch.zeros(5, 2)]))
        layer.bias.copy_(torch.cat([analysis.loc, 2.0 * analysis.noise_scale.log()]))
    x = analysis(size=7).detach()
    # Exact for the other, so every weight p(x, z) / q(z | x) is the evidence.
    bound = elbo(model, lambda x: _named(analysis, x), x, particles=2, seed=0)
    assert bound.rows is not None
    assert_close(bound.rows, analysis.log_evidence(x).detach(), rtol=1e-6, atol=1e-6)
    estimate = log_evidence(model, Amortized(model, hidden=(4,)), x, particles=20_000, seed=0)
    assert abs(estimate.mean - analysis.log_evidence(x).mean().item()) < 5 * estimate.se + 1e-3


def _named(analysis: FactorAnalysis, x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z1", analysis.posterior(x))


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
def test_the_forms_of_the_lecture(name: str) -> None:
    model = getattr(DeepLatentGaussian, name)(4, 3, hidden=5, noise_scale=0.5)
    upper, lower = (m.weight for m in model.layers[0].modules() if isinstance(m, nn.Linear))
    assert [n for n, _ in model.named_parameters() if "bias" in n] == []
    z, x = torch.randn(6, 3), torch.randn(6, 4)
    bend = torch.sigmoid if name == "sigmoid" else torch.relu
    mean = bend(z @ upper.T) @ lower.T
    exact = norm(mean.detach().numpy(), 0.5).logpdf(x.numpy()).sum(-1)
    assert_close(model.likelihood(z).log_prob(x), torch.as_tensor(exact), check_dtype=False)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=str)
def test_the_story_has_the_density_of_its_formula(likelihood: Any) -> None:
    torch.manual_seed(0)
    model = DeepLatentGaussian(4, (3, 2), hidden=(5,), likelihood=likelihood)
    with torch.no_grad():
        model.log_scales[0].copy_(torch.tensor([0.3, -0.2, 0.1]))
    x = model(size=6).detach()
    z2, z1 = torch.randn(6, 2), torch.randn(6, 3)
    told = poutine.condition(model, data={"z1": z1, "z2": z2})
    total = poutine.trace(told).get_trace(x).log_prob_sum()
    first, second = (m for m in model.layers[1].modules() if isinstance(m, nn.Linear))
    mean = torch.tanh(z2 @ first.weight.T + first.bias) @ second.weight.T + second.bias
    scale = model.log_scales[0].exp().detach().numpy()
    exact = norm.logpdf(z2.numpy()).sum() + norm(mean.detach().numpy(), scale).logpdf(z1).sum()
    exact += model.likelihood(z1).log_prob(x).sum().item()
    assert total.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("guide", [Ladder, Amortized], ids=["ladder", "amortized"])
def test_leading_dimensions_change_no_density(guide: Any) -> None:
    torch.manual_seed(0)
    model = DeepLatentGaussian(4, (3, 2, 2), hidden=(5,))
    x = model(size=6).detach()
    assert vectorizes(model, guide(model, hidden=(4,)), x, dim=-2)


def test_a_ladder_holds_the_posterior_of_a_chain_of_units() -> None:
    """One linear unit a layer: what the data say of each is normal, and the ladder adds the prior."""
    model = linear((1, 1), data_dim=3)
    x = model(size=5).detach()
    guide = Ladder(model, hidden=(3,))
    weights, bias = affine(model, 0)
    (slope,), (shift,) = affine(model, 1)
    assert model.log_noise_scale is not None
    noise = model.log_noise_scale.exp().item() ** 2
    square = float((weights**2).sum())
    # Of z1 by x: its estimate; of z2 by x: that of z1 with the noise of z1, and its own prior.
    spread = noise / square
    middle = spread + model.log_scales[0].exp().item() ** 2
    precision = float(slope[0]) ** 2 / middle + 1.0
    read = weights[:, 0] / square
    with torch.no_grad():  # tanh is linear near 0
        first = next(m for m in guide.encoder.modules() if isinstance(m, nn.Linear))
        first.weight.copy_(1e-4 * torch.eye(3))
        first.bias.zero_()
        (climb,) = (m for m in guide.ascent.modules() if isinstance(m, nn.Linear))
        climb.weight.copy_(torch.eye(3))
        climb.bias.zero_()
        for head in guide.heads.values():
            head.weight.zero_()
        one, two = guide.heads["site_z1"], guide.heads["site_z2"]
        one.weight[0] = torch.as_tensor(read) * 1e4
        one.bias.copy_(torch.tensor([-(read * bias).sum(), np.log(spread)]))
        gain = float(slope[0]) / middle / precision
        two.weight[0] = torch.as_tensor(gain * read) * 1e4
        two.bias.copy_(torch.tensor([-gain * ((read * bias).sum() + shift), -np.log(precision)]))
    means, covariances = joint(model)
    exact = multivariate_normal(means[-1], covariances[-1]).logpdf(x.numpy())
    bound = elbo(model, guide, x, particles=3, seed=0)
    assert bound.rows is not None
    assert_close(bound.rows, torch.as_tensor(exact), rtol=1e-5, atol=1e-5)


def test_a_ladder_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="must be a DeepLatentGaussian.*Amortized"):
        Ladder(PPCA(data_dim=3, latent_dim=1))  # pyright: ignore[reportArgumentType]
    for hidden in ((), 8, (8.0,)):
        with pytest.raises(
            ValueError, match="Ladder: hidden must be positive integers.*one or more"
        ):
            Ladder(DeepLatentGaussian(4, (2,)), hidden=cast(Any, hidden))


def test_training_raises_the_evidence_to_that_of_the_closed_form() -> None:
    truth = linear((2,), data_dim=5)
    x = truth(size=400).detach()
    model = DeepLatentGaussian(5, (2,), hidden=(), noise_scale=1.0)
    guide = Amortized(model, hidden=())
    fit(model, guide, x, epochs=150, lr=2e-2, batch_size=100, objective=ELBO(4), seed=0)
    means, covariances = joint(model)
    reached = multivariate_normal(means[-1], covariances[-1]).logpdf(x.numpy()).mean()
    ppca = PPCA.maximum_likelihood(x, latent_dim=2)
    best = ppca.log_evidence(x).mean().item()
    assert best - 0.02 < reached <= best + 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_dim": 0}, "data_dim must be an integer >= 1, got 0"),
        ({"data_dim": "4"}, "data_dim must be an integer >= 1, got '4'"),
        ({"latent_dims": ()}, r"latent_dims must be positive integers.*one or more, got \(\)"),
        ({"latent_dims": 2}, "latent_dims must be positive integers.*got 2"),
        ({"latent_dims": (2.0,)}, r"latent_dims must be positive integers.*got \(2.0,\)"),
        ({"hidden": 8}, "hidden must be positive integers.*got 8"),
        ({"noise_scale": -1.0}, "noise_scale must be a finite number > 0, got -1.0"),
        ({"noise_scale": math.inf}, "noise_scale must be a finite number > 0, got inf"),
        ({"noise_scale": "1"}, "noise_scale must be a finite number > 0, got '1'"),
        ({"noise_scale": 1.0, "likelihood": Bernoulli()}, "takes the place"),
        ({"activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_what_is_no_model_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepLatentGaussian(**({"data_dim": 4, "latent_dims": (2,)} | options))


def test_free_parameters_serve_it() -> None:
    model = DeepLatentGaussian.relu(4, 2, hidden=3)
    x = model(size=20).detach()
    result = fit(model, Local(model, rows=20), x, steps=200, lr=5e-2, seed=0)
    assert result.bounds[-50:].mean() > result.bounds[:50].mean()

"""The VAE against its formulas, and against quadrature over a one-dimensional latent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized
from ppl_models import VAE
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.parts.likelihoods import Bernoulli, Categorical, Gaussian


def layers(model: VAE) -> list[tuple[np.ndarray, np.ndarray]]:
    linear = [layer for layer in model.decoder.net if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]


def test_the_gaussian_likelihood_is_the_lectures_formula() -> None:
    model = VAE(3, 2, hidden=(4,), likelihood=Gaussian(min_scale=0.0))
    (w3, b3), (w45, b45) = layers(model)
    z = torch.randn(5, 2)
    h = np.tanh(z.numpy() @ w3.T + b3)
    loc = h @ w45[:3].T + b45[:3]
    log_square = h @ w45[3:].T + b45[3:]
    x = torch.randn(5, 3)
    want = norm(loc, np.sqrt(np.exp(log_square))).logpdf(x.numpy()).sum(-1)
    assert_close(model.likelihood(z).log_prob(x).detach(), torch.tensor(want))


def test_the_scale_never_falls_below_its_minimum() -> None:
    model = VAE(3, 2, hidden=(4,), likelihood=Gaussian(min_scale=0.25))
    with torch.no_grad():
        model.decoder.net[-1].bias.fill_(-1000.0)
    scale = model.likelihood(torch.randn(5, 2)).base_dist.scale.detach()
    assert_close(scale, torch.full((5, 3), 0.25))


def test_the_bernoulli_likelihood_is_a_cross_entropy() -> None:
    model = VAE(3, 2, hidden=(4,))
    (w1, b1), (w2, b2) = layers(model)
    z = torch.randn(5, 2)
    p = expit(np.tanh(z.numpy() @ w1.T + b1) @ w2.T + b2)
    x = (torch.rand(5, 3) < 0.5).double()
    want = (x.numpy() * np.log(p) + (1 - x.numpy()) * np.log1p(-p)).sum(-1)
    assert_close(model.likelihood(z).log_prob(x).detach(), torch.tensor(want))


def test_the_categorical_likelihood_is_a_softmax_over_classes() -> None:
    model = VAE(3, 2, hidden=(4,), likelihood=Categorical(classes=4))
    z = torch.randn(5, 2)
    codes = torch.randint(4, (5, 3))
    x = nn.functional.one_hot(codes, 4).double()
    logits = model.decoder(z).detach().reshape(5, 4, 3)  # classes first, as a decoder puts them
    want = -nn.functional.cross_entropy(logits, codes, reduction="none").sum(-1)
    assert_close(model.likelihood(z).log_prob(x).detach(), want)
    assert model(size=2).shape == (2, 3, 4)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(min_scale=0.1), Categorical(3)])
def test_importance_sampling_finds_the_evidence_by_quadrature(likelihood: object) -> None:
    model = VAE(4, 1, hidden=(5,), likelihood=likelihood)
    guide = Amortized(model, hidden=(5,))
    with torch.no_grad():  # a curved decoder, not its flat start
        model.decoder.net[0].weight.normal_(0, 2)
        model.decoder.net[2].weight.normal_(0, 1)
    x = model(size=6).detach()
    grid = torch.linspace(-9, 9, 4001).unsqueeze(-1)
    with torch.no_grad():
        joint = torch.stack(
            [model.prior().log_prob(grid) + model.likelihood(grid).log_prob(row) for row in x]
        )
    truth = torch.logsumexp(joint, 1) + math.log(18 / 4000)
    estimate = log_evidence(model, guide, x, particles=20_000, seed=0)
    assert bool(((estimate.rows - truth).abs() < 5 * estimate.rows_se).all())
    bound = elbo(model, guide, x, particles=1000, seed=0)
    assert bool((bound.rows <= truth + 5 * bound.rows_se).all())


def test_rows_can_be_images_and_the_decoder_a_convolutional_network() -> None:
    decoder = nn.Sequential(
        nn.Linear(2, 16), nn.Unflatten(-1, (4, 2, 2)), nn.ConvTranspose2d(4, 2, 2, stride=2)
    )
    model = VAE((1, 4, 4), 2, likelihood=Gaussian(), decoder=decoder)
    z = torch.randn(3, 5, 2)
    out = decoder(z.reshape(15, 2)).reshape(3, 5, 2, 4, 4)
    likelihood = model.likelihood(z).base_dist
    assert_close(likelihood.loc, out[:, :, :1])
    assert_close(likelihood.scale, 1e-3 + (out[:, :, 1:] / 2).exp())
    assert model(size=7).shape == (7, 1, 4, 4)


def test_a_decoder_of_another_size_is_refused_and_left_in_its_mode() -> None:
    decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5))
    before: list[Tensor] = [value.clone() for value in decoder.state_dict().values()]
    with pytest.raises(ValueError, match=r"decoder must put out 6 numbers a row.*\(2, 5\)"):
        VAE(6, 2, decoder=decoder)
    with pytest.raises(ValueError, match=r"decoder must map \(rows, 3\)"):
        VAE(6, 3, decoder=decoder)
    assert decoder.training
    assert all(
        torch.equal(a, b) for a, b in zip(before, decoder.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("sizes", [(0, 2), (4, 0), ((), 2), ((3, 0), 2), ("4", 2), (4, 2.0)])
def test_sizes_must_be_positive(sizes: tuple) -> None:
    with pytest.raises(ValueError, match="VAE: (data|latent)_dim must be .*integer"):
        VAE(*sizes)


def test_likelihoods_refuse_parameters_without_a_meaning() -> None:
    with pytest.raises(ValueError, match="min_scale must be >= 0, got -1"):
        Gaussian(min_scale=-1.0)
    with pytest.raises(ValueError, match="classes must be an integer >= 2, got 1"):
        Categorical(1)

"""PPCA against formulas written out again, and against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.testing import assert_close

from ppl_models import PPCA
from ppl_models.data import linear_gaussian


def simulated() -> Tensor:
    return linear_gaussian(400, data_dim=6, latent_dim=2, seed=1).x


def breast_cancer() -> Tensor:
    return torch.tensor(StandardScaler().fit_transform(load_breast_cancer().data))


def numbers(model: PPCA) -> tuple[np.ndarray, np.ndarray, float]:
    return (
        model.loading.detach().numpy(),
        model.loc.detach().numpy(),
        math.exp(model.log_noise_scale.item()),
    )


def test_the_evidence_is_the_dense_gaussian() -> None:
    model = PPCA(5, 2, noise_scale=0.7)
    model.loc.data.normal_()
    loading, loc, noise = numbers(model)
    x = model(size=20).detach()
    dense = multivariate_normal(loc, loading @ loading.T + noise**2 * np.eye(5)).logpdf(x.numpy())
    assert_close(model.log_evidence(x).detach(), torch.tensor(dense))


def test_the_posterior_is_bayes_rule_for_the_joint_gaussian() -> None:
    model = PPCA(5, 3, noise_scale=0.7)
    model.loc.data.normal_()
    loading, loc, noise = numbers(model)
    x = model(size=4).detach()
    # Condition the joint of (z, x): cov(z, x) = W^T, cov(x) = W W^T + s^2 I.
    gain = loading.T @ np.linalg.inv(loading @ loading.T + noise**2 * np.eye(5))
    posterior = model.posterior(x)
    assert_close(posterior.mean.detach(), torch.tensor((x.numpy() - loc) @ gain.T))
    covariance = torch.tensor(np.eye(3) - gain @ loading)
    assert_close(posterior.covariance_matrix.detach(), covariance.expand(4, 3, 3))


def test_joint_is_posterior_times_evidence_at_any_point() -> None:
    model = PPCA(5, 2)
    x, z = model(size=6).detach(), torch.randn(6, 2)
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    assert_close(joint, model.posterior(x).log_prob(z) + model.log_evidence(x))


@pytest.mark.parametrize("data", [simulated, breast_cancer])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_maximum_likelihood_agrees_with_scikit_learn(data: object, latent_dim: int) -> None:
    x = data()
    model = PPCA.maximum_likelihood(x, latent_dim)
    theirs = PCA(latent_dim).fit(x.numpy())
    # scikit-learn divides by N - 1 where the likelihood divides by N.
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    noise = values[latent_dim:].mean()
    assert_close(model.noise_scale.item() ** 2, noise)
    assert_close(noise * len(x) / (len(x) - 1), float(theirs.noise_variance_))
    scaled = PCA(latent_dim).fit(x.numpy())
    scaled.explained_variance_ = values[:latent_dim]
    scaled.noise_variance_ = noise
    assert_close(model.log_evidence(x).mean().item(), float(scaled.score(x.numpy())))
    # The score of scikit-learn's own estimate is a little lower: ours is the maximum.
    assert model.log_evidence(x).mean().item() >= float(theirs.score(x.numpy()))


@pytest.mark.parametrize("data", [simulated, breast_cancer])
def test_the_maximum_is_the_closed_form_of_tipping_and_bishop(data: object) -> None:
    x = data()
    (rows, data_dim), latent_dim = x.shape, 2
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    noise = values[latent_dim:].mean()
    want = -0.5 * (
        data_dim * math.log(2 * math.pi)
        + values[:latent_dim].log().sum()
        + (data_dim - latent_dim) * noise.log()
        + data_dim
    )
    model = PPCA.maximum_likelihood(x, latent_dim)
    assert_close(model.log_evidence(x).mean().detach(), want)
    assert rows > data_dim


def test_the_gradient_of_the_evidence_vanishes_at_the_maximum() -> None:
    x = simulated()
    model = PPCA.maximum_likelihood(x, 2)
    model.log_evidence(x).mean().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), msg=name, atol=1e-10, rtol=0)


def test_maximum_likelihood_keeps_the_precision_of_the_data() -> None:
    assert PPCA.maximum_likelihood(simulated().float(), 2).loading.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"), [((5, 0), ">= 1"), ((5, "2"), ">= 1"), ((5, 6), "in"), ((0, 1), ">= 1")]
)
def test_a_dimension_out_of_range_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"PPCA: (data|latent)_dim must be .*{said}"):
        PPCA(*arguments)


def test_a_noise_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_scale must be a finite number > 0, got 0"):
        PPCA(5, 2, noise_scale=0.0)


def test_maximum_likelihood_refuses_what_has_no_maximum() -> None:
    with pytest.raises(ValueError, match=r"latent_dim in \[1, 5\]"):
        PPCA.maximum_likelihood(simulated(), 6)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        PPCA.maximum_likelihood(simulated()[:1], 2)
    flat = torch.randn(50, 2) @ torch.randn(2, 5)
    with pytest.raises(ValueError, match="no variance is left for the noise"):
        PPCA.maximum_likelihood(flat, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        PPCA.maximum_likelihood(torch.full((5, 3), torch.nan), 2)


def test_parameters_may_have_leading_dimensions() -> None:
    singles = [PPCA(5, 2, noise_scale=scale) for scale in (0.5, 1.0, 2.0)]
    x = singles[0](size=6).detach()
    stacked = PPCA(5, 2)
    for name, _ in list(stacked.named_parameters()):
        values = torch.stack([getattr(single, name).data for single in singles])
        setattr(stacked, name, torch.nn.Parameter(values.unsqueeze(1)))  # particles, then the plate
    want = torch.stack([single.log_evidence(x) for single in singles])
    assert_close(stacked.log_evidence(x), want)
    means = torch.stack([single.posterior(x).mean for single in singles])
    assert_close(stacked.posterior(x).mean, means)

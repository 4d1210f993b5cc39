"""Simulated data and the truth behind them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ppl_models import PPCA, VAE
from ppl_models.data import linear_gaussian, simulate


def test_the_sample_covariance_is_that_of_the_linear_gaussian_model() -> None:
    rows = 20_000
    drawn = linear_gaussian(rows, data_dim=6, latent_dim=2, noise_scale=0.5, seed=1)
    covariance = drawn.loading @ drawn.loading.mT + 0.25 * torch.eye(6)
    sample = torch.cov(drawn.x.mT)
    # Of normal rows: var(S_ij) = (C_ij^2 + C_ii C_jj) / (N - 1).
    diagonal = covariance.diagonal()
    se = ((covariance.square() + diagonal[:, None] * diagonal) / (rows - 1)).sqrt()
    assert ((sample - covariance).abs() < 5 * se).all()
    assert ((drawn.x.mean(0) - drawn.loc).abs() < 5 * (diagonal / rows).sqrt()).all()


def test_the_rows_are_made_of_the_latents_that_are_kept() -> None:
    drawn = linear_gaussian(5000, data_dim=7, latent_dim=3, noise_scale=0.2)
    noise = drawn.x - drawn.loc - drawn.z @ drawn.loading.mT
    assert noise.std().item() == pytest.approx(0.2, rel=5 / math.sqrt(2 * noise.numel()))
    assert (drawn.z.shape, drawn.loading.shape, drawn.loc.shape) == ((5000, 3), (7, 3), (7,))
    assert drawn.noise_scale == 0.2
    # Orthogonal loadings, their lengths falling from 3 to 1.5.
    gram = drawn.loading.mT @ drawn.loading
    assert_close(gram, torch.tensor([3.0, 2.25, 1.5]).square().diag())


def test_the_linear_gaussian_simulator_reproduces_by_its_seed_and_isolates() -> None:
    state = torch.get_rng_state()
    first, second, other = (linear_gaussian(9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    linear_gaussian(9, seed=None)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 0}, "size=0"),
        ({"data_dim": 0}, "data_dim=0"),
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"data_dim": 3, "latent_dim": 4}, "data_dim=3, latent_dim=4"),
        ({"noise_scale": 0.0}, r"noise_scale=0\.0"),
        ({"noise_scale": math.nan}, "noise_scale=nan"),
    ],
)
def test_a_linear_gaussian_that_cannot_be_is_refused(arguments, named) -> None:
    with pytest.raises(ValueError, match=f"linear_gaussian: .*must be positive.*got .*{named}"):
        linear_gaussian(**arguments)


def test_simulate_keeps_the_latents_behind_the_rows() -> None:
    model = PPCA(data_dim=5, latent_dim=2, noise_scale=1e-6)
    drawn = simulate(model, 30, seed=0)
    assert list(drawn.latents) == ["z"]
    (x,) = drawn.batch
    assert not x.requires_grad
    assert_close(x, (drawn.latents["z"] @ model.loading.mT + model.loc).detach(), atol=1e-4, rtol=0)


def test_simulate_takes_functions_with_several_outputs_and_global_latents() -> None:
    def model(size):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(w, 1e-9))
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            x = pyro.sample("x", dist.Normal(z + kind, 1e-9))
            y = pyro.sample("y", dist.Normal(-x, 1e-9))
        return x, y

    drawn = simulate(model, 11, seed=0)
    assert set(drawn.latents) == {"w", "z", "kind"}
    x, y = drawn.batch
    assert_close(x, drawn.latents["w"] + drawn.latents["kind"], atol=1e-7, rtol=0)
    assert_close(y, -x, atol=1e-7, rtol=0)


def test_simulate_reproduces_by_its_seed_and_leaves_stream_store_and_modes() -> None:
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
    model = VAE(data_dim=4, latent_dim=2, decoder=decoder)
    assert model.training
    state = torch.get_rng_state()
    first, second, other = (simulate(model, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.batch[0], second.batch[0])
    assert torch.equal(first.latents["z"], second.latents["z"])
    assert not torch.equal(first.latents["z"], other.latents["z"])
    assert len(pyro.get_param_store()) == 0
    assert model.training
    assert decoder[1].training
    # Without dropout, as in `generate`: the logits of the mean network.
    torch.manual_seed(1)
    x = model.eval()(size=8).detach()
    assert torch.equal(first.batch[0], x)
    torch.set_rng_state(state)
    simulate(model, 8)
    assert not torch.equal(torch.get_rng_state(), state)


def test_simulate_needs_a_model_that_takes_a_size_and_a_positive_one() -> None:
    def conditional(x, y=None):
        return None

    with pytest.raises(ValueError, match="simulate: conditional takes no `size=`"):
        simulate(conditional, 3)
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"simulate: size must be an integer >= 1, got {size}"):
            simulate(PPCA(data_dim=3, latent_dim=1), size)

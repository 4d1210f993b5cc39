"""From data to latents and back, against the closed forms of PPCA and of small discrete models."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guides import Amortized, Exact, families
from ppl_models import PPCA, VAE
from ppl_models.evaluate import encode, generate, reconstruct
from ppl_models.parts.likelihoods import Categorical


def setting(rows=6) -> Any:
    model = PPCA(data_dim=5, latent_dim=2, noise_scale=0.7)
    return model, model(size=rows).detach()


def test_encode_gives_the_posterior_mean_of_the_exact_guide() -> None:
    model, x = setting()
    means = encode(model, Exact(model), x, draws=1)
    assert list(means) == ["z"]
    assert_close(means["z"], model.posterior(x).mean.detach())
    assert not means["z"].requires_grad


def test_reconstruct_gives_the_loading_times_the_posterior_mean() -> None:
    model, x = setting()
    draws = 2000
    (mean,) = reconstruct(model, Exact(model), x, draws=draws, seed=0).values()
    posterior, loading = model.posterior(x), model.loading.detach()
    expected = model.loc.detach() + posterior.mean @ loading.mT
    covariance = loading @ posterior.covariance_matrix[0] @ loading.mT
    se = (covariance.diagonal() / draws).sqrt()
    assert mean.shape == x.shape
    assert ((mean - expected).abs() < 5 * se).all()
    assert (mean - expected).abs().max() > 0  # drawn, not computed


def several(x) -> Any:
    """Two latents, the second discrete and dependent on the first."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(z + kind, 1.0), obs=x)


def several_guide(x) -> Any:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 2.0))
        kind_logits = torch.stack([z, torch.zeros_like(z), -z], -1)
        pyro.sample("kind", dist.Categorical(logits=kind_logits))


def test_several_latents_are_averaged_over_the_earlier_ones() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    draws = 3000
    means = encode(several, several_guide, x, draws=draws, seed=0)
    assert_close(means["z"], x)  # in closed form
    assert means["kind"].shape == (3, 3)
    assert_close(means["kind"].sum(-1), torch.ones(3))
    grid = torch.linspace(-8, 8, 4001)
    z = x[:, None] + 2.0 * grid
    mass = dist.Normal(0.0, 1.0).log_prob(grid).exp()
    share = torch.softmax(torch.stack([z, torch.zeros_like(z), -z], -1), -1)
    expected = (share * mass[:, None]).sum(1) / mass.sum()
    spread = ((share - expected[:, None]).square() * mass[:, None]).sum(1) / mass.sum()
    assert ((means["kind"] - expected).abs() < 5 * (spread / draws).sqrt()).all()


def test_a_latent_whose_mean_depends_on_a_helper_is_averaged_over_it() -> None:
    def guide(x):
        helper = pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + helper, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    error = encode(model, guide, x, draws=2500, seed=0)["z"] - x
    assert error.abs().max() < 5 / math.sqrt(2500)


def test_a_latent_without_a_closed_mean_is_averaged_over_draws() -> None:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        spread = dist.TransformedDistribution(
            dist.Normal(0.3, 0.5), [dist.transforms.ExpTransform()]
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", spread.expand((len(x),)))

    mean = math.exp(0.3 + 0.125)
    se = mean * math.sqrt(math.expm1(0.25) / 2000)
    found = encode(model, guide, torch.rand(3), draws=2000, seed=0)["z"]
    assert found.shape == (3,)
    assert ((found - mean).abs() < 5 * se).all()


def test_a_flow_is_encoded_by_its_draws() -> None:
    model, x = setting()
    guide = Amortized(model, family=families.Flow(transforms=1, hidden_features=(4,)))
    few, same = (encode(model, guide, x, draws=7, seed=1)["z"] for _ in range(2))
    assert few.shape == (6, 2)
    assert torch.equal(few, same)


def test_global_latents_are_not_encoded() -> None:
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(1.0, 1e-9))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + w, 1.0))

    x = torch.randn(4)
    means = encode(model, guide, x, draws=3)
    assert list(means) == ["z"]
    assert_close(means["z"], x + 1, atol=1e-7, rtol=0.0)


def test_binary_data_are_reconstructed_as_probabilities() -> None:
    model = VAE(data_dim=6, latent_dim=2, hidden=(4,))
    guide = Amortized(model, hidden=(4,))
    x = model(size=5).detach()
    found = reconstruct(model, guide, x, draws=3, seed=2)["x"]
    assert found.shape == (5, 6)
    assert ((found > 0) & (found < 1)).all()
    torch.manual_seed(2)
    with torch.no_grad():
        by_hand = [
            torch.sigmoid(model.decoder(guide.q("z", x).sample())).reshape(5, 6) for _ in range(3)
        ]
    assert_close(found, torch.stack(by_hand).mean(0))


def test_categorical_data_are_reconstructed_as_probabilities() -> None:
    model = VAE(data_dim=4, latent_dim=2, hidden=(4,), likelihood=Categorical(classes=3))
    x = model(size=5).detach()
    found = reconstruct(model, Amortized(model, hidden=(4,)), x)["x"]
    assert found.shape == x.shape == (5, 4, 3)
    assert_close(found.sum(-1), torch.ones(5, 4))

    def codes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = torch.stack([z, torch.zeros_like(z), -z], -1)
            pyro.sample("x", dist.Categorical(logits=logits), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 1.2), 1e-9))

    expected = torch.softmax(torch.tensor([1.2, 0.0, -1.2]), -1).expand(3, 3)
    found = reconstruct(codes, guide, torch.tensor([0, 2, 1]))["x"]
    assert_close(found, expected, atol=1e-7, rtol=0.0)


def test_generate_draws_what_the_model_draws() -> None:
    model, _ = setting()
    state = torch.get_rng_state()
    x = generate(model, 9, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(x, model(size=9).detach())
    torch.set_rng_state(state)
    assert torch.equal(x, generate(model, 9, seed=5))
    assert not torch.equal(x, generate(model, 9, seed=6))
    assert not x.requires_grad
    generate(model, 9)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [encode, reconstruct, generate])
def test_evaluation_leaves_modes_stream_and_store_as_they_were(function) -> None:
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
    model = VAE(data_dim=4, latent_dim=2, decoder=decoder)
    guide = Amortized(model, hidden=(4,))
    decoder[0].eval()  # a mode of its own
    modes = [module.training for module in [*model.modules(), *guide.modules()]]
    pyro.param("mine", torch.ones(2))
    state = torch.get_rng_state()
    x = torch.ones(3, 4)
    arguments = (model, 3) if function is generate else (model, guide, x)
    first, second = (function(*arguments, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in [*model.modules(), *guide.modules()]] == modes
    assert list(pyro.get_param_store()) == ["mine"]
    if function is generate:
        first, second = {"x": first}, {"x": second}
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_local_latents_is_refused_by_name() -> None:
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    for function in (encode, reconstruct):
        match = rf"{function.__name__} needs a latent for each row, but model .* \['w'\]"
        with pytest.raises(ValueError, match=match):
            function(model, guide, torch.randn(3))


def test_a_guide_that_misses_a_latent_is_told_which() -> None:
    model, x = setting()
    for function in (encode, reconstruct):
        with pytest.raises(ValueError, match=r"guide: it must sample every latent .*\['z'\] miss"):
            function(model, lambda x: None, x)


def test_counts_and_sizes_must_be_positive() -> None:
    model, x = setting()
    for function in (encode, reconstruct):
        match = rf"{function.__name__}: draws must be an integer >= 1, got 0"
        with pytest.raises(ValueError, match=match):
            function(model, Exact(model), x, draws=0)
    with pytest.raises(ValueError, match=r"generate: size must be an integer >= 1, got 0"):
        generate(model, 0)

    def conditional(x, y=None):
        return None

    with pytest.raises(ValueError, match=r"generate: conditional takes no `size=`"):
        generate(conditional, 3)

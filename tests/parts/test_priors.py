"""Parameters as global latents."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from guides import Amortized
from ppl_models import PPCA, bayesian, minibatch
from ppl_models.core.sites import site_table
from ppl_models.core.traces import run_pair
from ppl_models.infer import fit
from ppl_models.parts.nn import mlp
from ppl_models.parts.priors import normal


def only_loading(name: str, value: Tensor) -> Any:
    return normal(2.0)(name, value) if name == "loading" else None


def test_draws_have_the_moments_of_the_prior() -> None:
    model = bayesian(
        nn.Linear(2, 1), lambda name, w: normal(3.0 if name == "bias" else 0.5)(name, w)
    )
    with pyro.plate("draws", 4000, dim=-1), poutine.trace() as tracer:
        model(torch.zeros(1, 2))
    for name, scale in (("weight", 0.5), ("bias", 3.0)):
        value = tracer.trace.nodes[name]["value"].reshape(4000, -1)
        error = scale / 4000**0.5
        assert (value.mean(0).abs() < 5 * error).all()
        # The variance of a squared normal is twice its variance squared.
        assert ((value**2).mean(0) - scale**2).abs().max() < 5 * 2**0.5 * scale**2 / 4000**0.5


def test_the_density_is_the_joint_written_out() -> None:
    ppca = PPCA(data_dim=3, latent_dim=2)
    model = bayesian(ppca, dist.Normal(0.0, 0.7))
    x = torch.randn(4, 3)
    trace: Any = poutine.trace(model).get_trace(x)
    loading, loc, log_scale, z = (
        trace.nodes[name]["value"] for name in ("loading", "loc", "log_noise_scale", "z")
    )
    n = torch.distributions.Normal
    want = sum(n(0.0, 0.7).log_prob(value).sum() for value in (loading, loc, log_scale))
    want = want + n(0.0, 1.0).log_prob(z).sum()
    want = want + n(loc + z @ loading.T, log_scale.exp()).log_prob(x).sum()
    assert_close(trace.log_prob_sum(), want)


def test_a_distribution_is_expanded_over_each_parameter() -> None:
    model = bayesian(mlp(2, (3,), 1), dist.Laplace(0.0, 0.5))
    table = site_table(model, torch.zeros(4, 2))
    want = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}
    assert {site.name: tuple(site.event_shape) for site in table} == want
    assert all(site.batch_shape == () for site in table)
    value = torch.randn(3, 2)
    log_prob = table["0.weight"].fn.log_prob(value)
    assert_close(log_prob, torch.distributions.Laplace(0.0, 0.5).log_prob(value).sum())


@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
def test_particles_of_a_network_are_a_loop(kind: str) -> None:
    net = (
        mlp(2, (4,), 3)
        if kind == "mlp"
        else nn.Sequential(
            nn.Linear(2, 8), nn.Unflatten(-1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2, stride=2)
        )
    )
    model = bayesian(net, normal(1.0))
    x = torch.randn(5, 2)
    with pyro.plate("particles", 6, dim=-2), poutine.trace() as tracer:
        out = model(x)
    for particle in range(6):
        own = dict(net.named_parameters())
        values = {
            name: tracer.trace.nodes[name]["value"][particle].reshape(parameter.shape)
            for name, parameter in own.items()
        }
        assert_close(out[particle], functional_call(net, values, (x,)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layers_that_share_a_parameter_share_its_latent(dtype: torch.dtype) -> None:
    net, x = Tied(), torch.randn(5, 3, dtype=dtype)
    model = bayesian(net, normal()).to(dtype)
    names = ["first.weight", "first.bias", "second.bias", "last.weight", "last.bias"]
    assert list(model.starts()) == names
    draws = {name: torch.randn(2, 1, *v.shape, dtype=dtype) for name, v in model.starts().items()}
    with poutine.condition(data=draws), pyro.plate("particles", 2, dim=-2):
        found = model(x)
    for number in range(2):
        values = {name: value[number, 0] for name, value in draws.items()}
        alone = functional_call(net.to(dtype), values, (x,))
        torch.testing.assert_close(found[number], alone)


def test_layers_that_draw_draw_for_each_particle() -> None:
    model = bayesian(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)), normal())
    draws = {name: value.expand(2, 1, *value.shape) for name, value in model.starts().items()}
    with poutine.condition(data=draws):
        found = model(torch.randn(4, 3))
    zeros = found == 0
    assert 0.3 < zeros.double().mean() < 0.7
    assert not torch.equal(zeros[0], zeros[1])


def test_what_gets_no_prior_stays_a_parameter_with_its_value() -> None:
    ppca = PPCA(data_dim=3, latent_dim=1)
    ppca.loc.requires_grad_(False)
    model = bayesian(ppca, only_loading)
    x = ppca(size=6).detach()
    assert [site.name for site in site_table(model, x).latents] == ["loading", "z"]
    kept = {name.rpartition(".")[2]: p for name, p in model.named_parameters()}
    assert sorted(kept) == ["loc", "log_noise_scale"]
    assert not kept["loc"].requires_grad
    before = {name: p.detach().clone() for name, p in kept.items()}
    fit(model, Amortized(model, hidden=(2,)), x, steps=3, lr=0.1, seed=0)
    assert torch.equal(kept["loc"], before["loc"])
    assert not torch.equal(kept["log_noise_scale"], before["log_noise_scale"])


def test_the_prior_decides_and_not_whether_a_parameter_was_frozen() -> None:
    ppca = PPCA(data_dim=3, latent_dim=1)
    ppca.loading.requires_grad_(False)
    table = site_table(bayesian(ppca, only_loading), torch.zeros(2, 3))
    assert [site.name for site in table.globals] == ["loading"]


def test_the_module_is_copied_and_left_as_it_is() -> None:
    ppca = PPCA(data_dim=3, latent_dim=1)
    before = copy.deepcopy(ppca.state_dict())
    model = bayesian(ppca, only_loading)
    x = ppca(size=4).detach()
    model(x)
    assert list(ppca.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in ppca.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(ppca.loc, before["loc"])


def test_two_of_them_have_names_of_their_own() -> None:
    one, two = (bayesian(PPCA(data_dim=3, latent_dim=1), only_loading) for _ in range(2))
    assert one._pyro_name != two._pyro_name
    x = torch.zeros(2, 3)
    one(x)
    names = set(pyro.get_param_store().keys())
    two(x)
    assert len(pyro.get_param_store()) == 2 * len(names)


def test_a_generative_model_still_draws_rows() -> None:
    model = bayesian(PPCA(data_dim=3, latent_dim=1), dist.Normal(0.0, 1.0))
    assert model(size=5).shape == (5, 3)


def test_parameters_are_drawn_once_for_all_rows_and_not_scaled() -> None:
    model = bayesian(PPCA(data_dim=3, latent_dim=1), only_loading)
    x = model(size=4).detach()
    guide = Amortized(model, hidden=(2,))
    with minibatch(torch.arange(4), 20):
        pair = run_pair(model, guide, x)
    nodes: Any = pair.model.nodes
    assert nodes["loading"]["scale"] == 1.0
    assert nodes["z"]["scale"] == 5.0


def test_a_network_inside_the_plate_over_rows_is_refused() -> None:
    net = bayesian(nn.Linear(2, 1), normal())
    with (
        pytest.raises(ValueError, match=r"bayesian: .* outside `pyro.plate\('data'.*above the pl"),
        pyro.plate("data", 3),
    ):
        net(torch.zeros(3, 2))


def test_priors_that_do_not_fit_are_refused() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"prior of 'weight' must have event shape \(3, 2\).*batch \(3, 2\)"
    ):
        bayesian(net, lambda name, w: dist.Normal(torch.zeros_like(w), 1.0))
    with pytest.raises(ValueError, match=r"prior of 'weight'.*got event \(5,\)"):
        bayesian(net, lambda name, w: dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"no parameter of Linear got a prior.*'weight', 'bias'"):
        bayesian(net, lambda name, w: None)
    for prior in (1.0, "normal", normal, torch.distributions.Normal(0.0, 1.0)):
        with pytest.raises(
            ValueError, match="prior: it must be a distribution of Pyro.* or a func"
        ):
            bayesian(net, prior)
    for prior in (
        dist.Normal(torch.zeros(3), 1.0),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.Bernoulli(0.5),
    ):
        with pytest.raises(ValueError, match="prior: a distribution must be of one real number"):
            bayesian(net, prior)
    with pytest.raises(
        ValueError, match=r"prior of 'weight' must be a distribution or None, got 1"
    ):
        bayesian(net, lambda name, w: 1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="normal: scale must be > 0 and finite, got"):
            normal(scale)

"""Runs of a guide and a model: scored by both, split by rows and particles."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Exact
from ppl_models import PPCA, VAE, minibatch
from ppl_models.core.modes import evaluating, evaluation_mode
from ppl_models.core.traces import joint_table, log_weights, run_pair, vectorizes


def model(x: Tensor) -> None:
    """A global latent, one for each row on the left, one for each feature and row."""
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    features = pyro.plate("features", 3, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        with features:
            v = pyro.sample("v", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(v, 0.1), obs=x)


def guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.5, 1.5))
    features = pyro.plate("features", 3, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.7))
        with features:
            pyro.sample("v", dist.Normal(x, 0.2))


def by_hand(x: Tensor, w: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    def normal(loc: Any, scale: float, value: Tensor) -> Tensor:
        return torch.distributions.Normal(loc, scale).log_prob(value)

    rows = normal(w[:, None], 1.0, z) - normal(x.mean(-1), 0.7, z)
    each = normal(z[..., None], 0.5, v) + normal(v, 0.1, x) - normal(x, 0.2, v)
    return rows + each.sum(-1), normal(0.0, 2.0, w) - normal(0.5, 1.5, w)


@pytest.mark.parametrize("particles", [None, 1, 4])
def test_weights_are_the_densities_split_by_particles_and_rows(particles: int | None) -> None:
    x = torch.randn(5, 3)
    pair = run_pair(model, guide, x, particles=particles, dim=-3)
    count = particles or 1
    nodes: Any = pair.guide.nodes
    w = nodes["w"]["value"].reshape(count)
    z = nodes["z"]["value"].reshape(count, 5)
    v = nodes["v"]["value"].reshape(count, 5, 3)
    rows, whole = log_weights(pair)
    want_rows, want_whole = by_hand(x, w, z, v)
    assert rows is not None
    assert_close(rows, want_rows)
    assert_close(whole, want_whole)


def test_weights_carry_the_scale_of_a_minibatch_on_rows_only() -> None:
    x = torch.randn(2, 3)
    torch.manual_seed(1)
    rows, whole = log_weights(run_pair(model, guide, x))
    torch.manual_seed(1)
    with minibatch(torch.arange(2), 8):
        scaled, same = log_weights(run_pair(model, guide, x))
    assert rows is not None
    assert scaled is not None
    assert_close(scaled, 4 * rows)
    assert_close(same, whole)


def test_weights_without_a_plate_over_rows_are_one_for_each_particle() -> None:
    def single(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w[..., None] * torch.ones(3), 1.0).to_event(1), obs=x)

    def its_guide(x: Tensor) -> None:
        # The exact posterior, so that the weight is the evidence whatever is drawn.
        pyro.sample("w", dist.Normal(x.sum() / 4, 0.5))

    x = torch.randn(3)
    rows, whole = log_weights(run_pair(single, its_guide, x, particles=6, dim=-1))
    assert rows is None
    covariance = torch.eye(3) + torch.ones(3, 3)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert_close(whole, evidence.expand(6))


@pytest.mark.parametrize("particles", [None, 3])
def test_weights_of_the_exact_guide_are_the_evidence(particles: int | None) -> None:
    ppca = PPCA(data_dim=4, latent_dim=2)
    x = ppca(size=6).detach()
    rows, whole = log_weights(run_pair(ppca, Exact(ppca), x, particles=particles, dim=-2))
    assert rows is not None
    assert_close(rows, ppca.log_evidence(x).expand(particles or 1, 6))
    assert_close(whole, torch.zeros(particles or 1))


def test_the_joint_table_counts_the_plates_of_both_programs() -> None:
    def flat(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def deep(x: Tensor) -> None:
        with pyro.plate("helpers", 2, dim=-3):
            pyro.sample("h", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Normal(0.0, 1.0))

    table, dims = joint_table(flat, deep, torch.zeros(2))
    assert [site.name for site in table] == ["w"]
    assert dims == 3
    assert joint_table(model, guide, torch.zeros(2, 3))[1] == 2


def test_a_guide_that_misses_a_latent_is_refused() -> None:
    def missing(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"guide: it must sample every latent of model.*\['v', 'z"):
        run_pair(model, missing, torch.zeros(2, 3))


def test_a_missing_latent_that_is_marked_gets_the_hint_of_enumeration() -> None:
    def marked(x: Tensor) -> None:
        pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"\['k'\] are marked for enumeration.*TraceEnum_ELBO"):
        run_pair(marked, lambda x: None, torch.zeros(2))


def test_a_guide_that_samples_what_is_observed_is_refused() -> None:
    def twice(x: Tensor) -> None:
        guide(x)
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(2))

    with pytest.raises(ValueError, match=r"guide: it samples \['x'\], which the model observes"):
        run_pair(model, twice, torch.zeros(2, 3))


def test_a_guide_that_samples_something_else_is_refused() -> None:
    def more(x: Tensor) -> None:
        guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"it samples \['extra'\], which model does not have.*auxi"
    ):
        run_pair(model, more, torch.zeros(2, 3))


def test_programs_written_for_leading_dimensions_are_recognised() -> None:
    assert vectorizes(model, guide, torch.randn(4, 3), dim=-3)
    vae = VAE(data_dim=4, latent_dim=2, hidden=(3,))
    assert vectorizes(vae, Amortized(vae, hidden=(3,)), vae(size=5).detach(), dim=-2)


def test_a_model_that_fails_under_a_leading_dimension_is_recognised() -> None:
    def fails(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        loc = torch.mv(torch.ones(len(x), 3), w)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def its_guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert not vectorizes(fails, its_guide, torch.zeros(4), dim=-2)


def test_a_model_that_mixes_particles_is_recognised() -> None:
    def mixes(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + z.mean(), 1.0), obs=x)  # over particles too

    def its_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert not vectorizes(mixes, its_guide, torch.zeros(4), dim=-2)


def test_evaluation_mode_comes_and_goes_with_each_module() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Dropout())
    net[0].eval()
    with evaluation_mode(net, model):
        assert not any(module.training for module in net.modules())
        assert torch.is_grad_enabled()
    assert [module.training for module in net] == [False, True]
    with pytest.raises(ZeroDivisionError), evaluating(net):  # noqa: PT012
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in net] == [False, True]
    assert torch.is_grad_enabled()

"""Families against the densities they are named after, and the supports they must not leave."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import biject_to
from torch.testing import assert_close

from guides import families
from ppl_models.core.sites import Site, site_table

SUPPORTS = {
    "real": dist.Normal(0.0, 1.0),
    "real vector": dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "real matrix": dist.Normal(torch.zeros(3, 2), 1.0).to_event(2),
    "positive": dist.LogNormal(0.0, 1.0),
    "positive vector": dist.Gamma(torch.ones(3), 1.0).to_event(1),
    "unit interval": dist.Beta(1.0, 2.0),
    "interval": dist.Uniform(-1.0, 3.0),
    "simplex": dist.Dirichlet(torch.ones(4)),
    "cholesky factor": dist.LKJCholesky(3, 1.0),
    "binary": dist.Bernoulli(0.3),
    "binary vector": dist.Bernoulli(torch.full((3,), 0.3)).to_event(1),
    "categories": dist.Categorical(torch.ones(4) / 4),
    "vector of categories": dist.Categorical(torch.ones(3, 4) / 4).to_event(1),
    "binomial": dist.Binomial(5, torch.tensor(0.3)),
    "one hot": dist.OneHotCategorical(torch.ones(4) / 4),
    "counts": dist.Poisson(3.0),
}


def site(fn: object) -> Site:
    def model() -> None:
        pyro.sample("z", fn)

    return site_table(model)["z"]


FITTING = [
    pytest.param(family, name, id=f"{family.name}-{name}")
    for name, fn in SUPPORTS.items()
    for family in families.ALL
    if family.refuses(site(fn)) is None
]


def test_every_support_has_a_family_and_every_family_a_support() -> None:
    served = {(family.values[0].name, family.values[1]) for family in FITTING}
    assert {name for _, name in served} == set(SUPPORTS)
    assert {name for name, _ in served} == {family.name for family in families.ALL}


@pytest.mark.parametrize(("family", "name"), FITTING)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_a_family_draws_in_the_support_with_the_shapes_of_its_site(
    family: families.Family, name: str, lead: tuple[int, ...]
) -> None:
    about = site(SUPPORTS[name])
    module = family.build(about)
    assert module.initial().shape == (module.size,)
    q = module(torch.randn(*lead, module.size))
    assert q.batch_shape == lead
    assert q.event_shape == about.event_shape
    z = q.sample()
    assert bool(about.support.check(z).all())
    assert q.log_prob(z).shape == lead
    assert bool(torch.isfinite(q.log_prob(z)).all())
    # Relaxed families draw with a path where their site has none, and say that they are biased.
    smooth = isinstance(family, families.StraightThrough)
    assert q.has_rsample == (smooth or not about.discrete)


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_a_density_integrates_to_one_by_importance_sampling(
    family: families.Family, name: str
) -> None:
    # E_p[q / p] = 1 for any other density p on the support: here the family at other numbers.
    module = family.build(site(SUPPORTS[name]))
    at = 0.1 * torch.randn(module.size)
    q, p = module(at), module(at + 0.05 * torch.randn(module.size))
    z = p.sample((20_000,))
    with torch.no_grad():
        weights = (q.log_prob(z) - p.log_prob(z)).exp()
    se = weights.std() / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - 1) < 5 * float(se)
    assert float(se) < 0.05


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_each_row_has_the_density_that_it_has_alone(family: families.Family, name: str) -> None:
    module = family.build(site(SUPPORTS[name]))
    numbers = torch.randn(4, module.size)
    z = module(numbers).sample()
    together = module(numbers).log_prob(z)
    alone = torch.stack([module(n).log_prob(v) for n, v in zip(numbers, z, strict=True)])
    assert_close(together, alone)


@given(st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_normal_families_are_scipys(n: int, seed: int) -> None:
    about = site(dist.Normal(torch.zeros(n), 1.0).to_event(1))
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    z = draw(n)
    numbers = draw(2 * n)
    loc, scale = numbers[:n].numpy(), np.exp(numbers[n:].numpy() / 2)
    want = scipy.stats.norm(loc, scale).logpdf(z.numpy()).sum()
    assert_close(families.Normal().build(about)(numbers).log_prob(z).item(), want)

    numbers = draw(4 * n)
    factor = numbers[2 * n :].reshape(n, 2).numpy()
    covariance = factor @ factor.T + np.diag(np.exp(numbers[n : 2 * n].numpy()))
    want = scipy.stats.multivariate_normal(numbers[:n].numpy(), covariance).logpdf(z.numpy())
    assert_close(families.LowRankNormal(2).build(about)(numbers).log_prob(z).item(), want)

    numbers = draw(2 * n + n * (n - 1) // 2)
    factor = np.diag(np.exp(numbers[n : 2 * n].numpy() / 2))
    factor[np.tril_indices(n, -1)] = numbers[2 * n :].numpy()
    normal = scipy.stats.multivariate_normal(numbers[:n].numpy(), factor @ factor.T)
    got = families.FullNormal().build(about)(numbers).log_prob(z).item()
    assert_close(got, float(normal.logpdf(z.numpy())))


def test_elementwise_families_are_scipys() -> None:
    a, b = torch.tensor([0.3, -0.2])
    z = torch.tensor(0.4)
    numbers = torch.stack([a, b])
    cases = [
        (
            families.Gamma(),
            "positive",
            scipy.stats.gamma(0.05 + math.exp(a), scale=math.exp(-b)).logpdf,
        ),
        (families.Beta(), "unit interval", scipy.stats.beta(math.exp(a), math.exp(b)).logpdf),
        (
            families.Normal(),
            "positive",
            scipy.stats.lognorm(math.exp(b / 2), scale=math.exp(a)).logpdf,
        ),
    ]
    for family, name, want in cases:
        q = family.build(site(SUPPORTS[name]))(numbers)
        assert_close(q.log_prob(z).item(), float(want(z.item())))


def test_discrete_families_sum_to_one_over_their_support() -> None:
    for family, name in [
        (families.Bernoulli(), "binary"),
        (families.Categorical(), "categories"),
        (families.Categorical(), "binomial"),
        (families.OneHotCategorical(), "one hot"),
    ]:
        module = family.build(site(SUPPORTS[name]))
        q = module(torch.randn(module.size))
        values = q.enumerate_support()
        assert_close(q.log_prob(values).exp().sum(), torch.ones(()))
    poisson = families.Poisson().build(site(SUPPORTS["counts"]))(torch.tensor([0.5]))
    want = scipy.stats.poisson(math.exp(0.5)).logpmf(4)
    assert_close(poisson.log_prob(torch.tensor(4.0)).item(), want)


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("kind", [zuko.flows.MAF, zuko.flows.NSF])
def test_a_flow_scores_its_own_draws_as_it_scores_any_value(kind: type, inverse: bool) -> None:
    flow = families.Flow(kind, context=3, inverse=inverse, transforms=2, hidden_features=(8,))
    module = flow.build(site(SUPPORTS["real vector"]))
    q = module(torch.randn(4, 3))
    z = q.rsample()
    cached, recomputed = q.log_prob(z), q.log_prob(z.clone())
    assert_close(cached, recomputed)


@pytest.mark.parametrize("name", ["real vector", "simplex", "positive vector"])
def test_a_flow_has_the_density_of_its_jacobian(name: str) -> None:
    flow = families.Flow(context=2, transforms=2, hidden_features=(8,))
    about = site(SUPPORTS[name])
    module = flow.build(about)
    context = torch.randn(2)
    q = module(context)
    torch.manual_seed(3)
    z = q.sample()
    torch.manual_seed(3)
    noise = torch.randn(module.features)

    def push(e: Tensor) -> Tensor:
        base = module.flow(context)
        value = base.transform(e) if flow.inverse else base.transform.inv(e)
        return value if module._support is None else biject_to(module._support)(value)

    assert_close(push(noise), z)
    jacobian = torch.autograd.functional.jacobian(push, noise)
    if name == "simplex":  # n values sum to 1: the density is with respect to the first n - 1
        jacobian = jacobian[:-1]
    normal = dist.Normal(0.0, 1.0).log_prob(noise).sum()
    assert_close(q.log_prob(z), normal - torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (families.Normal(), "binary"),
        (families.Gamma(), "real"),
        (families.Beta(), "positive"),
        (families.Dirichlet(), "unit interval"),
        (families.Categorical(), "counts"),
        (families.Bernoulli(), "categories"),
        (families.Flow(), "categories"),
    ],
)
def test_a_support_that_a_family_cannot_serve_is_refused_with_those_that_can(
    family: families.Family, name: str
) -> None:
    about = site(SUPPORTS[name])
    with pytest.raises(ValueError, match=f"family {family.name} cannot serve site 'z'") as error:
        family.build(about)
    assert families.default(about).name in str(error.value)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        families.LowRankNormal(rank=0)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        families.Flow(context=0)

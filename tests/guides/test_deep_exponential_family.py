"""Where the guides of deep exponential families start, and their encoder of counts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from guides import Amortized, Exact, Local, families
from guides.base import key
from guides.deep_exponential_family import LogCounts, start_near
from guides.registry import GUIDES, MODELS, build
from ppl_models import PPCA, DeepExponentialFamily
from ppl_models.data import dataset
from ppl_models.evaluate import elbo, reconstruct
from ppl_models.infer import fit


def counts(rows: int = 40) -> Tensor:
    torch.manual_seed(1)
    return torch.poisson(torch.tensor([200.0, 30.0, 5.0, 1.0]).expand(rows, 4))


@pytest.mark.parametrize("family", [families.Normal(), families.Gamma()], ids=str)
@pytest.mark.parametrize("latent_weights", [True, False])
def test_gamma_sites_start_at_the_means_and_spreads_that_were_asked_for(
    family: Any, latent_weights: bool
) -> None:
    x = counts()
    model = DeepExponentialFamily(4, (300, 200), latent_weights=latent_weights)
    sites = {"z1", "z2"} | ({"w0", "w1"} if latent_weights else set())
    guide = Local(model, rows=40, family=dict.fromkeys(sites, family))
    assert start_near(guide, x, spread=0.2, seed=0) is guide
    for name in sites:
        q = guide.q(name, x)
        assert_close(q.stddev / q.mean, torch.full_like(q.mean, 0.2))
    for name in ("z1", "z2"):
        logs = guide.q(name, x).mean.log()
        assert abs(logs.mean()) < 5 * 0.2 / logs.numel() ** 0.5
        assert abs(logs.std() / 0.2 - 1) < 0.05
    if latent_weights:
        w0, w1 = (guide.q(name).mean.detach() for name in ("w0", "w1"))
    else:
        w0, w1 = (model.free_weights[level].detach().exp() for level in ("0", "1"))
    # 300 factors around exp(.02): their sum is off by 1.2 % at one standard deviation.
    assert float((w0.sum(0) / x.mean(0) - 1).abs().max()) < 0.08
    assert float((w1.sum(0) - 1).abs().max()) < 0.11
    again = Local(model, rows=40, family=dict.fromkeys(sites, family))
    start_near(again, x, spread=0.2, seed=0)
    assert torch.equal(again.q("z1", x).mean, guide.q("z1", x).mean)


@pytest.mark.parametrize("guide_of", [Local, Amortized])
@pytest.mark.parametrize(
    ("family", "observation"),
    [
        ("gamma", "poisson"),
        ("gamma", "normal"),
        ("gamma", "bernoulli"),
        ("normal", "poisson"),
        ("poisson", "poisson"),
        (("bernoulli", "gamma"), "poisson"),
    ],
    ids=str,
)
@pytest.mark.parametrize("latent_weights", [True, False])
def test_means_start_near_those_of_the_data(
    guide_of: Any, family: Any, observation: str, latent_weights: bool
) -> None:
    x = counts()
    x = x / 200 > 0.1 if observation == "bernoulli" else x
    x = x.double()
    torch.manual_seed(2)
    model = DeepExponentialFamily(
        4, (30, 20), family, observation=observation, latent_weights=latent_weights
    )
    options = {"rows": 40} if guide_of is Local else {"encoder": LogCounts(4, (8,))}
    guide = guide_of(model, **options)
    before = elbo(model, guide, x, particles=20, seed=0)
    start_near(guide, x, seed=0)
    after = elbo(model, guide, x, particles=20, seed=0)
    assert torch.isfinite(torch.tensor(after.mean))
    if observation != "bernoulli":  # these are at their start already
        assert after.mean > before.mean + 10.0
    found = reconstruct(model, guide, x, draws=100, seed=0)["x"].mean(0)
    if observation == "bernoulli":
        assert bool(((found > 0.5) == (x.mean(0) > 0.5)).all())
    else:
        assert float(((found - x.mean(0)).abs() - 0.3 * x.mean(0)).max()) < 1.0


def test_columns_without_a_count_start_above_zero() -> None:
    x = counts()
    x[:, 3] = 0.0
    model = DeepExponentialFamily(4, (3,))
    for data in (x, torch.zeros_like(x)):
        guide = start_near(Local(model, rows=40), data, seed=0)
        assert bool((guide.q("w0").mean > 0).all())
        assert torch.isfinite(torch.tensor(elbo(model, guide, data, particles=5, seed=0).mean))


def test_a_start_that_cannot_be_set_is_refused() -> None:
    x, model = counts(), DeepExponentialFamily(4, (3,))
    ppca = PPCA(4, 2)
    with pytest.raises(ValueError, match=r"of a DeepExponentialFamily is required.*Local of PPCA"):
        start_near(Local(ppca, rows=40), x)
    with pytest.raises(ValueError, match=r"of a DeepExponentialFamily is required.*got Exact"):
        start_near(cast(Any, Exact(ppca)), x)
    with pytest.raises(ValueError, match="non-negative integer"):
        start_near(Local(model, rows=40), x - 100.0)
    with pytest.raises(ValueError, match=r"spread must be in \(0, 1\], got 0"):
        start_near(Local(model, rows=40), x, spread=0.0)
    low_rank = Local(model, rows=40, family=families.LowRankNormal())
    with pytest.raises(ValueError, match="'z1' must have family Normal or Gamma, got LowRank"):
        start_near(low_rank, x)


def test_a_start_leaves_the_random_stream_alone() -> None:
    guide, x = Local(DeepExponentialFamily(4, (3,)), rows=40), counts()
    state = torch.get_rng_state()
    start_near(guide, x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_encoder_reads_the_logarithm_of_counts() -> None:
    encoder = LogCounts(4, (8, 5))
    x = counts(6)
    assert_close(encoder(x), encoder.net(torch.log(1.0 + x)))
    assert_close(encoder(-x), encoder.net(-torch.log(1.0 + x)))
    assert encoder(x).shape == (6, 5)
    assert encoder.arguments() == {"data_dim": 4, "hidden": (8, 5)}
    for sizes in ((0, (8,)), (4, ()), (4, (0,)), (4, 8), ("4", (8,))):
        with pytest.raises(ValueError, match="LogCounts: (data_dim|hidden) must be .*integer"):
            LogCounts(*cast(Any, sizes))


def test_a_log_normal_guide_knows_its_mean() -> None:
    guide = Local(DeepExponentialFamily(4, (3,)), rows=40)
    x = counts()
    with torch.no_grad():
        guide.row_parameters[key("z1")].copy_(torch.randn(40, 6))
    loc, log_square = guide.row_parameters[key("z1")].detach().split(3, 1)
    q = guide.q("z1", x)
    assert_close(q.mean, (loc + log_square.exp() / 2).exp())
    value = torch.rand(40, 3)
    normal = torch.distributions.Normal(loc, (log_square / 2).exp())
    assert_close(q.log_prob(value), (normal.log_prob(value.log()) - value.log()).sum(1))


@pytest.mark.parametrize(
    ("kind", "observation"), [("counts", "poisson"), ("binary", "bernoulli"), ("grey", "normal")]
)
def test_the_command_line_takes_the_observation_that_the_data_are(
    kind: str, observation: str
) -> None:
    torch.set_default_dtype(torch.float32)
    x = counts().float()
    rows = dataset(x if kind == "counts" else (x / x.max(0).values).numpy())
    rows = rows.binarized("threshold") if kind == "binary" else rows
    model = build("def", rows, latent_dims=(3, 2))
    assert model.families == (observation, "gamma", "gamma")
    for name in MODELS["def"].guides:
        guide = GUIDES[name](model, len(rows.x), (8,))
        with torch.no_grad():
            found = reconstruct(model, guide, rows.x, draws=50, seed=0)["x"].mean()
        assert torch.isfinite(found)
        result = fit(model, guide, rows.x, steps=3, seed=0)
        assert bool(torch.isfinite(result.bounds).all())
    q = GUIDES["log-counts"](model, 1, (8,)).q("z1", rows.x[:2])
    assert isinstance(q.base_dist, torch.distributions.Gamma)
    if observation == "poisson":
        w0 = model.free_weights["0"].detach().exp().sum(0)
        assert float((w0 / rows.x.mean(0)).log().abs().max()) < 1.0

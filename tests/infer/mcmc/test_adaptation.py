"""What warm-up learns: windows, groups, scales and step sizes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ppl_models.infer import sample
from ppl_models.infer.mcmc.adaptation import (
    companions,
    factors,
    find_step,
    grouped,
    groups_of,
    pooled,
    scales,
    windows,
)
from ppl_models.infer.mcmc.engine import Draws
from ppl_models.infer.mcmc.hashing import streams


@given(st.integers(0, 5000))
def test_windows_make_up_the_whole_of_warm_up(warmup: int) -> None:
    found = windows(warmup)
    assert sum(window.transitions for window in found) == warmup
    assert all(window.transitions > 0 for window in found)
    if warmup >= 20:
        assert [window.learns for window in found] == [False, *[True] * (len(found) - 2), False]
        learning = [window.transitions for window in found[1:-1]]
        assert learning == sorted(learning)


def test_few_chains_are_alone_and_many_share_by_target() -> None:
    cpu = torch.device("cpu")
    assert len(groups_of(4, 3, cpu).unique()) == 12
    many = groups_of(16, 3, cpu)
    assert torch.equal(many, torch.arange(3).repeat(16))
    values = torch.arange(48.0)
    assert_close(pooled(values, many)[:3], values.reshape(16, 3).mean(0))


def test_draws_of_a_group_are_those_of_its_chains() -> None:
    draws = torch.arange(48 * 5 * 2.0).reshape(48, 5, 2)
    together = grouped(draws, torch.arange(3).repeat(16))
    assert together.shape == (3, 80, 2)
    for target in range(3):
        want = draws[target::3].reshape(-1, 2)
        assert torch.equal(together[target].sort(0).values, want.sort(0).values)
    alone = grouped(draws, torch.arange(48))
    assert torch.equal(alone, draws)


def test_scales_are_those_of_the_draws() -> None:
    want = torch.tensor([0.01, 1.0, 50.0])
    draws = want * torch.randn(2, 20_000, 3)
    assert scales(draws).shape == (3, 2)
    assert_close(scales(draws), want.unsqueeze(1).expand(3, 2), rtol=0.05, atol=1e-3)


def test_a_chain_that_has_not_arrived_sets_no_scale_and_modes_do() -> None:
    draws = torch.randn(1, 6400, 2)
    lost = draws.clone()
    lost[0, :100] += 1e4  # one of 64 chains
    assert (scales(lost) / scales(draws) < 1.6).all()
    modes = draws.clone()
    modes[0, :3200] += 10.0
    assert_close(scales(modes)[:, 0], torch.full((2,), 26.0**0.5), rtol=0.05, atol=0.0)


def test_a_window_without_movement_leaves_a_small_positive_scale() -> None:
    found = scales(torch.ones(1, 25, 2))
    assert (found > 0.0).all()
    assert (found < 0.1).all()


def test_factors_are_those_of_the_covariance() -> None:
    want = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    draws = (want @ torch.randn(2, 40_000)).T.unsqueeze(0)
    assert_close(factors(draws)[:, :, 0], want, rtol=0.05, atol=0.02)
    few = factors(torch.randn(1, 3, 8))[:, :, 0]  # fewer draws than coordinates
    assert torch.isfinite(few).all()
    assert (few.diagonal() > 0.0).all()


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_a_first_step_is_where_acceptance_crosses_the_aim(start: float) -> None:
    edge = torch.tensor([0.01, 0.5, 30.0])

    def gain(momentum: Tensor, step: Tensor) -> Tensor:
        return math.log(0.8) - torch.log(step / edge)

    found = find_step(gain, streams(0, torch.arange(3)), torch.full((3,), start), 2, 0.8)
    assert ((found / edge).log2().abs() <= 1.0).all()


def test_a_first_step_where_there_is_no_number_is_small() -> None:
    def gain(momentum: Tensor, step: Tensor) -> Tensor:
        return torch.where(step > 0.1, torch.nan, 0.0)

    found = find_step(gain, streams(0, torch.arange(1)), torch.ones(1), 2, 0.8)
    assert found.item() < 0.2


def test_a_chain_far_from_the_mass_goes_on_from_another() -> None:
    """Of 40 chains in two groups two are at a mode with e^-100 of the mass, one stands still."""
    torch.manual_seed(0)
    u = torch.randn(40, 30, 3, dtype=torch.float64)
    energy = 0.5 * u.square().sum(-1) + 1.5
    u[4] += 50.0
    energy[4] += 100.0
    u[7] += 50.0
    energy[7] += 100.0
    u[9] = u[9, :1]
    zeros = torch.zeros(40, 30)
    draws = Draws(u, energy, zeros, zeros, zeros, zeros)
    source = companions(draws, 2)
    assert (source != torch.arange(40)).nonzero().flatten().tolist() == [4, 7, 9]
    assert source[[4, 7, 9]].tolist() == [0, 1, 3]  # of the same group, and each of its own


def test_chains_of_modes_that_share_the_mass_stay() -> None:
    """A narrow mode has a higher density, a wide one more room: the mass may be the same."""
    torch.manual_seed(0)
    scale = torch.ones(40, 1, 1, dtype=torch.float64)
    scale[:8] = 0.01
    u = scale * torch.randn(40, 30, 10, dtype=torch.float64)
    energy = 0.5 * (u / scale).square().sum(-1) + 10 * scale.log().squeeze(-1) + 5.0
    zeros = torch.zeros(40, 30)
    own = torch.arange(40)
    assert torch.equal(companions(Draws(u, energy, zeros, zeros, zeros, zeros), 1), own)
    energy[:20] += 200.0  # half of all: on their way
    assert torch.equal(companions(Draws(u, energy, zeros, zeros, zeros, zeros), 1), own)


def test_a_spurious_mode_does_not_keep_chains() -> None:
    """Two wells, one with e^-60 of the mass, in which a quarter of all starts end."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        wells = [-0.5 * (z / 0.1 - 10.0) ** 2, -0.5 * (z / 0.1 + 14.0) ** 2 - 60.0]
        pyro.factor("wells", torch.logsumexp(torch.stack(wells), 0))

    posterior = sample(model, chains=64, draws=100, warmup=200, seed=0)
    assert posterior.restarted > 0
    assert (posterior["z"] > 0).all()
    assert "Restarted" in str(posterior)
    assert posterior.scale()["z"].item() == pytest.approx(0.1, rel=0.05)

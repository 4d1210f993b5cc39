"""Seeds isolate, and names never collide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppl_models import PPCA
from ppl_models.core.random import seeded, unique_name


def test_a_seed_reproduces_and_leaves_the_global_stream_as_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(5):
        assert torch.equal(torch.randn(3), first)
    with seeded(6):
        assert not torch.equal(torch.randn(3), first)


def test_a_seed_is_the_seed_of_torch() -> None:
    with seeded(5):
        got = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3), got)


def test_no_seed_draws_from_the_global_stream_and_advances_it() -> None:
    torch.manual_seed(1)
    want = torch.randn(4)
    torch.manual_seed(1)
    with seeded(None):
        first = torch.randn(2)
    assert torch.equal(torch.cat([first, torch.randn(2)]), want)


def test_the_global_stream_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(5):  # noqa: PT012
        torch.randn(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_nest() -> None:
    with seeded(1):
        torch.randn(1)
        with seeded(2):
            torch.randn(7)
        got = torch.randn(1)
    with seeded(1):
        assert torch.equal(torch.randn(2)[1:], got)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with (
        pytest.raises(ValueError, match="seed must be None or an integer from 0 to .*, got"),
        seeded(seed),
    ):
        pass


def test_names_are_unique_for_each_prefix() -> None:
    names = [unique_name("a_prefix") for _ in range(3)] + [unique_name("another_prefix")]
    assert names == ["a_prefix_0", "a_prefix_1", "a_prefix_2", "another_prefix_0"]
    one, two = PPCA(data_dim=2, latent_dim=1), PPCA(data_dim=2, latent_dim=1)
    assert one._pyro_name != two._pyro_name

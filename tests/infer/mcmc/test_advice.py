"""Warnings: each appears where it should, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_models.infer import Posterior

CHAINS, DRAWS = 4, 250


def run_of(draws: Tensor | None = None, **options: Any) -> Posterior:
    """A run without a flaw, but for what the options say."""
    draws = torch.randn(CHAINS, DRAWS, 2) if draws is None else draws
    found = {
        "divergent": torch.zeros(CHAINS, DRAWS, dtype=torch.bool),
        "depth": torch.full((CHAINS, DRAWS), 3),
        "leapfrogs": torch.full((CHAINS, DRAWS), 7),
        "energy": torch.randn(CHAINS, DRAWS),
        "step_size": torch.ones(CHAINS),
        "max_depth": 10,
        "target_accept": 0.8,
        "warmup": 50,
        "seconds": 2.0,
    }
    return Posterior({"z": draws}, **(found | options))


def flawed(flaw: str) -> Posterior:
    if flaw == "interrupted":
        return run_of(interrupted=True)
    if flaw == "mixing":
        draws = torch.randn(CHAINS, DRAWS, 2)
        draws[0] += 3.0
        return run_of(draws)
    if flaw == "stuck":
        draws = torch.randn(CHAINS, DRAWS, 2)
        draws[2] = draws[2].repeat_interleave(3, 0)[:DRAWS]
        return run_of(draws)
    if flaw == "divergences":
        return run_of(divergent=torch.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS) < 17)
    if flaw == "depth":
        return run_of(depth=(torch.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS) < 123) * 7 + 3)
    walk = torch.randn(CHAINS, DRAWS).cumsum(1)
    return run_of(energy=torch.cat([walk[:1], torch.randn(CHAINS - 1, DRAWS)]))


WARNINGS = {
    "interrupted": "Interrupted: these are the draws so far, 250 of each chain",
    "mixing": "R-hat reaches",
    "stuck": "Stuck: chain 2 (of 4, counted from 0) stayed",
    "divergences": "in 17 transitions. Raise target_accept from 0.8 to 0.9, or reparametrise",
    "depth": "Depth limit: 12.3% of the transitions were cut short at 10 doublings",
    "energy": "E-BFMI is below 0.3 in 1 of 4 chains, down to 0.",
}
HEADS = (
    "Interrupted:",
    "R-hat reaches",
    "Stuck:",
    "Divergences:",
    "Depth limit:",
    "E-BFMI is below",
)


def test_a_good_run_has_a_header_a_table_and_no_warning() -> None:
    lines = str(run_of()).splitlines()
    assert lines[:2] == ["4 chains of 250 draws after 50 of warm-up", "2.0 s, 0 divergences"]
    assert lines[2].startswith("0.00% of transitions at the depth limit of 10, least E-BFMI 1.")
    assert lines[3].split() == [
        "mean", "mcse", "sd", "5%", "50%", "95%", "ess_bulk", "ess_tail", "ess_bulk/s", "r_hat",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[4:]] == ["z[0]", "z[1]"]


@pytest.mark.parametrize("flaw", WARNINGS)
def test_each_flaw_has_its_warning_and_no_other(flaw: str) -> None:
    text = str(flawed(flaw))
    assert WARNINGS[flaw] in text
    # A chain that hardly moves has not mixed either.
    others = {w for f, w in WARNINGS.items() if f != flaw and (flaw, f) != ("stuck", "mixing")}
    assert not [warning for warning in others if warning in text]
    heads = [head for head in HEADS if f"\n{head}" in text]
    assert len(heads) == 1 or (flaw == "stuck" and len(heads) == 2)


def test_the_numbers_of_the_header_are_those_of_the_run() -> None:
    deep = flawed("depth")
    assert "12.30% of transitions at the depth limit of 10" in str(deep)
    weak = flawed("energy")
    assert f"least E-BFMI {weak.ebfmi().min():.2f}" in str(weak)
    assert "17 divergences" in str(flawed("divergences"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (None, "Raise target_accept (0.9, then 0.95, then 0.99), or reparametrise"),
        (0.8, "Raise target_accept from 0.8 to 0.9, or"),
        (0.9, "Raise target_accept from 0.9 to 0.95, or"),
        (0.97, "Raise target_accept from 0.97 to 0.99, or"),
        (0.99, "With target_accept at 0.99 already, reparametrise"),
    ],
)
def test_the_next_target_is_named(target: float | None, said: str) -> None:
    divergent = torch.ones(CHAINS, DRAWS, dtype=torch.bool)
    assert said in str(run_of(divergent=divergent, target_accept=target))


def test_a_few_trajectories_at_the_limit_are_not_worth_a_word() -> None:
    depth = torch.full((CHAINS, DRAWS), 3)
    depth[0, :9] = 10  # 0.9 %
    text = str(run_of(depth=depth))
    assert "Depth limit" not in text
    assert "0.90% of transitions" in text


def test_many_stuck_chains_are_counted() -> None:
    text = str(Posterior({"z": torch.randn(20, 1).expand(20, 30)}))
    assert "chain 7 and 12 more (of 20, counted from 0)" in text


def test_elements_that_are_constant_do_not_hide_those_that_have_not_mixed() -> None:
    """A Cholesky factor has zeros, whose R-hat is unknown."""
    draws = torch.randn(CHAINS, DRAWS, 2)
    draws[..., 0] = 0.0
    draws[0, :, 1] += 3.0
    assert "R-hat reaches" in str(run_of(draws))

"""Draws for ArviZ, by the names that ArviZ looks for."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ppl_models.infer import Posterior


def test_draws_and_statistics_arrive_under_the_names_of_arviz() -> None:
    pytest.importorskip("arviz_base", exc_type=ImportError)
    posterior = Posterior(
        {"w": torch.randn(2, 5), "z": torch.randn(2, 5, 3, 4)},
        divergent=torch.zeros(2, 5, dtype=torch.bool),
        depth=torch.tensor([1, 2, 3, 4, 5]).expand(2, 5),
        leapfrogs=torch.ones(2, 5, dtype=torch.long),
        energy=torch.randn(2, 5),
        step_size=torch.tensor([0.1, 0.2]),
        max_depth=5,
        seconds=1.5,
        warmup=7,
    )
    tree = posterior.to_datatree()
    for name in posterior:
        assert tree["posterior"][name].dims[:2] == ("chain", "draw")
        assert np.array_equal(tree["posterior"][name].values, posterior[name].numpy())
    found = tree["sample_stats"]
    names = {"diverging", "tree_depth", "n_steps", "energy", "step_size", "reached_max_treedepth"}
    assert set(found.data_vars) == names
    assert all(found[name].dims == ("chain", "draw") for name in names)
    assert found["step_size"].values[:, 3].tolist() == [0.1, 0.2]
    assert found["reached_max_treedepth"].values.sum() == 2
    assert tree["posterior"].attrs["sampling_time"] == 1.5
    assert tree["posterior"].attrs["tuning_steps"] == 7


def test_rows_have_a_dimension_and_statistics_may_be_missing() -> None:
    pytest.importorskip("arviz_base", exc_type=ImportError)
    tree = Posterior({"z": torch.randn(2, 5, 3)}, energy=torch.randn(2, 5, 3)).to_datatree()
    assert tree["sample_stats"]["energy"].dims == ("chain", "draw", "row")
    assert "sample_stats" not in Posterior({"z": torch.randn(2, 5, 3)}).to_datatree().children


def test_the_error_without_arviz_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(ImportError, match=r"pip install 'ppl-models\[arviz\]'"):
        Posterior({"z": torch.randn(2, 5, 3)}).to_datatree()

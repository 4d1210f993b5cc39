"""Draws, and how far to trust them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats
from torch import Tensor
from torch.testing import assert_close

from ppl_models.infer import Posterior


def autoregressive(chains: int, draws: int, *shape: int) -> Tensor:
    noise = torch.randn(chains, draws, *shape)
    values = [noise[:, 0]]
    for n in range(1, draws):
        values.append(0.6 * values[-1] + 0.8 * noise[:, n])
    return torch.stack(values, 1)


@pytest.fixture
def posterior() -> Posterior:
    return Posterior({"w": autoregressive(3, 200), "z": autoregressive(3, 200, 2, 4) + 1.0})


def test_diagnostics_are_those_of_arviz_element_by_element(posterior: Posterior) -> None:
    tail = {"method": "tail", "prob": (0.05, 0.95)}
    for got, one in (
        (posterior.ess(), lambda a: array_stats.ess(a, chain_axis=0, draw_axis=1)),
        (posterior.ess("tail"), lambda a: array_stats.ess(a, chain_axis=0, draw_axis=1, **tail)),
        (posterior.rhat(), lambda a: array_stats.rhat(a, chain_axis=0, draw_axis=1)),
        (posterior.mcse(), lambda a: array_stats.mcse(a, chain_axis=0, draw_axis=1)),
    ):
        assert got["w"].shape == ()
        assert_close(got["w"].item(), float(one(posterior["w"].numpy())))
        assert got["z"].shape == (2, 4)
        for i, j in np.ndindex(2, 4):
            want = float(one(np.ascontiguousarray(posterior["z"][:, :, i, j].numpy())))
            assert_close(got["z"][i, j].item(), want)


def test_the_effective_size_is_that_of_the_process() -> None:
    """An autoregression of coefficient 0.6 has n (1 - 0.6) / (1 + 0.6) effective draws."""
    sizes = torch.stack([Posterior({"w": autoregressive(4, 500)}).ess()["w"] for _ in range(30)])
    error = sizes.std() / 30**0.5
    # The estimate's own bias at this length is a few per cent: it comes on top of 5 errors.
    assert abs(sizes.mean() - 2000 * 0.25) < 5 * error + 0.05 * 500


def test_chains_that_disagree_have_a_large_rhat() -> None:
    draws = torch.randn(4, 100, 2)
    draws[0, :, 1] += 5.0
    rhat = Posterior({"z": draws}).rhat()["z"]
    assert rhat[0] < 1.1
    assert rhat[1] > 1.3


def test_moments_are_over_chains_and_draws(posterior: Posterior) -> None:
    z = posterior["z"].reshape(600, 2, 4)
    assert_close(posterior.mean()["z"], z.mean(0))
    assert_close(posterior.scale()["z"], z.std(0))


def test_the_summary_has_a_row_for_each_element(posterior: Posterior) -> None:
    table = posterior.summary()
    assert list(table.columns) == [
        "mean", "mcse", "sd", "5%", "50%", "95%", "ess_bulk", "ess_tail", "r_hat",
    ]  # fmt: skip
    labels = ["w", *(f"z[{i},{j}]" for i in range(2) for j in range(4))]
    assert list(table.index) == labels
    z = posterior["z"][:, :, 1, 2].numpy().ravel()
    row = table.loc["z[1,2]"]
    want = [z.mean(), posterior.mcse()["z"][1, 2], z.std(ddof=1)]
    assert np.allclose(row[["mean", "mcse", "sd"]], want)
    assert np.allclose(row[["5%", "50%", "95%"]], np.quantile(z, [0.05, 0.5, 0.95]))
    assert np.allclose(
        row[["ess_bulk", "ess_tail", "r_hat"]],
        [
            posterior.ess()["z"][1, 2],
            posterior.ess("tail")["z"][1, 2],
            posterior.rhat()["z"][1, 2],
        ],
    )


def test_it_is_a_mapping_of_sites(posterior: Posterior) -> None:
    assert list(posterior) == ["w", "z"]
    assert len(posterior) == 2
    assert dict(posterior)["w"] is posterior["w"]
    assert (posterior.chains, posterior.draws) == (3, 200)
    assert repr(posterior) == "Posterior({'w': (3, 200), 'z': (3, 200, 2, 4)}, divergences=0)"


def test_it_prints_what_went_wrong_and_only_that() -> None:
    draws = torch.randn(2, 400, 1)
    fine = str(Posterior({"z": draws}, warmup=7, seconds=1.25))
    assert fine.startswith("2 chains of 400 draws after 7 of warm-up\n1.2 s, 0 divergences\n")
    assert "z[0]" in fine
    assert "Run longer" not in fine
    assert "target_accept" not in fine
    draws[0] += 3.0
    bad = str(Posterior({"z": draws}, divergences=torch.tensor([1, 2])))
    assert "3 divergences" in bad
    assert "Run longer" in bad
    assert "target_accept" in bad


def test_sites_must_agree_on_chains_and_draws() -> None:
    with pytest.raises(ValueError, match=r"same chains and draws.*\(2, 5\).*\(2, 6\)"):
        Posterior({"a": torch.zeros(2, 5, 3), "b": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="same chains and draws"):
        Posterior({})

"""Draws, and how far to trust them."""

from __future__ import annotations

import time
from typing import Any

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


def test_chains_that_stand_still_apart_have_an_infinite_rhat() -> None:
    torch.manual_seed(0)
    still = torch.randn(4, 1).expand(4, 100)
    found = Posterior({"z": torch.stack([still, torch.ones(4, 100), torch.randn(4, 100)], -1)})
    rhat = found.rhat()["z"]
    assert rhat[0] == torch.inf
    assert rhat[1].isnan()
    assert rhat[2] < 1.05
    assert "R-hat reaches inf" in str(found)


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


def run_of(draws: Tensor, **options: Any) -> Posterior:
    """A run without a flaw, but for what the options say."""
    shape = draws.shape[:2]
    found = {
        "divergent": torch.zeros(shape, dtype=torch.bool),
        "depth": torch.full(shape, 3),
        "leapfrogs": torch.full(shape, 7),
        "energy": torch.randn(shape),
        "step_size": torch.ones(shape[0]),
        "max_depth": 10,
        "target_accept": 0.8,
        "warmup": 50,
        "seconds": 2.0,
    }
    return Posterior({"z": draws}, **(found | options))


def test_errors_of_the_deviation_are_those_of_arviz(posterior: Posterior) -> None:
    got = posterior.mcse("sd")["z"]
    z = np.ascontiguousarray(posterior["z"][:, :, 1, 3].numpy())
    assert_close(got[1, 3].item(), float(array_stats.mcse(z, method="sd")))
    with pytest.raises(ValueError, match=r"no kind of standard error 'median'.*mean, sd"):
        posterior.mcse("median")


def test_the_error_of_a_deviation_is_the_spread_of_deviations() -> None:
    """For n independent normals the deviation spreads by sigma / sqrt(2 n)."""
    found = Posterior({"z": 3.0 * torch.randn(4, 1000, 50)}).mcse("sd")["z"]
    # The fourth moment behind each error spreads by some per cent at 4000 draws.
    assert_close(found.mean().item(), 3.0 / 8000**0.5, rtol=0.05, atol=0.0)


def test_independent_draws_are_worth_what_they_count_and_have_mixed() -> None:
    posterior = Posterior({"z": torch.randn(4, 1000, 40)})
    sizes, rhat = posterior.ess()["z"], posterior.rhat()["z"]
    assert abs(sizes.mean() - 4000) < 5 * sizes.std() / 40**0.5 + 0.05 * 4000
    assert (rhat < 1.01).all()
    # The mean of n independent draws errs by 1 / sqrt(n).
    assert_close(posterior.mcse()["z"].mean().item(), 1 / 4000**0.5, rtol=0.05, atol=0.0)


def test_the_summary_counts_effective_draws_by_the_second() -> None:
    draws = autoregressive(3, 200, 2)
    table = Posterior({"z": draws}, seconds=4.0).summary()
    assert list(table.columns[-4:]) == ["ess_bulk", "ess_tail", "ess_bulk/s", "r_hat"]
    assert np.allclose(table["ess_bulk/s"], table["ess_bulk"] / 4.0)


def test_the_summary_of_many_elements_takes_seconds() -> None:
    start = time.perf_counter()
    Posterior({"z": torch.randn(64, 500, 100)}).summary()
    assert time.perf_counter() - start < 30.0  # about 2 on an idle core


def test_ebfmi_is_that_of_arviz_and_two_for_independent_energies() -> None:
    energy = torch.randn(50, 400)
    posterior = Posterior({"z": torch.randn(50, 400)}, energy=energy)
    ebfmi = posterior.ebfmi()
    assert_close(ebfmi, torch.from_numpy(array_stats.bfmi(energy.numpy())))
    assert abs(ebfmi.mean() - 2.0) < 5 * ebfmi.std() / 50**0.5 + 2 / 400
    rows = energy.reshape(5, 10, 400).movedim(1, 2)
    found = Posterior({"z": torch.randn(5, 400, 10, 2)}, energy=rows).ebfmi()
    assert_close(found.flatten(), ebfmi)
    with pytest.raises(ValueError, match="needs the energy of each transition"):
        Posterior({"z": torch.randn(2, 5)}).ebfmi()


def test_an_autoregression_of_energies_has_the_ebfmi_of_its_coefficient() -> None:
    """The mean squared difference of neighbours is 2 (1 - a) of the variance."""
    ebfmi = Posterior({"z": torch.zeros(20, 2000)}, energy=autoregressive(20, 2000)).ebfmi()
    # A variance about the chain's own mean is smaller by (1 + a) / (1 - a) / n of itself.
    assert abs(ebfmi.mean() - 0.8) < 5 * ebfmi.std() / 20**0.5 + 0.8 * 4 / 2000


def test_stuck_chains_are_those_that_stay_in_half_of_their_transitions() -> None:
    draws = {"w": torch.randn(4, 101), "z": torch.randn(4, 101, 2)}
    for value in draws.values():
        value[1] = value[1, :1]  # never moves
        value[2, 1:] = value[2, 1:].repeat_interleave(2, 0)[:100]  # every other time
    draws["z"][3] = draws["z"][3, :1]  # only a part of it never moves
    assert Posterior(draws).stuck.tolist() == [False, True, True, False]
    draws["z"][2, :, 0] = torch.randn(101)
    assert Posterior(draws).stuck.tolist() == [False, True, False, False]


def test_stuck_rows_are_found_where_rows_are_targets_of_their_own() -> None:
    z = torch.randn(2, 30, 5, 3)
    z[1, :, 4] = 0.5
    energy = torch.randn(2, 30, 5)
    want = torch.zeros(2, 5, dtype=torch.bool)
    want[1, 4] = True
    assert torch.equal(Posterior({"z": z}, energy=energy).stuck, want)
    moved = Posterior({"z": z.movedim(2, 3)}, energy=energy, row_axis={"z": 3})
    assert torch.equal(moved.stuck, want)
    text = str(moved)
    assert "Stuck: chain 1 of row 4 (of 10, counted from 0)" in text


def test_counts_and_single_draws_are_never_stuck() -> None:
    assert not Posterior({"n": torch.zeros(2, 30, dtype=torch.long)}).stuck.any()
    assert not Posterior({"z": torch.zeros(2, 1)}).stuck.any()


def test_divergences_are_counted_from_the_transitions() -> None:
    divergent = torch.zeros(2, 30, 4, dtype=torch.bool)
    divergent[1, 3:5, 2] = True
    posterior = Posterior({"z": torch.randn(2, 30, 4)}, divergent=divergent)
    assert posterior.divergences.tolist() == [0, 2]
    assert posterior.rows == 4


@pytest.mark.parametrize(
    "statistics",
    [
        {"energy": torch.zeros(2, 31)},
        {"depth": torch.zeros(2, 30, 4, 2)},
        {"energy": torch.zeros(2, 30, 4), "depth": torch.zeros(2, 30, 5)},
        {"step_size": torch.zeros(3)},
        {"accept": torch.zeros(2, 3), "step_size": torch.zeros(2, 4)},
    ],
)
def test_statistics_must_fit_the_draws(statistics: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 30\).*or, for N rows"):
        Posterior({"z": torch.zeros(2, 30, 4)}, **statistics)


def test_pictures_take_a_run_with_rows() -> None:
    draws = torch.randn(2, 30, 4)
    posterior = run_of(
        draws,
        **{name: torch.zeros(2, 30, 4) for name in ("divergent", "depth", "leapfrogs", "energy")},
        step_size=torch.ones(2, 4),
    )
    assert posterior.plot().axes
    assert posterior.plot_pairs().axes


def test_sites_must_agree_on_chains_and_draws() -> None:
    with pytest.raises(ValueError, match=r"same chains and draws.*\(2, 5\).*\(2, 6\)"):
        Posterior({"a": torch.zeros(2, 5, 3), "b": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="same chains and draws"):
        Posterior({})

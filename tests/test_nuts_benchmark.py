"""The benchmark of samplers: what it makes of draws and of times, without running any."""

from __future__ import annotations

import importlib.util
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
INSTANT = {"set_up": 3.0, "warmup": 4.0, "sampling": 1.0, "ess": 80.0, "rhat": 1.0}


@pytest.fixture
def nuts(monkeypatch) -> Any:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("nuts_benchmark", FOLDER / "nuts.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def row(nuts, sampler: str, **given: Any) -> Any:
    rounds = [nuts.Run(**INSTANT | {"divergences": 0} | given)]
    return nuts.Row("eight_schools", 4, sampler, rounds=rounds)


def test_a_rate_is_draws_over_all_seconds_that_count(nuts) -> None:
    one = row(nuts, "ppl_models")
    one.cold = nuts.Run(**INSTANT | {"set_up": 11.0, "divergences": 0})
    assert one.rates() == {"sampling": 80.0, "+ warm-up": 16.0, "+ compile": 5.0}


def test_a_rate_is_the_median_of_the_rounds(nuts) -> None:
    one = row(nuts, "ppl_models")
    one.rounds += [nuts.Run(**INSTANT | {"ess": ess, "divergences": 0}) for ess in (8.0, 900.0)]
    assert one.rates()["sampling"] == 80.0


def test_independent_draws_are_all_effective_and_a_shifted_sampler_is_told(nuts) -> None:
    random = np.random.default_rng(0)
    rows = [row(nuts, name) for name in ("ppl_models", "NumPyro", "nutpie")]
    for one, shift, most in zip(rows, (0.0, 0.0, 0.3), (200.0, 100.0, 90.0), strict=True):
        draws = random.normal(size=(4, 500, 3)) + np.array([0.0, 1.0, shift])
        one.mean, one.error, ess, rhat = nuts.diagnose(draws)
        assert 1600 < ess < 2400
        assert rhat < 1.01
        np.testing.assert_allclose(one.error, draws.std((0, 1)) / 2000**0.5, rtol=0.1)
        one.rounds[-1] = nuts.Run(**INSTANT | {"ess": most, "divergences": 0})
    nuts.compare(rows)
    assert math.isnan(rows[0].z)  # all are compared with it
    assert rows[1].z < 5
    apart = 0.3 / (2 / 2000) ** 0.5
    assert abs(rows[2].z - apart) < 5
    assert nuts.disagreements(rows).startswith(
        "Like for like: eight_schools, 4 chains, nutpie: |z|"
    )
    assert nuts.disagreements(rows[:2]).endswith("all means agree within 5 errors")


def test_a_sampler_that_did_a_few_rows_is_compared_on_these(nuts) -> None:
    whole, few = row(nuts, "ppl_models"), row(nuts, "nutpie", ess=1000.0, rows=2)
    whole.mean, whole.error = np.array([0.0, 0.0, 9.0]), np.full(3, 3.0)
    few.mean, few.error = np.array([0.0, 10.0]), np.full(2, 4.0)
    nuts.compare([whole, few])
    assert math.isnan(whole.z)
    assert few.z == pytest.approx(2.0)


def test_who_would_take_too_long_is_left_out_and_the_table_says_so(nuts) -> None:
    before = [row(nuts, name) for name in ("ppl_models", "Pyro")]
    before.append(nuts.Row("eight_schools", 4, "NumPyro", "over 60 s"))
    skipped = nuts.too_long(before, 64, Namespace(limit=60.0))
    assert skipped == {"Pyro": "would take 80 s", "NumPyro": "over 60 s with 4 chains"}
    rows = [*before, nuts.Row("eight_schools", 64, "Pyro", skipped["Pyro"])]
    page = "\n".join(nuts.tables(rows))
    assert "64 chains, Pyro: left out, would take 80 s" in page
    assert "4 chains, NumPyro: left out, over 60 s" in page


def test_ratios_are_ours_over_theirs(nuts) -> None:
    lines = nuts.ratios([row(nuts, "ppl_models"), row(nuts, "NumPyro", ess=20.0)]).splitlines()
    assert lines[0].split() == ["ours", "/", "theirs", "chains", "NumPyro"]
    assert lines[1].split() == ["eight_schools", "4", "sampling", "4.00"]
    assert lines[4].split() == ["eight_schools", "4", "+", "compile", "-"]


def test_predictions_of_a_network_do_not_depend_on_the_order_of_its_units(nuts) -> None:
    random = np.random.default_rng(0)
    shapes = {"w1": (6, 50), "b1": (50,), "w2": (50,), "b2": (), "noise": ()}
    draws = {name: random.normal(size=(2, 3, *shape)) for name, shape in shapes.items()}
    data = {"x": random.normal(size=(30, 6))}
    order = random.permutation(50)
    other = {
        name: draws[name][..., order] if name in ("w1", "b1", "w2") else draws[name]
        for name in draws
    }
    measure = nuts.CASES["network"].measure
    assert measure(draws, data).shape == (2, 3, 21)
    np.testing.assert_allclose(measure(other, data), measure(draws, data))
    one = np.tanh(data["x"][4] @ draws["w1"][1, 2] + draws["b1"][1, 2]) @ draws["w2"][1, 2]
    np.testing.assert_allclose(measure(draws, data)[1, 2, 4], one + draws["b2"][1, 2])

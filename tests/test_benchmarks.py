"""The benchmarks: each says what it measures, without running."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ppl_models.data import load

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "argparse" in path.read_text("utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_teaches_without_running(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert f"python benchmarks/{script.name}" in capsys.readouterr().out  # an example to paste
    assert not list(tmp_path.iterdir())


def test_estimators_are_compared_from_one_start(monkeypatch) -> None:
    """`sbn.py`, on digits: its guide, its rows, and variances at the same parameters for all."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import record
    import sbn

    pages: list[str] = []
    monkeypatch.setattr(record, "write", lambda name, title, table, rows: pages.append(table))
    torch.set_default_dtype(torch.float32)
    digits = load("digits", binarize="static")
    options = argparse.Namespace(
        layers=[5, 3], seed=0, device=None, batch=50, lr=1e-3, steps=4, test=10, particles=5,
        draws=4, tune=1, name="sbn", rounds=1, time_steps=2, quick=True,
        curve=False,
    )  # fmt: skip
    assert isinstance(digits.x, torch.Tensor)
    mean = digits.x.mean(0)
    model, guide = sbn.start(digits, None, options)
    torch.testing.assert_close(
        model.layers[0].net[-1].bias, mean.clamp(1e-3, 1 - 1e-3).logit(), rtol=1e-5, atol=1e-5
    )
    lower, upper = guide.heads.values()
    h1 = torch.ones(7, 5)
    x = digits.x[:7]
    logits = [
        guide.q("h1", x).base_dist.logits,
        guide.q("h2", x, h1=h1).base_dist.logits,
    ]
    torch.testing.assert_close(logits[0], F.linear(x - mean, lower.weight, lower.bias))
    torch.testing.assert_close(logits[1], F.linear(h1, upper.weight, upper.bias))
    assert sum(p.numel() for p in guide.parameters()) == 65 * 5 + 6 * 3

    names = ["disarm", "reinforce", "concrete"]
    found = [sbn.run(name, digits, options) for name in names]
    rows, kept = [row for row, _ in found], found[0][1]
    assert list(kept) == ["middle", "end"]
    sbn.variances(rows, kept, digits, options)
    assert all(row["variance_end"] > 0 for row in rows)
    assert rows[1]["variance_end"] > rows[0]["variance_end"]
    monkeypatch.setattr(sbn, "step_time", lambda name, *_: 1.0 + len(name))
    sbn.step_times(rows, digits, options)
    assert rows[0]["ratio_to_reinforce"] == 0.7
    sbn.report(rows, options)
    assert [line.split()[0] for line in pages[0].splitlines()[1:]] == names

    options.curve = True  # its network reads units as -1 and 1
    signed, _ = sbn.start(digits, None, options)
    lowest = signed.layers[0].net[-1]
    torch.testing.assert_close(
        signed.likelihood(h1).base_dist.logits, F.linear(h1, lowest.weight, lowest.bias)
    )
    torch.testing.assert_close(
        signed.likelihood(0 * h1).base_dist.logits, F.linear(-h1, lowest.weight, lowest.bias)
    )
    sbn.report_curve([sbn.curve("rebar", digits, options)], options)
    assert "-231.03  -156.87  -143.47  -137.65" in pages[1]

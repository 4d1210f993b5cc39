"""The command line, run in this process."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from guides.registry import GUIDES, MODELS
from ppl_models import cli


def run(*words) -> Any:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def fails(monkeypatch, capsys) -> Any:
    """Run `main` on words that are wrong, and return the one line that it says."""

    def check(*words):
        monkeypatch.setattr(sys, "argv", ["ppl-models", *words])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert captured.out == ""
        return captured.err.strip().splitlines()

    return check


def test_models_lists_every_model_with_its_guides() -> None:
    lines = run("models").stdout.splitlines()
    assert len(lines) == 1 + len(MODELS)
    for line, entry in zip(lines[1:], MODELS.values(), strict=True):
        assert line.startswith(entry.name)
        assert entry.summary in line
        assert line.endswith(", ".join(entry.guides))


def test_guides_says_what_fits_a_model_and_why_the_others_do_not() -> None:
    linear, network = run("guides", "ppca").stdout, run("guides", "vae").stdout

    def verdict(text, name):
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        return line.removeprefix(name).split()[0]

    assert verdict(linear, "Exact(model)") == "yes"
    assert verdict(network, "Exact(model)") == "no"
    assert "not quadratic" in network
    for text in (linear, network):
        assert verdict(text, "Amortized(model)") == verdict(text, "Local(model, rows=len(x))")
        assert verdict(text, "Amortized(model)") == "yes"
        fitting, _, others = text.partition("these fit")[2].partition("the others")
        assert "Flow" in fitting
        assert "Bernoulli" not in fitting
        assert "Bernoulli" in others


def test_compare_prints_the_scorecard_of_the_guides_that_suit_the_model() -> None:
    result = run("compare", "ppca", "--epochs", "1", "--no-reference", "--particles", "20")
    lines = result.stdout.splitlines()
    assert lines[0].split()[0] == "guide"
    assert [line.split()[0] for line in lines[1:4]] == ["exact", "amortized", "local"]
    assert lines[1].split()[7:10] in (["0.000", "+-", "0.000"], ["-0.000", "+-", "0.000"])
    assert "epochs" not in lines[0]
    assert "1437 training and 360 test rows" in result.stdout
    assert "ppca on digits (1437 training rows, 360 test rows): exact, amor" in result.stderr


def test_compare_writes_a_table_and_a_page_and_reproduces_by_its_seed(tmp_path) -> None:
    out = tmp_path / "deep" / "report"
    words = ["compare", "vae", "--guides", "amortized, full", "--epochs", "1", "--no-reference"]
    words += ["--particles", "20", "--batch-size", "479", "--lr", "0.01", "--seed", "3"]
    state = torch.get_rng_state()
    result = run(*words, "--out", str(out))
    assert torch.equal(torch.get_rng_state(), state)
    assert "binarised by threshold" in result.stderr
    assert str(out / "scorecard.csv") in result.stderr
    frame = pd.read_csv(out / "scorecard.csv", index_col="guide")
    assert list(frame.index) == ["amortized", "full"]
    assert f"{frame.loc['full', 'elbo']:.3f} +- " in result.stdout
    assert "batch size 479, steps 3, lr 0.01, seed 3, particles 20" in result.stdout
    page = (out / "scorecard.html").read_text(encoding="utf-8")
    assert f"{frame.loc['full', 'elbo']:.3f}" in page
    run(*words, "--out", str(out))
    again = pd.read_csv(out / "scorecard.csv", index_col="guide")
    timed = ["train_seconds", "test_seconds"]
    pd.testing.assert_frame_equal(frame.drop(columns=timed), again.drop(columns=timed))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["compare", "vea"],
            "there is no model 'vea'. Did you mean 'vae'? Known: " + ", ".join(MODELS) + ".",
        ),
        (
            ["guides", "pca"],
            "there is no model 'pca'. Did you mean 'ppca'? Known: " + ", ".join(MODELS) + ".",
        ),
        (
            ["compare", "vae", "--guides", "amortized,lokal"],
            "there is no guide 'lokal'. Did you mean 'local'? Known: " + ", ".join(GUIDES) + ".",
        ),
        (
            ["compare", "vae", "--data", "digit"],
            "there is no data set 'digit'. Did you mean 'digits'? Known: digits.",
        ),
        (["guides", "vae", "--data", "mnist"], "there is no data set 'mnist'."),
        (["compare", "vae", "--lr", "-1", "--epochs", "1"], "fit: lr must be > 0, got -1.0."),
        (
            ["compare", "vae", "--guides", "exact", "--epochs", "1"],
            "Exact: the log joint of VAE is not quadratic in ['z']",
        ),
        (["compare", "ppca", "--lr", "1e4", "--no-reference"], "fit: at step"),
        (["compare", "ppca", "--device", "moon"], "device: torch knows no device 'moon'"),
    ],
)
def test_what_a_user_gets_wrong_is_told_in_one_line(fails, words, said) -> None:
    lines = [line for line in fails(*words) if " on digits" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ppl-models: {said}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_device_that_is_not_there_is_told_in_one_line(fails) -> None:
    lines = [line for line in fails("compare", "vae", "--device", "cuda") if "digits" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("ppl-models: device: 'cuda' was asked for, but torch")
    assert "Use device='cpu'" in lines[0]


def test_a_folder_that_cannot_be_made_is_told_in_one_line(fails, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    lines = fails("compare", "vae", "--epochs", "1", "--out", str(tmp_path / "file"))
    assert len(lines) == 1
    assert lines[0].startswith("ppl-models: --out must name a folder")


def test_options_out_of_range_are_refused_before_anything_runs(fails) -> None:
    for option, value in (("--epochs", "0"), ("--batch-size", "0"), ("--particles", "1")):
        said = " ".join(fails("compare", "vae", option, value))
        assert f"Invalid value for '{option}'" in said

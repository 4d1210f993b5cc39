"""The command line, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine
from typer.testing import CliRunner

from guides import Exact, Local, for_model
from guides.registry import GUIDES, MODELS, build
from ppl_models import PPCA, BayesianNeuralNetwork, cli
from ppl_models.core.random import seeded
from ppl_models.data import dataset, load
from ppl_models.evaluate import generate, gradient_variance, predict, score
from ppl_models.infer import fit, sample
from ppl_models.infer.estimators import ESTIMATORS, tuned
from ppl_models.runs import load_run, save_run


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
    assert f"Written to {out}: scorecard.csv, scorecard.html, scorecard.png" in result.stderr
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
            "there is no data set 'digit'. Did you mean 'digits'? Known: digits, mnist, ",
        ),
        (["fit", "vae", "--data", "wine.csv"], "this model is for values 0 and 1, or for grey"),
        (["fit", "ppca", "--binarize", "static", "--data", "wine.csv"], "wine: binarize="),
        (["fit", "vae", "--hidden", "64;64"], "--hidden must be positive integers"),
        (["fit", "ppca", "--latent-dim", "65"], "PPCA: latent_dim must be in [1, 64], got 65."),
        (
            ["fit", "vae", "--image-size", "8by8", "--data", "."],
            "--image-size must be height x width",
        ),
        (["fit", "vae", "--data", "nowhere.csv"], "there is no file or folder 'nowhere.csv'"),
        (["fit", "vae", "--data", "digits", "--test", "0.5"], "test is for your own data"),
        (["fit", "vae", "--data", "wine.csv", "--split", "3"], "split is for uci/"),
        (
            ["fit", "sbn", "--latent-dim", "4"],
            "sbn has no latent_dim; what can be chosen is latent",
        ),
        (["fit", "vae", "--latent-dims", "4"], "vae has no latent_dims; what can be chosen is la"),
        (["fit", "sbn", "--latent-dims", "4;2"], "--latent-dims must be positive integers"),
        (["compare", "sbn", "--guides", "flow", "--epochs", "1"], "family Flow cannot serve site"),
        (["fit", "ppca", "--hidden", "5"], "--hidden: neither ppca nor the guide exact has hidden"),
        (["fit", "vae", "--lr", "1e9", "--epochs", "1"], "fit: at step"),
        (["fit", "vae", "--hidden", "100000000000"], "there is not enough memory"),
        (["fit", "vae", "--out", "wine.csv/x"], "--out must name a folder, or one to be made"),
        (["evaluate", "runs/vea"], "load_run: there is no run in 'runs/vea'"),
        (["sample", "runs/vea"], "load_run: there is no run in 'runs/vea'"),
        (["generate", "runs/vea"], "load_run: there is no run in 'runs/vea'"),
        (["show", "runs/vea"], "load_run: there is no run in 'runs/vea'"),
        (["show", "wine.csv"], "load_run: path must be the folder of a run, but 'wine.csv' is a"),
        (
            ["compare", "vae", "--lr", "-1", "--epochs", "1"],
            "fit: lr must be a finite number > 0, got -1.0.",
        ),
        (
            ["compare", "vae", "--guides", "exact", "--epochs", "1"],
            "Exact: the log joint of VAE is not quadratic in ['z']",
        ),
        (["compare", "ppca", "--lr", "1e4", "--no-reference"], "fit: at step"),
        (["compare", "ppca", "--device", "moon"], "device: torch knows no device 'moon'"),
        (
            ["estimators", "sbn", "--estimators", "reinforce,disarn"],
            "there is no estimator 'disarn'. Did you mean 'disarm'? Known: reinforce-all, ",
        ),
        (
            ["estimators", "vae", "--estimators", "disarm", "--epochs", "0"],
            "--estimators: none of these fits vae with amortized; leave it out for those that do.",
        ),
        (["estimators", "sbn", "--rows", "1438"], "--rows must be at most 1437, the training rows"),
        (["predict", "--data", "wine.csv"], "predict: wine has no target to be predicted. For a"),
        (["predict", "--family", "fall"], "there is no family 'fall'. Did you mean 'full'?"),
        (
            ["predict", "--data", "wine.csv", "--target", "hue", "--counts"],
            "--counts: the target must be whole numbers, but it is continuous. Write them without",
        ),
        (
            ["predict", "--data", "same.csv", "--target", "number"],
            "predict: the target must vary, but all 10 training rows have 5.5. Is it the right colum",
        ),
        (
            ["predict", "--data", "same.csv", "--target", "word"],
            "predict: the target must vary, but all 10 training rows have 'red'. Is it the right col",
        ),
        (
            ["predict", "--data", "header.csv", "--target", "number"],
            "dataset: at least 2 rows are needed, one to train and one to test",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_told_in_one_line(
    fails, words, said, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_wine(as_frame=True).data.to_csv("wine.csv", index=False)
    same = pd.DataFrame({"x": range(12), "number": 5.5})
    if "word" in words:
        same = same.assign(word="red")
    same.to_csv("same.csv", index=False)
    same[:0].to_csv("header.csv", index=False)
    lines = [line for line in fails(*words) if " on digits" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ppl-models: {said}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_device_that_is_not_there_is_told_in_one_line(fails) -> None:
    lines = [line for line in fails("compare", "vae", "--device", "cuda") if "digits" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("ppl-models: device: 'cuda' was asked for, but torch")
    assert "Use device='cpu'" in lines[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of each kind, two epochs long."""
    folder = tmp_path_factory.mktemp("runs")
    wine = load_wine(as_frame=True)
    wine.data.assign(cultivar=wine.target).to_csv(folder / "wine.csv", index=False)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        run("fit", "vae", "--epochs", "2", "--seed", "5", "--out", str(folder / "vae"))
        run("fit", "vae", "--guide", "local", "--epochs", "1", "--out", str(folder / "local"))
        table = ["--data", str(folder / "wine.csv"), "--target", "cultivar", "--standardize"]
        words = ["fit", "ppca", *table, "--latent-dim", "2", "--epochs", "2"]
        run(*words, "--out", str(folder / "wine"))
    finally:
        torch.set_default_dtype(dtype)
    return folder


def test_fit_saves_the_pair_that_the_library_trains(saved) -> None:
    torch.set_default_dtype(torch.float32)
    digits = load("digits", binarize="threshold")
    model = build("vae", digits, seed=5)
    with seeded(5):
        guide = GUIDES["amortized"](model, len(digits.x), (64,))
    result = fit(model, guide, digits.x, epochs=2, batch_size=64, lr=3e-3, seed=5)
    loaded = load_run(saved / "vae")
    assert torch.equal(loaded.fit.bounds, result.bounds)
    assert loaded.info["model"] == "vae"
    assert loaded.config["training"]["settings"] == result.settings


def test_fit_is_the_same_for_the_same_seed_and_leaves_the_global_stream_alone(tmp_path) -> None:
    words = ["fit", "vae", "--epochs", "1", "--seed", "2", "--out"]
    state = torch.get_rng_state()
    bounds = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) + len(bounds))
        run(*words, str(tmp_path / name))
        bounds.append(load_run(tmp_path / name).fit.bounds)
    assert torch.equal(*bounds)
    torch.set_rng_state(state)
    run(*words, str(tmp_path / "three"))
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_draws_what_suits_the_data(saved) -> None:
    pictures = {
        name: {file.stem for file in (saved / name).glob("*.png")} for name in ("vae", "wine")
    }
    assert pictures["vae"] == {"bounds", "latents", "reconstructions", "samples", "interpolation"}
    assert pictures["wine"] == {"bounds", "latents"}


def test_evaluate_prints_the_scorecard_of_the_library(saved) -> None:
    torch.set_default_dtype(torch.float32)
    words = ["evaluate", str(saved / "vae"), "--particles", "20", "--no-reference", "--seed", "4"]
    printed = json.loads(run(*words, "--json").stdout)
    loaded = load_run(saved / "vae")
    test = load("digits", binarize="threshold").x_test
    card = score(loaded.fit, test, particles=20, seed=4, reference=None)
    entry = card.entries[0]
    (row,) = printed["guides"]
    assert row["guide"] == "amortized"
    assert (row["elbo"], row["log_evidence"]) == (entry.elbo.mean, entry.evidence.mean)
    assert row["gap"] == entry.gap
    assert row["mean_error"] is None  # NaN is not JSON
    assert f"{entry.elbo.mean:.3f} +- " in run(*words).stdout


def test_evaluate_refines_a_guide_with_parameters_for_each_row(saved) -> None:
    words = ["evaluate", str(saved / "local"), "--particles", "2", "--no-reference"]
    assert "local was refined on the test rows" in run(*words).stdout


def test_evaluate_takes_other_data_and_says_when_none_is_known(saved, fails, tmp_path) -> None:
    torch.set_default_dtype(torch.float32)
    model = PPCA(64, 2)
    x = load("digits").x
    save_run(tmp_path, fit(model, Exact(model), x, steps=1, seed=0))
    said = fails("evaluate", str(tmp_path))
    assert len(said) == 1
    assert said[0].endswith("was saved without the name of its data, so say which: --data digits.")
    words = ["evaluate", str(tmp_path), "--data", "digits", "--particles", "2", "--no-reference"]
    assert run(*words).stdout.splitlines()[1].startswith("Exact")
    said = fails("evaluate", str(saved / "wine"), "--data", "digits", "--no-reference")
    assert said == ["ppl-models: 'digits' must have 13 columns, as the run had, got 64."]
    (said,) = fails("sample", str(saved / "wine"), "--rows", "37")
    assert said == "ppl-models: --rows must be at most 36, the test rows; got 37."
    said = fails("evaluate", str(saved / "vae"), "--binarize", "static")
    assert said[0].startswith("ppl-models: --binarize goes with --data")


def test_other_rows_are_scored_in_the_units_of_the_run(saved, tmp_path) -> None:
    torch.set_default_dtype(torch.float32)
    table = pd.read_csv(saved / "wine.csv")
    table.drop(columns="cultivar").to_csv(tmp_path / "others.csv", index=False)
    words = ["evaluate", str(saved / "wine"), "--data", str(tmp_path / "others.csv")]
    printed = json.loads(run(*words, "--particles", "2", "--no-reference", "--json").stdout)
    assert printed["settings"]["data"] == "142 training and 178 test rows"
    own = dataset(saved / "wine.csv", y="cultivar", standardize=True)
    model = load_run(saved / "wine").model
    want = model.log_evidence(torch.cat([own.x, own.x_test])).mean().item()
    assert printed["guides"][0]["elbo"] == pytest.approx(want, rel=1e-5)


def test_a_run_draws_without_its_data_and_is_not_scored_on_others_unawares(
    tmp_path, fails, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = load_wine(as_frame=True).data
    table.to_csv("wine.csv", index=False)
    run("fit", "ppca", "--data", "wine.csv", "--epochs", "1", "--out", "run")
    table.iloc[:100].to_csv("wine.csv", index=False)
    (said,) = fails("evaluate", "run", "--no-reference")
    assert "the data of this run are no longer what they were" in said
    (tmp_path / "wine.csv").unlink()
    for words in (["generate", "run", "--size", "2"], ["show", "run", "--out", "pictures"]):
        result = run(*words)
        assert "going on without the data: there is no file or folder" in result.stderr
    (said,) = fails("evaluate", "run")
    assert "there is no file or folder" in said


def test_pictures_of_another_run_do_not_stay(tmp_path) -> None:
    run("fit", "ppca", "--epochs", "1", "--out", str(tmp_path))
    assert (tmp_path / "samples.png").exists()
    load_wine(as_frame=True).data.to_csv(tmp_path / "wine.csv", index=False)
    words = ["--data", str(tmp_path / "wine.csv"), "--epochs", "1", "--out", str(tmp_path)]
    run("fit", "ppca", *words)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"bounds", "latents"}


def test_a_run_on_a_table_of_ones_own_finds_it_again_from_anywhere(
    saved, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(saved / "wine"), "--particles", "2", "--no-reference", "--json"]
    printed = json.loads(run(*words).stdout)
    assert printed["settings"]["data"] == "142 training and 36 test rows"
    assert abs(printed["guides"][0]["gap"]) < 1e-3  # exact


def test_sample_prints_and_writes_the_draws_of_the_library(saved, tmp_path) -> None:
    torch.set_default_dtype(torch.float32)
    sizes = {"chains": 2, "draws": 10, "warmup": 10}
    words = ["sample", str(saved / "wine"), "--rows", "2", "--seed", "1", "--out", str(tmp_path)]
    words += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    result = run(*words)
    loaded = load_run(saved / "wine")
    wine = dataset(saved / "wine.csv", y="cultivar", standardize=True)
    posterior = sample(loaded.model, wine.x_test[:2], rows=True, seed=1, **sizes)
    drawn = np.load(tmp_path / "draws.npz")["z"]
    np.testing.assert_array_equal(drawn, posterior["z"].numpy())
    assert "2 chains of 10 draws after 10 of warm-up" in result.stdout
    assert (tmp_path / "posterior.png").stat().st_size > 1000
    printed = json.loads(run(*words, "--json").stdout)
    assert [site["element"] for site in printed["sites"]] == [
        "z[0,0]",
        "z[0,1]",
        "z[1,0]",
        "z[1,1]",
    ]
    assert printed["sites"][0]["mean"] == pytest.approx(
        posterior.mean()["z"][0, 0].item(), rel=1e-5
    )


def test_generate_draws_the_rows_of_the_library(saved, tmp_path) -> None:
    words = ["generate", str(saved / "vae"), "--size", "3", "--seed", "7"]
    rows = np.array(json.loads(run(*words, "--json").stdout))
    torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(rows, generate(load_run(saved / "vae").model, 3, seed=7).numpy())
    text = run(*words, "--out", str(tmp_path)).stdout
    np.testing.assert_array_equal(pd.read_csv(tmp_path / "samples.csv").to_numpy(), rows)
    assert f"{rows.mean():.4g}" in text
    assert "360 test rows" in text
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_show_tells_what_was_trained_and_how(saved, tmp_path) -> None:
    lines = run("show", str(saved / "vae"), "--out", str(tmp_path)).stdout.splitlines()
    told = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}
    assert told["model"] == (
        "VAE(data_dim=64, latent_dim=8, hidden=(64), likelihood=None, decoder=None)"
    )
    assert told["guide"].startswith("Amortized(hidden=(64)")
    assert (told["data"], told["epochs"], told["seed"]) == ("digits", "2", "5")
    bounds = load_run(saved / "vae").fit.bounds
    assert told["bound last epoch"] == f"{bounds[-23:].mean().item():.4g}"
    assert (tmp_path / "bounds.png").stat().st_size > 1000
    printed = json.loads(run("show", str(saved / "vae"), "--json").stdout)
    assert printed["bound_last_epoch"] == bounds[-23:].mean().item()
    assert printed["compiled"].startswith("vanilla step")
    assert printed["compile"] is True


def test_every_table_has_a_form_for_scripts(saved) -> None:
    listed = json.loads(run("models", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(MODELS)
    choices = json.loads(run("guides", "ppca", "--json").stdout)
    assert {c["name"] for c in choices if c["fits"] and not c["site"]} == set(
        for_model(PPCA(64, 8)).fitting
    )
    card = json.loads(
        run(
            "compare", "ppca", "--epochs", "1", "--no-reference", "--particles", "2", "--json"
        ).stdout
    )
    assert [row["guide"] for row in card["guides"]] == ["exact", "amortized", "local"]


def test_sizes_reach_the_model_and_the_guide(tmp_path) -> None:
    words = ["fit", "vae", "--latent-dim", "3", "--hidden", "7,5", "--epochs", "1"]
    run(*words, "--out", str(tmp_path))
    loaded = load_run(tmp_path)
    assert loaded.model.latent_dim == 3
    assert [p.shape[0] for p in loaded.model.decoder.parameters()] == [7, 7, 5, 5, 64, 64]
    assert loaded.config["guide"]["recipe"]["arguments"]["hidden"] == [7, 5]


def test_a_model_of_discrete_latents_goes_all_the_way_but_for_nuts(tmp_path, fails) -> None:
    folder = str(tmp_path / "sbn")
    words = ["--latent-dims", "5,3", "--epochs", "2"]
    printed = json.loads(run("fit", "sbn", *words, "--out", folder, "--json").stdout)
    assert (printed["guide"], printed["steps"]) == ("bottom-up", 46)
    loaded = load_run(folder)
    assert loaded.model.latent_dims == (5, 3)
    assert loaded.guide.local_sites() == ["h1", "h2"]
    assert loaded.fit.settings["objective"] == "ELBO(score=DisARM())"
    # Nothing lies between two states, so there is no map of the latents and no way between rows.
    drawn = {file.stem for file in (tmp_path / "sbn").glob("*.png")}
    assert drawn == {"bounds", "reconstructions", "samples"}
    told = run("evaluate", folder, "--particles", "20").stdout
    assert "NUTS was not run where a latent is discrete" in told
    rows = np.array(json.loads(run("generate", folder, "--size", "3", "--json").stdout))
    assert rows.shape == (3, 64)
    assert set(np.unique(rows)) == {0.0, 1.0}
    (said,) = fails("sample", folder, "--rows", "1")
    assert said.startswith("ppl-models: sample: NUTS needs continuous latents, but site 'h2'")
    words = ["compare", "sbn", *words, "--hidden", "4", "--particles", "20", "--json"]
    card = json.loads(run(*words).stdout)
    assert [row["guide"] for row in card["guides"]] == ["bottom-up", "amortized", "local"]
    assert all(row["mean_error"] is None for row in card["guides"])


def test_estimators_measures_what_the_library_measures(tmp_path) -> None:
    torch.set_default_dtype(torch.float32)
    words = ["estimators", "sbn", "--latent-dims", "5,3", "--epochs", "1", "--draws", "60"]
    words += ["--rows", "20", "--tune", "5", "--seed", "3"]
    words += ["--estimators", "disarm, nvil,sticking-the-landing"]
    result = run(*words, "--out", str(tmp_path / "report"), "--json")
    printed = json.loads(result.stdout)
    digits = load("digits", binarize="threshold")
    model = build("sbn", digits, seed=3, latent_dims=(5, 3))
    with seeded(3):
        x = digits.x[torch.randperm(len(digits.x))[:20]]
        guide = GUIDES["bottom-up"](model, len(digits.x), (64,))
    objective = MODELS["sbn"].objective
    fit(model, guide, digits.x, objective=objective, epochs=1, batch_size=64, lr=3e-3, seed=3)
    ready = {
        name: tuned(ESTIMATORS[name], model, guide, digits.x, rows=20, steps=5, seed=3)
        for name in ("disarm", "nvil")
    }
    found = gradient_variance(model, guide, x, objectives=ready, draws=60, seed=3)
    assert [entry["name"] for entry in printed["estimators"]] == list(ready)
    for entry in printed["estimators"]:
        assert entry["objective"] == repr(ESTIMATORS[entry["name"]])
        assert entry["guide_variance"] == found.total(entry["name"], "guide")
        assert entry["model_signal_to_noise"] == found.signal_to_noise(entry["name"], "model")
        parts = entry["variance_by_parameter"]
        assert set(parts) == set(found.variance[entry["name"]])
        of_guide = sum(part for key, part in parts.items() if key.startswith("guide."))
        assert of_guide == pytest.approx(entry["guide_variance"])
    (other,) = printed["do_not_fit"]
    assert other["name"] == "sticking-the-landing"
    assert "draws carry no gradient" in other["reason"]
    folder = tmp_path / "report"
    assert f"Written to {folder}: estimators.txt, estimators.json" in result.stderr
    assert {file.name for file in folder.iterdir()} == {
        "estimators.txt",
        "estimators.json",
        "estimators.png",
    }
    text = " ".join((folder / "estimators.txt").read_text("utf-8").split())
    assert "On 20 training rows, after 1 epoch; seed 3." in text
    assert "Networks and factors of nvil were trained for 5 steps." in text
    assert "disarm ELBO(score=DisARM())" in text
    assert "sticking-the-landing ELBO: path=StickingTheLanding() does not fit" in text


def test_estimators_of_other_pairs(tmp_path) -> None:
    """A guide of rows is that of the rows measured; one without parameters shows the model's."""
    few = ["--rows", "10", "--draws", "2", "--tune", "0"]
    text = run("estimators", "sbn", "--latent-dims", "4", "--guide", "local", "--epochs", "1", *few)
    assert "do not fit" not in text.stdout  # 16 joint states are few enough for the sum
    words = ["estimators", "sbn", "--guide", "local", "--epochs", "0", *few, "--json"]
    printed = json.loads(run(*words).stdout)
    assert [entry["name"] for entry in printed["do_not_fit"]] == ["enumerate"]
    assert "guide.row_parameters.site_h1" in printed["estimators"][0]["variance_by_parameter"]
    words = ["estimators", "ppca", "--guide", "exact", "--epochs", "0", *few, "--json"]
    printed = json.loads(run(*words).stdout)
    assert all(entry["guide_variance"] is None for entry in printed["estimators"])
    reasons = {entry["name"]: entry["reason"] for entry in printed["do_not_fit"]}
    assert "no closed form" in reasons["analytic-kl"]
    assert "guide does not depend on the model" in reasons["sticking-the-landing"]


@pytest.mark.parametrize("how", ["threshold", "static", "dynamic"])
def test_grey_values_become_binary_as_asked(how, tmp_path) -> None:
    words = ["fit", "vae", "--epochs", "1", "--binarize", how, "--out", str(tmp_path)]
    assert f"binarised by {how}" in run(*words).stderr
    assert load_run(tmp_path).info["binarize"] == how


def test_a_failing_fit_leaves_the_run_before_it(saved, fails, tmp_path) -> None:
    run("fit", "ppca", "--epochs", "1", "--out", str(tmp_path))
    before = load_run(tmp_path).fit.bounds
    fails("fit", "ppca", "--guide", "amortized", "--lr", "1e4", "--out", str(tmp_path))
    assert torch.equal(load_run(tmp_path).fit.bounds, before)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(fails, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    lines = fails("compare", "vae", "--epochs", "1", "--out", str(tmp_path / "file"))
    assert len(lines) == 1
    assert lines[0].startswith("ppl-models: --out must name a folder")


def test_options_out_of_range_are_refused_before_anything_runs(fails) -> None:
    for option, value in (("--epochs", "0"), ("--batch-size", "0"), ("--particles", "1")):
        said = " ".join(fails("compare", "vae", option, value))
        assert f"Invalid value for '{option}'" in said


def test_predict_tells_in_units_of_the_file_what_the_library_predicts(tmp_path) -> None:
    wine = load_wine(as_frame=True).data
    wine.to_csv(tmp_path / "wine.csv", index=False)
    words = ["predict", "--data", str(tmp_path / "wine.csv"), "--target", "alcohol", "--json"]
    words += ["--epochs", "30", "--hidden", "5", "--draws", "50", "--seed", "2", "--test", "0.25"]
    told = json.loads(run(*words, "--out", str(tmp_path / "out")).stdout)
    rows = dataset(wine.drop(columns="alcohol"), y=wine.alcohol, test=0.25, standardize=True)
    with seeded(2):
        model = BayesianNeuralNetwork(12, hidden=(5,))
        guide = Local(model, example=(rows.x, rows.y))
    guide.start_around(model.net.starts(), scale=0.01)
    fit(model, guide, (rows.x, rows.y), epochs=30, batch_size=64, lr=3e-3, seed=2)
    found = predict(model, guide, rows.x_test, rows.y_test, draws=50, seed=2)
    assert rows.y_scale is not None
    assert rows.y_test is not None
    assert found.log_density is not None
    assert rows.y_scale == pytest.approx(wine.alcohol.std(), rel=0.1)
    assert told["log_density"] == pytest.approx(found.log_density.mean - np.log(rows.y_scale))
    off = (found.mean - rows.y_test).square().mean().sqrt().item()
    assert told["rmse"] == pytest.approx(off * rows.y_scale)
    assert told["rmse"] < told["rmse_of_the_mean"]
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert set(table["true"].round(4)) <= set(wine.alcohol.round(4))
    square = ((table.predicted - table.true) ** 2).mean()
    assert told["rmse"] == pytest.approx(square**0.5, rel=1e-5)
    assert told["epistemic"] == pytest.approx(table.epistemic.mean())
    assert told["aleatoric"] == pytest.approx(table.aleatoric.mean())
    assert told["aleatoric"] == pytest.approx(found.aleatoric.mean().item() * rows.y_scale)
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 1000


def test_predict_takes_whole_numbers_for_classes_unless_they_are_counts(tmp_path) -> None:
    wine = load_wine(as_frame=True)
    table = wine.data[["hue", "alcohol"]].assign(cultivar=wine.target * 2)
    table.to_csv(tmp_path / "wine.csv", index=False)
    words = ["predict", "--data", str(tmp_path / "wine.csv"), "--target", "cultivar"]
    words += ["--epochs", "40", "--json", "--family", "full", "--hidden", "4", "--draws", "20"]
    classes = json.loads(run(*words, "--out", str(tmp_path / "classes")).stdout)
    assert classes["target"] == "classes"
    assert classes["accuracy"] > classes["accuracy_of_the_commonest_class"]
    told = pd.read_csv(tmp_path / "classes" / "predictions.csv")
    assert list(told.columns) == ["true", "predicted", "p(0)", "p(2)", "p(4)"]
    assert (told.true == told.predicted).mean() == pytest.approx(classes["accuracy"])
    counts = json.loads(run(*words, "--counts", "--out", str(tmp_path / "counts")).stdout)
    assert counts["target"] == "a count"
    told = pd.read_csv(tmp_path / "counts" / "predictions.csv")
    assert set(told.true) == {0.0, 2.0, 4.0}
    assert counts["rmse"] < counts["rmse_of_the_mean"]

"""Data sets in words: what is found again, what is like it, and what does not apply."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine

from ppl_models.data import dataset, load
from ppl_models.data.source import Source


@pytest.fixture
def wine(tmp_path, monkeypatch) -> pd.DataFrame:
    """A labelled table, wine.csv, in the current folder."""
    monkeypatch.chdir(tmp_path)
    bunch = load_wine(as_frame=True)
    table = bunch.data.assign(cultivar=np.array(["one", "two", "three"])[bunch.target])
    table.to_csv("wine.csv", index=False)
    return table


def test_a_name_and_a_file_load_as_in_python(wine) -> None:
    digits = Source("digits", binarize="static").load()
    assert torch.equal(digits.x_test, load("digits", binarize="static").x_test)
    own = Source("wine.csv", target="cultivar", standardize=True, test=30.0).load()
    want = dataset("wine.csv", y="cultivar", standardize=True, test=30)
    assert torch.equal(own.x, want.x)
    assert torch.equal(own.y_test, want.y_test)


def test_what_suits_a_model_is_done_unless_said_otherwise(wine) -> None:
    assert Source("digits").load("threshold").binarize == "threshold"
    assert Source("digits", binarize="none").load("threshold").binarize is None
    assert Source("digits").load().binarize is None
    wine.iloc[:, :3].gt(2).astype(float).to_csv("binary.csv", index=False)
    assert Source("binary.csv").load("threshold").binarize is None  # zeros and ones already
    with pytest.raises(ValueError, match=r"wine has values from .* such as vae-gaussian"):
        Source("wine.csv", target="cultivar").load("threshold")


def test_a_run_finds_its_rows_again_from_another_folder(
    wine, tmp_path_factory, monkeypatch
) -> None:
    source = Source("wine.csv", target="cultivar", image_size=None, standardize=True)
    rows = source.load()
    info = {"model": "ppca"} | source.info(rows)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = Source.of(info)
    assert dataclasses.replace(again, data="wine.csv") == source
    assert torch.equal(again.again(info).x_test, rows.x_test)
    assert Source.of({"model": "ppca"}) is None


def test_rows_that_have_changed_are_not_taken_for_those_of_the_run(wine) -> None:
    source = Source("wine.csv", target="cultivar")
    info = source.info(source.load())
    wine.iloc[:100].to_csv("wine.csv", index=False)
    with pytest.raises(ValueError, match=r"trained on 142 rows and tested on 36.*80 and 20 others"):
        source.again(info)


def test_other_rows_are_brought_to_the_units_of_the_run_and_are_all_test_rows(wine) -> None:
    source = Source("wine.csv", target="cultivar", standardize=True)
    rows = source.load()
    info = source.info(rows)
    for table in (wine.drop(columns="cultivar").iloc[:50], wine.iloc[:50]):
        table.to_csv("other.csv", index=False)
        other = source.like(info, "other.csv")
        want = torch.tensor(wine.drop(columns="cultivar").iloc[:50].to_numpy()).float()
        want = (want.double() - rows.loc.double()) / rows.scale.double()
        assert len(other.x_test) == 50
        order = np.lexsort(other.x_test.numpy().T), np.lexsort(want.float().numpy().T)
        torch.testing.assert_close(other.x_test[order[0]], want.float()[order[1]])
    assert other.y_test is not None


def test_other_columns_are_refused(wine) -> None:
    source = Source("wine.csv", target="cultivar")
    info = source.info(source.load())
    wine.iloc[:, ::-1].to_csv("turned.csv", index=False)
    with pytest.raises(
        ValueError, match="must have the columns of the run, in their order: alcohol"
    ):
        source.like(info, "turned.csv")
    standardized = dataclasses.replace(source, standardize=True)
    with pytest.raises(ValueError, match="were not saved with it"):
        standardized.like({}, "wine.csv")
    np.save("narrow.npy", np.random.default_rng(0).normal(size=(20, 3)))
    info = standardized.info(standardized.load())
    with pytest.raises(ValueError, match="must have 13 columns, as the run had, got 3"):
        standardized.like(info, "narrow.npy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "digits", "target": "y"}, "target is for your own data, and 'digits' comes"),
        ({"data": "digits", "test": 0.5}, "test is for your own data"),
        ({"data": "digits", "image_size": (4, 4)}, "image-size is for your own data"),
        ({"data": "wine.csv", "split": 3}, "split is for uci/"),
        ({"data": "wine.csv", "test": float("nan")}, "test must be a share in"),
        ({"data": "wine.csv", "test": float("inf")}, "test must be a share in"),
        ({"data": "wine.csv", "test": -1.0}, "test must be a share in"),
        ({"data": "digits", "standardize": True, "binarize": "static"}, "leave one out"),
        ({"data": "nowhere.csv"}, "there is no file or folder 'nowhere.csv'"),
        ({"data": "not/here"}, "there is no file or folder 'not/here'"),
        ({"data": "uci/wein"}, "there is no data set 'uci/wein'"),
        ({"data": "digit"}, "Did you mean 'digits'"),
    ],
)
def test_what_does_not_apply_is_refused(wine, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        Source(**options).load()


def test_a_folder_named_like_a_data_set_does_not_hide_it(wine, tmp_path) -> None:
    (tmp_path / "digits").mkdir()
    assert len(Source("digits").load().x) == 1437

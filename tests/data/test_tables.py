"""Tables: sizes, means as published, splits; and the formats they come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ppl_models.data import load

GERMAN = ("german_credit", "german_credit/german_credit_numeric.npz")
OIL = ("oil_flow", "oil_flow/oil_flow.npz")
# Rows, columns, mean of y as the UCI repository has it, its unit, rows to test.
UCI = {
    "boston": (506, 13, 22.53, 51),  # thousands of dollars
    "concrete": (1030, 8, 35.82, 103),  # megapascals
    "energy": (768, 8, 22.31, 77),  # kilowatt hours per square metre
    "wine": (1599, 11, 5.636, 160),  # marks
    "yacht": (308, 6, 10.50, 31),  # resistance per weight
}


@pytest.mark.parametrize("name", UCI)
def test_a_regression_has_the_rows_of_its_source(load_at_hand, name) -> None:
    rows, columns, mean, held = UCI[name]
    data = load_at_hand(f"uci/{name}", f"uci_regression/{name}.npz")
    assert data.name == f"uci/{name}"
    assert (data.x.shape, data.x_test.shape) == ((rows - held, columns), (held, columns))
    assert data.x.dtype == data.y.dtype == data.y_test.dtype == torch.float32
    assert torch.cat([data.y, data.y_test]).mean().item() == pytest.approx(mean, abs=0.006)
    assert (data.classes, data.image_shape, data.binarize) == (None, None, None)


@pytest.mark.parametrize("split", [0, 19])
def test_a_split_is_the_one_that_is_given(load_at_hand, at_hand, split) -> None:
    place = "uci_regression/yacht.npz"
    data = load_at_hand("uci/yacht", place, split=split)
    with np.load(at_hand("uci/yacht", place)) as kept:
        z = dict(kept)
    train, test = z["train_index"][split].tolist(), z["test_index"][split].tolist()
    assert sorted(train + test) == list(range(308))
    np.testing.assert_allclose(data.x.numpy(), z["X"][train], rtol=1e-6)
    np.testing.assert_allclose(data.x_test.numpy(), z["X"][test], rtol=1e-6)
    np.testing.assert_allclose(data.y.numpy(), z["y"][train], rtol=1e-6)
    np.testing.assert_allclose(data.y_test.numpy(), z["y"][test], rtol=1e-6)


def test_the_twenty_splits_differ(load_at_hand) -> None:
    tests = {
        tuple(load_at_hand("uci/yacht", "uci_regression/yacht.npz", split=s).y_test.tolist())
        for s in range(20)
    }
    assert len(tests) == 20


def test_german_credit_has_700_good_and_300_bad_risks(load_at_hand, at_hand) -> None:
    german = load_at_hand(*GERMAN)
    assert (german.x.shape, german.x_test.shape) == ((800, 24), (200, 24))
    assert german.y.bincount().tolist() == [560, 240]
    assert german.y_test.bincount().tolist() == [140, 60]
    assert german.classes == 2
    with np.load(at_hand(*GERMAN)) as kept:
        source = np.column_stack([kept["X"], kept["y"] - 1])
    # The first row of the public file, and its risk.
    assert source[0].tolist() == [
        *(1, 6, 4, 12, 5, 5, 3, 4, 1, 67, 3, 2, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1),
        0,
    ]
    ours = torch.cat(
        [
            torch.cat([german.x, german.y[:, None].float()], 1),
            torch.cat([german.x_test, german.y_test[:, None].float()], 1),
        ]
    ).numpy()
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], source[np.lexsort(source.T)])
    place = torch.arange(1, 201)
    assert int((german.x_test.sum(1).long() * place).sum()) == 2402510


def test_oil_flow_comes_in_three_parts_of_a_thousand(load_at_hand) -> None:
    oil = load_at_hand(*OIL)
    for x, y, counts in (
        (oil.x, oil.y, [343, 316, 341]),
        (oil.x_valid, oil.y_valid, [334, 325, 341]),
        (oil.x_test, oil.y_test, [324, 363, 313]),
    ):
        assert x.shape == (1000, 12)
        assert x.dtype == torch.float32
        assert y.bincount().tolist() == counts
    assert [round(v, 4) for v in oil.x[0, :3].tolist()] == [0.3315, 0.2156, 0.6802]
    assert oil.classes == 3
    assert not torch.equal(oil.x, oil.x_valid)
    assert not torch.equal(oil.x, oil.x_test)


def test_a_regression_is_made_of_its_texts(at_hand, empty_cache, load_at_hand) -> None:
    expected = load_at_hand("uci/yacht", "uci_regression/yacht.npz", split=7)
    with np.load(at_hand("uci/yacht", "uci_regression/yacht.npz")) as kept:
        z = dict(kept)
    folder = empty_cache / "uci_regression" / "yacht"
    folder.mkdir(parents=True)
    rows = np.column_stack([z["X"], z["y"]]).tolist()
    lines = "".join(" ".join(map(repr, row)) + "\n" for row in rows)
    (folder / "data.txt").write_text(lines)
    np.savetxt(folder / "index_features.txt", np.arange(6))
    np.savetxt(folder / "index_target.txt", [6])
    for split in range(20):
        np.savetxt(folder / f"index_train_{split}.txt", z["train_index"][split])
        np.savetxt(folder / f"index_test_{split}.txt", z["test_index"][split])
    made = load("uci/yacht", split=7)
    for part in ("x", "y", "x_test", "y_test"):
        assert torch.equal(getattr(made, part), getattr(expected, part))
    assert (empty_cache / "uci_regression/yacht.npz").is_file()


def test_german_credit_is_made_of_its_text(at_hand, empty_cache) -> None:
    with np.load(at_hand(*GERMAN)) as kept:
        rows = np.column_stack([kept["X"], kept["y"]])
    (empty_cache / "german_credit").mkdir(parents=True)
    lines = "".join("".join(f"{value:4d}" for value in row) + " \n" for row in rows)
    (empty_cache / "german_credit/german.data-numeric").write_text(lines)
    assert load("german_credit").y.bincount().tolist() == [560, 240]


def test_oil_flow_is_made_of_one_column_a_regime(at_hand, empty_cache) -> None:
    with np.load(at_hand(*OIL)) as kept:
        stored = {
            key: np.eye(3)[kept[key]] if key.endswith("Lbls") else kept[key] for key in kept.files
        }
    (empty_cache / "oil_flow").mkdir(parents=True)
    savemat(empty_cache / "oil_flow/3Class.mat", stored)
    assert load("oil_flow").y_valid.bincount().tolist() == [334, 325, 341]

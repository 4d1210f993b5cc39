"""Images: sizes, splits, values, labels, and that they stand upright."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from ppl_models.data import load


def test_the_split_is_1437_rows_to_train_and_360_to_test() -> None:
    digits = load("digits")
    assert digits.x.shape == (1437, 64)
    assert digits.y.shape == (1437,)
    assert digits.x_test.shape == (360, 64)
    assert digits.y_test.shape == (360,)
    assert digits.image_shape == (8, 8)
    assert digits.classes == 10
    assert (digits.name, digits.binarize) == ("digits", None)


def test_every_row_of_the_source_is_in_one_part_with_its_label() -> None:
    digits = load("digits")
    bunch = load_digits()
    source = np.column_stack([bunch.data, bunch.target])
    ours = torch.cat(
        [
            torch.cat([digits.x * 16, digits.y[:, None].float()], 1),
            torch.cat([digits.x_test * 16, digits.y_test[:, None].float()], 1),
        ]
    ).numpy()
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], source[np.lexsort(source.T)])
    # No image is twice in the source, so the two parts are disjoint.
    assert len(np.unique(source, axis=0)) == len(source)


def test_the_split_has_the_same_share_of_each_class() -> None:
    digits = load("digits")
    count = torch.bincount(torch.cat([digits.y, digits.y_test]))
    expected = count * 360 / 1797
    assert ((torch.bincount(digits.y_test) - expected).abs() < 1).all()


def test_the_split_is_always_the_same() -> None:
    first, second = load("digits"), load("digits", binarize="threshold")
    assert torch.equal(first.y, second.y)
    assert torch.equal((first.x >= 0.5).float(), second.x)
    assert torch.equal((first.x_test >= 0.5).float(), second.x_test)
    # Sums weighted by position: any other order or split moves them.
    place = torch.arange(1, 361)
    assert int((first.y_test * place).sum()) == 283622
    assert int(((first.x_test * 16).sum(1).long() * place).sum()) == 20286355


def test_values_are_grey_in_the_unit_interval_or_zero_and_one() -> None:
    grey, binary = load("digits"), load("digits", binarize="threshold")
    assert torch.equal(grey.x.unique() * 16, torch.arange(17.0, dtype=torch.float32))
    assert binary.x.unique().tolist() == binary.x_test.unique().tolist() == [0.0, 1.0]
    assert binary.binarize == "threshold"
    for data in (grey, binary):
        assert data.x.dtype == data.x_test.dtype == torch.float32
        assert data.y.dtype == data.y_test.dtype == torch.int64


def test_loading_draws_nothing_from_the_random_streams() -> None:
    state = torch.get_rng_state()
    random = np.random.mtrand._rand  # the global stream that scikit-learn may use
    numpy_state = random.get_state()[1].copy()
    load("digits")
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(random.get_state()[1], numpy_state)

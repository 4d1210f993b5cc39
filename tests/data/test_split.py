"""Splits: whole, disjoint, by class, the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from ppl_models.data.split import split_rows


@pytest.mark.parametrize("classes", [None, np.arange(50) % 4, np.array([0] * 49 + [1])])
def test_every_row_is_in_one_part(classes) -> None:
    train, test = split_rows(50, 12, seed=3, classes=classes)
    assert (len(train), len(test)) == (38, 12)
    assert sorted([*train, *test]) == list(range(50))
    again = split_rows(50, 12, seed=3, classes=classes)
    np.testing.assert_array_equal(again[1], test)
    assert list(split_rows(50, 12, seed=4, classes=classes)[1]) != list(test)


def test_each_part_has_the_same_share_of_each_class() -> None:
    classes = np.array(["a"] * 30 + ["b"] * 10)
    _, test = split_rows(40, 8, seed=0, classes=classes)
    assert (classes[test] == "a").sum() == 6


def test_too_few_rows_for_every_class_are_split_without_them() -> None:
    _, test = split_rows(20, 3, seed=0, classes=np.arange(20) // 2)
    assert len(test) == 3


def test_the_split_draws_nothing_from_the_global_stream() -> None:
    stream = np.random.mtrand._rand
    before = stream.get_state()[1].copy()
    split_rows(20, 3, seed=0)
    np.testing.assert_array_equal(stream.get_state()[1], before)

"""Splits into rows to train and rows to test, the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np


def split_rows(
    rows: int, test: int, *, seed: int, classes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the training rows and the test rows, both shuffled.

    Arguments:
        rows: Rows in all.
        test: How many of them are to test.
        seed: The same seed gives the same split, on any machine.
        classes: A class for each row: then each part has the same share of each, if both parts
            have room for every class and every class has two rows.
    """
    from sklearn.model_selection import train_test_split

    if classes is not None:
        counts = np.unique(classes, return_counts=True)[1]
        if counts.min() < 2 or min(test, rows - test) < len(counts):
            classes = None
    parts: Any = train_test_split(
        np.arange(rows), test_size=test, random_state=seed, stratify=classes
    )
    return parts[0], parts[1]

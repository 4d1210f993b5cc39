"""Data sets: tensors with a fixed split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ppl_models.core.checks import check_known

NAMES = ("digits",)


@dataclass(frozen=True)
class Dataset:
    """A data set with a fixed split.

    Attributes:
        name: Its name.
        binarize: How it was made binary; None if it was not.
        x: Training rows, floats in [0, 1], shape (N, D).
        y: Their labels.
        x_test: Test rows.
        y_test: Their labels.
        image_shape: Height and width of a row.
        classes: Number of labels.
    """

    name: str
    binarize: str | None
    x: Float[Tensor, "N D"] = field(repr=False)
    y: Int[Tensor, " N"] = field(repr=False)
    x_test: Float[Tensor, "M D"] = field(repr=False)
    y_test: Int[Tensor, " M"] = field(repr=False)
    image_shape: tuple[int, int]
    classes: int


def load(name: str = "digits", *, binarize: str | None = None) -> Dataset:
    """Load a data set.

    Arguments:
        name: "digits": 1797 images of 8 x 8 in ten classes, which comes with scikit-learn and is
            never fetched; 1437 rows to train and 360 to test, split by class, always the same.
        binarize: "threshold" makes a pixel of at least half the maximum 1 and others 0; None leaves
            grey values in [0, 1].

    Raises:
        ValueError: If the name is unknown, or `binarize` is.

    Example:
        >>> digits = load("digits", binarize="threshold")
        >>> digits.x.shape, digits.x_test.shape, digits.x.unique()
        (torch.Size([1437, 64]), torch.Size([360, 64]), tensor([0., 1.]))
    """
    check_known("data set", name, NAMES)
    if binarize not in (None, "threshold"):
        raise ValueError(f"load: binarize must be None or 'threshold', got {binarize!r}.")
    bunch: Any = load_digits()
    images = torch.tensor(bunch.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    if binarize == "threshold":
        images = (images >= 0.5).float()
    train, test = train_test_split(
        torch.arange(len(images)).numpy(), test_size=360, random_state=0, stratify=labels.numpy()
    )
    return Dataset(
        name=name,
        binarize=binarize,
        x=images[train],
        y=labels[train],
        x_test=images[test],
        y_test=labels[test],
        image_shape=(8, 8),
        classes=10,
    )

"""What a data set is: tensors with a fixed split; how it is made binary or standardised."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_models.core.dynamic import Dynamic

Binarize = Literal["threshold", "static", "dynamic"]

# The seed of each part, where a part is drawn once and for all.
_TRAIN, _TEST, _VALID = range(3)


def check_binarize(name: str, how: Binarize | None) -> None:
    """Refuse what is no way to make values binary.

    Raises:
        ValueError: With the ways there are.
    """
    if how is not None and how not in get_args(Binarize):
        raise ValueError(
            f"{name}: binarize must be None, 'threshold', 'static' or 'dynamic', got {how!r}."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set with a fixed split.

    Attributes:
        name: Its name.
        binarize: How it was made binary; None if it was not.
        x: Training rows, float32, shape (N, D); a `Dynamic` where they are drawn anew each epoch.
        y: Their labels 0 to C - 1, or a continuous target in float32; None without any.
        x_test: Test rows.
        y_test: Their labels or targets.
        image_shape: Height and width of a row; None if rows are no images.
        classes: Number of labels C; None without labels or with a continuous target.
        x_valid: Validation rows, where the data set comes with them.
        y_valid: Their labels or targets.
        labels: What the labels 0 to C - 1 stand for, where they were names or other numbers.
        vocabulary: The words that the columns count, in texts.
        halves: Two parts of each test document that sum to it, for document completion.
        loc: What `standardized` took off each column of x, shape (D,).
        scale: What it then divided by, shape (D,).
        y_loc: The same for a continuous y.
        y_scale: The same for a continuous y. A log-density of the standardised y, in nats per
            row, is that of the raw y after taking off log(y_scale).
        columns: The names of the columns of x, where it was read from a DataFrame or a .csv file.
    """

    name: str
    binarize: Binarize | None
    x: Float[Tensor, "N D"] | Dynamic
    y: Int[Tensor, " N"] | Float[Tensor, " N"] | None
    x_test: Float[Tensor, "M D"]
    y_test: Int[Tensor, " M"] | Float[Tensor, " M"] | None
    image_shape: tuple[int, int] | None = None
    classes: int | None = None
    x_valid: Float[Tensor, "V D"] | None = None
    y_valid: Int[Tensor, " V"] | Float[Tensor, " V"] | None = None
    labels: tuple[str | int, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    halves: tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]] | None = None
    loc: Float[Tensor, " D"] | None = None
    scale: Float[Tensor, " D"] | None = None
    y_loc: float | None = None
    y_scale: float | None = None
    columns: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        """Rows, range and labels at a glance; no values."""
        grey = self.x.probabilities if isinstance(self.x, Dynamic) else self.x
        low, high = (0, 1) if self.binarize else (v.item() for v in grey.aminmax())
        rows = f"{len(self.x)} rows"
        if self.x_valid is not None:
            rows += f" + {len(self.x_valid)} valid"
        parts = [f"{rows} + {len(self.x_test)} test"]
        parts.append(f"{self.x.shape[1]} values in [{low:.4g}, {high:.4g}]")
        if self.image_shape is not None:
            parts.append("images of {} x {}".format(*self.image_shape))
        if self.binarize is not None:
            parts.append(f"binary ({self.binarize})")
        if self.loc is not None:
            parts.append("standardised")
        if self.y is None:
            parts.append("no labels")
        else:
            parts.append("y continuous" if self.classes is None else f"{self.classes} classes")
        return f"Dataset {self.name}: {', '.join(parts)}"

    def binarized(self, how: Binarize | None) -> Dataset:
        """Return the data set with grey values in [0, 1] made binary.

        Arguments:
            how: "threshold": 1 where the value is at least 0.5. "static": one draw with the value
                as the probability of a one, always the same. "dynamic": x is drawn anew for each
                epoch of `fit`; other parts are drawn once, as in "static". None changes nothing.

        Raises:
            ValueError: If `how` is none of these, the values are not all in [0, 1], or the data
                set was made binary or standardised before.
        """
        if how is None:
            return self
        check_binarize(self.name, how)
        if self.binarize is not None:
            raise ValueError(f"{self.name} is binary already ({self.binarize}).")
        if self.loc is not None:
            raise ValueError(f"{self.name} is standardised: binarise it before, or not at all.")
        assert isinstance(self.x, Tensor)
        parts = [v for v in (self.x, self.x_test, self.x_valid) if v is not None]
        low, high = min(v.min().item() for v in parts), max(v.max().item() for v in parts)
        if low < 0 or high > 1:
            raise ValueError(
                f"{self.name}: binarize={how!r} needs grey values in [0, 1], got values from "
                f"{low:.4g} to {high:.4g}. Leave binarize=None, or scale the values first."
            )
        if how == "threshold":
            x, x_test = _above_half(self.x), _above_half(self.x_test)
            x_valid = None if self.x_valid is None else _above_half(self.x_valid)
        else:
            x = Dynamic(self.x) if how == "dynamic" else Dynamic(self.x).draw(_TRAIN)
            x_test = Dynamic(self.x_test).draw(_TEST)
            x_valid = None if self.x_valid is None else Dynamic(self.x_valid).draw(_VALID)
        return dataclasses.replace(self, binarize=how, x=x, x_test=x_test, x_valid=x_valid)

    def standardized(self) -> Dataset:
        """Return the data set with each column, and a continuous y, of mean 0 and scale 1.

        Mean and scale (the root of the mean square, divided by N) are those of the training rows;
        they are kept in `loc`, `scale`, `y_loc`, `y_scale`. A column that is constant there keeps
        scale 1 and is named in a warning.

        Raises:
            ValueError: If the data set is binary.
        """
        if self.loc is not None:
            return self
        if self.binarize is not None or not isinstance(self.x, Tensor):
            raise ValueError(
                f"{self.name} is binary ({self.binarize}), and binary rows are not standardised. "
                "Load it with binarize=None."
            )
        constant = (self.x == self.x[0]).all(0)
        if bool(constant.any()):
            columns = constant.nonzero().flatten().tolist()
            named = ", ".join(map(str, columns[:10])) + (", ..." if len(columns) > 10 else "")
            warnings.warn(
                f"{self.name}: {len(columns)} of {len(constant)} columns are constant over the "
                f"training rows and keep scale 1: {named}.",
                stacklevel=2,
            )
        loc, scale = _moments(self.x)
        scale = torch.where(constant, 1.0, scale)
        new = dataclasses.replace(
            self,
            x=_scaled(self.x, loc, scale),
            x_test=_scaled(self.x_test, loc, scale),
            x_valid=None if self.x_valid is None else _scaled(self.x_valid, loc, scale),
            halves=None,  # parts of a standardised count do not sum to it
            loc=loc.float(),
            scale=scale.float(),
        )
        if self.y is None or self.y_test is None or self.classes is not None:
            return new
        y_loc, y_scale = _moments(self.y)
        if bool((self.y == self.y[0]).all()):
            y_scale = torch.ones_like(y_scale)
        return dataclasses.replace(
            new,
            y=_scaled(self.y, y_loc, y_scale),
            y_test=_scaled(self.y_test, y_loc, y_scale),
            y_valid=None if self.y_valid is None else _scaled(self.y_valid, y_loc, y_scale),
            y_loc=y_loc.item(),
            y_scale=y_scale.item(),
        )


def _above_half(x: Tensor) -> Tensor:
    return (x >= 0.5).float()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population scale in double precision: a column of years has both large."""
    x = x.double()
    return x.mean(0), x.std(0, correction=0)


def _scaled(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return ((x.double() - loc) / scale).float()

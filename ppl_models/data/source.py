"""A data set as it was asked for in words, so that a saved run finds it again, or others like it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_models.core.dynamic import Dynamic
from ppl_models.data.dataset import Binarize, Dataset
from ppl_models.data.load import NAMES, load
from ppl_models.data.own import dataset


@dataclass(frozen=True)
class Source:
    """What to load, and how to prepare it.

    Attributes:
        data: A name that `load` knows, or the path of what `dataset` reads.
        target: Column of labels of an own table.
        split: Which split of uci/*.
        test: Share or number of own rows to test; None for a fifth.
        image_size: Height and width of own images.
        binarize: How grey values become 0 and 1: "none" for not at all, None for what suits the
            model.
        standardize: Whether columns are standardised by the training rows.
    """

    data: str
    target: str | None = None
    split: int = 0
    test: float | None = None
    image_size: tuple[int, int] | None = None
    binarize: Binarize | str | None = None
    standardize: bool = False

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Source | None:
        """Return the source that a run was saved with; None if it does not say."""
        known = {f.name: info[f.name] for f in fields(cls) if f.name in info}
        if not isinstance(known.get("data"), str):
            return None
        if known.get("image_size") is not None:
            known["image_size"] = tuple(known["image_size"])
        return cls(**known)

    @property
    def own(self) -> bool:
        """Whether it is a file or folder, and not a data set by name."""
        return self.data not in NAMES and Path(self.data).exists()

    def load(self, suited: Binarize | None = None) -> Dataset:
        """Load it.

        Arguments:
            suited: How grey values become 0 and 1 for the model at hand, unless said otherwise.

        Raises:
            ValueError: If an option does not apply, or as `load` and `dataset` do.
            OSError: As `load` does.
        """
        self._check()
        rows = self._read()
        if self.standardize:
            return rows.standardized()
        return self._binarized(rows, suited)

    def info(self, rows: Dataset) -> dict[str, Any]:
        """Return what a run must keep to find these rows again, and to prepare others like them."""
        seen = {
            "rows": len(rows.x),
            "test_rows": len(rows.x_test),
            "columns": None if rows.columns is None else list(rows.columns),
            "sha256": _digest(rows),
            "loc": None if rows.loc is None else rows.loc.tolist(),
            "scale": None if rows.scale is None else rows.scale.tolist(),
        }
        asked = asdict(self) | {"binarize": None if self.binarize is None else str(self.binarize)}
        return asked | {"data": self._place(), "seen": seen}

    def again(self, info: Mapping[str, Any], suited: Binarize | None = None) -> Dataset:
        """Load the rows that a run was trained on and tested with.

        Raises:
            ValueError: If they are no longer what they were.
        """
        rows = self.load(suited)
        seen = info.get("seen")
        if seen is not None and seen["sha256"] != _digest(rows):
            raise ValueError(
                f"the data of this run are no longer what they were: it was trained on "
                f"{seen['rows']} rows and tested on {seen['test_rows']}, and '{self.data}' now "
                f"gives {len(rows.x)} and {len(rows.x_test)} others. To score what is there now, "
                f"pass --data {self.data}."
            )
        return rows

    def like(self, info: Mapping[str, Any], data: str, suited: Binarize | None = None) -> Dataset:
        """Load other rows, prepared as those of a run were; all rows of a file are test rows.

        Raises:
            ValueError: If they have other columns, or what is needed to prepare them was not saved.
        """
        other = replace(self, data=data, test=None, split=0)
        if other.own and not other._has_target():
            other = replace(other, target=None)
        elif not other.own:
            other = replace(other, target=None, image_size=None)
        other._check()
        rows, seen = other._read(), info.get("seen") or {}
        columns = seen.get("columns")
        if columns is not None and rows.columns is not None and list(rows.columns) != columns:
            raise ValueError(
                f"'{data}' must have the columns of the run, in their order: {', '.join(columns)}; "
                f"got {', '.join(rows.columns)}."
            )
        if other.own:
            assert isinstance(rows.x, Tensor)
            labels = None
            if rows.y is not None and rows.y_test is not None:
                labels = torch.cat([rows.y, rows.y_test])
            rows = replace(rows, x_test=torch.cat([rows.x, rows.x_test]), y_test=labels)
        if not self.standardize:
            return self._binarized(rows, suited)
        if seen.get("loc") is None:
            raise ValueError(
                "the run was trained on standardised rows, but their mean and scale were not "
                "saved with it, so other rows cannot be brought to the same units."
            )
        loc, scale = (torch.tensor(seen[key], dtype=torch.float64) for key in ("loc", "scale"))
        if rows.x_test.shape[1:] != loc.shape:
            raise ValueError(
                f"'{data}' must have {len(loc)} columns, as the run had, got "
                f"{rows.x_test.shape[1]}."
            )
        x_test = ((rows.x_test.double() - loc) / scale).float()
        return replace(rows, x_test=x_test, loc=loc.float(), scale=scale.float())

    def _check(self) -> None:
        """Refuse what would otherwise be passed over."""
        if not self.own and self.data not in NAMES and _looks_like_a_path(self.data):
            raise ValueError(
                f"there is no file or folder '{self.data}', and no data set of that name."
            )
        own = {"target": self.target, "test": self.test, "image_size": self.image_size}
        for name, value in own.items():
            if value is not None and not self.own:
                raise ValueError(
                    f"{name.replace('_', '-')} is for your own data, and '{self.data}' comes with "
                    "its labels, split and sizes. Leave it out."
                )
        if self.own and self.split:
            raise ValueError(f"split is for uci/*, and '{self.data}' is your own. Use test.")
        if self.test is not None and not 0 < self.test < math.inf:
            raise ValueError(
                f"test must be a share in (0, 1) or a number of rows, got {self.test}."
            )
        if self.standardize and self.binarize not in (None, "none"):
            raise ValueError("rows are either standardised or made binary: leave one out.")

    def _read(self) -> Dataset:
        if not self.own:
            how: Any = None if self.binarize in (None, "none") else str(self.binarize)
            return load(self.data, split=self.split, binarize=how)
        test = 0.2 if self.test is None else self.test
        if test >= 1 and test == int(test):
            test = int(test)  # rows, and not a share
        return dataset(self.data, y=self.target, test=test, image_size=self.image_size)

    def _binarized(self, rows: Dataset, suited: Binarize | None) -> Dataset:
        """Make grey values binary as asked, or else as suits the model; refuse what cannot be."""
        if rows.binarize is not None or self.binarize == "none":
            return rows
        if self.binarize is not None:
            how: Any = str(self.binarize)
            return rows.binarized(how)
        values = rows.x_test
        if suited is None or bool(((values == 0) | (values == 1)).all()):
            return rows
        low, high = (value.item() for value in values.aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                "this model is for values 0 and 1, or for grey values from 0 to 1 that can be made "
                f"binary, but {rows.name} has values from {low:.4g} to {high:.4g}. Take a model of "
                "real values, such as vae-gaussian."
            )
        return rows.binarized(suited)

    def _place(self) -> str:
        return str(Path(self.data).resolve()) if self.own else self.data

    def _has_target(self) -> bool:
        if self.target is None or Path(self.data).suffix not in (".csv", ".tsv"):
            return False
        separator = "\t" if Path(self.data).suffix == ".tsv" else ","
        with Path(self.data).open(encoding="utf-8-sig", errors="replace") as file:
            names = [name.strip().strip('"') for name in file.readline().split(separator)]
        return self.target in names


def _looks_like_a_path(data: str) -> bool:
    return not data.startswith("uci/") and ("/" in data or "\\" in data or "." in data)


def _digest(rows: Dataset) -> str:
    x = rows.x.probabilities if isinstance(rows.x, Dynamic) else rows.x
    total = hashlib.sha256()
    for value in (x, rows.x_test):
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()

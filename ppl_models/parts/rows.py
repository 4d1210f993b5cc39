"""How many rows a model's plate has."""

from __future__ import annotations

from torch import Tensor


def plate_size(x: Tensor | None, size: int | None) -> int:
    """Return the rows of `x`, or `size`.

    Raises:
        ValueError: If both or neither are given, or there are no rows.
    """
    if (x is None) == (size is None):
        raise ValueError(
            "model: pass either data, model(x), or a number of rows to draw, model(size=n); got "
            f"{'neither' if x is None else 'both'}."
        )
    rows = size if x is None else len(x)
    if rows is None or rows < 1:
        raise ValueError(f"model: at least one row is required, got {rows}.")
    return rows

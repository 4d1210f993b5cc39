"""Tables of text that line up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> str:
    """Lay out rows of text under a heading, columns two spaces apart.

    Arguments:
        head: Title of each column.
        rows: Cells of each row.
        right: One letter a column: "r" puts its cells to the right; others, and columns beyond the
            end, stay left.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    sides = [right[i : i + 1] == "r" for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in lines
    )

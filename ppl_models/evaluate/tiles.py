"""Images: which site of a model is one, of what shape, and many of them drawn as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from ppl_models.core.checks import check_known
from ppl_models.core.picture import axes_for, to_array
from ppl_models.core.sites import SiteTable
from ppl_models.evaluate.latent import row_axis


def draw_tiles(
    ax: Axes,
    tiles: np.ndarray,
    value_range: tuple[float, float],
    *,
    cmap: str,
    left: float = 0.0,
    gap: int | None = None,
) -> None:
    """Draw images as one, each in a tile of 1 x 1; what is NaN stays blank.

    Arguments:
        ax: Axes.
        tiles: Shape (lines, columns, height, width), or the same and 3 colours.
        value_range: The values drawn darkest and brightest.
        cmap: Colours of a grey image.
        left: Where the first column begins; what is drawn last is furthest to the right.
        gap: Pixels between images, by default an eighth of their height.
    """
    lines, columns, height, width = tiles.shape[:4]
    gap = max(1, round(height / 8)) if gap is None else gap
    colour = tiles.shape[4:]
    whole = np.full((lines * (height + gap), columns * (width + gap), *colour), np.nan)
    whole = whole.reshape(lines, height + gap, columns, width + gap, *colour)
    whole[:, :height, :, :width] = tiles.swapaxes(1, 2)
    whole = whole.reshape(lines * (height + gap), columns * (width + gap), *colour)
    low, high = value_range
    if colour:
        blank = np.isnan(whole).any(-1, keepdims=True)
        whole = np.clip((np.nan_to_num(whole) - low) / (high - low), 0.0, 1.0)
        whole = np.concatenate([whole, 1.0 - blank], -1)
    # Half of a gap to the left and above: each image is in the middle of its tile.
    right, down = gap / (width + gap) / 2, gap / (height + gap) / 2
    where = (left + right, left + columns + right, lines + down, down)
    drawn = np.ma.masked_invalid(whole)
    ax.imshow(drawn, cmap=cmap, vmin=low, vmax=high, extent=where, interpolation="nearest")
    ax.set_aspect((height + gap) / (width + gap))
    ax.set_xlim(0, left + columns)
    ax.set_ylim(lines, 0)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def limits(data: np.ndarray) -> tuple[float, float]:
    """Return the values to draw darkest and brightest: 0 and 1, or almost the range of the data."""
    finite = data[np.isfinite(data)]
    if finite.size == 0 or (finite.min() >= 0.0 and finite.max() <= 1.0):
        return 0.0, 1.0
    low, high = np.quantile(finite, [0.01, 0.99])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def axes_for_tiles(
    ax: Axes | None, tiles: np.ndarray, *, beside: float = 0.0, below: float = 0.0
) -> Axes:
    """Return the axes given, or those of a new picture with room for the tiles.

    Arguments:
        ax: Axes to draw into.
        tiles: As in `draw_tiles`.
        beside: Columns of room for more.
        below: Inches of room for what is written below.
    """
    lines, columns, height, width = tiles.shape[:4]
    across = columns + beside
    tile = min(1.0, max(0.3, 8.0 / across, 1.6 / lines))
    return axes_for(ax, max(4.0, across * tile + 1.2), lines * tile * height / width + 0.8 + below)


def image_site(
    caller: str, table: SiteTable, image_shape: Sequence[int] | None, site: str | None
) -> tuple[str, tuple[int, ...]]:
    """Choose the observed site that is an image, and its shape.

    Arguments:
        caller: Who asks.
        table: The sites of the model.
        image_shape: The shape that the user gave, if any.
        site: The site that the user named, if any.

    Raises:
        ValueError: If there is no such site, several, or the shape does not fit its rows.
    """
    rows = {
        s.name: tuple(rows_first(table, s.name, s.value).shape[1:])
        for s in table.observed
        if s.data_dim is not None
    }
    if site is not None:
        check_known("observed site in a plate over rows", site, rows)
        rows = {site: rows[site]}
    shape = None if image_shape is None else _checked_shape(caller, image_shape)
    if shape is not None:
        fitting = [name for name, row in rows.items() if math.prod(row) == math.prod(shape)]
    else:
        fitting = [name for name, row in rows.items() if _is_image(row)]
    if len(fitting) == 1:
        return fitting[0], shape or rows[fitting[0]]
    if len(fitting) > 1:
        raise ValueError(f"{caller}: say with site= which is the image to draw, of {fitting}.")
    if not rows:
        raise ValueError(
            f"{caller}: the model observes nothing inside plate '{table.plate}', so there is no "
            "image to draw. Name the plate over rows with plate=..., and write it vectorised."
        )
    listed = ", ".join(f"'{name}' has rows of shape {row}" for name, row in rows.items())
    flat = [row[0] for row in rows.values() if len(row) == 1]
    side = next((math.isqrt(n) for n in flat if math.isqrt(n) ** 2 == n), None)
    hint = f"such as image_shape=({side}, {side})" if side else "image_shape=(height, width)"
    if shape is None:
        raise ValueError(f"{caller}: {listed}. Say how to lay them out, {hint}.")
    raise ValueError(
        f"{caller}: image_shape={shape} needs rows of {math.prod(shape)} elements, but {listed}. "
        f"Give (height, width) or (channels, height, width) with that product, {hint}."
    )


def _checked_shape(caller: str, image_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(image_shape) if isinstance(image_shape, Sequence) else (image_shape,)
    if not (all(isinstance(n, int) and n > 0 for n in shape) and _is_image(shape)):
        raise ValueError(
            f"{caller}: image_shape must be (height, width), (1, height, width) or (3, height, "
            f"width), got {image_shape!r}."
        )
    return shape


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def as_images(rows: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Lay rows out as images, shape (N, height, width), or the same and 3 colours."""
    images = to_array(rows).reshape(len(rows), *shape)
    if len(shape) == 2:
        return images
    return images[:, 0] if shape[0] == 1 else np.moveaxis(images, 1, -1)


def rows_first(table: SiteTable, name: str, value: Tensor) -> Tensor:
    """Move the rows of a site's values to the front."""
    return value.movedim(row_axis(table, name, value), 0)

"""Pictures of models of images: reconstructions, samples, latents, and the way between two rows.

They take any Pyro model with a plate over rows, and any guide for it. A batch of several arguments
is passed as a tuple. What is drawn of a row is its observed site with as many elements as
`image_shape`, or the one that `site` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppl_models.core.batch import as_batch, check_model
from ppl_models.core.checks import check_count
from ppl_models.core.minibatch import minibatch
from ppl_models.core.modes import evaluating
from ppl_models.core.picture import (
    COLOURS,
    drawing,
    figure_of,
    picture,
    to_array,
)
from ppl_models.core.random import seeded, stream
from ppl_models.core.sites import (
    Site,
    SiteTable,
    accepts_size,
    describe_program,
    example_batch,
    site_table,
    table_of,
)
from ppl_models.core.store import own_parameters
from ppl_models.core.types import Batch
from ppl_models.evaluate.latent import by_row, encode, mean_of, reconstruct, row_axis
from ppl_models.evaluate.tiles import (
    as_images,
    axes_for_tiles,
    draw_tiles,
    image_site,
    limits,
    rows_first,
)

CLASSES = 20  # more labels than this are drawn as numbers on a scale
MARKERS = "os^DvPX<>*"


def plot_reconstructions(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Any,
    *,
    image_shape: Sequence[int] | None = None,
    rows: int = 10,
    draws: int = 20,
    site: str | None = None,
    cmap: str = "gray",
    seed: int | None = 0,
    plate: str = "data",
    ax: Axes | None = None,
) -> Figure:
    """Draw rows of data above what the model expects in their place, given the guide's latents.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        x: The data, of which the first rows are drawn; a tuple for several arguments.
        image_shape: (height, width), (1, height, width) or (3, height, width); by default that of
            a row, if it is not flat.
        rows: Rows to draw.
        draws: Draws of the latents that are averaged, as in `reconstruct`.
        site: The observed site that is an image, where several might be.
        cmap: Colours of a grey image, by matplotlib's name: "gray", or "gray_r" for ink on paper.
        seed: An integer isolates and reproduces: a look moves nothing. None draws from the global
            random stream.
        plate: Name of the plate over rows.
        ax: Axes to draw into, such as `plt.gca()` for a window; by default a new picture.

    Raises:
        ValueError: If rows are not of that shape, or as `reconstruct` does.

    Example:
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=12, latent_dim=2)
        >>> x = model(size=20)
        >>> figure = plot_reconstructions(model, Exact(model), x, image_shape=(3, 4), rows=5)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['data', 'reconstruction']
    """
    check_count("plot_reconstructions", "rows", rows)
    batch = as_batch(x, model, guide)
    with _first(guide, batch, rows, plate) as part:
        table = check_model(model, part, plate=plate, rows=len(part[0]))
        name, shape = image_site("plot_reconstructions", table, image_shape, site)
        found = reconstruct(model, guide, *part, draws=draws, seed=seed, plate=plate)
    data = as_images(rows_first(table, name, table[name].value)[:rows], shape)
    means = _known_mean("plot_reconstructions", name, found.get(name))
    means = as_images(rows_first(table, name, means)[:rows], shape)
    with drawing():
        tiles = np.stack([data, means])
        ax = axes_for_tiles(ax, tiles)
        draw_tiles(ax, tiles, limits(data), cmap=cmap)
        ax.set_yticks([0.5, 1.5], ["data", "reconstruction"])
        ax.set_xticks([])
        ax.set_title(f"Reconstructions: {_pair(model, guide)}")
        return figure_of(ax)


def plot_samples(
    model: Callable[..., Any],
    size: int = 64,
    *,
    image_shape: Sequence[int] | None = None,
    means: bool = True,
    value_range: tuple[float, float] | None = None,
    site: str | None = None,
    cmap: str = "gray",
    seed: int | None = 0,
    plate: str = "data",
    ax: Axes | None = None,
) -> Figure:
    """Draw new rows from a generative model.

    Arguments:
        model: A Pyro model that takes `size`.
        size: Rows to draw.
        image_shape: As in `plot_reconstructions`.
        means: Draw the mean of each row given its latents; False draws the row itself, with the
            noise of its pixels.
        value_range: The values drawn darkest and brightest; by default 0 and 1 if all are between
            them, and otherwise almost the smallest and largest.
        site: As in `plot_reconstructions`.
        cmap: As in `plot_reconstructions`.
        seed: An integer isolates and reproduces: a look moves nothing. None draws from the global
            random stream.
        plate: Name of the plate over rows.
        ax: Axes to draw into, such as `plt.gca()` for a window; by default a new picture.

    Raises:
        ValueError: If the model takes no `size`, rows are not of that shape, or the range is empty.

    Example:
        >>> from ppl_models import PPCA
        >>> figure = plot_samples(PPCA(12, 2), 9, image_shape=(3, 4))
        >>> figure.axes[0].get_title(loc="left")
        'Samples: PPCA, means given latents'
    """
    check_count("plot_samples", "size", size)
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(
            f"plot_samples: value_range must be (low, high) with low < high, got {value_range}."
        )
    if not accepts_size(model):
        raise ValueError(
            f"plot_samples: {describe_program(model)} takes no `size=`, so it cannot draw rows by "
            "itself. Give it the argument, or draw plot_reconstructions of rows at hand."
        )
    known = site_table(model, *example_batch(model), plate=plate)
    name, shape = image_site("plot_samples", known, image_shape, site)
    with own_parameters(model), seeded(seed), evaluating(model):
        trace = poutine.trace(model).get_trace(size=size)
    node: Any = trace.nodes[name]
    values = _known_mean("plot_samples", name, mean_of(node["fn"])) if means else node["value"]
    images = as_images(rows_first(table_of(trace, plate), name, values), shape)
    with drawing():
        columns = math.ceil(math.sqrt(size))
        lines = math.ceil(size / columns)
        tiles = np.full((lines * columns, *images.shape[1:]), np.nan)
        tiles[:size] = images
        tiles = tiles.reshape(lines, columns, *images.shape[1:])
        ax = axes_for_tiles(ax, tiles)
        draw_tiles(ax, tiles, value_range or limits(images), cmap=cmap)
        ax.set_xticks([])
        ax.set_yticks([])
        what = "means given latents" if means else "draws"
        ax.set_title(f"Samples: {describe_program(model)}, {what}")
        return figure_of(ax)


def plot_interpolation(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Any,
    *,
    image_shape: Sequence[int] | None = None,
    pairs: int = 5,
    steps: int = 9,
    site: str | None = None,
    cmap: str = "gray",
    seed: int | None = 0,
    plate: str = "data",
    ax: Axes | None = None,
) -> Figure:
    """Draw the way from one row to another, straight through the latents.

    The first row of the data is joined with the second, the third with the fourth, and so on. On
    the line between their posterior means, what the model expects is drawn. Whatever is not a
    continuous latent of a row is that of the first of the two: discrete latents, and covariates.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        x: The data, two rows or more; a tuple for several arguments.
        image_shape: As in `plot_reconstructions`.
        pairs: Pairs of rows to draw, if there are as many.
        steps: Points on each way, both ends included.
        site: As in `plot_reconstructions`.
        cmap: As in `plot_reconstructions`.
        seed: An integer isolates and reproduces: a look moves nothing. None draws from the global
            random stream.
        plate: Name of the plate over rows.
        ax: Axes to draw into, such as `plt.gca()` for a window; by default a new picture.

    Raises:
        ValueError: If there are fewer than two rows, the model has no continuous local latent, rows
            are not of that shape, or as `encode` does.

    Example:
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=12, latent_dim=2)
        >>> figure = plot_interpolation(model, Exact(model), model(size=4), image_shape=(3, 4))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()][:3]
        ['data', '0', '1/8']
    """
    check_count("plot_interpolation", "pairs", pairs)
    check_count("plot_interpolation", "steps", steps, least=2)
    batch = as_batch(x, model, guide)
    total = len(batch[0]) if batch else 0
    if total < 2:
        raise ValueError(
            f"plot_interpolation: x must have at least two rows, to go from one to the other, got "
            f"{total}."
        )
    pairs = min(pairs, total // 2)
    with _first(guide, batch, 2 * pairs, plate) as part:
        table = check_model(model, part, plate=plate, rows=len(part[0]))
        name, shape = image_site("plot_interpolation", table, image_shape, site)
        names = _continuous("plot_interpolation", model, table)
        means = encode(model, guide, *part, seed=seed, plate=plate)
        others = _others(model, guide, part, table, names, seed)
    latents = {}
    for latent in names:
        value = rows_first(table, latent, means[latent])[: 2 * pairs]
        start, end = value[0::2].unsqueeze(1), value[1::2].unsqueeze(1)
        share = torch.linspace(0.0, 1.0, steps).to(value).reshape(-1, *[1] * (value.ndim - 1))
        latents[latent] = torch.lerp(start, end, share).flatten(0, 1)
    source = torch.arange(0, 2 * pairs, 2).repeat_interleave(steps)
    decoded = _decode("plot_interpolation", model, part, table, latents, others, name, source, seed)
    between = as_images(decoded, shape)
    between = between.reshape(pairs, steps, *between.shape[1:])
    data = as_images(rows_first(table, name, table[name].value)[: 2 * pairs], shape)
    with drawing():
        gap = 0.25
        ax = axes_for_tiles(ax, between, beside=2 + 2 * gap, below=0.5)
        for tiles, left in (
            (data[0::2, None], 0.0),
            (between, 1 + gap),
            (data[1::2, None], steps + 1 + 2 * gap),
        ):
            draw_tiles(ax, tiles, limits(data), cmap=cmap, left=left)
        at = [0.5, *(k + 1.5 + gap for k in range(steps)), steps + 1.5 + 2 * gap]
        ways = ["0", *(f"{k}/{steps - 1}" for k in range(1, steps - 1)), "1"]
        ax.set_xticks(at, ["data", *ways, "data"])
        ax.set_yticks([])
        ax.set_xlabel("share of the way between the posterior means")
        ax.set_title(f"Interpolation: {_pair(model, guide)}")
        return figure_of(ax)


def plot_latents(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    grid: int = 15,
    site: str | None = None,
    cmap: str = "gray",
    seed: int | None = 0,
    plate: str = "data",
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw where the guide puts each row: posterior means of its continuous latents.

    Of more than two units, the two directions in which the means vary most are drawn. With a latent
    of two units and an `image_shape`, a second panel shows what the model expects at a grid of
    quantiles of the prior.

    Arguments:
        model: Any Pyro model with a plate over rows.
        guide: Any Pyro guide for it.
        x: The data; a tuple for several arguments.
        y: A label for each row: classes, or numbers on a scale.
        image_shape: As in `plot_reconstructions`.
        grid: Points along each side of the second panel.
        site: As in `plot_reconstructions`.
        cmap: As in `plot_reconstructions`, for the second panel.
        seed: An integer isolates and reproduces: a look moves nothing. None draws from the global
            random stream.
        plate: Name of the plate over rows.
        ax: Axes to draw into, such as `plt.gca()` for a window, or a pair of them where there is a
            second panel; by default a new picture.

    Raises:
        ValueError: If there is not one label for each row, the model has no continuous local
            latent, rows are not of that shape, or as `encode` does.

    Example:
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=12, latent_dim=2)
        >>> x = model(size=30)
        >>> figure = plot_latents(model, Exact(model), x, [0, 1] * 15)
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('posterior mean of z[0]', 'posterior mean of z[1]')
    """
    check_count("plot_latents", "grid", grid, least=2)
    batch = as_batch(x, model, guide)
    table = check_model(model, batch, plate=plate, rows=len(batch[0]) if batch else 1)
    names = _continuous("plot_latents", model, table)
    means = encode(model, guide, *batch, seed=seed, plate=plate)
    units = np.concatenate([to_array(by_row(table, name, means[name])) for name in names], 1)
    labels = _labels_of(y, len(units))
    decoded = None
    if image_shape is not None and len(names) == 1 and units.shape[1] == 2:
        decoded = _decoded_grid(model, guide, batch, table, names[0], grid, image_shape, site, seed)
    with drawing():
        axes = _panels(ax, 2 if decoded else 1)
        points, axis_names = _plane(units, _unit_names(table, names, means))
        axes[0].set_xlabel(axis_names[0])
        axes[0].set_ylabel(axis_names[1])
        _draw_rows(axes[0], points, labels)
        axes[0].set_title(f"Latents of {len(units):,} rows: {_pair(model, guide)}")
        if decoded:
            tiles, quantiles, data = decoded
            draw_tiles(axes[1], tiles, limits(data), cmap=cmap)
            at = np.unique([0, grid // 4, grid // 2, grid - 1 - grid // 4, grid - 1])
            axes[1].set_xticks(at + 0.5, [f"{quantiles[k, 0]:.2f}" for k in at])
            axes[1].set_yticks(grid - at - 0.5, [f"{quantiles[k, 1]:.2f}" for k in at])
            axes[1].set_xlabel(f"{names[0]}[0], at quantiles of the prior")
            axes[1].set_ylabel(f"{names[0]}[1], at quantiles of the prior")
            axes[1].set_title("What the model expects there")
        return figure_of(axes[0])


@contextmanager
def _first(guide: Any, batch: Batch, rows: int, plate: str) -> Iterator[Batch]:
    """Give the first rows, and tell a guide with parameters for each row which they are."""
    total = len(batch[0]) if batch else 0
    # Pyro's own guides tie their parameters to positions: they take all rows or none.
    whole = rows >= total or isinstance(guide, AutoGuide)
    told = nullcontext() if whole else minibatch(torch.arange(rows), total, plate=plate)
    with told:
        yield batch if whole else tuple(value[:rows] for value in batch)


def _known_mean(caller: str, name: str, mean: Tensor | None) -> Tensor:
    if mean is None:
        raise ValueError(
            f"{caller}: the distribution of site '{name}' has no mean in closed form, so what the "
            "model expects cannot be drawn."
            + (" Use means=False." if caller == "plot_samples" else "")
        )
    return mean


def _continuous(caller: str, model: Callable[..., Any], table: SiteTable) -> list[str]:
    names = [site.name for site in table.locals if not site.discrete]
    if not names:
        found = [site.name for site in table.latents]
        raise ValueError(
            f"{caller}: a continuous latent for each row is required, but {describe_program(model)} "
            f"has none inside plate '{table.plate}'; its latents are {found}. Discrete latents have "
            "no values between two values."
        )
    if any(table[name].data_dim is None for name in names):
        raise ValueError(
            f"{caller}: plate '{table.plate}' must be vectorised, but {names} are in a loop over it. "
            f"Write `with pyro.plate('{table.plate}', len(x)):`."
        )
    return names


def _others(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    part: Batch,
    table: SiteTable,
    names: list[str],
    seed: int | None,
) -> dict[str, Tensor]:
    """Draw from the guide what is not moved: discrete latents, and those that rows share."""
    others = [site.name for site in table.latents if site.name not in names]
    if not others:
        return {}
    own = None if seed is None else stream(seed, 1)
    with own_parameters(model, guide), seeded(own), evaluating(model, guide):
        trace = poutine.trace(guide).get_trace(*part)
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: nodes[name]["value"] for name in others}


def _decode(
    caller: str,
    model: Callable[..., Any],
    part: Batch,
    table: SiteTable,
    latents: dict[str, Tensor],
    others: dict[str, Tensor],
    name: str,
    source: Tensor,
    seed: int | None,
) -> Tensor:
    """Return what the model expects of a site, given latents; rows first.

    Arguments:
        caller: Who asks.
        model: The model.
        part: Rows of data.
        table: The sites of the model on those.
        latents: Values of continuous local latents, rows first, M of them.
        others: Values of all other latents on those rows of data.
        name: The site.
        source: Which row of data stands in for all else, for each of the M.
        seed: Of what the model draws all the same.
    """
    fixed = {}
    for latent, value in latents.items():
        fixed[latent] = value.movedim(0, row_axis(table, latent, table[latent].value))
    for latent, value in others.items():
        if table[latent].local:
            axis = row_axis(table, latent, value)
            value = value.index_select(axis, source.to(value.device))
        fixed[latent] = value
    arguments = tuple(value[source.to(value.device)] for value in part)
    own = None if seed is None else stream(seed, 2)
    with own_parameters(model), seeded(own), evaluating(model):
        trace = poutine.trace(poutine.condition(model, data=fixed)).get_trace(*arguments)
    node: Any = trace.nodes[name]
    mean = _known_mean(caller, name, mean_of(node["fn"]))
    return rows_first(table, name, mean)


def _decoded_grid(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    table: SiteTable,
    latent: str,
    grid: int,
    image_shape: Sequence[int],
    site: str | None,
    seed: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images on a grid, the quantiles along its sides, and the images in the data."""
    name, shape = image_site("plot_latents", table, image_shape, site)
    others = _others(model, guide, batch, table, [latent], seed)
    quantiles = _prior_quantiles(table[latent], table, grid, seed)
    # Tiles are drawn from the top left: the second unit falls from line to line.
    points = torch.stack(
        [quantiles[:, 0].expand(grid, -1), quantiles[:, 1].flip(0)[:, None].expand(-1, grid)], -1
    ).reshape(grid * grid, 2)
    like = rows_first(table, latent, table[latent].value)
    values = {latent: points.reshape(-1, *like.shape[1:])}
    source = torch.zeros(grid * grid, dtype=torch.int64)
    decoded = _decode("plot_latents", model, batch, table, values, others, name, source, seed)
    images = as_images(decoded, shape)
    data = as_images(rows_first(table, name, table[name].value)[:1000], shape)  # for their range
    return images.reshape(grid, grid, *images.shape[1:]), to_array(quantiles), data


def _prior_quantiles(site: Site, table: SiteTable, count: int, seed: int | None) -> Tensor:
    """Return evenly spread quantiles of each unit of the first row's prior, shape (count, units)."""
    fn: Any = site.fn
    value = site.value
    levels = ((torch.arange(count) + 0.5) / count).to(value)
    base = fn
    while hasattr(base, "base_dist") and type(base).__name__ in (
        "Independent",
        "ExpandedDistribution",
    ):
        base = base.base_dist
    with torch.no_grad():
        try:
            shaped = levels.reshape(-1, *[1] * value.ndim)
            found = base.icdf(shaped).expand(count, *value.shape)
        except NotImplementedError:
            with seeded(0 if seed is None else stream(seed, 3)):
                found = torch.quantile(fn.sample((4000,)), levels, dim=0)
    rows = found.movedim(row_axis(table, site.name, value), 1)
    return rows[:, 0].reshape(count, -1)


def _unit_names(table: SiteTable, names: list[str], means: dict[str, Tensor]) -> list[str]:
    found = []
    for name in names:
        shape = rows_first(table, name, means[name]).shape[1:]
        places = np.ndindex(*shape)
        found += [f"{name}[{','.join(map(str, p))}]" if p else name for p in places]
    return found


def _plane(units: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return two coordinates of each row, or one where there is one, and what they are."""
    if len(names) == 1:
        return units, [f"posterior mean of {names[0]}", "rows"]
    if len(names) == 2:
        return units, [f"posterior mean of {name}" for name in names]
    centred = units - units.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, [0, 1]])  # of two signs, always the same
    shares = values[::-1][:2] / max(values.sum(), np.finfo(float).tiny)
    axis_names = [
        f"{word} direction ({share:.0%} of the variance of {len(names)} units)"
        for word, share in zip(("first", "second"), shares, strict=True)
    ]
    return centred @ directions, axis_names


def _labels_of(y: Any, rows: int) -> np.ndarray | None:
    if y is None:
        return None
    labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if labels.shape != (rows,):
        raise ValueError(
            f"plot_latents: y must have one label for each of {rows} rows, shape ({rows},), got "
            f"shape {labels.shape}."
        )
    if len(np.unique(labels)) > CLASSES and labels.dtype.kind not in "fiub":
        raise ValueError(
            f"plot_latents: y must have at most {CLASSES} classes, or be numbers on a scale, got "
            f"{len(np.unique(labels))} different values of dtype {labels.dtype}."
        )
    return labels


def _draw_rows(ax: Axes, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw rows as points, or as a histogram where there is but one coordinate."""
    size = float(np.clip(6000 / len(points), 2, 24))
    line = points.shape[1] == 1
    if labels is not None and _on_a_scale(labels):
        if line:
            points = np.stack([points[:, 0], labels], 1)
            ax.set_ylabel("label")
        drawn = ax.scatter(*points.T, c=labels, s=size, cmap="viridis", lw=0, rasterized=True)
        figure_of(ax).colorbar(drawn, ax=ax, label="label")
        return
    kinds = [] if labels is None else list(np.unique(labels))
    groups = [points[labels == kind] for kind in kinds] or [points]
    names = [f"{kind:g}" if isinstance(kind, np.floating) else str(kind) for kind in kinds]
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(groups))]
    if line:
        values = [group[:, 0] for group in groups]
        ax.hist(values, bins=40, stacked=True, color=colours, label=names or None)
    else:
        _draw_clouds(ax, groups, names, colours, size)
    if names:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, markerscale=1.5)


def _draw_clouds(
    ax: Axes, groups: list[np.ndarray], names: list[str], colours: list[str], size: float
) -> None:
    """Draw each group with a colour and a marker, and its name in the middle."""
    for k, group in enumerate(groups):
        style = {"color": colours[k], "marker": MARKERS[k % len(MARKERS)], "alpha": 0.75}
        name = names[k] if names else None
        ax.scatter(*group.T, s=size, lw=0, label=name, rasterized=True, **style)
    halo = [withStroke(linewidth=3, foreground="white")]
    middle = {"ha": "center", "va": "center", "fontweight": "bold", "path_effects": halo}
    for name, group in zip(names, groups, strict=False):
        ax.text(np.median(group[:, 0]), np.median(group[:, 1]), name, **middle)


def _on_a_scale(labels: np.ndarray) -> bool:
    kinds = np.unique(labels)
    if labels.dtype.kind == "f" and not (kinds == kinds.round()).all():
        return True
    return len(kinds) > CLASSES


def _panels(ax: Axes | Sequence[Axes] | None, count: int) -> list[Axes]:
    if ax is None:
        return list(picture(5.8 if count == 1 else 11.0, 5.0).subplots(1, count, squeeze=False)[0])
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != count:
        raise ValueError(f"plot_latents: ax must be {count} axes, one a panel, got {len(axes)}.")
    return axes


def _pair(model: Any, guide: Any) -> str:
    return f"{describe_program(model)} with {describe_program(guide)}"

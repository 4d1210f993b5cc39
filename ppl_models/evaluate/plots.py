"""The picture of a scorecard."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ppl_models.core.picture import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    Canvas,
    axes_for,
    drawing,
    figure_of,
    picture,
    to_array,
)
from ppl_models.evaluate.gradients import GradientVariance
from ppl_models.evaluate.predictions import Prediction
from ppl_models.evaluate.scorecard import Entry, Scorecard

LEVEL = 0.05  # how often the band of a calibration plot is left by chance, at most
BINS = 10  # of predicted probabilities
ERRORS = 2  # standard errors to each side that a bar shows


def plot_scorecard(card: Scorecard, *, figure: Canvas | None = None) -> Figure:
    """Draw guides as rows, and what is known of them as columns: see `Scorecard.plot`."""
    entries = card.entries
    beside = any(entry.reference is not None for entry in entries)
    columns = {_draw_bounds: 2.4, _draw_gaps: 1.2} | ({_draw_scales: 1.2} if beside else {})
    columns |= {_draw_times: 1.2}
    with drawing():
        height = 1.9 + 0.36 * len(entries)
        canvas = picture(11.0 if beside else 9.5, height) if figure is None else figure
        grid = canvas.subplots(
            1, len(columns), sharey=True, squeeze=False, width_ratios=list(columns.values())
        )[0]
        for ax, draw in zip(grid, columns, strict=True):
            for row in range(0, len(entries), 2):
                ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", lw=0, zorder=0)
            draw(ax, entries)
            ax.grid(visible=False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        grid[0].set_yticks(range(len(entries)), [entry.name for entry in entries])
        grid[0].set_ylim(len(entries) - 0.5, -0.5)
        same = ", ".join(f"{name} {value}" for name, value in card.settings.items())
        note = f"Bars are {ERRORS} standard errors to each side. Same for all: {same}."
        canvas.supxlabel(textwrap.fill(note, 140), fontsize="small", color=GREY, x=0.01, ha="left")
        return figure_of(grid[0])


def _draw_bounds(ax: Axes, entries: Sequence[Entry]) -> None:
    for row, entry in enumerate(entries):
        gap = entry.gap
        if gap is not None and math.isfinite(gap):
            ax.barh(row, gap, left=entry.elbo.mean, height=0.3, color=BLUE, alpha=0.25)
    bounds = [(entry.elbo.mean, entry.elbo.se) for entry in entries]
    evidence = [(e.evidence.mean, e.evidence.se) if e.evidence else None for e in entries]
    _draw_points(ax, bounds, "o", DARK, "ELBO")
    _draw_points(ax, evidence, "D", ORANGE, "log p(x)")
    ax.set_title("ELBO and log p(x): the gap between them\n")
    ax.set_xlabel("nats per test row (right is better)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, borderpad=0)


def _draw_gaps(ax: Axes, entries: Sequence[Entry]) -> None:
    gaps = [None if e.gap is None or e.gap_se is None else (e.gap, e.gap_se) for e in entries]
    _draw_points(ax, gaps, "o", DARK)
    _draw_ideal(ax, 0.0)
    _draw_absent(ax, gaps)
    ax.margins(x=0.15)
    ax.set_title("Gap\n0 is perfect")
    ax.set_xlabel("nats per test row")


def _draw_scales(ax: Axes, entries: Sequence[Entry]) -> None:
    references = [entry.reference for entry in entries]
    ratios = [(r.scale_ratio, 0.0) if r and r.scale_ratio > 0.0 else None for r in references]
    ax.set_xscale("log", base=2)
    _draw_points(ax, ratios, "o", DARK)
    _draw_ideal(ax, 1.0)
    _draw_absent(ax, ratios)
    known = [ratio for ratio, _ in filter(None, ratios) if math.isfinite(ratio)]
    ax.set_xlim(min([0.5, *(0.8 * r for r in known)]), max([2.0, *(1.25 * r for r in known)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    ax.set_title("Posterior scale\n1 is perfect")
    ax.set_xlabel("guide's / NUTS's")


def _draw_times(ax: Axes, entries: Sequence[Entry]) -> None:
    least = 1e-3
    train = [(max(least, entry.fit.seconds), 0.0) for entry in entries]
    test = [(max(least, entry.test_seconds), 0.0) for entry in entries]
    ax.set_xscale("log")
    _draw_points(ax, train, "o", DARK, "training")
    _draw_points(ax, test, "D", ORANGE, "test")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.15)
    ax.set_title("Time\n")
    ax.set_xlabel("seconds")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, borderpad=0)


def _draw_points(
    ax: Axes,
    points: Sequence[tuple[float, float] | None],
    marker: str,
    colour: str,
    label: str | None = None,
) -> None:
    """Draw a value and its standard error for each row that has one."""
    known = [(row, *point) for row, point in enumerate(points) if point and _drawable(point)]
    rows, values, errors = np.array(known).reshape(-1, 3).T
    bars = ERRORS * np.where(np.isfinite(errors), errors, 0.0)
    ax.errorbar(
        values, rows, xerr=bars, fmt=marker, color=colour, ms=5, lw=1.4, capsize=2.5, label=label
    )


def _drawable(point: tuple[float, float] | None) -> bool:
    return point is not None and math.isfinite(point[0])


def _draw_ideal(ax: Axes, value: float) -> None:
    ax.axvline(value, color=GREY, lw=1, ls="--", zorder=1)


def _draw_absent(ax: Axes, points: Sequence[tuple[float, float] | None]) -> None:
    for row, point in enumerate(points):
        if not _drawable(point):
            where = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center"}
            ax.text(0.97, row, "not known", color=GREY, fontsize="small", style="italic", **where)


def plot_gradient_variance(found: GradientVariance, *, figure: Canvas | None = None) -> Figure:
    """Draw the variance of each parameter by objective: see `GradientVariance.plot`."""
    names = list(found.variance)
    keys = list(next(iter(found.variance.values())))
    with drawing():
        canvas = picture(9.5, 1.6 + 0.36 * len(keys)) if figure is None else figure
        ax = canvas.subplots()
        for row in range(0, len(keys), 2):
            ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", lw=0, zorder=0)
        for place, name in enumerate(names):
            totals = [found.variance[name][key].sum().item() for key in keys]
            shift = 0.5 * ((place + 0.5) / len(names) - 0.5)
            rows = [(row + shift, total) for row, total in enumerate(totals) if total > 0.0]
            ax.plot([t for _, t in rows], [r for r, _ in rows], "o", ms=5, label=name)
        ax.set_xscale("log")
        ax.set_yticks(range(len(keys)), keys)
        ax.set_ylim(len(keys) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("variance of one estimate, summed over elements, (nats per row)²")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return figure_of(ax)


def plot_calibration(found: Prediction, *, ax: Axes | None = None) -> Figure:
    """Draw how often what was predicted came true: see `Prediction.plot`."""
    with drawing():
        ax = axes_for(ax, 4.6, 4.4)
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="calibrated")
        if found.levels is not None:
            _draw_levels(ax, to_array(found.levels))
        else:
            _draw_frequencies(ax, found)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")
        ax.legend(loc="lower right")
        return figure_of(ax)


def _draw_levels(ax: Axes, levels: np.ndarray) -> None:
    """Draw the distribution function of the levels, and the band of Dvoretzky and others."""
    levels = np.sort(levels.ravel())
    share = np.arange(1, len(levels) + 1) / len(levels)
    ax.step([0, *levels, 1], [0, *share, 1], where="post", color=BLUE, label=f"{len(levels)} rows")
    half = math.sqrt(math.log(2 / LEVEL) / (2 * len(levels)))
    grid = np.linspace(0, 1, 101)
    low, high = np.clip(grid - half, 0, 1), np.clip(grid + half, 0, 1)
    label = f"{1 - LEVEL:.0%} of calibrated curves"
    ax.fill_between(grid, low, high, color=GREY, alpha=0.18, lw=0, label=label)
    ax.set_xlabel("predictive probability of values below")
    ax.set_ylabel("share of rows")
    ax.set_title("Calibration")


def _draw_frequencies(ax: Axes, found: Prediction) -> None:
    """Draw, for predicted probabilities of alike size, how often the class was the one."""
    assert found.hits is not None
    predicted, hits = to_array(found.mean).ravel(), to_array(found.hits).ravel()
    which = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(which, minlength=BINS)
    full = count > 0
    middle = np.bincount(which, predicted, BINS)[full] / count[full]
    share = np.bincount(which, hits, BINS)[full] / count[full]
    noise = np.bincount(which, predicted * (1 - predicted), BINS)[full] ** 0.5 / count[full]
    label = f"{len(found.mean)} rows; bars are {ERRORS} standard errors if calibrated"
    ax.errorbar(
        middle, share, yerr=ERRORS * noise, fmt="o", color=DARK, ms=5, capsize=2.5, label=label
    )
    ax.set_xlabel("predicted probability of a class")
    ax.set_ylabel("how often it was the one")
    ax.set_title("Calibration")

"""Pictures of a training run and of draws from a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import gaussian_kde

from ppl_models.core.checks import check_count, check_known
from ppl_models.core.picture import (
    BLUE,
    COLOURS,
    DARK,
    GREY,
    RED,
    Canvas,
    axes_for,
    drawing,
    figure_of,
    picture,
    to_array,
)
from ppl_models.core.sites import describe_program
from ppl_models.infer.mcmc.advice import poorly_mixed
from ppl_models.infer.mcmc.posterior import Posterior, element_names
from ppl_models.infer.svi import Fit

SMOOTHED = 50  # a long run is smoothed over the epochs nearest to a fiftieth of it


def plot_bounds(fit: Fit, *, ax: Axes | None = None) -> Figure:
    """Draw the bounds of a training run by step, and their running mean: see `Fit.plot`."""
    with drawing():
        ax = axes_for(ax, 7.0, 4.0)
        bounds = to_array(fit.bounds)
        steps = np.arange(1, len(bounds) + 1)
        finite = np.isfinite(bounds)
        shown = np.where(finite, bounds, np.nan)
        in_epoch = max(1, round(fit.steps / fit.epochs)) if fit.epochs > 0 else 1
        window = smoothing_window(len(bounds), in_epoch)
        mean = running_mean(shown, window)
        few = len(bounds) < 30
        raw: dict[str, Any] = {"marker": "."} if few else {"alpha": 0.35, "lw": 0.8}
        ax.plot(steps, shown, color=BLUE, label="each step", **raw)
        if window > 1:
            passes = window / in_epoch
            of = f", {passes:.3g} epoch{'s' * (passes != 1)}" if in_epoch > 1 else ""
            label = f"mean of the last {window} steps{of}"
            ax.plot(steps[window - 1 :], mean, color=DARK, lw=1.8, label=label)
        for note in _cut(ax, shown[finite]), _missing(finite):
            if note:
                ax.plot([], [], "v", color=GREY, label=note)
        ax.legend(loc="lower right")
        pair = f"{describe_program(fit.model)} with {describe_program(fit.guide)}"
        last = f"bound {mean[-1]:.4g} nats per row" if finite.any() else "no finite bound"
        ax.set_title(f"{pair}: {last} after {len(bounds):,} step{'s' * (len(bounds) != 1)}")
        ax.set_xlabel("step" if in_epoch > 1 else "step (an epoch each)")
        ax.set_ylabel("bound (nats per row)")
        ax.set_xlim(0, max(2, 1.01 * len(bounds)))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 1 < in_epoch <= len(bounds):
            convert = (lambda step: step / in_epoch, lambda epoch: epoch * in_epoch)
            ax.secondary_xaxis("top", functions=convert).set_xlabel("epoch")
        return figure_of(ax)


def smoothing_window(steps: int, in_epoch: int) -> int:
    """Return how many steps to average: whole epochs where the run is long enough for some."""
    window = in_epoch * max(1, round(steps / (SMOOTHED * in_epoch)))
    return min(window, max(1, steps // 4))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average each `window` values in a row, less those that are NaN."""
    rolling = pd.Series(values).rolling(window, min_periods=1).mean()
    return np.asarray(rolling)[window - 1 :]


def _cut(ax: Axes, values: np.ndarray) -> str | None:
    """Leave a dive of the first steps out of sight, and say so."""
    if len(values) == 0:
        return None
    with np.errstate(over="ignore"):
        low, high = np.quantile(values, 0.05), values.max()
        spread = high - low
    if not np.isfinite(4 * spread) or values.min() >= low - 2 * spread:
        return None
    floor = low - spread / 4
    ax.set_ylim(floor, high + spread / 20)
    below = int((values < floor).sum())
    return f"{below:,} steps are below the picture, down to {values.min():.4g}"


def _missing(finite: np.ndarray) -> str | None:
    missing = int((~finite).sum())
    return f"{missing:,} steps without a finite bound are left out" if missing else None


def plot_posterior(
    posterior: Posterior,
    *,
    sites: str | Sequence[str] | None = None,
    limit: int = 8,
    figure: Canvas | None = None,
) -> Figure:
    """Draw densities and traces of each chain, element by element: see `Posterior.plot`."""
    chosen, left = _elements("Posterior.plot", posterior, sites, limit)
    with drawing():
        canvas = picture(9.0, 0.7 + 1.35 * len(chosen)) if figure is None else figure
        grid = canvas.subplots(len(chosen), 2, squeeze=False, width_ratios=(1, 1.6))
        for (name, draws), (density, trace) in zip(chosen.items(), grid, strict=True):
            one = Posterior({name: torch.as_tensor(draws)})
            rhat, ess = one.rhat()[name].item(), one.ess()[name].item()
            _draw_densities(density, draws)
            for chain, values in enumerate(draws):
                trace.plot(values, color=COLOURS[chain % len(COLOURS)], lw=0.6, alpha=0.8)
            bad = poorly_mixed(rhat, ess, posterior.chains)
            density.set_title(name)
            warning = {"color": RED, "fontweight": "bold"} if bad else {}
            trace.set_title(f"R-hat {rhat:.3f}, ESS {ess:,.0f} of {draws.size:,}", **warning)
            density.set_yticks([])
            density.grid(visible=False)
            density.spines["left"].set_visible(False)
            trace.margins(x=0)
            trace.sharex(grid[-1, 1])
            trace.tick_params(labelbottom=trace is grid[-1, 1])
        grid[-1, 0].set_xlabel("value (density of each chain)")
        grid[-1, 1].set_xlabel("draw")
        canvas.suptitle(_heading(posterior, left))
        return figure_of(grid[0, 0])


def plot_pairs(
    posterior: Posterior,
    *,
    sites: str | Sequence[str] | None = None,
    limit: int = 5,
    figure: Canvas | None = None,
) -> Figure:
    """Draw each pair of elements against each other: see `Posterior.plot_pairs`."""
    chosen, left = _elements("Posterior.plot_pairs", posterior, sites, limit)
    size = len(chosen)
    values = {name: draws.flatten() for name, draws in chosen.items()}
    with drawing():
        side = max(6.0, min(12.0, 1.8 * size))
        canvas = picture(side, side) if figure is None else figure
        grid = canvas.subplots(size, size, squeeze=False, sharex="col")
        thin = slice(None, None, -(-posterior.chains * posterior.draws // 4000))
        divergent = _divergent(posterior)
        for i, (below, y) in enumerate(values.items()):
            for j, (beside, x) in enumerate(values.items()):
                ax = grid[i, j]
                if i == j:
                    ax.hist(x[np.isfinite(x)], bins=40, color=BLUE, histtype="stepfilled")
                    ax.set_yticks([])
                    ax.spines["left"].set_visible(False)
                elif i > j:
                    ax.scatter(x[thin], y[thin], s=4, color=BLUE, alpha=0.25, lw=0, rasterized=True)
                    if divergent.any():
                        marks: dict[str, Any] = {"s": 9, "color": RED, "lw": 0, "zorder": 3}
                        ax.scatter(x[divergent], y[divergent], rasterized=True, **marks)
                    ax.sharey(grid[i, 0])
                else:
                    text = f"correlation\n{_correlation(x, y)}"
                    middle = {"ha": "center", "va": "center", "transform": ax.transAxes}
                    ax.text(0.5, 0.5, text, color=GREY, **middle)
                    ax.set_axis_off()
                if i == size - 1:
                    ax.set_xlabel(beside)
                if j == 0 and i > 0:
                    ax.set_ylabel(below)
                if j > 0:
                    ax.tick_params(labelleft=False)
                ax.grid(visible=False)
        canvas.suptitle(_heading(posterior, left))
        canvas.align_labels()
        return figure_of(grid[0, 0])


def _heading(posterior: Posterior, left: int) -> str:
    divergent = int(posterior.divergences.sum())
    text = f"{posterior.chains} chains of {posterior.draws:,} draws, {divergent:,} divergences"
    if left:
        text += f"\n{left:,} more elements are not drawn: name them in sites=, or raise limit="
    return text


def _divergent(posterior: Posterior) -> np.ndarray:
    """Which draws came of a transition that diverged, where that is one for all elements."""
    if posterior.divergent is None or posterior.rows is not None:
        return np.zeros(posterior.chains * posterior.draws, dtype=bool)
    return to_array(posterior.divergent.flatten()).astype(bool)


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    with np.errstate(invalid="ignore", divide="ignore"):
        return f"{np.corrcoef(x, y)[0, 1]:+.2f}"


def _draw_densities(ax: Axes, draws: np.ndarray) -> None:
    """Draw the density of each chain over the range of all; shares, where values are few."""
    finite = draws[np.isfinite(draws)]
    points = np.unique(finite)
    for chain, values in enumerate(draws):
        colour = COLOURS[chain % len(COLOURS)]
        values = values[np.isfinite(values)]
        if len(points) <= 12 and (points == points.round()).all():
            shares = [np.mean(values == point) if len(values) else 0.0 for point in points]
            offset = 0.6 * ((chain + 0.5) / len(draws) - 0.5)
            ax.bar(points + offset, shares, width=0.6 / len(draws), color=colour)
            ax.set_xticks(points)
        elif len(np.unique(values)) > 2:
            grid = np.linspace(finite.min(), finite.max(), 200)
            thin = values[:: -(-len(values) // 5000)]
            ax.plot(grid, gaussian_kde(thin)(grid), color=colour)
        else:
            for value in np.unique(values):
                ax.axvline(value, color=colour)
    ax.set_ylim(bottom=0)


def _elements(
    caller: str, posterior: Posterior, sites: str | Sequence[str] | None, limit: int
) -> tuple[dict[str, np.ndarray], int]:
    """Choose scalar elements: their draws, shape (chains, draws), and how many are left out.

    Where there are too many, each site gets its share of the places.
    """
    check_count(caller, "limit", limit)
    names = list(posterior) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    if not names:
        raise ValueError(f"{caller}: sites must name at least one latent site, got {sites!r}.")
    labels = {name: element_names(name, posterior[name].shape[2:]) for name in posterior}
    places = {label: (name, i) for name in labels for i, label in enumerate(labels[name])}
    queues = []
    for name in names:
        if name not in places:
            check_known("latent site", name, posterior)
        queues.append([name] if name in places else labels[name])
    every = list(dict.fromkeys(_in_turn(queues)))
    taken = set(every[:limit])
    chosen = {}
    for label in (label for queue in queues for label in queue if label in taken):
        site, place = places[label]
        flat = posterior[site].reshape(posterior.chains, posterior.draws, -1)
        chosen[label] = to_array(flat[:, :, place])
    return chosen, len(every) - len(chosen)


def _in_turn(queues: Iterable[list[str]]) -> Iterable[str]:
    """Yield the first of each queue, then the second of each, and so on."""
    queues = [list(queue) for queue in queues]
    for place in range(max(map(len, queues), default=0)):
        yield from (queue[place] for queue in queues if place < len(queue))

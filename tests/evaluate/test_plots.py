"""The picture of a scorecard: every figure of the table is where the table says."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from guides import Exact
from ppl_models import PPCA
from ppl_models.evaluate import Estimate, Scorecard
from ppl_models.evaluate.scorecard import Entry, Reference
from ppl_models.infer import Posterior, fit

SETTINGS = {"data": "8 training and 8 test rows", "steps": 1}


def estimate(mean, se) -> Estimate:
    return Estimate(mean=mean, se=se, rows=None, rows_se=None, particles=10)


@pytest.fixture(scope="module")
def entry() -> Entry:
    torch.manual_seed(0)
    model = PPCA(4, 2).double()
    result = fit(model, Exact(model), model(size=8).detach(), steps=1, seed=0, progress=False)
    return Entry(
        name="a",
        model=model,
        guide=result.guide,
        fit=dataclasses.replace(result, seconds=2.5),
        elbo=estimate(-10.0, 0.1),
        evidence=estimate(-9.0, 0.3),
        active=(2, 2),
        parameters=0,
        test_seconds=0.25,
        refined=False,
        reference=Reference(0.1, 0.05, 0.8, Posterior({"z": torch.zeros(1, 2)})),
    )


def changed(entry, **changes) -> Entry:
    return dataclasses.replace(entry, **changes)


def drawn(*entries, **options) -> Any:
    figure = Scorecard(tuple(entries), SETTINGS, ()).plot(**options)
    figure.savefig(io.BytesIO())
    return figure


def points(ax) -> list[dict]:
    """Read each set of points off its axes: for each row its value and its bar."""
    sets = []
    for container in (c for c in ax.containers if hasattr(c, "has_xerr")):
        line, _, (bars,) = container.lines
        values, rows = line.get_data()
        ends = [segment[:, 0] for segment in bars.get_segments()]
        sets.append({round(r): (v, *e) for r, v, e in zip(rows, values, ends, strict=True)})
    return sets


def test_each_guide_is_a_row_with_its_figures_and_two_standard_errors(entry) -> None:
    other = changed(entry, name="b", elbo=estimate(-12.0, 0.2), evidence=estimate(-9.5, 0.4))
    figure = drawn(entry, other)
    bounds, gaps, scales, times = figure.axes
    assert [t.get_text() for t in bounds.get_yticklabels()] == ["a", "b"]
    assert bounds.get_ylim() == (1.5, -0.5)  # the first on top
    elbo, evidence = points(bounds)
    np.testing.assert_allclose([elbo[0], elbo[1]], [(-10, -10.2, -9.8), (-12, -12.4, -11.6)])
    np.testing.assert_allclose([evidence[0], evidence[1]], [(-9, -9.6, -8.4), (-9.5, -10.3, -8.7)])
    bars = [b for b in bounds.patches if b.get_height() < 0.5]
    np.testing.assert_allclose(
        [(b.get_x(), b.get_width(), b.get_y() + b.get_height() / 2) for b in bars],
        [(-10, 1.0, 0), (-12, 2.5, 1)],
        atol=1e-12,
    )
    (gap,) = points(gaps)
    spread = 2 * math.hypot(0.1, 0.3)
    np.testing.assert_allclose(gap[0], (1.0, 1.0 - spread, 1.0 + spread))
    assert gap[1][0] == 2.5
    (scale,) = points(scales)
    assert scale[0][0] == 0.8
    train, test = points(times)
    assert (train[0][0], test[0][0]) == (2.5, 0.25)
    for ax, ideal in ((gaps, 0.0), (scales, 1.0)):
        (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert line.get_xdata()[0] == ideal
        assert ax.get_xlim()[0] <= ideal <= ax.get_xlim()[1]


def test_panels_say_what_they_are_and_in_what_unit(entry) -> None:
    figure = drawn(entry)
    titles = [ax.get_title(loc="left").strip() for ax in figure.axes]
    assert titles == [
        "ELBO and log p(x): the gap between them",
        "Gap\n0 is perfect",
        "Posterior scale\n1 is perfect",
        "Time",
    ]
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "nats per test row (right is better)",
        "nats per test row",
        "guide's / NUTS's",
        "seconds",
    ]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["ELBO", "log p(x)"]
    assert [t.get_text() for t in figure.axes[3].get_legend().get_texts()] == ["training", "test"]
    note = figure.get_supxlabel().replace("\n", " ")
    assert note == (
        "Bars are 2 standard errors to each side. Same for all: data 8 training and 8 test rows, "
        "steps 1."
    )


def test_what_an_entry_does_not_have_is_drawn_as_missing(entry) -> None:
    bare = changed(entry, evidence=None, reference=None)
    flat = changed(entry, reference=dataclasses.replace(entry.reference, scale_ratio=0.0))
    figure = drawn(entry, bare, flat)
    bounds, gaps, scales, _ = figure.axes
    elbo, evidence = points(bounds)
    assert (set(elbo), set(evidence)) == ({0, 1, 2}, {0, 2})
    assert [(t.get_text(), t.get_position()[1]) for t in gaps.texts] == [("not known", 1)]
    assert set(points(gaps)[0]) == {0, 2}
    assert [t.get_position()[1] for t in scales.texts] == [1, 2]
    assert len(drawn(bare).axes) == 3  # no panel of scales where there is no reference


def test_odd_figures_are_drawn(entry) -> None:
    figure = drawn(
        changed(entry, elbo=estimate(-math.inf, math.nan)),
        changed(entry, elbo=estimate(-10.0, math.nan), test_seconds=0.0),
        changed(entry, evidence=estimate(math.nan, math.nan)),
    )
    elbo, evidence = points(figure.axes[0])
    assert (set(elbo), set(evidence)) == ({1, 2}, {0, 1})
    assert elbo[1] == (-10.0, -10.0, -10.0)  # no bar where the error is not known


def test_many_guides_make_a_taller_picture(entry) -> None:
    few, many = drawn(entry), drawn(*(changed(entry, name=f"guide {k}") for k in range(25)))
    extra = many.get_size_inches()[1] - few.get_size_inches()[1]
    assert extra / 24 > 0.3
    assert len(many.axes[0].get_yticklabels()) == 25


def test_a_scorecard_is_drawn_into_the_figure_given(entry) -> None:
    own = Figure()
    assert drawn(entry, figure=own) is own
    assert len(own.axes) == 4

"""Pictures of bounds and of draws: what is drawn is what was found."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from guides import Exact
from ppl_models import PPCA
from ppl_models.core.picture import COLOURS, RED, Picture
from ppl_models.infer import Fit, Posterior, fit
from ppl_models.infer.plots import running_mean, smoothing_window


def fitted(bounds, *, in_epoch=1) -> Fit:
    model = PPCA(4, 2)
    result = fit(model, Exact(model), model(size=8).detach(), steps=1, seed=0, progress=False)
    bounds = torch.as_tensor(bounds, dtype=torch.float64)
    steps = len(bounds)
    return dataclasses.replace(result, bounds=bounds, steps=steps, epochs=steps / in_epoch)


def drawn(figure) -> Any:
    figure.savefig(io.BytesIO())  # whatever goes wrong, goes wrong now
    return figure


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_bounds_and_their_running_mean_are_drawn() -> None:
    bounds = torch.randn(240).sub(20.0)
    figure = drawn(fitted(bounds, in_epoch=12).plot())
    (ax,) = figure.axes
    raw, mean = ax.lines
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 241))
    np.testing.assert_array_equal(raw.get_ydata(), bounds.numpy())
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(12, 241))
    want = [bounds[k - 12 : k].mean().item() for k in range(12, 241)]
    np.testing.assert_allclose(mean.get_ydata(), want)
    assert raw.get_alpha() < 0.5
    assert mean.get_linewidth() > raw.get_linewidth()
    assert legend(ax) == ["each step", "mean of the last 12 steps, 1 epoch"]
    assert ax.get_title(loc="left") == (
        f"PPCA with Exact: bound {want[-1]:.4g} nats per row after 240 steps"
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "bound (nats per row)")
    (epochs,) = ax.child_axes
    assert epochs.get_xlabel() == "epoch"
    np.testing.assert_allclose(epochs.get_xlim(), np.array(ax.get_xlim()) / 12)


def test_the_picture_is_of_a_true_run() -> None:
    model = PPCA(4, 2)
    x = model(size=100).detach()
    result = fit(model, Exact(model), x, epochs=3, batch_size=30, seed=0, progress=False)
    (ax,) = drawn(result.plot()).axes
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.bounds.numpy())
    np.testing.assert_allclose(ax.child_axes[0].get_xlim(), np.array(ax.get_xlim()) / 4)


@pytest.mark.parametrize(
    ("steps", "in_epoch", "window"),
    [(1, 1, 1), (3, 12, 1), (40, 12, 10), (480, 12, 12), (6000, 12, 120), (1000, 1, 20)],
)
def test_whole_epochs_are_averaged_where_there_are_some(steps, in_epoch, window) -> None:
    assert smoothing_window(steps, in_epoch) == window


def test_a_mean_forgets_the_first_dive_and_skips_what_is_missing() -> None:
    values = np.r_[-1e12, np.full(9, math.nan), np.arange(10.0)]
    mean = running_mean(values, 2)
    assert mean[0] == -1e12
    assert np.isnan(mean[1])
    np.testing.assert_allclose(mean[-9:], np.arange(0.5, 9.0))


def test_a_first_dive_is_below_the_picture_which_says_so() -> None:
    bounds = torch.cat([torch.tensor([-1e5, -3e4, -900.0]), torch.linspace(-20, -17, 300)])
    (ax,) = drawn(fitted(bounds).plot()).axes
    low, high = ax.get_ylim()
    assert -21.5 < low < -20.0
    assert -17.0 < high < -16.5
    assert legend(ax)[-1] == "3 steps are below the picture, down to -1e+05"


def test_a_run_without_a_dive_is_drawn_whole() -> None:
    bounds = torch.linspace(-45, -17, 300)
    (ax,) = fitted(bounds).plot().axes
    assert ax.get_ylim()[0] < -45
    assert "below" not in " ".join(legend(ax))


def test_a_single_step_is_a_point_that_can_be_seen() -> None:
    (ax,) = drawn(fitted([-3.0], in_epoch=12).plot()).axes
    (raw,) = ax.lines
    assert raw.get_marker() == "."
    assert raw.get_alpha() is None
    assert ax.get_title(loc="left").endswith("bound -3 nats per row after 1 step")
    assert not ax.child_axes


@pytest.mark.parametrize(
    "bounds",
    [[], [math.nan], [-math.inf, -5.0], [math.nan, -1e300, 1e300] * 20, [-7.0] * 50],
    ids=["none", "nan", "infinite", "huge", "constant"],
)
def test_no_bounds_are_too_odd_to_draw(bounds) -> None:
    (ax,) = drawn(fitted(bounds).plot()).axes
    missing = sum(not math.isfinite(bound) for bound in bounds)
    said = [text for text in legend(ax) if "without a finite bound" in text]
    assert said == ([f"{missing} steps without a finite bound are left out"] if missing else [])
    assert ("no finite bound" in ax.get_title(loc="left")) == (missing == len(bounds))


def test_bounds_are_drawn_into_the_axes_given() -> None:
    own = Figure()
    left, right = own.subplots(1, 2)
    assert fitted([-2.0, -1.0]).plot(ax=right) is own
    assert not left.lines
    assert len(right.lines) == 1


def posterior(**sites) -> Posterior:
    sites = sites or {"w": (), "z": (2, 3)}
    draws = {name: torch.randn(3, 60, *shape) for name, shape in sites.items()}
    return Posterior(draws, divergences=torch.tensor([0, 2, 1]))


def test_densities_and_traces_are_those_of_each_chain() -> None:
    draws = posterior()
    figure = drawn(draws.plot(sites=["w", "z[1,2]"]))
    assert len(figure.axes) == 4
    table = draws.summary()
    for row, (name, values) in enumerate(
        {"w": draws["w"], "z[1,2]": draws["z"][..., 1, 2]}.items()
    ):
        density, trace = figure.axes[2 * row : 2 * row + 2]
        assert density.get_title(loc="left") == name
        line = table.loc[name]
        assert trace.get_title(loc="left") == (
            f"R-hat {line['r_hat']:.3f}, ESS {line['ess_bulk']:,.0f} of 180"
        )
        for chain in range(3):
            own = values[chain].numpy()
            np.testing.assert_array_equal(trace.lines[chain].get_ydata(), own)
            grid, height = density.lines[chain].get_data()
            np.testing.assert_allclose(height, gaussian_kde(own)(grid))
            assert (grid[0], grid[-1]) == (values.min(), values.max())
            assert {to_hex(ax.lines[chain].get_color()) for ax in (density, trace)} == {
                COLOURS[chain]
            }
    assert figure.get_suptitle() == "3 chains of 60 draws, 3 divergences"
    assert figure.axes[3].get_xlabel() == "draw"


def test_too_many_elements_are_counted_and_every_site_gets_its_share() -> None:
    figure = posterior(z=(2, 3), w=(), v=(4,)).plot(limit=4)
    names = [ax.get_title(loc="left") for ax in figure.axes[::2]]
    assert names == ["z[0,0]", "z[0,1]", "w", "v[0]"]
    assert "7 more elements are not drawn" in figure.get_suptitle()
    assert "more" not in posterior(z=(4,)).plot(limit=4).get_suptitle()


def test_sites_are_drawn_in_the_order_asked_for() -> None:
    figure = posterior().plot(sites=["z[0,1]", "w", "z[0,1]"])
    assert [ax.get_title(loc="left") for ax in figure.axes[::2]] == ["z[0,1]", "w"]
    assert len(posterior().plot(sites="z").axes) == 12


def test_draws_that_have_not_mixed_are_in_red() -> None:
    draws = torch.randn(2, 500, 2)
    draws[1, :, 0] += 9.0
    bad, good = (ax._left_title for ax in Posterior({"z": draws}).plot().axes[1::2])
    assert bad.get_color() == RED
    assert good.get_color() != RED


def test_discrete_draws_are_shares_and_odd_ones_are_drawn() -> None:
    counts = torch.randint(0, 3, (2, 40))
    (shares, _) = drawn(Posterior({"n": counts}).plot()).axes
    heights = [bar.get_height() for bar in shares.patches]
    want = [(counts[chain] == k).double().mean().item() for chain in range(2) for k in range(3)]
    np.testing.assert_allclose(heights, want)
    odd = torch.randn(2, 40, 3)
    odd[..., 0] = 0.5
    odd[0, :, 1] = math.nan
    odd[1, 3, 2] = math.inf
    drawn(Posterior({"z": odd}).plot())
    drawn(Posterior({"z": odd}).plot_pairs())
    drawn(Posterior({"z": torch.randn(1, 1, 2)}).plot())


def test_pairs_are_clouds_below_histograms_between_and_correlations_above() -> None:
    draws = posterior()
    figure = drawn(draws.plot_pairs(sites=["w", "z[0,0]", "z[0,1]"]))
    grid = np.array(figure.axes).reshape(3, 3)
    names = ["w", "z[0,0]", "z[0,1]"]
    values = [
        v.flatten().numpy() for v in (draws["w"], draws["z"][..., 0, 0], draws["z"][..., 0, 1])
    ]
    assert [ax.get_xlabel() for ax in grid[2]] == names
    assert [ax.get_ylabel() for ax in grid[1:, 0]] == names[1:]
    for i, j in np.ndindex(3, 3):
        if i > j:
            (cloud,) = grid[i, j].collections
            np.testing.assert_array_equal(cloud.get_offsets().T, [values[j], values[i]])
        elif i < j:
            (text,) = grid[i, j].texts
            want = np.corrcoef(values[i], values[j])[0, 1]
            assert text.get_text() == f"correlation\n{want:+.2f}"
        else:
            (outline,) = grid[i, i].patches
            counts, edges = np.histogram(values[i], bins=40)
            assert outline.get_xy()[:, 1].max() == counts.max()
            assert outline.get_xy()[:, 0].min() == edges[0]


def test_a_posterior_is_drawn_into_the_figure_given() -> None:
    own = Figure()
    _, right = own.subfigures(1, 2)
    assert posterior(w=()).plot(figure=right) is own
    assert len(right.axes) == 2
    assert posterior(w=()).plot_pairs(figure=right) is own
    assert isinstance(posterior(w=()).plot_pairs(), Picture)


def test_pairs_mark_the_draws_of_divergent_transitions() -> None:
    divergent = torch.zeros(3, 60, dtype=torch.bool)
    divergent[1, [4, 9]] = True
    draws = Posterior({"z": torch.randn(3, 60, 2)}, divergent=divergent)
    figure = drawn(draws.plot_pairs())
    _, marked = figure.axes[2].collections
    np.testing.assert_array_equal(marked.get_offsets(), draws["z"][1, [4, 9]])


def test_unknown_names_and_impossible_limits_are_refused() -> None:
    for plot in (posterior().plot, posterior().plot_pairs):
        with pytest.raises(
            ValueError, match=r"no latent site 'zz'. Did you mean 'z'\? Known: w, z"
        ):
            plot(sites=["w", "zz"])
        with pytest.raises(ValueError, match="no latent site 'z\\[2,0\\]'"):
            plot(sites="z[2,0]")
        with pytest.raises(ValueError, match="at least one latent site"):
            plot(sites=[])
        with pytest.raises(ValueError, match="limit must be an integer >= 1, got 0"):
            plot(limit=0)


def test_drawing_leaves_the_random_stream_alone() -> None:
    draws, run = posterior(), fitted([-2.0, -1.0])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - as a user has it
    run.plot(), draws.plot(), draws.plot_pairs()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002 - as a user has it

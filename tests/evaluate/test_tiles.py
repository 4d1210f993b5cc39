"""Images: their site, their shape, and their tiles."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from ppl_models.core.sites import SiteTable, site_table
from ppl_models.evaluate.tiles import as_images, draw_tiles, image_site, limits


def table(*shapes) -> SiteTable:
    """Make a model that observes one site for each shape, and tabulate it."""

    def model(*batch):
        with pyro.plate("data", 3):
            for i, value in enumerate(batch):
                event = value.ndim - 1
                pyro.sample(
                    f"x{i}", dist.Normal(torch.zeros(3, *shapes[i]), 1.0).to_event(event), obs=value
                )

    return site_table(model, *(torch.zeros(3, *shape) for shape in shapes))


@pytest.mark.parametrize(
    ("shapes", "image_shape", "site", "found"),
    [
        ([(64,)], (8, 8), None, ("x0", (8, 8))),
        ([(64,)], [1, 4, 16], None, ("x0", (1, 4, 16))),
        ([(48,)], (3, 4, 4), None, ("x0", (3, 4, 4))),
        ([(5, 7)], None, None, ("x0", (5, 7))),
        ([(3, 5, 7)], None, None, ("x0", (3, 5, 7))),
        ([(10,), (64,)], (8, 8), None, ("x1", (8, 8))),
        ([(10,), (4, 4)], None, None, ("x1", (4, 4))),
        ([(64,), (64,)], (8, 8), "x1", ("x1", (8, 8))),
    ],
)
def test_the_site_whose_rows_fit_is_the_image(shapes, image_shape, site, found) -> None:
    assert image_site("plot", table(*shapes), image_shape, site) == found


@pytest.mark.parametrize(
    ("shapes", "image_shape", "site", "message"),
    [
        ([(64,)], None, None, r"'x0' has rows of shape \(64,\).*such as image_shape=\(8, 8\)"),
        ([(60,)], None, None, r"'x0' has rows of shape \(60,\).*image_shape=\(height, width\)"),
        ([(4, 8, 8)], None, None, r"'x0' has rows of shape \(4, 8, 8\)"),
        ([(64,)], (7, 9), None, r"\(7, 9\) needs rows of 63 elements, but 'x0' has rows.*\(64,\)"),
        ([(64,)], (4, 4, 4), None, r"must be \(height, width\).*got \(4, 4, 4\)"),
        ([(64,)], (64,), None, r"must be \(height, width\)"),
        ([(64,)], 64, None, r"must be \(height, width\).*got 64"),
        ([(64,)], (8, 8.0), None, r"must be \(height, width\)"),
        ([(64,)], (0, 8), None, r"must be \(height, width\)"),
        ([(64,), (64,)], (8, 8), None, r"say with site= which .*\['x0', 'x1'\]"),
        ([(64,)], (8, 8), "y", "no observed site in a plate over rows 'y'"),
        ([], (8, 8), None, "observes nothing inside plate 'data'"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(shapes, image_shape, site, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        image_site("plot", table(*shapes), image_shape, site)
    assert "\n" not in str(error.value)


def test_rows_become_images_with_colours_last() -> None:
    rows = torch.arange(2 * 12.0).reshape(2, 12)
    np.testing.assert_array_equal(as_images(rows, (3, 4)), rows.reshape(2, 3, 4))
    np.testing.assert_array_equal(as_images(rows, (1, 3, 4)), rows.reshape(2, 3, 4))
    colour = as_images(rows, (3, 2, 2))
    assert colour.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(colour[1, 0, 1], rows[1, [1, 5, 9]])


def test_data_between_0_and_1_keep_that_range_and_others_almost_theirs() -> None:
    assert limits(np.array([0.2, 0.4, np.nan])) == (0.0, 1.0)
    assert limits(np.full(3, 7.0)) == (6.5, 7.5)
    assert limits(np.array([np.nan])) == (0.0, 1.0)
    spread = np.arange(-100.0, 101.0)
    assert limits(np.append(spread, 1e9)) == pytest.approx((-98, 99), abs=0.1)


def test_every_image_is_drawn_in_the_middle_of_its_tile() -> None:
    tiles = np.random.default_rng(0).uniform(size=(2, 3, 8, 16))
    ax = Figure().subplots()
    draw_tiles(ax, tiles, (0.0, 1.0), cmap="gray", left=1.5)
    (image,) = ax.images
    whole = image.get_array()
    assert whole.shape == (2 * 9, 3 * 17)
    left, right, bottom, top = image.get_extent()
    across, down = (right - left) / whole.shape[1], (bottom - top) / whole.shape[0]
    for line, column in np.ndindex(2, 3):
        x, y = 1.5 + column + 0.5, line + 0.5
        start, stop = (x - left) / across - 8, (x - left) / across + 8
        above, below = (y - top) / down - 4, (y - top) / down + 4
        part = whole[round(above) : round(below), round(start) : round(stop)]
        np.testing.assert_array_equal(part, tiles[line, column])
        assert (start, above) == pytest.approx((round(start), round(above)))
    assert whole.mask.sum() == whole.size - tiles.size
    assert ax.get_aspect() == 9 / 17  # so that pixels are square
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 4.5), (2, 0))


def test_colours_are_stretched_over_the_range_and_blanks_are_clear() -> None:
    tiles = np.array([-1.0, 0.0, 3.0, 9.0]).reshape(1, 1, 2, 2, 1).repeat(3, -1)
    tiles = np.concatenate([tiles, np.full_like(tiles, np.nan)], 1)
    ax = Figure().subplots()
    draw_tiles(ax, tiles, (-1.0, 3.0), cmap="gray")
    whole = ax.images[0].get_array()
    np.testing.assert_allclose(whole[:2, :2, 0], [[0.0, 0.25], [1.0, 1.0]])
    np.testing.assert_array_equal(whole[:2, :, 3], [[1, 1, 0, 0, 0, 0]] * 2)

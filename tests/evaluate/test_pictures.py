"""Pictures of models of images: each pixel drawn is one that the model computes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.testing import assert_close

from guides import Amortized, Exact, Local
from ppl_models import PPCA, VAE
from ppl_models.core.picture import COLOURS, Picture
from ppl_models.evaluate import (
    encode,
    plot_interpolation,
    plot_latents,
    plot_reconstructions,
    plot_samples,
    reconstruct,
)
from ppl_models.parts.likelihoods import Gaussian

SHAPE = (3, 4)


def setting(rows=12, latent_dim=2) -> Any:
    model = VAE(data_dim=12, latent_dim=latent_dim, hidden=(5,))
    return model, Amortized(model, hidden=(5,)), model(size=rows).detach()


def drawn(figure) -> Any:
    figure.savefig(io.BytesIO())
    return figure


def tiles(image, lines, columns) -> torch.Tensor:
    """Cut the images out of the one that was drawn."""
    whole = image.get_array()
    height, width = whole.shape[0] // lines, whole.shape[1] // columns
    gap = max(1, round(height / 9))
    cut = np.asarray(whole).reshape(lines, height, columns, width, *whole.shape[2:]).swapaxes(1, 2)
    return torch.tensor(cut[:, :, : height - gap, : width - gap])


def same(image, lines, columns, want) -> None:
    got = tiles(image, lines, columns)
    assert_close(got, want.reshape(got.shape).to(got), atol=1e-6, rtol=1e-6)


def test_data_are_above_and_reconstructions_below() -> None:
    model, guide, x = setting()
    figure = drawn(plot_reconstructions(model, guide, x, image_shape=SHAPE, rows=5, seed=3))
    (ax,) = figure.axes
    (image,) = ax.images
    want = reconstruct(model, guide, x[:5], seed=3)["x"]
    same(image, 2, 5, torch.stack([x[:5], want]))
    assert ax.get_title(loc="left") == "Reconstructions: VAE with Amortized"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["data", "reconstruction"]
    assert image.get_clim() == (0.0, 1.0)
    assert image.get_cmap().name == "gray"
    dark = plot_reconstructions(model, guide, x, image_shape=SHAPE, cmap="gray_r").axes[0].images[0]
    assert dark.get_cmap().name == "gray_r"


def test_only_the_rows_drawn_are_looked_at() -> None:
    model, guide, x = setting(rows=50)
    met = []

    def watched(x) -> Any:
        met.append(len(x))
        return guide(x)

    plot_reconstructions(model, watched, x, image_shape=SHAPE, rows=4)
    plot_interpolation(model, watched, x, image_shape=SHAPE, pairs=2)
    assert set(met) == {4}
    plot_reconstructions(model, guide, x[:3], image_shape=SHAPE, rows=10)  # fewer than asked for


def test_a_guide_with_parameters_for_each_row_finds_its_rows() -> None:
    model, _, x = setting(latent_dim=3)
    guide = Local(model, rows=len(x))
    for parameter in guide.parameters():
        parameter.data.normal_()
    (ax,) = plot_reconstructions(model, guide, x, image_shape=SHAPE, rows=4, draws=1000).axes
    exact = reconstruct(model, guide, x, draws=1000)["x"][:4]
    got = tiles(ax.images[0], 2, 4)[1].reshape(4, 12)
    assert (got - exact).abs().max() < 5 * 0.5 / 1000**0.5 * 2**0.5
    (ax,) = plot_interpolation(model, guide, x, image_shape=SHAPE, pairs=2, steps=2).axes
    means = encode(model, guide, x)["z"][:4]
    same(ax.images[1], 2, 2, model.likelihood(means).mean.detach())


def test_guides_of_pyro_take_all_rows() -> None:
    model = PPCA(12, 2)
    x = model(size=9).detach()
    guide = AutoNormal(model)
    guide(x)
    figure = plot_reconstructions(model, guide, x, image_shape=SHAPE, rows=4, seed=0)
    same(
        figure.axes[0].images[0],
        2,
        4,
        torch.stack([x, reconstruct(model, guide, x, seed=0)["x"]])[:, :4],
    )
    plot_interpolation(model, guide, x, image_shape=SHAPE, pairs=2)
    plot_latents(model, guide, x)


def test_samples_are_the_means_of_rows_given_their_latents() -> None:
    model, _, _ = setting()
    torch.manual_seed(5)
    trace = poutine.trace(model).get_trace(size=7)
    figure = drawn(plot_samples(model, 7, image_shape=SHAPE, seed=5))
    (ax,) = figure.axes
    want = torch.full((9, 12), torch.nan)
    want[:7] = model.likelihood(trace.nodes["z"]["value"]).mean.detach()
    got = tiles(ax.images[0], 3, 3).reshape(9, 12)
    assert_close(got[:7], want[:7])
    assert ax.images[0].get_array().mask[-1].all()  # a gap
    assert ax.images[0].get_array()[-4:, 5:].mask.all()  # what is not drawn is blank
    assert ax.get_title(loc="left") == "Samples: VAE, means given latents"
    draws = plot_samples(model, 7, image_shape=SHAPE, seed=5, means=False)
    got = tiles(draws.axes[0].images[0], 3, 3).reshape(9, 12)[:7]
    assert_close(got, trace.nodes["x"]["value"])
    assert draws.axes[0].get_title(loc="left") == "Samples: VAE, draws"
    stretched = plot_samples(model, 7, image_shape=SHAPE, value_range=(0.2, 0.8))
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert stretched.axes[0].images[0].get_clim() == (0.2, 0.8)


def test_colour_images_are_drawn_in_colour_from_rows_of_their_shape() -> None:
    model = VAE(data_dim=(3, 4, 5), latent_dim=2, hidden=(5,), likelihood=Gaussian())
    guide = Amortized(model, hidden=(5,))
    x = model(size=4).detach()
    image = drawn(plot_reconstructions(model, guide, x, seed=0)).axes[0].images[0]
    low, high = np.quantile(x.numpy(), [0.01, 0.99])
    want = torch.stack([x, reconstruct(model, guide, x, seed=0)["x"]]).movedim(2, -1)
    got = tiles(image, 2, 4)
    assert_close(got[..., :3], ((want - low) / (high - low)).clamp(0, 1))
    assert (got[..., 3] == 1).all()


def test_the_way_between_two_rows_is_straight_in_the_latents() -> None:
    model, guide, x = setting()
    (ax,) = drawn(plot_interpolation(model, guide, x, image_shape=SHAPE, pairs=3, steps=5)).axes
    left, between, right = ax.images
    z = encode(model, guide, x)["z"]
    same(left, 3, 1, x[:6:2])
    same(right, 3, 1, x[1:6:2])
    way = torch.linspace(0, 1, 5)[:, None]
    points = torch.stack([(1 - way) * z[2 * k] + way * z[2 * k + 1] for k in range(3)])
    same(between, 3, 5, model.likelihood(points).mean.detach())
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["data", "0", "1/4", "2/4", "3/4", "1", "data"]
    for tick, image in zip(ax.get_xticks()[[0, 1, -1]], (left, between, right), strict=True):
        edge = image.get_extent()
        middle = (image.get_extent()[0] + edge[1]) / 2
        assert abs(tick - middle) < 3
        assert edge[0] < tick < edge[1]
    assert ax.get_title(loc="left") == "Interpolation: VAE with Amortized"


def test_pairs_are_as_many_as_the_rows_allow() -> None:
    model, guide, x = setting(rows=5)
    (ax,) = plot_interpolation(model, guide, x, image_shape=SHAPE).axes
    assert tiles(ax.images[0], 2, 1).shape[0] == 2
    with pytest.raises(ValueError, match="at least two rows.*got 1"):
        plot_interpolation(model, guide, x[:1], image_shape=SHAPE)


def mixed(x, y) -> Any:
    """A user's function: covariates, a global, two continuous latents and a discrete one."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 12), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        loc = torch.stack([a, b], -1) @ weight + y[:, None] + 10.0 * kind[:, None]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def mixed_guide(x, y) -> Any:
    pyro.sample("weight", dist.Delta(torch.arange(24.0).reshape(2, 12), event_dim=2))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Delta(torch.arange(len(x)) % 3))
        pyro.sample("a", dist.Delta(x[:, 0]))
        pyro.sample("b", dist.Delta(x[:, 1].exp()))


def test_several_latents_move_together_and_all_else_is_that_of_the_first_row() -> None:
    x, y = torch.randn(4, 12), torch.randn(4)
    options = {"image_shape": SHAPE, "steps": 3, "seed": 0}
    (ax,) = drawn(plot_interpolation(mixed, mixed_guide, (x, y), **options)).axes
    weight = torch.arange(24.0).reshape(2, 12)
    latents = torch.stack([x[:, 0], x[:, 1].exp()], -1)
    want = torch.stack(
        [
            (latents[k] + share * (latents[k + 1] - latents[k])) @ weight + y[k] + 10.0 * (k % 3)
            for k in (0, 2)
            for share in (0.0, 0.5, 1.0)
        ]
    )
    same(ax.images[1], 2, 3, want)
    figure = plot_latents(mixed, mixed_guide, (x, y))
    assert figure.axes[0].get_xlabel() == "posterior mean of a"
    (cloud,) = figure.axes[0].collections
    assert_close(torch.tensor(np.asarray(cloud.get_offsets())), latents)
    plot_reconstructions(mixed, mixed_guide, (x, y), image_shape=SHAPE)


def test_a_latent_in_a_second_plate_is_laid_out_by_rows() -> None:
    def model(x) -> Any:
        with pyro.plate("pixels", 12, dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x) -> Any:
        with pyro.plate("pixels", 12, dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x / 3, 1.0))

    x = torch.randn(12, 12)
    figure = drawn(plot_interpolation(model, guide, x, image_shape=SHAPE, pairs=6, steps=2))
    left, between, _ = figure.axes[0].images
    same(left, 6, 1, x.mT[0::2])
    same(between, 6, 2, 2 * x.mT / 3)


def test_two_units_are_drawn_as_they_are_and_coloured_by_label() -> None:
    model, guide, x = setting(rows=30)
    y = torch.arange(30) % 3
    (ax,) = drawn(plot_latents(model, guide, x, y)).axes
    means = encode(model, guide, x)["z"].numpy()
    for k, cloud in enumerate(ax.collections):
        np.testing.assert_allclose(cloud.get_offsets(), means[k::3])
        assert to_hex(cloud.get_facecolor()[0, :3]) == COLOURS[k]
        text = ax.texts[k]
        assert text.get_text() == str(k)
        np.testing.assert_allclose(text.get_position(), np.median(means[k::3], 0))
    assert len({cloud.get_paths()[0].vertices.shape for cloud in ax.collections}) > 1  # markers
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "posterior mean of z[0]",
        "posterior mean of z[1]",
    )
    assert ax.get_title(loc="left") == "Latents of 30 rows: VAE with Amortized"


def test_more_units_are_seen_from_where_they_vary_most() -> None:
    model = PPCA(12, 5)
    x = model(size=40).detach()
    (ax,) = drawn(plot_latents(model, Exact(model), x)).axes
    means = encode(model, Exact(model), x)["z"].numpy()
    centred = means - means.mean(0)
    _, scale, directions = np.linalg.svd(centred, full_matrices=False)
    (cloud,) = ax.collections
    want = centred @ directions[:2].T
    got = np.asarray(cloud.get_offsets())
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-9)
    share = scale**2 / (scale**2).sum()
    assert ax.get_xlabel() == f"first direction ({share[0]:.0%} of the variance of 5 units)"
    assert ax.get_ylabel() == f"second direction ({share[1]:.0%} of the variance of 5 units)"


def test_one_unit_is_a_histogram_by_label() -> None:
    model = PPCA(12, 1)
    x = model(size=40).detach()
    (ax,) = drawn(plot_latents(model, Exact(model), x, ["b", "a"] * 20)).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert sum(bar.get_height() for bar in ax.patches) == 40
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("posterior mean of z[0]", "rows")


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_labels_on_a_scale_get_a_bar_of_colours(latent_dim) -> None:
    model = PPCA(12, latent_dim)
    x = model(size=40).detach()
    figure = drawn(plot_latents(model, Exact(model), x, x.sum(1)))
    ax, bar = figure.axes
    np.testing.assert_allclose(ax.collections[0].get_array(), x.sum(1))
    assert bar.get_ylabel() == "label"
    assert ax.get_legend() is None


def test_a_second_panel_is_what_the_model_expects_at_quantiles_of_the_prior() -> None:
    model, guide, x = setting()
    figure = drawn(plot_latents(model, guide, x, image_shape=SHAPE, grid=4))
    _, panel = figure.axes
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(4) + 0.5) / 4)
    want = torch.stack(
        [
            model.likelihood(torch.stack([quantiles[column], quantiles[3 - line]])).mean.detach()
            for line in range(4)
            for column in range(4)
        ]
    )
    same(panel.images[0], 4, 4, want)
    assert [t.get_text() for t in panel.get_xticklabels()] == [f"{q:.2f}" for q in quantiles]
    heights = {
        t.get_text(): y for t, y in zip(panel.get_yticklabels(), panel.get_yticks(), strict=True)
    }
    assert heights[f"{quantiles[3]:.2f}"] < heights[f"{quantiles[0]:.2f}"]  # lines fall
    assert panel.get_xlabel() == "z[0], at quantiles of the prior"
    assert len(plot_latents(*setting(latent_dim=3), image_shape=SHAPE).axes) == 1


def test_a_prior_without_quantiles_is_drawn_from() -> None:
    class Pushed(nn.Module):
        def forward(self, x) -> Any:
            with pyro.plate("data", len(x)):
                flow = [dist.transforms.planar(2)]
                z = pyro.sample(
                    "z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), flow)
                )
                pyro.sample("x", dist.Normal(z.repeat(1, 6), 1.0).to_event(1), obs=x)

    def guide(x) -> Any:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    x = torch.randn(6, 12)
    first, second = (
        plot_latents(Pushed(), guide, x, image_shape=SHAPE, grid=3, seed=1).axes[1] for _ in "ab"
    )
    assert first.images[0].get_array().shape == second.images[0].get_array().shape


def test_pictures_are_drawn_into_the_axes_given() -> None:
    model, guide, x = setting()
    own = Figure()
    axes = own.subplots(1, 5)
    options = {"image_shape": SHAPE}
    assert plot_reconstructions(model, guide, x, ax=axes[0], **options) is own
    assert plot_samples(model, ax=axes[1], **options) is own
    assert plot_interpolation(model, guide, x, ax=axes[2], **options) is own
    assert plot_latents(model, guide, x, ax=axes[3:], **options) is own
    assert [len(ax.images) for ax in axes] == [1, 1, 3, 0, 1]
    assert plot_latents(model, guide, x, ax=axes[3]) is own
    assert len(axes[3].collections) == 2
    with pytest.raises(ValueError, match="ax must be 2 axes, one a panel, got 1"):
        plot_latents(model, guide, x, ax=axes[3], **options)
    assert isinstance(plot_samples(model, **options), Picture)


def test_a_look_leaves_everything_as_it_was() -> None:
    torch.set_default_dtype(torch.float32)
    model, _, _ = setting()
    guide = Amortized(model, encoder=nn.Sequential(nn.Linear(12, 4), nn.Dropout(0.5)))
    x = model(size=8).detach()
    model.train(), guide.train()
    modes = [m.training for p in (model, guide) for m in p.modules()]
    state, names = torch.get_rng_state(), set(pyro.get_param_store())
    plots = [
        lambda seed: plot_reconstructions(model, guide, x, image_shape=SHAPE, seed=seed),
        lambda seed: plot_samples(model, image_shape=SHAPE, seed=seed),
        lambda seed: plot_interpolation(model, guide, x, image_shape=SHAPE, seed=seed),
        lambda seed: plot_latents(model, guide, x, image_shape=SHAPE, seed=seed),
    ]
    for plot in plots:
        first, second = (drawn(plot(1)).axes[-1].images[-1].get_array() for _ in "ab")
        np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pyro.get_param_store()) == names
    assert [m.training for p in (model, guide) for m in p.modules()] == modes
    assert all(v.grad is None for p in (model, guide) for v in p.parameters())
    plots[0](None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_numpy_data_are_drawn_like_tensors() -> None:
    model, guide, x = setting()
    plot_reconstructions(model, guide, x.numpy(), image_shape=SHAPE)
    plot_latents(model, guide, x.numpy(), np.arange(12) % 2 == 0, image_shape=SHAPE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_a_gpu_are_drawn() -> None:
    model, guide, x = setting()
    model.cuda(), guide.cuda()
    drawn(plot_reconstructions(model, guide, x, image_shape=SHAPE))
    drawn(plot_samples(model, image_shape=SHAPE))
    drawn(plot_interpolation(model, guide, x.cuda(), image_shape=SHAPE))
    drawn(plot_latents(model, guide, x, torch.arange(12).cuda() % 3, image_shape=SHAPE))
    drawn(plot_interpolation(mixed, mixed_guide, (x.cuda(), x[:, 0].cuda()), image_shape=SHAPE))


def test_what_cannot_be_drawn_is_refused_in_a_line() -> None:
    model, guide, x = setting()
    for plot in (plot_reconstructions, plot_interpolation):
        with pytest.raises(
            ValueError, match=r"rows of shape \(12,\).*image_shape=\(height, width\)"
        ):
            plot(model, guide, x)
        with pytest.raises(ValueError, match=rf"{plot.__name__}: .*needs rows of 64 elements"):
            plot(model, guide, x, image_shape=(8, 8))
    with pytest.raises(ValueError, match="plot_samples: image_shape="):
        plot_samples(model, image_shape=(8, 8))
    with pytest.raises(ValueError, match=r"value_range must be .low, high.*got \(1, 0\)"):
        plot_samples(model, image_shape=SHAPE, value_range=(1, 0))
    with pytest.raises(ValueError, match="mixed takes no `size=`"):
        plot_samples(mixed, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"one label for each of 12 rows.*\(3,\)"):
        plot_latents(model, guide, x, [1, 2, 3])
    with pytest.raises(ValueError, match=r"at most 20 classes.*got 30 different"):
        plot_latents(model, guide, model(size=30).detach(), [f"c{k}" for k in range(30)])
    for options in ({"rows": 0}, {"rows": 2.5}):
        with pytest.raises(ValueError, match="rows must be an integer >= 1"):
            plot_reconstructions(model, guide, x, image_shape=SHAPE, **options)
    for options in ({"pairs": 0}, {"steps": 1}):
        with pytest.raises(ValueError, match="must be an integer >="):
            plot_interpolation(model, guide, x, image_shape=SHAPE, **options)


def discrete(x) -> Any:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z[:, None].expand(-1, 12), 1.0).to_event(1), obs=x)


def discrete_guide(x) -> Any:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.3)))


def test_discrete_latents_have_nothing_between_them() -> None:
    x = torch.randn(4, 12)
    for plot in (plot_latents, plot_interpolation):
        with pytest.raises(ValueError, match=r"continuous latent for each row.*are \['z'\]"):
            plot(discrete, discrete_guide, x, image_shape=SHAPE)
    drawn(plot_reconstructions(discrete, discrete_guide, x, image_shape=SHAPE))


def test_a_likelihood_without_a_mean_is_drawn_only_as_it_falls() -> None:
    def model(x=None, *, size=None) -> Any:
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            warped = dist.TransformedDistribution(
                dist.Normal(z[:, None].expand(-1, 12), 1.0).to_event(1),
                [dist.transforms.TanhTransform()],
            )
            return pyro.sample("x", warped, obs=x)

    with pytest.raises(ValueError, match="site 'x' has no mean in closed form.*means=False"):
        plot_samples(model, image_shape=SHAPE)
    drawn(plot_samples(model, image_shape=SHAPE, means=False))

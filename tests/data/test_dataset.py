"""A data set: made binary, standardised, told in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from ppl_models.data import Dataset, Dynamic, load


def grey(rows: int = 400) -> Dataset:
    x = torch.rand(rows + 300, 6, generator=torch.Generator().manual_seed(1)).float()
    x[:, 0], x[:, 1] = 0, 1
    return Dataset("grey", None, x[:rows], None, x[-100:], None, x_valid=x[rows:-100])


def table() -> Dataset:
    draw = torch.Generator().manual_seed(2)
    x = (torch.randn(60, 3, generator=draw) * 5 + 2000).float()
    x[:, 1] = 7.3
    y = (torch.randn(60, generator=draw) * 3 - 40).float()
    return Dataset("table", None, x[:40], y[:40], x[40:], y[40:])


def test_threshold_is_one_from_a_half_on() -> None:
    half = torch.tensor([[0.0, 0.499, 0.5, 1.0]])
    data = Dataset("grey", None, half, None, half, None, x_valid=half).binarized("threshold")
    for part in (data.x, data.x_test, data.x_valid):
        assert part.tolist() == [[0, 0, 1, 1]]
        assert part.dtype == torch.float32
    assert data.binarize == "threshold"


def test_static_is_one_draw_with_the_grey_value_for_its_mean() -> None:
    data = grey()
    first, second = data.binarized("static"), data.binarized("static")
    for part in ("x", "x_test", "x_valid"):
        p, x = getattr(data, part), getattr(first, part)
        assert torch.equal(x, getattr(second, part))
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert x.dtype == torch.float32
        error = (x - p).mean(0).abs()
        assert bool((error <= 5 * (p * (1 - p)).mean(0).div(len(p)).sqrt()).all())
    assert first.binarize == "static"


def test_parts_are_drawn_independently() -> None:
    x = torch.full((50, 4), 0.5)
    data = Dataset("grey", None, x, None, x, None, x_valid=x).binarized("static")
    assert not torch.equal(data.x, data.x_test)
    assert not torch.equal(data.x, data.x_valid)
    assert not torch.equal(data.x_test, data.x_valid)


def test_dynamic_is_drawn_anew_and_its_test_rows_once() -> None:
    data = grey()
    state = torch.get_rng_state()
    dynamic = data.binarized("dynamic")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(dynamic.x, Dynamic)
    assert torch.equal(dynamic.x.probabilities, data.x)
    assert not torch.equal(dynamic.x.draw(), dynamic.x.draw())
    assert torch.equal(dynamic.x_test, data.binarized("dynamic").x_test)
    assert set(dynamic.x_test.unique().tolist()) == {0.0, 1.0}
    assert set(dynamic.x_valid.unique().tolist()) == {0.0, 1.0}


def test_what_cannot_be_made_binary_says_why() -> None:
    with pytest.raises(ValueError, match=r"grey: binarize must be None, 'threshold', .* 'dynamc'"):
        grey().binarized("dynamc")
    with pytest.raises(ValueError, match=r"table: binarize='static' needs grey values in \[0, 1\]"):
        table().binarized("static")
    with pytest.raises(ValueError, match=r"grey is binary already \(dynamic\)"):
        grey().binarized("dynamic").binarized("static")
    outside = dataclasses.replace(grey(), x_test=torch.full((1, 6), 1.5))
    with pytest.raises(ValueError, match=r"got values from 0 to 1\.5"):
        outside.binarized("threshold")
    with (
        pytest.warns(UserWarning, match="constant"),
        pytest.raises(ValueError, match="grey is standardised: binarise it before"),
    ):
        grey().standardized().binarized("threshold")
    assert grey().binarized(None).binarize is None


def test_standardised_rows_have_mean_zero_and_scale_one_over_the_training_rows() -> None:
    raw = table()
    with pytest.warns(
        UserWarning, match=r"table: 1 of 3 columns are constant .* keep scale 1: 1\."
    ):
        data = raw.standardized()
    kept = [0, 2]
    assert_close(data.x.mean(0), torch.zeros(3).float(), atol=1e-5, rtol=0)
    assert_close(data.x[:, kept].square().mean(0), torch.ones(2).float(), atol=1e-5, rtol=0)
    assert_close(data.y.mean(), torch.tensor(0.0).float(), atol=1e-5, rtol=0)
    assert_close(data.y.square().mean(), torch.tensor(1.0).float(), atol=1e-5, rtol=0)
    for name in ("x", "x_test"):
        back = getattr(data, name) * data.scale + data.loc
        assert_close(back, getattr(raw, name), atol=1e-3, rtol=0)
    assert_close(data.y_test * data.y_scale + data.y_loc, raw.y_test)
    assert data.scale[1].item() == 1.0
    assert (data.x[:, 1] == 0).all()
    assert data.x.dtype == data.y.dtype == data.loc.dtype == data.scale.dtype == torch.float32
    assert raw.loc is None
    assert data.standardized() is data


def test_classes_are_not_standardised_and_validation_rows_are() -> None:
    x = torch.arange(12.0).reshape(6, 2).float()
    y = torch.arange(6) % 3
    raw = Dataset("c", None, x, y, x, y, classes=3, x_valid=x + 1, y_valid=y, halves=(x, x))
    data = raw.standardized()
    assert torch.equal(data.y, y)
    assert torch.equal(data.y_valid, y)
    assert data.y_loc is None
    assert_close(data.x_valid, (x + 1 - x.mean(0)) / x.std(0, correction=0))
    assert data.halves is None
    continuous = dataclasses.replace(raw, y=y.float(), y_test=y.float(), classes=None)
    continuous = dataclasses.replace(continuous, y_valid=y.float() + 1).standardized()
    assert_close(continuous.y_valid, (y.float() + 1 - 1) / (2 / 3) ** 0.5)
    same = torch.full((6,), 3.0).float()
    constant = dataclasses.replace(raw, y=same, y_test=same, classes=None, y_valid=None)
    assert constant.standardized().y.tolist() == [0.0] * 6


@pytest.mark.parametrize("how", ["threshold", "dynamic"])
def test_binary_rows_are_not_standardised(how) -> None:
    with pytest.raises(
        ValueError, match=rf"digits is binary \({how}\).*Load it with binarize=None"
    ):
        load("digits", binarize=how).standardized()


def test_a_data_set_tells_its_rows_range_and_labels() -> None:
    assert repr(load("digits", binarize="dynamic")) == (
        "Dataset digits: 1437 rows + 360 test, 64 values in [0, 1], images of 8 x 8, "
        "binary (dynamic), 10 classes"
    )
    assert str(grey()) == (
        "Dataset grey: 400 rows + 200 valid + 100 test, 6 values in [0, 1], no labels"
    )
    with pytest.warns(UserWarning, match="constant"):
        assert repr(table().standardized()).endswith("], standardised, y continuous")

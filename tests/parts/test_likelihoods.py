"""Likelihoods: from a decoder's numbers to a density."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ppl_models import VAE
from ppl_models.parts.likelihoods import (
    Bernoulli,
    Categorical,
    Classes,
    Counts,
    Gaussian,
    Homoscedastic,
)

SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)
EVENTS = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)


@settings(deadline=None, max_examples=25)
@given(batch=SHAPES, event=EVENTS, seed=st.integers(0, 2**31))
def test_bernoulli_is_that_of_scipy(batch: Any, event: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(*batch, 1, *event))
    x = random.integers(0, 2, size=(*batch, *event)).astype(float)
    fn: Any = Bernoulli()(torch.tensor(logits), len(event))
    assert (fn.batch_shape, fn.event_shape) == (batch, event)
    rate = 1 / (1 + np.exp(-logits.reshape(*batch, *event)))
    axes = tuple(range(-len(event), 0))
    assert_close(
        fn.log_prob(torch.tensor(x)), torch.tensor(scipy.stats.bernoulli.logpmf(x, rate).sum(axes))
    )


@settings(deadline=None, max_examples=25)
@given(batch=SHAPES, event=EVENTS, seed=st.integers(0, 2**31), least=st.sampled_from([0.0, 0.2]))
def test_gaussian_is_that_of_scipy(batch: Any, event: Any, seed: int, least: float) -> None:
    random = np.random.default_rng(seed)
    loc, log_square = random.normal(size=(2, *batch, *event))
    x = random.normal(size=(*batch, *event))
    outputs = torch.tensor(np.stack([loc, log_square], axis=len(batch)))
    fn: Any = Gaussian(min_scale=least)(outputs, len(event))
    assert (fn.batch_shape, fn.event_shape) == (batch, event)
    axes = tuple(range(-len(event), 0))
    want = scipy.stats.norm.logpdf(x, loc, least + np.exp(log_square / 2)).sum(axes)
    assert_close(fn.log_prob(torch.tensor(x)), torch.tensor(want))


@settings(deadline=None, max_examples=25)
@given(batch=SHAPES, event=EVENTS, seed=st.integers(0, 2**31), classes=st.integers(2, 4))
def test_categorical_is_the_logit_less_their_log_sum(
    batch: Any, event: Any, seed: int, classes: int
) -> None:
    random = np.random.default_rng(seed)
    outputs = random.normal(size=(*batch, classes, *event))
    codes = random.integers(0, classes, size=(*batch, *event))
    fn: Any = Categorical(classes)(torch.tensor(outputs), len(event))
    assert (fn.batch_shape, fn.event_shape) == (batch, (*event, classes))
    logits = np.moveaxis(outputs, len(batch), -1)
    chosen = np.take_along_axis(logits, codes[..., None], -1)[..., 0]
    axes = tuple(range(-len(event), 0))
    want = (chosen - scipy.special.logsumexp(logits, axis=-1)).sum(axes)
    x = torch.nn.functional.one_hot(torch.tensor(codes), classes).double()
    assert_close(fn.log_prob(x), torch.tensor(want))


def test_sizes_are_the_numbers_for_each_element() -> None:
    assert [Bernoulli().size, Gaussian().size, Categorical(5).size] == [1, 2, 5]


def test_the_scale_never_falls_below_its_minimum() -> None:
    fn: Any = Gaussian(min_scale=0.25)(torch.tensor([[0.0], [-200.0]]), 1)
    assert fn.base_dist.scale.item() == 0.25
    assert_close(fn.log_prob(torch.zeros(1)).item(), -math.log(0.25 * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_negative_minimum_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Gaussian: min_scale must be >= 0, got"):
        Gaussian(min_scale=value)


@pytest.mark.parametrize("classes", [1, 0])
def test_a_single_class_is_refused(classes: int) -> None:
    with pytest.raises(
        ValueError, match=f"Categorical: classes must be an integer >= 2, got {classes}"
    ):
        Categorical(classes)


@settings(deadline=None, max_examples=25)
@given(batch=SHAPES, event=EVENTS, seed=st.integers(0, 2**31))
def test_one_scale_classes_and_counts_are_those_of_scipy(batch: Any, event: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    outputs = random.normal(size=(*batch, 3, *event))
    lead, events = outputs[..., :1, *(slice(None),) * len(event)], len(event)
    loc = np.squeeze(lead, -events - 1)
    x = random.normal(size=loc.shape)
    scale = random.uniform(0.5, 2.0, size=batch)
    wide = scale.reshape(*batch, *(1,) * events)
    codes = random.integers(0, 3, size=loc.shape)
    shares = scipy.special.softmax(outputs, -events - 1)
    of_code = np.take_along_axis(shares, np.expand_dims(codes, -events - 1), -events - 1)
    n = scipy.stats.norm
    for fn, value, want in (
        (Homoscedastic(0.3)(torch.tensor(lead), events), x, n(loc, 0.3).logpdf(x)),
        (
            Homoscedastic()(torch.tensor(lead), events, noise_scale=torch.tensor(scale)),
            x,
            n(loc, wide).logpdf(x),
        ),
        (Classes(3)(torch.tensor(outputs), events), codes, np.log(of_code.squeeze(-events - 1))),
        (
            Counts()(torch.tensor(lead), events),
            codes.astype(float),
            scipy.stats.poisson(np.exp(loc)).logpmf(codes),
        ),
    ):
        made: Any = fn
        assert (made.batch_shape, made.event_shape) == (batch, event)
        axes = tuple(range(-events, 0))
        assert_close(made.log_prob(torch.tensor(value)), torch.tensor(want.sum(axes)))


def test_a_scale_to_be_inferred_needs_a_model_that_does() -> None:
    assert VAE(4, 2, likelihood=Homoscedastic(0.1))(size=3).shape == (3, 4)
    vae = VAE(4, 2, likelihood=Homoscedastic())
    with pytest.raises(ValueError, match="infers no latents of its likelihood. Give a known scale"):
        vae(size=3)

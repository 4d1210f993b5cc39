"""A number with its error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ppl_models.evaluate import Estimate


def test_an_estimate_prints_its_value_and_its_error() -> None:
    estimate = Estimate(-1.23456, 0.01234, None, None, 10)
    assert str(estimate) == "-1.235 +- 0.012 nats/row"


def test_an_estimate_shows_no_rows_and_takes_no_changes() -> None:
    estimate = Estimate(-1.0, 0.1, torch.arange(1000.0), torch.ones(1000), 10, -0.005)
    assert repr(estimate) == "Estimate(mean=-1.0, se=0.1, particles=10, bias=-0.005)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.mean = 0.0

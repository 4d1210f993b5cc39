"""What users met: each test is of something that once crashed, or was wrong without a word."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from ppl_models.infer import NUTS, Posterior, sample

Y = torch.tensor([1.0, 2.0, 3.0])


def drawn(model: Any, *batch: Tensor, **options: Any) -> Posterior:
    chosen = {"chains": 4, "draws": 200, "warmup": 200, "seed": 0, "compile": False} | options
    return sample(model, *batch, progress=False, **chosen)


def scalar_rows(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_rows_with_scalar_latents_print() -> None:
    found = drawn(scalar_rows, Y, rows=True, draws=40)
    assert found.stuck.shape == (4, 3)
    assert "z[2]" in str(found)


@pytest.mark.parametrize("text", [str, repr, "{:.2f}".format], ids=["str", "repr", "format"])
def test_a_latent_turned_into_text_stops_nothing(text: Any) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        text(loc)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    assert drawn(model, Y, draws=10, warmup=10).compiled.startswith("traced graph")


PRIOR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
WILD = dist.LogNormal(0.0, 300.0).expand([1]).to_event(1)


def test_priors_made_beforehand_check_nothing() -> None:
    found = drawn(lambda: pyro.sample("x", PRIOR), draws=20, warmup=20)
    assert found.compiled == "traced graph"
    drawn(lambda: pyro.sample("x", WILD), draws=20, warmup=40)

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear: Any = PyroModule[nn.Linear](1, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

        def forward(self, y: Tensor) -> None:
            loc = self.linear(torch.ones(len(y), 1)).squeeze(-1)
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    assert drawn(Regression(), Y, draws=20, warmup=20).compiled == "traced graph"


def test_draws_are_not_rounded_to_a_few_values() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        found = drawn(lambda: pyro.sample("x", dist.Normal(1e6, 1e-2)), draws=500, warmup=500)
        assert found["x"].dtype == torch.float64
        assert found["x"].std().item() == pytest.approx(0.01, rel=0.15)
        assert not found.stuck.any()
        assert drawn(lambda: pyro.sample("x", dist.Normal(0, 1)))["x"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def numbered(y: Tensor) -> None:
    with pyro.plate("data", len(y)) as i:
        z = pyro.sample("z", dist.Normal(i.to(y.dtype), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def centred(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z - z.mean(), 0.5), obs=y)


def scaled(y: Tensor) -> None:
    with pyro.plate("data", 100, subsample=torch.arange(len(y))):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


@pytest.mark.parametrize("model", [numbered, centred, scaled])
def test_rows_that_depend_on_each_other_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"rows=True takes each row by itself.*rows=False"):
        drawn(model, Y, rows=True)


def test_a_model_that_needs_all_rows_is_refused_row_by_row() -> None:
    shift = torch.tensor([0.0, 10.0, 20.0])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    with pytest.raises(ValueError, match=r"rows=True runs .* on single rows.*rows=False"):
        drawn(model, Y, rows=True)


def test_a_latent_that_nothing_constrains_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing .* says where 'x' is"):
        drawn(lambda: pyro.sample("x", dist.Normal(0.0, 1.0).mask(False)))
    flat_but_bounded = drawn(lambda: pyro.sample("x", dist.Uniform(2.0, 3.0)))
    assert flat_but_bounded["x"].mean().item() == pytest.approx(2.5, abs=0.1)


def test_places_of_observed_values_stay_near_0() -> None:
    """Pyro has a latent for each value of a site that is observed in part: for observed ones, too."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            seen = torch.tensor([True, True, False])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y, obs_mask=seen)

    found = drawn(model, Y, draws=1000, warmup=300, chains=8)
    assert found["loc"].mean().item() == pytest.approx(1.0, abs=0.05)  # (1 + 2) / 3
    assert found["loc"].std().item() == pytest.approx(3**-0.5, rel=0.05)
    values = found["y_unobserved"]
    assert values.mean((0, 1)).tolist() == pytest.approx([0.0, 0.0, 1.0], abs=0.1)
    assert values.std(1).mean(0).tolist() == pytest.approx([1.0, 1.0, (4 / 3) ** 0.5], rel=0.06)
    assert not found.divergences.any()


def test_draws_that_run_off_are_told() -> None:
    found = Posterior({"x": torch.full((4, 50), 1e20) * torch.randn(4, 50)})
    assert "Running off: draws of x" in str(found)
    assert "several modes" not in str(found)


def test_angles_come_back_to_one_turn() -> None:
    found = drawn(lambda: pyro.sample("angle", dist.VonMises(0.5, 4.0)), draws=1000, warmup=500)
    assert found["angle"].abs().max() <= math.pi
    assert found["angle"].mean().item() == pytest.approx(0.5, abs=0.1)


def half_line() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("positive", torch.log(-a))


def empty_support() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Uniform(a, 1.0))


@pytest.mark.parametrize("model", [half_line, empty_support])
def test_one_draw_of_the_prior_without_a_density_refuses_nothing(model: Any) -> None:
    assert torch.isfinite(drawn(model, draws=20)["a"]).all()


def test_guides_that_do_not_fit_are_named_as_such() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def wide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    for guide, words in (
        (wide, r"given as init does not fit.*\(3,\)"),
        (lambda: None, "arguments"),
    ):
        with pytest.raises(ValueError, match=words):
            drawn(model, Y, init=guide)


def test_odd_settings_are_refused() -> None:
    for options, words in (
        ({"max_depth": 2.5}, "max_depth must be of type int, got 2.5"),
        ({"target_accept": "a"}, "target_accept must be of type float, got 'a'"),
        ({"dense": "x"}, "dense must be True or False, got 'x'"),
    ):
        wrong: Any = options
        with pytest.raises(ValueError, match=words):
            NUTS(**wrong)


def test_counts_without_an_end_are_not_told_to_be_summed() -> None:
    def model() -> None:
        pyro.sample("k", dist.Poisson(torch.tensor(2.0)))

    with pytest.raises(ValueError, match="no end, so that they cannot be summed over"):
        drawn(model)


def test_a_single_chain_is_told_what_it_cannot_show() -> None:
    assert "One chain has no R-hat" in str(Posterior({"x": torch.randn(1, 500)}))


def test_parameters_of_functions_keep_their_precision() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    try:

        def model(y: Tensor) -> None:
            scale = pyro.param("attacked_scale", torch.tensor(1.0))
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(loc, scale), obs=y)

        drawn(model, Y.float(), draws=10, warmup=10)
        assert pyro.param("attacked_scale").dtype == torch.float32
    finally:
        pyro.clear_param_store()
        torch.set_default_dtype(before)

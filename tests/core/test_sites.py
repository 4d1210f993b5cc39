"""The site table says what a model is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints

from ppl_models import PPCA, VAE, bayesian
from ppl_models.core.sites import (
    accepts_size,
    argument_names,
    base_support,
    describe,
    describe_program,
    example_batch,
    site_table,
)

KINDS = {
    "normal": (dist.Normal(0.0, 1.0), "real", False),
    "log-normal": (dist.LogNormal(0.0, 1.0), "positive", False),
    "beta": (dist.Beta(1.0, 1.0), "unit interval", False),
    "bernoulli": (dist.Bernoulli(0.5), "boolean", True),
    "poisson": (dist.Poisson(3.0), "non-negative integer", True),
    "categorical": (dist.Categorical(torch.ones(3)), "integers 0 to 2", True),
}


@st.composite
def statements(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(sorted(KINDS))),
        "event": tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        "local": draw(st.booleans()),
        "inner": draw(st.booleans()),
        "role": draw(st.sampled_from(["latent", "observed", "enumerated"])),
    }


@settings(deadline=None, max_examples=40)
@given(
    specs=st.lists(statements(), min_size=1, max_size=5),
    rows=st.integers(1, 4),
    on_left=st.booleans(),
)
def test_the_table_of_a_random_model_is_what_was_written(
    specs: list[dict[str, Any]], rows: int, on_left: bool
) -> None:
    data_dim = -2 if on_left else -1

    def model() -> None:
        data = pyro.plate("data", rows, dim=data_dim)
        inner = pyro.plate("inner", 5, dim=-3 - data_dim)
        for i, spec in enumerate(specs):
            fn = KINDS[spec["kind"]][0].expand(spec["event"]).to_event(len(spec["event"]))
            options: dict[str, Any] = {}
            plates = [p for p, on in ((data, spec["local"]), (inner, spec["inner"])) if on]
            batch = [1] * max((-p.dim for p in plates), default=0)
            for plate in plates:
                batch[plate.dim] = plate.size
            if spec["role"] == "observed":
                options["obs"] = fn.expand(batch).sample()
            if spec["role"] == "enumerated":
                options["infer"] = {"enumerate": "sequential"}
            with ExitStack() as entered:
                for plate in plates:
                    entered.enter_context(plate)
                pyro.sample(f"s{i}", fn, **options)

    table = site_table(model)
    assert [site.name for site in table] == [f"s{i}" for i in range(len(specs))]
    for site, spec in zip(table, specs, strict=True):
        _, words, discrete = KINDS[spec["kind"]]
        suffix = {0: "", 1: " vector", 2: " matrix"}[len(spec["event"])]
        assert describe(site.support) == words + suffix
        assert site.event_shape == spec["event"]
        assert site.discrete == discrete
        assert site.local == spec["local"]
        assert site.data_dim == (data_dim if spec["local"] else None)
        assert site.observed == (spec["role"] == "observed")
        assert site.enumerated == (spec["role"] == "enumerated")
        assert site.latent == (spec["role"] == "latent")
        want = {"data": spec["local"], "inner": spec["inner"]}
        assert sorted(f.name for f in site.plates) == sorted(k for k, on in want.items() if on)
    for role, got in (("latent", table.latents), ("observed", table.observed)):
        want_names = [f"s{i}" for i, spec in enumerate(specs) if spec["role"] == role]
        assert [site.name for site in got] == want_names
    assert {*table.locals, *table.globals} == set(table.latents)
    assert all(site.local for site in table.locals)
    assert not any(site.local for site in table.globals)
    assert table.row_wise == any(spec["local"] for spec in specs)
    dims = [-data_dim for s in specs if s["local"]] + [3 + data_dim for s in specs if s["inner"]]
    assert table.plate_dims == max(dims, default=0)


def test_the_table_reads_like_the_story() -> None:
    model = bayesian(
        PPCA(data_dim=3, latent_dim=1),
        lambda name, w: (
            dist.Normal(torch.zeros_like(w), 1.0).to_event(w.ndim) if name == "loading" else None
        ),
    )
    assert str(site_table(model, model(size=5))).splitlines() == [
        "site     role           plates  batch  event   support",
        "loading  global latent  -       ()     (3, 1)  real matrix",
        "z        local latent   data    (5,)   (1,)    real vector",
        "x        observed       data    (5,)   (3,)    real vector",
    ]


def test_an_unknown_site_is_a_key_error_that_lists_the_sites() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    table = site_table(model, model(size=2))
    assert table["z"].name == "z"
    assert len(table) == 2
    with pytest.raises(KeyError, match=r"no site 'w'; the sites are \['z', 'x'\]"):
        table["w"]


def test_deterministic_and_subsample_statements_are_no_sites() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * w)
        with pyro.plate("data", len(x), subsample_size=2) as chosen:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[chosen])

    table = site_table(model, torch.zeros(5))
    assert [site.name for site in table] == ["w", "x"]
    assert table.subsamples_itself


def test_a_sequential_plate_has_no_dimension_but_its_sites_are_local() -> None:
    def model(x: Tensor) -> None:
        for n in pyro.plate("data", len(x)):
            pyro.sample(f"x_{n}", dist.Normal(0.0, 1.0), obs=x[n])

    table = site_table(model, torch.zeros(2))
    assert [(s.local, s.data_dim) for s in table] == [(True, None), (True, None)]
    assert table.row_wise
    assert table.plate_dims == 0
    assert not table.subsamples_itself


def test_the_plate_over_rows_may_have_another_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("people", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert site_table(model, torch.zeros(3), plate="people")["z"].local
    assert not site_table(model, torch.zeros(3))["z"].local


def test_the_marks_for_enumeration_make_a_latent_nobody_has_to_sample() -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})

    table = site_table(model)
    assert table["k"].enumerated
    assert table.latents == ()
    assert "global enumerated" in str(table)


def test_looking_changes_neither_the_random_stream_nor_the_store() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("w", dist.Exponential(rate))

    before = torch.get_rng_state()
    site_table(model, torch.zeros(2))
    ppca = PPCA(data_dim=3, latent_dim=1)
    state = torch.get_rng_state()
    example_batch(ppca)
    site_table(ppca, torch.zeros(2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    assert before.shape == state.shape


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (constraints.real, "real"),
        (dist.LogNormal(0.0, 1.0).support, "positive"),
        (dist.Dirichlet(torch.ones(3)).support, "simplex"),
        (dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(3).support, "real array of 3 dimensions"),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).support, "real vector"),
        (dist.Binomial(7, torch.tensor(0.5)).support, "integers 0 to 7"),
        (dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)).support, "unit interval"),
    ],
)
def test_supports_have_names(support: Any, words: str) -> None:
    assert describe(support) == words


def test_the_base_of_a_support_counts_what_it_stripped() -> None:
    nested = constraints.independent(constraints.independent(constraints.positive, 1), 2)
    assert base_support(nested) == (constraints.positive, 3)


def test_examples_are_drawn_or_asked_for() -> None:
    vae = VAE(data_dim=4, latent_dim=1, hidden=(2,))
    (x,) = example_batch(vae, size=3)
    assert x.shape == (3, 4)
    assert torch.equal(x, example_batch(vae, size=3)[0])  # from a seed of its own
    assert not x.requires_grad
    given_batch = torch.ones(2)
    assert example_batch(vae, given_batch)[0] is given_batch
    assert example_batch(vae, (given_batch, x))[1] is x

    def conditional(x: Tensor, y: Tensor | None = None) -> None: ...

    with pytest.raises(ValueError, match=r"conditional cannot draw.*example=\(x\[:2\],\)"):
        example_batch(conditional)


def test_programs_are_read_through_their_forward() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    wrapped = bayesian(model, dist.Normal(0.0, 1.0))
    assert accepts_size(model)
    assert accepts_size(wrapped)
    assert not accepts_size(lambda x: x)
    assert argument_names(model, 1) == argument_names(wrapped, 1) == ["x"]
    assert argument_names(lambda a: a, 2) == ["a", "argument 2"]
    assert describe_program(model) == "PPCA"
    assert describe_program(example_batch) == "example_batch"

"""Explanations: each site's log-density is the trace's, and errors carry the sites so far."""

from __future__ import annotations

import math
import traceback
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Exact
from guides.registry import PAIRS
from ppl_models import PPCA, explain
from ppl_models.core.sites import site_table
from ppl_models.evaluate import elbo, encode
from ppl_models.infer import fit, sample


def everything(x: Tensor) -> None:
    """All kinds of statements: flat, enumerated, deterministic, factor, loop, scaled, subsampled."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1).mask(False))
    pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
    total = pyro.deterministic("total", w.sum())
    pyro.factor("pull", -(total**2))
    for i in pyro.plate("loop", 2):
        pyro.sample(f"l_{i}", dist.Gamma(2.0, 3.0))
    with poutine.scale(scale=3.0), pyro.plate("data", len(x), subsample_size=2) as chosen:
        z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([4]).to_event(1))
        with poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", dist.Poisson(z.exp().sum(-1)), obs=x[chosen])


def traced(model: Any, *batch: Tensor, seed: int = 0) -> poutine.Trace:
    torch.manual_seed(seed)
    return poutine.trace(model).get_trace(*batch)


def test_each_log_density_is_that_of_the_trace_and_so_is_the_total() -> None:
    x = torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0])
    explained = explain(everything, x, seed=4)
    trace = traced(everything, x, seed=4)
    for site in explained:
        want = trace.log_prob_sum(lambda name, _, wanted=site.name: name == wanted)
        assert (site.log_density or 0.0) == float(want)
    assert explained.log_density is not None
    assert_close(torch.tensor(explained.log_density), torch.as_tensor(trace.log_prob_sum()))


def test_the_log_densities_are_scipys() -> None:
    x = torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0])
    explained = explain(everything, x)
    value = {site.name: site.value.numpy() for site in explained}
    rate = torch.as_tensor(value["z"]).exp().sum(-1).numpy()
    want = {
        "w": 0.0,  # flat
        "k": -math.log(3),
        "total": None,
        "pull": -(value["w"].sum() ** 2),
        "l_0": scipy.stats.gamma.logpdf(value["l_0"], 2.0, scale=1 / 3),
        "l_1": scipy.stats.gamma.logpdf(value["l_1"], 2.0, scale=1 / 3),
        "z": 3 * 5 / 2 * scipy.stats.norm.logpdf(value["z"], 0.0, 2.0).sum(),
        "x": 3 * 5 / 2 * scipy.stats.poisson.logpmf(value["x"], rate)[0],
    }
    assert [site.name for site in explained] == list(want)
    for name, density in want.items():
        got = explained[name].log_density
        assert got is None if density is None else got == pytest.approx(density, rel=1e-12)


def test_the_table_says_what_each_site_is() -> None:
    explained = explain(everything, torch.arange(5.0))
    lines = [line.split("  ") for line in str(explained).splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines[2:-1]]
    assert [row[:7] for row in cells] == [
        ["w", "global latent", "-", "()", "(3,)", "real vector", "Normal"],
        ["k", "global enumerated", "-", "()", "()", "integers 0 to 2", "Categorical"],
        ["total", "deterministic", "-", "()", "()", "-", "-"],
        ["pull", "factor", "-", "()", "(0,)", "-", "Unit"],
        ["l_0", "global latent", "loop 2 in a loop", "()", "()", "non-negative", "Gamma"],
        ["l_1", "global latent", "loop 2 in a loop", "()", "()", "non-negative", "Gamma"],
        ["z", "local latent", "data 2 of 5 at -1", "(2,)", "(4,)", "real vector", "Normal"],
        ["x", "observed", "data 2 of 5 at -1", "(2,)", "()", "non-negative integer", "Poisson"],
    ]
    assert cells[2][7] == "-"
    assert [row[7] for row in cells if row[0] != "total"] == [
        f"{site.log_density:.3f}" for site in explained if site.name != "total"
    ]
    assert lines[-1][-1].strip() == f"{explained.log_density:.3f}"
    assert len(explained) == 8
    with pytest.raises(KeyError, match=r"no site 'y'; the sites are \['w', 'k'"):
        explained["y"]


def test_a_guide_is_explained_beside_and_the_difference_is_the_bound_of_one_draw() -> None:
    model = PPCA(data_dim=5, latent_dim=2)
    x = model(size=7).detach()
    explained = explain(model, x, guide=Exact(model))
    want = model.log_evidence(x).sum().item()  # whatever is drawn: the guide is exact
    assert explained.elbo == pytest.approx(want, rel=1e-10)
    assert explained.guide is not None
    assert torch.equal(explained["z"].value, explained.guide["z"].value)
    assert f"log p - log q: {want:.3f} nats" in str(explained)
    assert explain(model, x).elbo is None


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_pair_is_explained(pair: Any) -> None:
    model = pair.model()
    batch = pair.batch(model, 4)
    explained = explain(model, *batch, guide=pair.guide(model, 4))
    assert explained.elbo is not None
    assert math.isfinite(explained.elbo)
    assert explained.failure is explained.mismatch is None


def test_a_guide_that_does_not_fit_leaves_no_bound_and_says_why() -> None:
    model = PPCA(data_dim=5, latent_dim=2)
    explained = explain(model, model(size=3), guide=lambda x: None)
    assert explained.elbo is None
    assert "['z'] missing" in str(explained)
    assert explained.log_density is not None  # the model drew for itself


def test_a_program_that_fails_is_explained_as_far_as_it_came() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.zeros(9), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    explained = explain(model, torch.zeros(4), guide=model)
    for half in (explained, explained.guide):
        assert half is not None
        assert [site.name for site in half] == ["z"]
        assert half.log_density is None
        assert half["z"].log_density is not None
        assert half.failure is not None
        assert half.failure.startswith("at site 'y', Normal with batch shape (9,)")
    assert explained.elbo is None
    assert "failed at site 'y'" in str(explained)
    assert "failed before its first site: KeyError: 'x'" in str(explain(lambda: {}["x"]))  # type: ignore[index]


def test_a_site_that_cannot_be_scored_is_named() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    explained = explain(model, torch.zeros(4))
    assert explained.failure is not None
    assert explained.failure.startswith("to score site 'x': ")
    assert [site.log_density is None for site in explained] == [False, True]
    assert explained.log_density is None


def test_explaining_changes_nothing_and_hears_no_handler_outside() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> None:
            loc = pyro.param("loc", torch.zeros(2))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

    model = Model()
    x = torch.randn(6, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    plain = explain(model, x)
    with poutine.scale(scale=100.0), poutine.trace() as outside:
        inside = explain(model, x)
    assert inside.log_density == plain.log_density
    assert len(outside.trace) == 0
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(pyro.get_param_store()) == 0
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert explain(model, x, seed=1).log_density != plain.log_density


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="explain: model must be a Pyro model.*the class PPCA"):
        explain(PPCA)
    with pytest.raises(ValueError, match="explain: guide must be a Pyro guide"):
        explain(everything, torch.zeros(3), guide=Amortized)


# Errors of shapes


def fine(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.ones(4, 5), 1.0).to_event(1), obs=x)


def torn(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.ones(3, 5), 1.0).to_event(1), obs=x)


def wide(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, scale).expand([5]).to_event(1))


def stray(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))


SITES = [
    "site  role    plates        batch  event  value",
    "z     latent  data 6 at -1  (6,)   (4,)",
]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: elbo(torn, fine, x), ["torn failed after site 'z'.", *SITES, "(6, 4)"]),
        (lambda x: fit(torn, fine, x, steps=1), ["torn failed after site 'z'.", *SITES]),
        (lambda x: sample(torn, x, draws=4), ["torn failed after site 'z'.", *SITES]),
        (lambda x: encode(torn, fine, x), ["torn failed after site 'z'.", *SITES]),
        (lambda x: Amortized(torn, example=x), ["torn failed after site 'z'.", *SITES]),
        (lambda x: site_table(torn, x), ["torn failed after site 'z'.", *SITES]),
        # The guide's draws have another width than the model's site: the value tells.
        (lambda x: elbo(fine, wide, x), ["fine failed after site 'z'.", *SITES, "(6, 5)"]),
        (lambda x: fit(fine, wide, x, steps=1), ["fine failed after site 'z'.", *SITES, "(6, 5)"]),
        (
            lambda x: elbo(fine, stray, x),
            ["stray failed at site 'z', Normal with batch shape (4,) and event shape ()."],
        ),
        (lambda x: fit(fine, stray, x, steps=1), ["stray failed at site 'z'"]),
        (lambda x: site_table(lambda x: x[..., 0, 0, 0], x), ["failed before its first site."]),
    ],
)
def test_an_error_of_shapes_tabulates_the_sites_so_far_once(call: Any, said: list[str]) -> None:
    with pytest.raises((ValueError, RuntimeError, IndexError)) as error:
        call(torch.zeros(6, 5))
    printed, link = "", error.value
    while link is not None:  # the whole chain, without the lines of code
        printed += "".join(traceback.format_exception_only(link))
        link = link.__cause__ or link.__context__
    for words in said:
        assert printed.count(words) == 1, printed
    (note,) = error.value.__notes__
    assert said[0] in note
    assert "Trace Shapes" not in printed


def test_the_librarys_own_errors_stay_as_they_are() -> None:
    model = PPCA(data_dim=5, latent_dim=2)
    for call in (
        lambda: site_table(model),
        lambda: elbo(model, Amortized(model), torch.zeros(3, 4)),
    ):
        with pytest.raises(ValueError, match=r"model: pass either|the model describes") as error:
            call()
        assert not any("failed" in note for note in getattr(error.value, "__notes__", ()))


def test_a_note_is_hung_once_however_often_an_error_passes() -> None:
    def outer(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        site_table(torn, x)

    with pytest.raises(RuntimeError) as error:
        site_table(outer, torch.zeros(6, 5))
    (note,) = error.value.__notes__
    assert note.startswith("torn failed after site 'z'.")


def test_arrays_are_taken_as_fit_takes_them() -> None:
    model = PPCA(data_dim=3, latent_dim=1).float()
    x = torch.randn(4, 3)
    want, got = explain(model, x.float()), explain(model, x.numpy())
    assert got.failure is None
    assert [site.log_density for site in got.sites] == pytest.approx(
        [site.log_density for site in want.sites]
    )


def test_auxiliary_sites_of_a_guide_are_told_as_such() -> None:
    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    guide()
    told = explain(model, guide=guide).guide
    assert told is not None
    assert {site.name: site.role for site in told.sites} == {
        "w_unconstrained": "auxiliary",
        "w": "global latent",
    }

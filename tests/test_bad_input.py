"""What a user can get wrong: one clear error, and nothing has changed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import Amortized, Exact, Local, families
from guides.registry import MODELS, build, lookup
from ppl_models import PPCA, VAE
from ppl_models.data import load
from ppl_models.evaluate import compare, elbo, encode, iwae_bound, log_evidence, reconstruct
from ppl_models.infer import fit, sample


def fitted(model, guide, *batch) -> Any:
    fit(model, guide, batch, steps=1, progress=False)


def bounded(model, guide, *batch) -> Any:
    elbo(model, guide, *batch, particles=2)


def scored(model, guide, *batch) -> Any:
    log_evidence(model, guide, *batch, particles=2)


def encoded(model, guide, *batch) -> Any:
    encode(model, guide, *batch, draws=1)


def rebuilt(model, guide, *batch) -> Any:
    reconstruct(model, guide, *batch, draws=1)


def sampled(model, guide, *batch) -> Any:
    sample(model, *batch, chains=1, draws=4, warmup=1, progress=False)


def compared(model, guide, *batch) -> Any:
    """Bad training rows."""
    good = tuple(torch.zeros(4, 5) for _ in batch)
    compare(model, {"g": guide}, batch, good, steps=1, reference=None, progress=False)


def compared_on(model, guide, *batch) -> Any:
    """Bad test rows."""
    good = tuple(torch.zeros(4, 5) for _ in batch)
    compare(model, {"g": guide}, good, batch, steps=1, reference=None, progress=False)


ALL = (fitted, bounded, scored, encoded, rebuilt, sampled, compared, compared_on)


class unchanged:
    """Check that parameters, random streams and Pyro's store are after a block as before it."""

    def __init__(self, *programs):
        self.modules = [p for p in programs if isinstance(p, torch.nn.Module)]

    def look(self) -> Any:
        parameters = [v for m in self.modules for v in m.state_dict().values()]
        store = pyro.get_param_store().get_state()["params"]
        return {
            "values": [v.clone() for v in parameters],
            "identity": [id(v) for m in self.modules for v in m.parameters()],
            "grad": [(v.requires_grad, v.grad) for m in self.modules for v in m.parameters()],
            "modes": [m.training for module in self.modules for m in module.modules()],
            "stream": torch.get_rng_state(),
            "store": {name: value.detach().clone() for name, value in store.items()},
        }

    def __enter__(self):
        pyro.param("mine", torch.arange(3.0))
        self.before = self.look()

    def __exit__(self, *error):
        after = self.look()
        for key, value in self.before.items():
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, msg=f"{key} changed")


def linear() -> Any:
    model = PPCA(data_dim=5, latent_dim=2)
    return model, Exact(model)


def binary() -> Any:
    model = VAE(data_dim=5, latent_dim=2, hidden=(4,))
    return model, Amortized(model, hidden=(4,))


def holed(value) -> Any:
    x = torch.zeros(6, 5)
    x[4, 2] = value
    return x


BAD_DATA = {
    "NaN": (linear, holed(torch.nan), r"argument 'x' must be finite, but 1 of 30 .* at \(4, 2\)"),
    "infinity": (linear, holed(-torch.inf), r"argument 'x' must be finite, but 1 of 30"),
    "NaN in numpy": (linear, holed(np.nan).numpy(), r"argument 'x' must be finite"),
    "width": (linear, torch.zeros(6, 4), r"argument 'x'.*shape \(6, 5\).*but got \(6, 4\)"),
    "width for a network": (binary, torch.zeros(6, 4), r"'x'.*shape \(6, 5\).*but got \(6, 4\)"),
    "a single row": (linear, torch.zeros(5), r"argument 'x'.*shape \(5, 5\).*but got \(5,\)"),
    "rank": (linear, torch.zeros(6, 5, 1), r"argument 'x'.*shape .*but got \(6, 5, 1\)"),
    "a middle dimension": (linear, torch.zeros(6, 1, 5), r"'x'.*\(6, 5\).*but got \(6, 1, 5\)"),
    "scalar": (linear, torch.tensor(1.0), r"'x' must have at least one row, got shape \(\)"),
    "no rows": (linear, torch.zeros(0, 5), r"'x' must have at least one row, got .*\(0, 5\)"),
    "grey values": (
        binary,
        torch.rand(6, 5),
        r"argument 'x'.*Bernoulli has support 'boolean.*outside it.*range from .*Binarise first",
    ),
    "integers": (
        linear,
        torch.zeros(6, 5, dtype=torch.long),
        r"argument 'x'.*Normal needs floating point values, got torch\.int64",
    ),
    "integers for a network": (
        binary,
        torch.zeros(6, 5, dtype=torch.long),
        r"'x'.*needs floating point values, got torch\.int64",
    ),
    "integers in numpy": (
        linear,
        np.zeros((6, 5), dtype=int),
        r"argument 'x'.*needs floating point values, got torch\.int64",
    ),
    "booleans": (linear, torch.zeros(6, 5, dtype=torch.bool), r"floating .* got torch\.bool"),
    "strings": (linear, np.array([["a"] * 5] * 6), r"argument 'x' must hold numbers, got ndarray"),
    "text": (linear, "digits", r"argument 'x' must hold numbers, got str"),
    "objects": (linear, np.array([None] * 6), r"argument 'x' must hold numbers, got .*object"),
    "nothing": (linear, None, r"argument 'x' must hold numbers, got NoneType"),
}


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_by_name_and_change_nothing(function, case) -> None:
    make, x, said = BAD_DATA[case]
    model, guide = make()
    with unchanged(model, guide), pytest.raises(ValueError, match=f"(?s){said}"):
        function(model, guide, x)


def two(x, y) -> Any:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("function", ALL)
def test_arguments_of_different_lengths_are_refused_by_name(function) -> None:
    x, y = torch.zeros(6, 5), torch.zeros(7, 5)
    guide = Amortized(two, hidden=(4,), example=(x[:2], y[:2]))
    said = r"data: all arguments must have the same number of rows, got x: 6, y: 7"
    with unchanged(guide), pytest.raises(ValueError, match=said):
        function(two, guide, x, y)


@pytest.mark.parametrize("function", ALL)
def test_a_missing_argument_is_told_with_what_came(function) -> None:
    model, guide = linear()
    said = r"(?s)PPCA cannot be run on this data.*called with no arguments"
    with unchanged(model, guide), pytest.raises(ValueError, match=said):
        function(model, guide)


class Labelled(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "data: the Dataset is empty; at least one row is required"),
        (
            [(torch.zeros(5), "seven")] * 3,
            r"data: every item of the Dataset must be .*got \(\(5,\), 'str'\)",
        ),
        (
            [torch.zeros(5), torch.zeros(4)],
            r"data: every item of the Dataset .*got \(\(5,\),\), \(\(4,\),\)",
        ),
        (
            [(torch.zeros(5), 1.0), (torch.zeros(5),)],
            r"data: every item .*got \(\(5,\), 'float'\), \(\(5,\),\)",
        ),
    ],
)
def test_a_bad_dataset_is_refused(rows, said) -> None:
    model, guide = linear()
    with unchanged(model, guide), pytest.raises(ValueError, match=said):
        fit(model, guide, Labelled(rows), steps=1, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "fit: batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, r"fit: batch_size must be an integer >= 1, got 2\.5"),
        ({"steps": 0}, "fit: steps must be an integer >= 1, got 0"),
        ({"epochs": -1}, "fit: epochs must be an integer >= 1, got -1"),
        ({"steps": 3, "epochs": 2}, "fit: give either steps or epochs, got both, steps=3 and epo"),
        ({"lr": 0.0}, r"fit: lr must be a finite number > 0, got 0\.0"),
        ({"seed": -1}, "seed must be None or an integer from 0 to .*, got -1"),
        ({"device": "moon"}, "device: torch knows no device 'moon'"),
    ],
)
def test_choices_out_of_range_are_refused_by_fit_and_by_compare(options, said) -> None:
    model, guide = linear()
    x = torch.zeros(6, 5)
    with unchanged(model, guide), pytest.raises(ValueError, match=said):
        fit(model, guide, x, progress=False, **options)
    with unchanged(model, guide), pytest.raises(ValueError, match=said):
        compare(model, {"g": guide}, x, x, progress=False, reference=None, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
def test_a_cuda_device_that_is_not_there_is_refused(device) -> None:
    model, guide = linear()
    x = torch.zeros(6, 5)
    said = r"device: 'cuda.*' was asked for, but torch .* finds 0 CUDA devices.* device='cpu'"
    for call in (
        lambda: fit(model, guide, x, device=device),
        lambda: sample(model, x, device=device),
        lambda: compare(model, {"g": guide}, x, x, device=device),
    ):
        with unchanged(model, guide), pytest.raises(ValueError, match=said):
            call()


def test_unknown_names_are_told_the_nearest() -> None:
    digits = load("digits")
    with pytest.raises(ValueError, match=r"there is no model 'PPCA'.*Known: ppca, "):
        build("PPCA", digits)
    with pytest.raises(ValueError, match=r"there is no model 'vaee'. Did you mean 'vae'\?"):
        lookup("model", "vaee", MODELS)
    with pytest.raises(ValueError, match=r"no data set 'didgits'. Did you mean 'digits'\?"):
        load("didgits")


def misses(x) -> Any:
    pyro.param("shift", torch.tensor(0.0))


def samples_the_data(x) -> Any:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))


def samples_a_stranger(x) -> Any:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("function", [fitted, bounded, scored, encoded, rebuilt])
@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (misses, r"guide: it must sample every latent of PPCA, \['z'\], but .* \['z'\] missing"),
        (samples_the_data, r"guide: it samples \['x'\], which the model observes"),
        (samples_a_stranger, r"guide: it samples \['v'\], which PPCA does not have"),
    ],
)
def test_a_guide_that_does_not_fit_is_told_which_site(function, guide, said) -> None:
    model, _ = linear()
    x = torch.zeros(6, 5)
    guide(x)  # its own parameters are in the store before
    with unchanged(model), pytest.raises(ValueError, match=said):
        function(model, guide, x)
    with pytest.raises(ValueError, match=said), unchanged(model):
        compare(model, {"g": lambda m: guide}, x, x, steps=1, reference=None, progress=False)


@pytest.mark.parametrize("function", [fitted, bounded, scored, rebuilt, encoded, compared_on])
def test_local_with_the_wrong_number_of_rows_is_told_both(function) -> None:
    model, _ = linear()
    guide = Local(model, rows=7)
    rows = 4 if function is compared_on else 6
    said = rf"Local: rows must be {rows}.*got rows=7.*refine"
    with unchanged(model, guide), pytest.raises(ValueError, match=said):
        function(model, guide, torch.zeros(6, 5))


@pytest.mark.parametrize("rows", [None, 0, -1, 2.0, True])
def test_local_needs_a_number_of_rows(rows) -> None:
    model, _ = linear()
    said = rf"Local: rows must be the number of rows .*an integer >= 1.*got {rows}"
    with unchanged(model), pytest.raises(ValueError, match=said):
        Local(model, rows=rows)


@pytest.mark.parametrize("make", [Amortized, lambda m, **o: Local(m, rows=4, **o)])
@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            families.Bernoulli(),
            r"family Bernoulli cannot serve site 'z'.*Families that can: .*Norm",
        ),
        ({"z": families.Categorical()}, r"family Categorical cannot serve site 'z'"),
        ({"y": families.Normal()}, r"family names \['y'\], but the latents .* are \['z'\]"),
        ("normal", r"family must be a `families\.Family`.*got 'normal'"),
    ],
)
def test_a_family_that_cannot_serve_a_site_names_those_that_can(make, family, said) -> None:
    model, _ = linear()
    with unchanged(model), pytest.raises(ValueError, match=said):
        make(model, family=family)


def no_plate(x) -> Any:
    w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(w, 1.0).expand((len(x), 5)).to_event(2), obs=x)


def no_plate_guide(x) -> Any:
    loc = pyro.param("loc", torch.zeros(5))
    pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (log_evidence, r"log_evidence scores rows.*site 'w'.*plate 'data' of no_plate.*`elbo`"),
        (iwae_bound, r"iwae_bound scores rows.*site 'w'.*plate 'data' of no_plate.*`elbo`"),
        (encode, r"encode needs a latent for each row, but no_plate .* \['w'\]"),
        (reconstruct, r"reconstruct needs a latent for each row, but no_plate .* \['w'\]"),
        (lambda m, g, x: sample(m, x, rows=True), r"sample: rows=True needs a model with a plate"),
        (lambda m, g, x: fit(m, g, x, batch_size=2, steps=1), r"fit: batch_size=2 of 6 rows needs"),
        (
            lambda m, g, x: Amortized(m, example=(x,)),
            r"Amortized: no latent is inside plate 'data'",
        ),
    ],
)
def test_a_row_wise_function_on_a_model_without_rows_says_so(call, said) -> None:
    x = torch.randn(6, 5)
    no_plate_guide(x)
    with unchanged(), pytest.raises(ValueError, match=said):
        call(no_plate, no_plate_guide, x)


def test_errors_are_raised_without_warnings() -> None:
    model, guide = linear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for function in ALL:
            with pytest.raises(ValueError, match="finite"):
                function(model, guide, holed(torch.nan))
    assert not caught

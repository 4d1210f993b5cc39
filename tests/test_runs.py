"""Saved runs: the same numbers in a new process, and what a damaged folder says."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from guides import Amortized, Exact, Local, families
from guides.flows import zuko
from guides.registry import BLOCKS, PAIRS
from ppl_models import PPCA, VAE, runs
from ppl_models.core.dynamic import Dynamic
from ppl_models.core.module import NamedModule
from ppl_models.evaluate import elbo
from ppl_models.infer import fit
from ppl_models.parts.likelihoods import Gaussian
from ppl_models.parts.priors import bayesian, normal
from ppl_models.runs import load_run, save_run

ROWS = 10
OWN = {
    "vae-convolutional",
    "bnn-convolutional",
}  # pairs with networks of their own, which a run cannot name

NEW_PROCESS = """
import json, sys
import torch
from guides.registry import PAIRS
from ppl_models.evaluate import elbo
from ppl_models.runs import load_run

folder, own = sys.argv[1], set(sys.argv[2:])
x = torch.load(folder + "/x.pt")
found = {}
for pair in PAIRS:
    given = {}
    if pair.name in own:
        given = {"model": pair.model()}
        given["guide"] = pair.guide(given["model"], 10)
    run = load_run(f"{folder}/{pair.name}", **given)
    bound = elbo(run.model, run.guide, *x[pair.name], particles=3, seed=0)
    found[pair.name] = [bound.mean, bound.se, run.fit.bounds.tolist()]
print(json.dumps(found))
"""


def configs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in folder.glob("*/config.json")]


def test_every_pair_gives_the_same_numbers_in_a_new_process(tmp_path, monkeypatch) -> None:
    here, batches = {}, {}
    for i, pair in enumerate(PAIRS):
        torch.manual_seed(1)
        # Half of them in float64; the new process has float32 for its default.
        model = pair.model().to(torch.float64 if i % 2 else torch.float32)
        guide = pair.guide(model, ROWS)
        batches[pair.name] = pair.batch(model, ROWS)
        result = fit(model, guide, batches[pair.name], steps=2, seed=0)
        save_run(tmp_path / pair.name, result)
        bound = elbo(model, guide, *batches[pair.name], particles=3, seed=0)
        here[pair.name] = [bound.mean, bound.se, result.bounds.tolist()]
    torch.save(batches, tmp_path / "x.pt")
    command = [sys.executable, "-W", "error", "-c", NEW_PROCESS, str(tmp_path), *OWN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here

    # And here, where the default is float64, without pickle, and with nothing to import by name.
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("load_run unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for pair in PAIRS:
        if pair.name not in OWN:
            run = load_run(tmp_path / pair.name)
            bound = elbo(run.model, run.guide, *batches[pair.name], particles=3, seed=0)
            assert [bound.mean, bound.se, run.fit.bounds.tolist()] == here[pair.name]
    for config in configs(tmp_path):
        for text in strings(config):
            assert "/" not in text
            assert "\\" not in text
            assert text in BLOCKS or not importable(text), text


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def importable(text: str) -> bool:
    module, _, name = text.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        return False
    with contextlib.suppress(ImportError):
        return hasattr(importlib.import_module(module), name)
    return False


# Programs of a user: each function makes them anew, as a script does when it is run again.


@dataclass(frozen=True)
class Student:
    """A likelihood of the user's own."""

    df: float = 3.0
    size: int = 1

    def __call__(self, outputs: Any, event_dim: int) -> Any:
        return dist.StudentT(self.df, outputs.squeeze(-event_dim - 1), 1.0).to_event(event_dim)


@dataclass(frozen=True)
class Wide(families.Normal):
    """A family of the user's own."""


class MyVAE(VAE):
    """A subclass with a story of its own."""

    def prior(self) -> Any:
        return dist.Normal(self.prior_loc + 1.0, 1.0).to_event(1)


class Tied(nn.Module):
    """One weight under two names, batch norm, and a layer that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(2, 4)
        self.last.weight.requires_grad_(False)
        self.register_buffer("precise", torch.tensor(0.1, dtype=torch.float64))

    def forward(self, z: Any) -> Any:
        return self.last(self.second(self.norm(self.first(z)))) + self.precise.to(z.dtype)


class PyroParts(PyroModule):
    """Pyro's own: a constrained parameter and a prior as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.7), constraints.positive)
        self.slope = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Any, y: Any) -> None:
        loc = self.slope * x
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.scale), obs=y)


def function_model() -> Callable[..., None]:
    net = nn.Linear(2, 4)

    def model(x: Any) -> None:
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    return model


def function_guide(model: Any, x: Any) -> Callable[..., None]:
    def guide(x: Any) -> None:
        loc = pyro.param("loc", lambda: 0.1 * torch.randn(2))
        scale = pyro.param("z_scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


def regression() -> Callable[..., None]:
    def model(count: Any, y: Any) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * count, 1.0), obs=y)

    return model


def counts() -> Callable[..., None]:
    def model(count: Any) -> None:
        with pyro.plate("data", len(count)):
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
            pyro.sample("count", dist.Poisson(rate), obs=count)

    return model


def without_data() -> Callable[..., None]:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(w, 1.0), obs=torch.tensor(0.3))

    return model


def items() -> Callable[..., None]:
    """Has a latent for each item, in a plate that the guide does not know to be over rows."""

    def model(x: Any) -> None:
        with pyro.plate("items", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def mixture() -> Callable[..., None]:
    def model(x: Any) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        shift = pyro.param("shift", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            kind = pyro.sample(
                "kind", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(locs[kind] + shift, 1.0), obs=x)

    return model


def own_flow(features: int, context: int) -> nn.Module:
    return zuko.flows.MAF(features, context, transforms=1, hidden_features=(4,))


def ppca() -> PPCA:
    return PPCA(data_dim=4, latent_dim=2)


def small_vae(**options: Any) -> VAE:
    return VAE(data_dim=4, latent_dim=2, hidden=(3,), **options)


def network(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Tanh())


def amortized(model: Any, x: Any) -> Amortized:
    return Amortized(model, hidden=(3,), example=x)


def free(model: Any, x: Any) -> Local:
    return Local(model, rows=ROWS, example=x)


def reals(*shape: int) -> Any:
    return torch.randn(ROWS, *shape)


def refined(model: Any, x: Any) -> Any:
    return Local(model, rows=3).refine(x, steps=2, seed=0)


@dataclass(frozen=True)
class Case:
    """A pair that somebody may have, and what of it must be passed in at loading."""

    name: str
    model: Callable[[], Any]
    guide: Callable[[Any, Any], Any]
    data: Callable[[], Any]
    pass_model: bool = False
    pass_guide: Any = False  # or a class to be passed
    options: dict[str, Any] | None = None


LINE = lambda: (torch.arange(ROWS), reals())
CASES = [
    Case(
        "own decoder",
        lambda: small_vae(decoder=nn.Linear(2, 4)),
        amortized,
        lambda: reals(4).round().clamp(0, 1),
        pass_model=True,
    ),
    Case(
        "own encoder",
        ppca,
        lambda model, x: Amortized(model, encoder=network()),
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "own likelihood",
        lambda: small_vae(likelihood=Student()),
        amortized,
        lambda: reals(4),
        pass_model=True,
    ),
    Case(
        "own family",
        ppca,
        lambda model, x: Amortized(model, hidden=(3,), family=Wide()),
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "own flow",
        ppca,
        lambda model, x: Local(model, rows=ROWS, family=families.Flow(own_flow, context=3)),
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "family by site",
        ppca,
        lambda model, x: Amortized(model, hidden=(3,), family={"z": families.FullNormal()}),
        lambda: reals(4),
    ),
    Case(
        "bayesian by a block",
        lambda: bayesian(ppca(), normal(2.0)),
        amortized,
        lambda: reals(4),
    ),
    Case(
        "bayesian by a function",
        lambda: bayesian(ppca(), lambda name, w: normal()(name, w) if name == "loading" else None),
        amortized,
        lambda: reals(4),
        pass_model=True,
    ),
    Case(
        "functions",
        function_model,
        function_guide,
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "functions in minibatches",
        function_model,
        function_guide,
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
        options={"batch_size": 4},
    ),
    Case("function and guide", function_model, free, lambda: (reals(4),), pass_model=True),
    Case(
        "function and guide in minibatches",
        function_model,
        free,
        lambda: (reals(4),),
        pass_model=True,
        options={"batch_size": 4},
    ),
    Case(
        "AutoNormal of rows, by class",
        function_model,
        lambda model, x: AutoNormal(model),
        lambda: reals(4),
        pass_model=True,
        pass_guide=AutoNormal,
    ),
    Case(
        "AutoNormal of rows",
        function_model,
        lambda model, x: AutoNormal(model),
        lambda: reals(4),
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "AutoDiagonalNormal, by class",
        regression,
        lambda model, x: AutoDiagonalNormal(model),
        LINE,
        pass_model=True,
        pass_guide=AutoDiagonalNormal,
    ),
    Case(
        "AutoDiagonalNormal",
        regression,
        lambda model, x: AutoDiagonalNormal(model),
        LINE,
        pass_model=True,
        pass_guide=True,
    ),
    Case(
        "library model, guide of Pyro",
        ppca,
        lambda model, x: AutoNormal(model),
        lambda: reals(4),
        pass_guide=AutoNormal,
    ),
    Case(
        "PyroParam and PyroSample",
        PyroParts,
        lambda model, x: AutoNormal(model),
        lambda: (reals(), reals()),
        pass_model=True,
        pass_guide=AutoNormal,
    ),
    Case("no data", without_data, lambda m, x: Local(m, example=()), tuple, pass_model=True),
    Case("integers and reals", regression, free, LINE, pass_model=True),
    Case("integers", counts, free, lambda: (torch.arange(ROWS),), pass_model=True),
    Case("another plate", items, free, lambda: (reals(),), pass_model=True),
    Case(
        "tied, frozen, with buffers",
        lambda: small_vae(decoder=Tied()),
        amortized,
        lambda: reals(4).round().clamp(0, 1),
        pass_model=True,
    ),
    Case("refined", ppca, refined, lambda: reals(4)),
    Case(
        "free from amortised",
        ppca,
        lambda model, x: amortized(model, x).local(x),
        lambda: reals(4),
    ),
    Case("exact", ppca, lambda model, x: Exact(model), lambda: reals(4)),
    Case(
        "subclass",
        lambda: MyVAE(4, 2, hidden=(3,)),
        amortized,
        lambda: reals(4).round().clamp(0, 1),
        pass_model=True,
    ),
    Case("dynamic", small_vae, lambda m, x: Amortized(m), lambda: Dynamic(torch.rand(ROWS, 4))),
    Case("fixed model", ppca, amortized, lambda: reals(4), options={"fixed_model": True}),
]


def numbers(model: Any, guide: Any, x: Any) -> tuple[Any, ...]:
    """Everything there is to compare: the bound, the states, what learns, what Pyro's store has."""
    bound = elbo(model, guide, *(x if isinstance(x, tuple) else (x,)), particles=2, seed=0)
    modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
    states = [(name, v.dtype, v.tolist()) for m in modules for name, v in m.state_dict().items()]
    learns = [(n, p.requires_grad) for m in modules for n, p in m.named_parameters()]
    store = {name: value.tolist() for name, value in pyro.get_param_store().items()}
    return bound.mean, states, learns, store


def trained(case: Case) -> tuple[Any, Any]:
    x = case.data()
    model = case.model()
    guide = case.guide(model, x)
    return x, fit(model, guide, x, steps=2, lr=0.1, seed=0, **(case.options or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pair_of_a_user_gives_the_same_numbers(case, tmp_path) -> None:
    torch.set_default_dtype(torch.float32)
    x, result = trained(case)
    save_run(tmp_path, result)
    before = numbers(result.model, result.guide, x)
    pyro.clear_param_store()
    if isinstance(result.model, NamedModule) and isinstance(result.guide, NamedModule):
        torch.set_default_dtype(torch.float64)  # functions are others then: they make constants
    given: dict[str, Any] = {}
    if case.pass_model:
        given["model"] = case.model()
    if isinstance(case.pass_guide, type):
        given["guide"] = case.pass_guide
    elif case.pass_guide:
        given["guide"] = case.guide(given["model"], x)
    random = torch.get_rng_state()
    run = load_run(tmp_path, **given)
    assert torch.equal(torch.get_rng_state(), random)
    assert numbers(run.model, run.guide, x) == before
    assert given.get("model") in (None, run.model)
    if isinstance(run.guide, NamedModule):
        assert run.guide._model[0] is run.model
    for role in given:  # what is the user's own must be passed
        others = {name: value for name, value in given.items() if name != role}
        missing = f"the {role} of '{tmp_path}' cannot be made .* your own: {role}"
        if not run.config[role]["yours"]:
            missing = "guide= was made for another PPCA than the model of this run"
        with pytest.raises(ValueError, match=f"load_run: {missing}"):
            load_run(tmp_path, **others)
    assert numbers(run.model, run.guide, x) == before


def test_a_mixture_that_is_summed_out_gives_the_same_parameters(tmp_path) -> None:
    def guide_of(model: Any) -> AutoNormal:
        return AutoNormal(pyro.poutine.block(model, hide=["kind"]))

    model, x = mixture(), reals()
    guide = guide_of(model)
    save_run(tmp_path, fit(model, guide, x, steps=2, seed=0, objective=TraceEnum_ELBO()))
    before = guide.state_dict(), pyro.param("shift").item()
    pyro.clear_param_store()
    again = mixture()
    run = load_run(tmp_path, model=again, guide=guide_of(again))
    assert pyro.param("shift").item() == before[1]
    for name, value in run.guide.state_dict().items():
        assert torch.equal(value, before[0][name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Any:
    """A run that tests copy: its folder, what was saved, its data, and its numbers."""
    torch.manual_seed(0)
    model = PPCA(data_dim=4, latent_dim=2).double()
    guide = Amortized(model, hidden=(3,))
    x = torch.randn(30, 4, dtype=torch.float64)
    result = fit(model, guide, x, steps=20, lr=0.1, seed=0, batch_size=7)
    folder = save_run(tmp_path_factory.mktemp("runs") / "saved", result, info={"a": [1, None]})
    return Saved(folder, result, x, elbo(model, guide, x, particles=2, seed=0).mean)


@dataclass(frozen=True)
class Saved:
    folder: Path
    fit: Any
    x: Any
    bound: float

    def copied(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder / "run"))

    def is_in(self, folder: Path) -> bool:
        run = load_run(folder)
        return elbo(run.model, run.guide, self.x, particles=2, seed=0).mean == self.bound


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_folder_holds_three_files_whose_names_say_what_is_in_them(saved) -> None:
    config, history, parameters = sorted(contents(saved.folder))
    assert config == "config.json"
    assert re.fullmatch(r"history-[0-9a-f]{12}\.csv", history)
    assert re.fullmatch(r"parameters-[0-9a-f]{12}\.safetensors", parameters)
    lines = (saved.folder / history).read_text().splitlines()
    assert lines[0] == "step,bound"
    assert [line.split(",")[0] for line in lines[1:]] == [str(i) for i in range(1, 21)]


def test_the_fit_comes_back_bit_for_bit(saved) -> None:
    run = load_run(saved.folder)
    assert run.path == saved.folder
    assert run.info == {"a": [1, None]}
    assert run.fit.model is run.model
    assert run.fit.guide is run.guide
    for name in ("steps", "epochs", "batch_size", "parameters", "seconds", "compiled"):
        assert getattr(run.fit, name) == getattr(saved.fit, name)
    assert run.fit.interrupted is False
    assert run.fit.settings == saved.fit.settings
    assert run.fit.bounds.dtype == torch.float64
    assert torch.equal(run.fit.bounds, saved.fit.bounds)
    assert len(run.fit.example) == 1
    assert torch.equal(run.fit.example[0], saved.x[:2])


def test_saved_twice_the_files_of_parameters_and_history_are_the_same(saved, tmp_path) -> None:
    save_run(tmp_path, load_run(saved.folder).fit)
    assert set(contents(tmp_path)) == set(contents(saved.folder))


def test_training_goes_on_as_it_would_have(saved, tmp_path) -> None:
    model = PPCA(4, 2)
    guide = Amortized(model, hidden=(3,))
    save_run(tmp_path, fit(model, guide, saved.x, steps=2, seed=0))
    run = load_run(tmp_path)
    one = fit(model, guide, saved.x, steps=3, seed=1, batch_size=7)
    two = fit(run.model, run.guide, saved.x, steps=3, seed=1, batch_size=7)
    assert torch.equal(one.bounds, two.bounds)
    assert numbers(model, guide, saved.x) == numbers(run.model, run.guide, saved.x)


def test_two_loads_of_a_run_train_apart_under_plain_pyro(saved) -> None:
    one, two = load_run(saved.folder), load_run(saved.folder)
    optimiser = pyro.optim.Adam({"lr": 0.1})  # pyright: ignore[reportAttributeAccessIssue]
    for run in (one, two):
        SVI(run.model, run.guide, optimiser, Trace_ELBO()).step(saved.x)
    assert len(pyro.get_param_store()) == 2 * sum(
        len(list(program.parameters())) for program in (one.model, one.guide)
    )
    for run in (one, two):
        changed = elbo(run.model, run.guide, saved.x, particles=2, seed=0).mean
        assert changed != saved.bound


def test_a_loaded_run_can_be_copied_and_refined(saved) -> None:
    run = load_run(saved.folder)
    twin = copy.deepcopy(run)
    assert twin.guide._model[0] is twin.model
    assert elbo(twin.model, twin.guide, saved.x, particles=2, seed=0).mean == saved.bound
    local = run.guide.local(saved.x[:3])
    assert local.refine(saved.x[:3], steps=2, seed=0)._model[0] is run.model


@pytest.mark.parametrize(
    ("info", "back"),
    [
        (None, {}),
        ({2: "a", 10: ("b", 0.1)}, {"2": "a", "10": ["b", 0.1]}),
        ({"text": "π\u2028\ud800", "deep": {"x": [{}]}}, None),
    ],
)
def test_info_comes_back_as_json_has_it(saved, tmp_path, info, back) -> None:
    save_run(tmp_path, saved.fit, info=info)
    assert load_run(tmp_path).info == (info if back is None else back)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ([("a", 1)], r"a mapping such as a dict, got \[\('a', 1\)\]"),
        ("text", "a mapping such as a dict, got 'text'"),
        ({"x": torch.ones(2)}, "something that JSON can hold: Object of type Tensor"),
        ({"x": float("nan")}, "something that JSON can hold: Out of range"),
        ({(1,): 2}, "something that JSON can hold: keys must be"),
    ],
)
def test_info_that_is_not_for_json_is_refused_and_nothing_written(
    saved, tmp_path, info, message
) -> None:
    with pytest.raises(ValueError, match=f"save_run: info must be {message}"):
        save_run(tmp_path / "new", saved.fit, info=info)
    assert not (tmp_path / "new").exists()


def test_only_a_fit_is_saved_and_only_to_a_folder(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match="result must be what `fit` returned, got PosixPath"):
        save_run(saved.fit, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="path must be a folder, but '.*file' is a file"):
        save_run(tmp_path / "file", saved.fit)
    with pytest.raises(OSError, match="save_run: cannot write to '.*file/run': Not a directory"):
        save_run(tmp_path / "file" / "run", saved.fit)
    assert contents(tmp_path) == {"file": b"mine"}


class Odd(PPCA):
    """Keeps something that a file of tensors cannot hold."""

    def __init__(self, kept: Any) -> None:
        super().__init__(4, 2)
        self.register_buffer("kept", kept)


@pytest.mark.parametrize("kept", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_a_tensor_that_cannot_be_held_is_refused_by_kind(kept, tmp_path) -> None:
    model = Odd(kept)
    result = fit(model, Amortized(model, hidden=()), reals(4), steps=1, seed=0)
    with pytest.raises(
        ValueError, match=r"save_run: .*(complex128|state:model.kept is a torch.spa)"
    ):
        save_run(tmp_path / "new", result)
    assert not (tmp_path / "new").exists()


def test_parameters_that_are_gone_from_the_store_are_not_made_up(tmp_path) -> None:
    model = function_model()
    result = fit(model, function_guide(model, None), reals(4), steps=1, seed=0)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="'loc', .* are not in Pyro's parameter store any more"):
        save_run(tmp_path, result)
    assert len(pyro.get_param_store()) == 0


def test_saving_changes_nothing(tmp_path) -> None:
    model = function_model()
    guide = AutoNormal(model)
    x = reals(4)
    result = fit(model, guide, x, steps=1, seed=0)
    pyro.param("other", torch.tensor(1.0))
    before = numbers(model, guide, x), pyro.get_param_store().keys(), torch.get_rng_state().tolist()
    save_run(tmp_path, result)
    after = numbers(model, guide, x), pyro.get_param_store().keys(), torch.get_rng_state().tolist()
    assert after == before


# What is passed in wrongly.


def other(**options: Any) -> Any:
    return small_vae(decoder=nn.Linear(2, 4), **options)


def both(model: Any, guide: Callable[[Any], Any]) -> dict[str, Any]:
    return {"model": model, "guide": guide(model)}


WRONG: list[tuple[Any, Any, Any, str]] = [
    (ppca, amortized, lambda: {"model": other()}, "model of this run is PPCA, but model= is .*VAE"),
    (
        ppca,
        amortized,
        lambda: {"model": PPCA(4, 3)},
        "PPCA made with latent_dim=2, but model= was made with latent_dim=3. Pass one like it",
    ),
    (ppca, amortized, lambda: {"model": PPCA}, "model must be .* got the class PPCA"),
    (ppca, amortized, lambda: {"model": 3}, "model= is your own int|model must be .* got 3"),
    (ppca, amortized, lambda: {"model": nn.Linear(2, 4)}, "but model= is your own Linear"),
    (ppca, amortized, lambda: {"model": lambda x: None}, "model= is the function <lambda>"),
    (ppca, amortized, lambda: {"guide": Local}, "is Amortized, but guide= is the class Local"),
    (ppca, amortized, lambda: {"guide": Amortized}, r"hidden=\(3\), .* with hidden=\(200\)"),
    (
        ppca,
        amortized,
        lambda: {"guide": Amortized(ppca(), hidden=(3,))},
        "guide= was made for another PPCA than the model of this run",
    ),
    (
        ppca,
        lambda model, x: Exact(model),
        lambda: {"model": ppca(), "guide": Exact(ppca())},
        "guide= was made for another PPCA than the model of this run",
    ),
    (
        small_vae,
        amortized,
        lambda: {"model": MyVAE(4, 2, hidden=(3,))},
        "the model of this run is VAE, but model= is your own MyVAE",
    ),
    (
        small_vae,
        amortized,
        lambda: {"model": type("VAE", (VAE,), {})(4, 2, hidden=(3,))},
        "the model of this run is VAE, but model= is your own VAE",
    ),
    (
        small_vae,
        amortized,
        lambda: {"model": small_vae(likelihood=Student())},
        "likelihood=None, but .* likelihood=your own Student",
    ),
    (
        lambda: other(likelihood=Student()),
        amortized,
        lambda: {"model": other()},
        "likelihood=your own Student, but .* likelihood=None",
    ),
    (
        lambda: small_vae(decoder=nn.Linear(2, 8), likelihood=Gaussian(0.1)),
        amortized,
        lambda: {"model": small_vae(decoder=nn.Linear(2, 8), likelihood=Gaussian(0.5))},
        r"Gaussian\(min_scale=0.1\), but .*Gaussian\(min_scale=0.5\)",
    ),
    (
        lambda: bayesian(ppca(), dist.Normal(0.0, 1.0)),
        amortized,
        lambda: {"model": bayesian(ppca(), dist.Normal(0.0, 2.0))},
        r"Normal\(loc=0, scale=1\), but .*Normal\(loc=0, scale=2\)",
    ),
    (
        lambda: other(),
        amortized,
        lambda: {"model": small_vae(decoder=nn.Sequential(nn.Linear(2, 4)))},
        "decoder=your own Linear, but .*decoder=your own Sequential",
    ),
    (
        lambda: small_vae(decoder=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))),
        amortized,
        lambda: {"model": small_vae(decoder=nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 4)))},
        r"model VAE is not what was saved: .*0.weight has shape \(5, 2\), in the run \(3, 2\)",
    ),
    (
        lambda: small_vae(decoder=nn.Sequential(nn.Linear(2, 4))),
        amortized,
        lambda: {"model": small_vae(decoder=nn.Sequential(nn.Linear(2, 4, bias=False)))},
        "model VAE is not what was saved: decoder.net.0.bias is only in the run",
    ),
    (
        ppca,
        lambda model, x: Amortized(model, encoder=network(bias=False)),
        lambda: both(ppca(), lambda model: Amortized(model, encoder=network())),
        "guide Amortized is not what was saved: encoder.0.bias is not in the run",
    ),
    (
        regression,
        lambda model, x: AutoNormal(model),
        lambda: {"model": regression(), "guide": AutoDiagonalNormal},
        "is your own AutoNormal, but guide= is the class AutoDiagonalNormal",
    ),
    (
        regression,
        free,
        lambda: {"model": counts()},
        "cannot be made again: .*takes 1 positional",
    ),
    (
        function_model,
        function_guide,
        lambda: {"model": function_model(), "guide": lambda x: None},
        "guide= is a function|loc is only in the run",
    ),
    (function_model, function_guide, dict, "model of .* is your own: model \\(model\\)"),
    (
        regression,
        lambda model, x: Rigid(model, 2),
        lambda: {"model": regression(), "guide": Rigid},
        "Rigid, called with the model alone, said: .* missing 1 required .*Make the guide",
    ),
]


class Rigid(AutoNormal):
    def __init__(self, model: Any, number: int) -> None:
        super().__init__(model)
        self.number = number


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: re.sub(r"\W+", " ", wrong[3])[:40])
def test_what_is_not_what_was_saved_is_refused_and_left_as_it_is(wrong, tmp_path) -> None:
    make_model, make_guide, passed, message = wrong
    torch.set_default_dtype(torch.float32)
    x = LINE() if make_model is regression else reals(4).round().clamp(0, 1)
    model = make_model()
    save_run(tmp_path, fit(model, make_guide(model, x), x, steps=1, seed=0))
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    given = passed()
    modules = [value for value in given.values() if isinstance(value, nn.Module)]
    for module in modules:
        next(module.parameters(), torch.zeros(())).requires_grad_(False)
    pyro.param("loc", torch.tensor([5.0, 6.0]))
    before = everything(modules)
    with pytest.raises(ValueError, match=f"^(load_run: .*)?{message}".replace("?", "?.*", 1)):
        load_run(tmp_path, **given)
    assert everything(modules) == before


def everything(modules: list[nn.Module]) -> Any:
    tensors = [
        (name, id(v), v.dtype, v.device, v.requires_grad, v.tolist())
        for module in modules
        for name, v in (*module.named_parameters(), *module.named_buffers())
    ]
    store = [(n, id(v), v.tolist()) for n, v in pyro.get_param_store()._params.items()]
    return tensors, [m.training for m in modules], store, torch.get_rng_state().tolist()


def stops_at_the_second_look(monkeypatch) -> None:
    """Let loading fail at the last thing it does, when all is filled."""
    calls = []

    def run(fit: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(fit)

    real = runs._run
    monkeypatch.setattr(runs, "_run", run)


def test_what_fails_after_all_was_filled_leaves_everything_as_it_was(saved, monkeypatch) -> None:
    stops_at_the_second_look(monkeypatch)
    model = PPCA(4, 2).float()
    guide = Amortized(model, hidden=(3,))
    model.loc.requires_grad_(False)
    before = everything([model, guide])
    with pytest.raises(KeyboardInterrupt):
        load_run(saved.folder, model=model, guide=guide)
    assert everything([model, guide]) == before


def test_what_was_in_the_store_is_there_again_if_loading_fails(tmp_path, monkeypatch) -> None:
    model = function_model()
    guide = function_guide(model, None)
    x = reals(4)
    save_run(tmp_path, fit(model, guide, x, steps=1, seed=0))
    fit(model, guide, x, steps=3, seed=0)
    before = everything([])
    stops_at_the_second_look(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        load_run(tmp_path, model=model, guide=guide)
    assert everything([]) == before


def test_what_was_frozen_is_frozen_and_the_rest_is_not(saved, tmp_path) -> None:
    model = ppca()
    model.loc.requires_grad_(False)
    save_run(tmp_path, fit(model, amortized(model, None), saved.x, steps=1, seed=0))
    for run in (load_run(tmp_path), load_run(tmp_path, model=ppca().requires_grad_(False))):
        learns = {name: p.requires_grad for name, p in run.model.named_parameters()}
        assert learns == {name: name != "loc" for name in learns}


class Precise(PPCA):
    """In float32, but for a constant, which is not saved."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.float().register_buffer("c", torch.tensor(0.1, dtype=torch.float64), persistent=False)


def test_a_model_of_two_precisions_keeps_both(saved, tmp_path) -> None:
    model = Precise()
    save_run(tmp_path, fit(model, amortized(model, None), saved.x, steps=1, seed=0))
    run = load_run(tmp_path, model=Precise())
    assert run.model.c.item() == 0.1
    assert run.model.loc.dtype == torch.float32


def test_a_device_that_cannot_run_the_model_leaves_it_where_it_was(saved) -> None:
    model = PPCA(4, 2).float()
    guide = Amortized(model, hidden=(3,))
    before = everything([model, guide])
    with pytest.raises(ValueError, match="load_run: the model and guide of .* cannot be run"):
        load_run(saved.folder, model=model, guide=guide, device="meta")
    assert everything([model, guide]) == before
    with pytest.raises(ValueError, match="device: torch knows no device 'abacus'"):
        load_run(saved.folder, device="abacus")
    run = load_run(saved.folder, model=model, guide=guide, device="cpu")
    assert run.model is model
    assert elbo(model, guide, saved.x, particles=2, seed=0).mean == saved.bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_from_a_gpu_loads_on_either_device(saved, tmp_path) -> None:
    for case in CASES:
        if not case.pass_model and not case.pass_guide:
            torch.manual_seed(0)
            x = case.data()
            model = case.model()
            guide = case.guide(model, x)
            save_run(tmp_path, fit(model, guide, x, steps=2, seed=0, device="cuda"))
            for device in ("cpu", "cuda"):
                run = load_run(tmp_path, device=device)
                assert {p.device.type for p in run.model.parameters()} == {device}
                assert run.fit.example[0].device.type == device
                bound = elbo(run.model, run.guide, x, particles=2000, seed=0)
                there = elbo(model, guide, x, particles=2000, seed=0)
                assert abs(bound.mean - there.mean) <= 5 * (bound.se + there.se) + 1e-4


def test_networks_that_changed_their_story_are_told_of(tmp_path) -> None:
    make = lambda squash: nn.Sequential(nn.Linear(2, 3), squash, nn.Linear(3, 4))
    model = small_vae(decoder=make(nn.Tanh()))
    save_run(tmp_path, fit(model, amortized(model, None), reals(4).round().clamp(0, 1), steps=1))
    with pytest.warns(
        UserWarning, match="give a bound of .* something else has changed: a network"
    ):
        load_run(tmp_path, model=small_vae(decoder=make(nn.Sigmoid())))


# Damage.


def edit(folder: Path, change: Callable[[Any], Any], *, sign: bool = True) -> None:
    """Change config.json, and its checksum too: whoever tampers can compute it."""
    config = json.loads((folder / "config.json").read_text())
    config = change(config) or config
    if sign:
        config.pop("digest", None)
        config["digest"] = runs._digest(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["config", "parameters", "history"])
def test_a_truncated_or_flipped_file_is_refused_by_name(saved, tmp_path, kind) -> None:
    folder = saved.copied(tmp_path)
    (file,) = folder.glob(f"{kind}*")
    whole = file.read_bytes()
    damaged = [whole[:n] for n in (0, 1, len(whole) // 2, len(whole) - 1)] + [whole + b" x"]
    for content in damaged if kind != "config" else ():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"has {len(content)} of {len(whole)} bytes"):
            load_run(folder)
    for i in torch.randint(len(whole), (40,)).tolist():
        damaged += [whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :] for flip in (1, 128)]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"load_run: .*{re.escape(file.name)}"):
            load_run(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"load_run: .*{re.escape(file.name)}"):
        load_run(folder)
    file.write_bytes(whole)
    assert saved.is_in(folder)


def put(value: Any, *path: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put(3, "model", "recipe", "arguments", "latent_dim"),
        put(1e-9, "training", "seconds"),
        put("os.system", "model", "recipe", "name"),
        put({"b": 1}, "info"),
        put(None, "digest"),
    ],
)
def test_an_edited_config_is_refused(saved, tmp_path, change) -> None:
    folder = saved.copied(tmp_path)
    edit(folder, change, sign=False)
    with pytest.raises(ValueError, match="config.json' was changed after it was saved"):
        load_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("os.system", "model", "recipe", "name"), "no building block 'os.system'"),
        (put({"itself": "os.system"}, "guide", "recipe", "arguments", "family"), "'os.system'"),
        (put("models.PPCB", "model", "recipe", "name"), "Did you mean 'models.PPCA'"),
        (put("2", "model", "recipe", "arguments", "latent_dim"), "PPCA .* cannot be made again"),
        (put(3, "model", "recipe", "arguments", "latent_dim"), "PPCA is not what was saved"),
        (put({}, "model", "recipe", "arguments"), "cannot be made again"),
        (put("../../evil", "files", "parameters", "name"), "it has no file '../../evil'"),
        (put("config.json", "files", "history", "name"), "it has no file 'config.json'"),
        (put({}, "files"), "is damaged"),
        (put([], "training"), "is damaged"),
    ],
)
def test_a_config_edited_with_its_checksum_executes_nothing(
    saved, tmp_path, monkeypatch, change, message
) -> None:
    called = []
    monkeypatch.setattr(os, "system", lambda command: called.append(command))
    folder = saved.copied(tmp_path)
    (tmp_path / "evil").write_bytes(next(folder.glob("parameters*")).read_bytes())
    edit(folder, change)
    with pytest.raises(ValueError, match=f"load_run: .*{message}"):
        load_run(folder)
    assert called == []


@pytest.mark.parametrize("kind", ["parameters", "history"])
def test_garbage_with_its_checksum_is_refused(saved, tmp_path, kind) -> None:
    folder = saved.copied(tmp_path)
    garbage = b"garbage"
    (file,) = folder.glob(f"{kind}*")
    file.write_bytes(garbage)

    def change(config: Any) -> None:
        about = config["files"][kind]
        about["bytes"] = len(garbage)
        about["sha256"] = runs.hashlib.sha256(garbage).hexdigest()

    edit(folder, change)
    with pytest.raises(ValueError, match="load_run: "):
        load_run(folder)


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_version_says_to_upgrade(saved, tmp_path, version) -> None:
    folder = saved.copied(tmp_path)
    edit(folder, lambda config: {"format": config["format"], "version": version, "all": "new"})
    with pytest.raises(
        ValueError, match=f"version {version}, and ppl-models .* Upgrade ppl-models"
    ):
        load_run(folder)


@pytest.mark.parametrize("version", ["1", 1.0, True, None, [], 0, -1])
def test_a_version_that_never_was_is_damage(saved, tmp_path, version) -> None:
    folder = saved.copied(tmp_path)
    edit(folder, put(version, "version"))
    with pytest.raises(ValueError, match="was changed after it was saved"):
        load_run(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no run in '.*': it has no config.json"),
        (b"", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"not json", "is damaged"),
        (b"[" * 200_000, "is damaged"),
        (b"[1]", "is not from a run of this library"),
        (b"null", "is not from a run of this library"),
        (b'{"format": "other"}', "is not from a run of this library"),
        (b'{"format": "ppl-models run", "version": 1, "x": NaN}', "was changed"),
    ],
)
def test_what_is_no_run_is_told_apart(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"load_run: .*{message}"):
        load_run(tmp_path)


def test_a_path_that_is_no_folder_has_no_run(saved, tmp_path) -> None:
    for path in (tmp_path / "nothing", str(tmp_path)):
        with pytest.raises(ValueError, match="load_run: there is no run in"):
            load_run(path)
    with pytest.raises(ValueError, match=r"must be the folder of a run, but '.*config.json' is a"):
        load_run(saved.folder / "config.json")


# A disk that is full, and a process that is stopped.


class Disk:
    """Stops at the k-th thing that is asked of the disk, before it is done or right after."""

    def __init__(self, monkeypatch, *, at: int, after: bool, error: BaseException) -> None:
        self.left, self.after, self.error, self.asked = at, after, error, []
        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and "wb" not in arguments:
                return real(*arguments, **options)
            if not self.after:
                self.tick(name)
            done = real(*arguments, **options)
            if name == "open":
                done = Stream(done, self)
            if self.after:
                self.tick(name)
            return done

        return call

    def tick(self, name: str) -> None:
        self.asked.append(name)
        self.left -= 1
        if self.left == -1:
            raise self.error


class Stream:
    """A file of which only a half is written when the disk is full."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.disk.tick("write")
        self.file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def newer() -> Any:
    torch.manual_seed(1)
    model = PPCA(data_dim=4, latent_dim=1).double()
    return fit(model, Exact(model), torch.randn(30, 4, dtype=torch.float64), steps=2, seed=0)


@contextlib.contextmanager
def refusal(folder: Path) -> Iterator[list[str]]:
    """Take the error that says that a folder cannot be written to, and no other."""
    said: list[str] = []
    try:
        yield said
    except OSError as error:
        said.append(str(error))
        assert error.errno == errno.ENOSPC  # noqa: PT017 - there may be none
        assert f"save_run: cannot write to '{folder}': No space left on device." in said[0]
        assert said[0].endswith("What was saved there before is as it was.")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_whenever_saving_stops_there_is_a_whole_run(
    saved, newer, tmp_path, monkeypatch, overwrite, error, after
) -> None:
    if after and isinstance(error, OSError):
        return  # what was done did not fail
    seen: list[str] = []
    for at in range(100):
        folder = tmp_path / f"{at}" / "new"
        if overwrite:
            folder = saved.copied(tmp_path / f"{at}")
            (folder / "picture.png").write_bytes(b"mine")
        before = contents(tmp_path)
        with monkeypatch.context() as patch:
            disk = Disk(patch, at=at, after=after, error=error)
            with contextlib.suppress(KeyboardInterrupt), refusal(folder) as said:
                save_run(folder, newer)
        seen = disk.asked
        if disk.left >= 0:
            break
        if contents(tmp_path) == before:
            assert said or isinstance(error, KeyboardInterrupt)
            assert overwrite or not (tmp_path / f"{at}").exists()
        else:  # it stopped when all was done
            assert not said
            assert load_run(folder).model.arguments()["latent_dim"] == 1
        assert not list(tmp_path.rglob(".*"))
        shutil.rmtree(tmp_path / f"{at}", ignore_errors=True)
    assert seen.count("write") == seen.count("replace") == 3
    assert seen.count("fsync") == 5


def test_a_file_system_that_takes_no_more_leaves_the_old_run(saved, tmp_path) -> None:
    folder = saved.copied(tmp_path)
    before = contents(folder)
    model = PPCA(data_dim=600, latent_dim=2)
    large = fit(model, Amortized(model, hidden=()), torch.randn(3, 600), steps=1, seed=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="save_run: cannot write to '.*': File too large"):
            save_run(folder, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before
    assert saved.is_in(folder)
    save_run(folder, large)
    assert len(contents(folder)) == 3


def test_a_run_replaces_the_files_of_the_old_one_and_no_others(saved, newer, tmp_path) -> None:
    folder = saved.copied(tmp_path)
    others = ("picture.png", "parameters.txt", "parameters-000000000000.safetensors", "a/b.csv")
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    save_run(folder, newer)
    assert len(contents(folder)) == 3 + len(others)
    assert all((folder / name).read_text() == name for name in others)
    assert load_run(folder).model.arguments()["latent_dim"] == 1


def test_a_damaged_run_can_be_saved_over_and_names_no_file_to_delete(
    saved, newer, tmp_path
) -> None:
    folder = saved.copied(tmp_path)
    (folder / "picture.png").write_text("mine")
    for name in ("picture.png", "config.json", "../saved.txt"):
        edit(folder, put(name, "files", "history", "name"))
        save_run(folder, newer)
        assert (folder / "picture.png").exists()
        assert load_run(folder).model.arguments()["latent_dim"] == 1
    (folder / "config.json").write_text("{")
    save_run(folder, newer)
    assert load_run(folder).model.arguments()["latent_dim"] == 1


def test_paths_may_be_relative_and_new(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save_run("a/b/c", saved.fit) == Path("a/b/c")
    assert saved.is_in(Path("a/b/c"))
    assert saved.is_in(tmp_path / "a" / "b" / "c")


def test_a_folder_that_may_not_be_written_to_keeps_its_run(
    saved, newer, tmp_path, monkeypatch
) -> None:
    folder = saved.copied(tmp_path)
    refused = PermissionError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as patch:
        Disk(patch, at=1, after=False, error=refused)  # after mkdir, which finds the folder there
        with pytest.raises(PermissionError, match="save_run: cannot write to .*Permission denied"):
            save_run(folder, newer)
    assert saved.is_in(folder)


def test_the_python_of_the_page_on_runs_runs(tmp_path, monkeypatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "runs.md").read_text(encoding="utf-8")
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "runs.md", "exec"), scope)  # noqa: S102 - our own text
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["ppca", "vae"]


@pytest.mark.parametrize(
    "path", [("model",), ("guide",), ("info",), ("bound",), ("model", "frozen"), ("guide", "kind")]
)
def test_a_config_without_one_of_its_parts_is_damaged(saved, tmp_path, path) -> None:
    folder = saved.copied(tmp_path)

    def drop(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    edit(folder, drop)
    with pytest.raises(ValueError, match="is damaged"):
        load_run(folder)


def test_a_save_leaves_the_files_of_another_writer_that_came_in_between(
    saved, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    model = PPCA(5, 2)
    result = fit(model, Exact(model), model(size=9), steps=1, seed=0)
    save_run(folder, result)
    put_file, others = runs._put, []

    def between(file: Path, content: bytes) -> None:
        put_file(file, content)
        if file.name == "config.json" and not others:
            others.append(file)
            save_run(folder, result)  # the same contents, another config

    monkeypatch.setattr(runs, "_put", between)
    save_run(folder, result)
    assert others
    assert torch.equal(load_run(folder).fit.bounds, result.bounds)

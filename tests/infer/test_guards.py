"""What a recorded graph takes for granted."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from ppl_models import VAE
from ppl_models.infer.guards import difference, fingerprint, reached


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
        self.beta = 0.5
        self.options = {"rates": [1.0, 2.0], "name": "one"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.beta * self.net(x)


def rebind(module: Scaled) -> None:
    module.net[0].weight.data = module.net[0].weight.data.clone()


def assign(module: Scaled) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def reduce_dropout(module: Scaled) -> None:
    module.net[1].p = 0.1


CHANGES: dict[str, tuple[Callable[[Scaled], Any], str]] = {
    "mode": (lambda m: m.eval(), "training"),
    "mode of one": (lambda m: m.net[1].eval(), "Scaled.net.1.training"),
    "number": (lambda m: setattr(m, "beta", 0.6), "Scaled.beta"),
    "number of another type": (lambda m: setattr(m, "beta", True), "Scaled.beta"),
    "number within": (
        lambda m: m.options["rates"].__setitem__(1, 3.0),
        "Scaled.options['rates'][1]",
    ),
    "longer list": (lambda m: m.options["rates"].append(3.0), "Scaled.options['rates']: length"),
    "rate of dropout": (reduce_dropout, "Scaled.net.1.p"),
    "memory of a parameter": (rebind, "Scaled.net.0.weight"),
    "parameters": (assign, "Scaled.net.0.bias"),
    "frozen": (lambda m: m.net[0].weight.requires_grad_(False), "Scaled.net.0.weight"),
    "buffer": (
        lambda m: setattr(m.net[2], "running_mean", torch.zeros(3)),
        "Scaled.net.2.running_mean",
    ),
    "dtype": (lambda m: m.float(), "Scaled.net.0.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_a_graph_would_not_see_is_seen_and_named(name: str) -> None:
    change, told = CHANGES[name]
    module = Scaled()
    before = fingerprint(module)
    assert fingerprint(module) == before
    change(module)
    assert any(told in found for found in difference(before, fingerprint(module)))


HIDDEN = 1.0


def _hidden() -> float:
    return HIDDEN


class Rate:
    def __call__(self) -> float:
        return HIDDEN


class ByProperty(nn.Module):
    @property
    def rate(self) -> float:
        return HIDDEN


class ByStatic(nn.Module):
    @staticmethod
    def rate() -> float:
        return HIDDEN


class ByClass(nn.Module):
    @classmethod
    def rate(cls) -> float:
        return HIDDEN


class ByLambda(nn.Module):
    def rate(self) -> float:
        rate = lambda: sum(HIDDEN for _ in range(2))
        return rate()


class ByObject(nn.Module):
    rate = Rate()


class ByInner(nn.Module):
    def rate(self) -> float:
        def inner() -> float:
            return _hidden()

        return inner()


@pytest.mark.parametrize("kind", [ByProperty, ByStatic, ByClass, ByLambda, ByObject, ByInner])
def test_a_global_is_seen_wherever_a_class_reads_it(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kind()
    before = fingerprint(module)
    assert fingerprint(module) == before
    monkeypatch.setattr(sys.modules[__name__], "HIDDEN", 3.0)
    (told,) = difference(before, fingerprint(module))
    assert told.endswith("HIDDEN")


class Private(nn.Module):
    _rate = 1.0


def test_an_attribute_of_a_class_is_seen_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Private()
    before = fingerprint(module)
    monkeypatch.setattr(Private, "_rate", 3.0)
    assert difference(before, fingerprint(module)) == ["Private._rate"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32(1), np.float32(3)),
        (np.int64(1), np.int64(3)),
        (1 + 0j, 3 + 0j),
        (range(1), range(3)),
        (Fraction(1), Fraction(3)),
        (deque([1.0]), deque([3.0])),
        ({"a": {"b": {"c": {"d": {"e": {"f": [1.0]}}}}}}, {"a": {"b": {"c": {"d": {"e": {}}}}}}),
    ],
)
def test_numbers_of_any_kind_are_seen_at_any_depth(one: Any, other: Any) -> None:
    module = Scaled()
    module.options = one
    before = fingerprint(module)
    assert fingerprint(module) == before
    module.options = other
    assert difference(before, fingerprint(module))


def test_values_of_tensors_are_no_part_of_it() -> None:
    module = Scaled()
    before = fingerprint(module)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value += 1
    assert fingerprint(module) == before


def test_functions_are_known_by_what_they_close_over_and_by_globals_that_they_name() -> None:
    scale = 1.0
    table = {"a": torch.zeros(2)}

    def inner(x: torch.Tensor) -> torch.Tensor:
        return scale * x + table["a"]

    def outer(x: torch.Tensor, shift: float = 2.0) -> torch.Tensor:
        return inner(x) + shift

    before = fingerprint(partial(outer, shift=3.0))
    scale = 1.5
    assert difference(before, fingerprint(partial(outer, shift=3.0))) == ["partial: inner: scale"]
    assert "partial arguments['shift']" in difference(
        before, fingerprint(partial(outer, shift=4.0))
    )
    between = fingerprint(outer)
    table["a"] = torch.zeros(2)
    assert difference(between, fingerprint(outer)) == ["outer: inner: table['a']"]


FACTOR = 1.0


class Settings:
    rate = 1.0


class Modular(nn.Module):
    width = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return FACTOR * Settings.rate * sizes.SCALE * x


sizes = types.ModuleType("sizes_of_a_user")
vars(sizes)["SCALE"] = 1.0


@pytest.mark.parametrize(
    ("holder", "name", "told"),
    [
        (sys.modules[__name__], "FACTOR", "Modular.helper: FACTOR"),
        (Settings, "rate", "Modular.helper: Settings.rate"),
        (sizes, "SCALE", "Modular.helper: sizes.SCALE"),
        (Modular, "width", "Modular.width"),
    ],
)
def test_what_methods_of_a_module_refer_to_is_looked_after(
    holder: Any, name: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Modular()
    before = fingerprint(module)
    assert fingerprint(module) == before
    monkeypatch.setattr(holder, name, 3.0)
    assert difference(before, fingerprint(module)) == [told]


def test_an_attribute_hides_that_of_its_class_from_the_program_not_from_its_guard() -> None:
    module = Modular()
    module.width = 2
    before = fingerprint(module, module)
    module.width = 5
    assert difference(before, fingerprint(module, module)) == ["Modular.width"]


@dataclass(slots=True)
class Slotted:
    rate: float
    shift: float = 0.0


def test_attributes_in_slots_are_looked_after() -> None:
    settings = Slotted(1.0)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * settings.rate

    before = fingerprint(model)
    settings.rate = 2.0
    assert difference(before, fingerprint(model)) == ["model: settings.rate"]


def test_tensors_are_reached_through_functions_and_objects() -> None:
    held, module = torch.ones(2), Scaled()

    def model(x: torch.Tensor) -> torch.Tensor:
        return module(x) * held

    found = {id(value) for value in reached(model)}
    assert found >= {id(held), *map(id, module.parameters()), *map(id, module.buffers())}


def test_arrays_are_known_by_what_they_hold() -> None:
    weights = np.ones(3)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * float(weights[0])

    before = fingerprint(model)
    weights[0] = 2.0
    assert difference(before, fingerprint(model)) == ["model: weights"]


def test_entries_of_the_parameter_store_are_known_by_identity() -> None:
    pyro.param("scale", torch.ones(2))
    before = fingerprint()
    pyro.get_param_store()["scale"] = torch.ones(2)
    assert difference(before, fingerprint()) == ["pyro.param 'scale'"]


def test_a_model_that_refers_to_itself_ends() -> None:
    model = VAE(4, 2, hidden=(3,))
    loop: list[Any] = [model]
    loop.append(loop)
    object.__setattr__(model, "loop", loop)
    assert fingerprint(model) == fingerprint(model)

"""Library calls leave Pyro's parameter store as it was."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_models.core.store import own_parameters, scratch_store, unchanged_on_error


class Scaled(PyroModule):
    """Parameters of each kind: plain, constrained, of a PyroModule child, of a plain child."""

    def __init__(self, value: float, name: str = "") -> None:
        super().__init__(name)
        self.loc = nn.Parameter(torch.tensor(value))
        self.scale = PyroParam(torch.tensor(value + 2.0), constraints.positive)
        self.child = PyroModule[nn.Linear](1, 1)
        self.plain = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.plain(self.child(x[:, None]))[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc + 0 * h, self.scale), obs=x)
        return self.loc, self.scale


def contents() -> dict[str, Any]:
    state: Any = pyro.get_param_store().get_state()
    values = {name: (id(value), value.detach().clone()) for name, value in state["params"].items()}
    return values | {f"constraint {name}": kind for name, kind in state["constraints"].items()}


@pytest.mark.parametrize("name", ["", "outer"])
def test_nothing_of_a_module_stays_in_the_store(name: str) -> None:
    module = Scaled(1.0, name)
    x = torch.zeros(3)
    pyro.param("mine", torch.tensor(3.0))
    before = contents()
    with own_parameters(module):
        module(x)
        assert len(pyro.get_param_store()) == 9  # all eight of the module, and mine
    assert contents() == before


def test_a_module_uses_its_own_values_whatever_a_namesake_left() -> None:
    first, second = Scaled(1.0), Scaled(5.0)
    x = torch.zeros(3)
    first(x)
    store = pyro.get_param_store()
    assert store._params["loc"] is first.loc  # in Pyro the first of a name wins
    before = contents()
    with own_parameters(second):
        loc, scale = second(x)
        assert loc is second.loc
        assert store._params["loc"] is second.loc
        assert (loc.item(), scale.item()) == (5.0, pytest.approx(7.0))
    assert contents() == before


def test_what_a_function_writes_stays_and_a_constraint_with_it() -> None:
    module = Scaled(1.0)
    with own_parameters(module):
        pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
    store = pyro.get_param_store()
    assert list(store.keys()) == ["rate"]
    assert store._constraints["rate"] is constraints.positive
    assert pyro.param("rate").item() == pytest.approx(2.0)


def test_an_error_restores_the_store_too() -> None:
    module = Scaled(1.0)
    before = contents()
    with pytest.raises(ZeroDivisionError), own_parameters(module):  # noqa: PT012
        module(torch.zeros(2))
        raise ZeroDivisionError
    assert contents() == before


def test_frozen_parameters_stay_frozen_and_bring_no_warning() -> None:
    module = Scaled(1.0)
    module.requires_grad_(False)
    with own_parameters(module):  # warnings are errors here
        loc, scale = module(torch.zeros(2))
    assert not loc.requires_grad
    assert not scale.requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_programs_that_are_no_modules_claim_nothing() -> None:
    pyro.param("mine", torch.tensor(3.0))
    before = contents()
    with own_parameters(lambda x: x, nn.Linear(2, 2)):
        pass
    assert contents() == before


def test_a_scratch_store_forgets_what_was_new_and_keeps_what_was_there() -> None:
    kept = pyro.param("kept", torch.tensor(1.0))
    before = contents()
    with scratch_store():
        assert pyro.param("kept").item() == kept.item()
        pyro.param("new", torch.tensor(2.0))
    assert contents() == before


def test_only_a_block_that_fails_is_undone() -> None:
    with unchanged_on_error():
        pyro.param("a", torch.tensor(1.0))
    with pytest.raises(ZeroDivisionError), unchanged_on_error():  # noqa: PT012
        pyro.param("b", torch.tensor(1.0))
        raise ZeroDivisionError
    assert list(pyro.get_param_store().keys()) == ["a"]

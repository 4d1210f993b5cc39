"""Recipes: what comes back is what went in, and nothing is built but what the table names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guides import families
from guides.flows import zuko
from guides.registry import BLOCKS
from ppl_models import PPCA, VAE
from ppl_models.core import recipe
from ppl_models.parts.likelihoods import Gaussian
from ppl_models.parts.priors import bayesian, normal


@dataclass
class Point:
    x: Any
    y: Any = 2.0
    norm: float = field(default=0.0, init=False)


NAMES = {"shapes.Point": Point, "shapes.normal": dist.Normal, "functions.sqrt": math.sqrt}


def there_and_back(value, names=NAMES) -> Any:
    tensors: dict[str, Tensor] = {}
    own: list[str] = []
    spec = recipe.encode(value, names, tensors, own, at="it")
    assert own == []
    # As a file would: by way of JSON, and tensors in a store of their own.
    text = json.dumps(spec, allow_nan=False)
    return recipe.decode(json.loads(text), names, {k: v.clone() for k, v in tensors.items()})


def same(one, two) -> bool:
    if isinstance(one, tuple | list):
        return type(two) is tuple and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, Point):
        return type(two) is Point and same((one.x, one.y), (two.x, two.y))
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, float) and math.isnan(one):
        return isinstance(two, float) and math.isnan(two)
    return type(one) is type(two) and one == two


tensors = st.sampled_from(
    [torch.zeros(()), torch.arange(6).reshape(2, 3), torch.tensor([True]), torch.ones(0, 2).float()]
)
words = st.sampled_from(
    ["float", "tensor", "mapping", "itself", "name", "arguments", "yours", ".a"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
values = st.recursive(
    leaves | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(words | st.text(max_size=3), inner, max_size=3)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=8,
)


@given(values)
def test_values_come_back(value) -> None:
    assert same(value, there_and_back(value))


def test_tensors_whose_places_read_alike_stay_apart() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    value = {"a.b": one, "a": {"b": two}, "a[0]": two, "c": [one]}
    assert same(value, there_and_back(value))


def test_numbers_of_numpy_come_back_as_numbers_and_arrays_as_tensors() -> None:
    assert there_and_back((np.float32(0.5), np.int8(3), np.bool_(True), np.str_("a"))) == (
        0.5,
        3,
        True,
        "a",
    )
    array = np.arange(6.0).reshape(2, 3)
    for view in (array, array[::-1, ::2], array.astype(">f4"), array > 2, array.astype("int16")):
        back = there_and_back(view)
        assert back.numpy().dtype == view.dtype.newbyteorder("=")
        assert back.tolist() == view.tolist()


def test_an_entry_of_the_table_comes_back_as_itself() -> None:
    assert there_and_back((math.sqrt, Point)) == (math.sqrt, Point)


@pytest.mark.parametrize("name", [n for n in BLOCKS if n.startswith("priors.") and n[7].isupper()])
def test_each_prior_comes_back_with_its_density(name) -> None:
    made: Any = BLOCKS[name]
    arguments = {k: torch.tensor([0.7, 1.3]) for k in made.arg_constraints if k != "validate_args"}
    takes = {"df": 3.0, "loc": 0.2}
    own = {k: arguments[k] + takes.get(k, 0.0) for k in arguments}
    prior = made(**own)
    back = there_and_back(prior, BLOCKS)
    at = torch.tensor([0.4, 2.1])
    assert type(back) is type(prior)
    assert torch.equal(back.log_prob(at), prior.log_prob(at))


@pytest.mark.parametrize("family", families.ALL, ids=lambda family: family.name)
def test_each_family_comes_back(family) -> None:
    back = there_and_back(family, BLOCKS)
    assert type(back) is type(family)
    assert repr(back) == repr(family)


def test_models_come_back_with_the_arguments_they_were_made_with() -> None:
    model = VAE((2, 3), 2, hidden=[4], likelihood=Gaussian(0.25))
    back = there_and_back(model, BLOCKS)
    assert back.arguments() == {
        "data_dim": (2, 3),
        "latent_dim": 2,
        "hidden": (4,),
        "likelihood": Gaussian(0.25),
        "decoder": None,
    }
    nested = there_and_back(bayesian(PPCA(5, 2), normal(2.0)), BLOCKS)
    assert nested.arguments()["module"].arguments() == PPCA(5, 2).arguments()
    assert nested.arguments()["prior"] == normal(2.0)


def test_options_that_a_signature_collects_are_spread() -> None:
    flow = families.Flow(zuko.flows.NSF, context=3, bins=4, hidden_features=(8,))
    back = there_and_back(flow, BLOCKS)
    assert back.arguments() == flow.arguments()


class MyPoint(Point):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda x: x, "<lambda>"),
        (MyPoint(1.0), "MyPoint"),
        (dist.Normal(0.0, 1.0).to_event(0).mask(False), "MaskedDistribution"),
        ({1: 2}, "dict"),
        ({1, 2}, "set"),
        (np.array(["a"]), "ndarray"),
        (torch.float32, "dtype"),
        (1j, "complex"),
    ],
)
def test_what_the_table_lacks_is_the_users_own_and_is_not_built(value, kind) -> None:
    own: list[str] = []
    spec = recipe.encode(Point([0, value]), NAMES, {}, own, at="it")
    assert own == [f"it.x[1] ({kind})"]
    assert recipe.show(spec, {}) == f"shapes.Point(x=(0, your own {kind}), y=2.0)"
    with pytest.raises(ValueError, match=r"recipe: cannot build \{'yours'"):
        recipe.decode(spec, NAMES, {})


@pytest.mark.parametrize("kind", ["itself", "name"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "shapes.Pint", "Point", ""])
def test_nothing_is_made_that_is_not_in_the_table(kind, name) -> None:
    spec = {kind: name} | ({"arguments": {"x": "touch x"}} if kind == "name" else {})
    with pytest.raises(ValueError, match=f"there is no building block '{name}'"):
        recipe.decode(spec, NAMES, {})


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'shapes.Point'\?"):
        recipe.decode({"name": "shapes.Pint", "arguments": {}}, NAMES, {})


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": "shapes.Point"},
        {"name": ["shapes.Point"], "arguments": {}},
        {"name": "shapes.Point", "arguments": []},
        {"tensor": "missing"},
        {"tensor": 3},
        {"mapping": [1]},
        {"itself": None},
        {"float": 1.0},
        {"reduce": ["os.system", "true"]},
        object(),
    ],
)
def test_what_is_no_description_is_refused(spec) -> None:
    with pytest.raises(ValueError, match="recipe: cannot build"):
        recipe.decode(spec, NAMES, {})


def test_an_argument_that_a_class_does_not_take_is_refused() -> None:
    spec = {"name": "shapes.Point", "arguments": {"x": 1, "z": 2}}
    with pytest.raises(ValueError, match="recipe: Point takes no argument 'z'"):
        recipe.decode(spec, NAMES, {})


def test_what_is_given_stands_in_for_what_is_described() -> None:
    spec = {"name": "shapes.Point", "arguments": {"x": 1, "y": 2}}
    assert recipe.decode(spec, NAMES, {}, y=3) == Point(1, 3)


def test_a_description_is_written_out_in_full() -> None:
    tensors: dict[str, Tensor] = {}
    value = Point(
        [dist.Normal(torch.zeros(2), 1.25), {"a": math.inf}], (math.sqrt, "b", torch.tensor([3, 4]))
    )
    spec = recipe.encode(value, NAMES, tensors, [], at="it")
    assert recipe.show(spec, tensors) == (
        "shapes.Point(x=(shapes.normal(loc=tensor (2,) of 0, 0, scale=tensor (2,) of 1.25, 1.25), "
        "{a=inf}), y=(functions.sqrt, 'b', tensor (2,) of 3, 4))"
    )

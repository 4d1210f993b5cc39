"""Networks carry leading dimensions, in inputs and in parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from ppl_models.parts.nn import Network, mlp

LEAD = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 8),
        nn.Unflatten(-1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 1, kernel_size=2, stride=2),
    )


NETS = {"mlp": lambda: mlp(2, (5,), 3), "convolutional": convolutional}


def test_a_tanh_network_is_the_formula_of_the_lecture() -> None:
    net = mlp(3, (4,), 2)
    x = torch.randn(7, 3)
    first, last = net[0], net[2]
    hidden = torch.tanh(x @ first.weight.T + first.bias)
    assert_close(net(x), hidden @ last.weight.T + last.bias)
    assert [type(layer) for layer in mlp(3, (4, 5))] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]
    assert [type(layer) for layer in mlp(3, (), 2)] == [nn.Linear]
    assert len(mlp(3, ())) == 0


@settings(deadline=None, max_examples=25)
@given(lead=LEAD, rows=st.integers(1, 4), kind=st.sampled_from(sorted(NETS)))
def test_leading_dimensions_of_the_input_are_a_loop(
    lead: tuple[int, ...], rows: int, kind: str
) -> None:
    net = NETS[kind]()
    z = torch.randn(*lead, rows, 2)
    got = Network(net)(z)
    want = torch.stack([net(one) for one in z.reshape(-1, rows, 2)])
    assert_close(got, want.reshape(*lead, *want.shape[1:]))


@settings(deadline=None, max_examples=25)
@given(
    outer=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    plates=st.integers(1, 2),
    rows=st.integers(1, 4),
    kind=st.sampled_from(sorted(NETS)),
    data=st.data(),
)
def test_batched_parameters_are_a_loop_over_particles(
    outer: tuple[int, ...], plates: int, rows: int, kind: str, data: st.DataObject
) -> None:
    """Parameters (*outer, 1, ..., 1, *own): what latents of that many plates to the right have."""
    net = NETS[kind]()
    own = dict(net.named_parameters())
    chosen = data.draw(st.sets(st.sampled_from(sorted(own)), min_size=1))
    drawn = {name: torch.randn(*outer, *(1,) * plates, *own[name].shape) for name in sorted(chosen)}
    inner = [2] * (plates - 1)
    shared = data.draw(st.booleans())  # the input may lack the dimensions of particles
    z = torch.randn(*(() if shared else (*outer, *inner)), rows, 2)
    wrapped = Network(net)
    got = functional_call(wrapped, {f"net.{name}": value for name, value in drawn.items()}, (z,))
    z = z.expand(*outer, *inner, rows, 2)
    want = []
    for index in torch.cartesian_prod(*(torch.arange(n) for n in outer)).reshape(-1, len(outer)):
        at = tuple(index.tolist())
        values = {name: value[at].reshape(own[name].shape) for name, value in drawn.items()}
        want.append(functional_call(net, values, (z[at].reshape(-1, 2),)))
    stacked = torch.stack(want)
    whole = stacked.reshape(*z.shape[:-1], *stacked.shape[2:])
    assert_close(got.expand_as(whole), whole)  # plates that the input lacks stay ones


@pytest.mark.parametrize("kind", sorted(NETS))
def test_gradients_reach_each_particle_alone(kind: str) -> None:
    net = NETS[kind]()
    name, own = next(iter(net.named_parameters()))
    weights = torch.randn(3, 1, *own.shape, requires_grad=True)
    z = torch.randn(4, 2)

    def run(value: Tensor) -> Any:
        return functional_call(Network(net), {f"net.{name}": value}, (z,))

    (gradient,) = torch.autograd.grad(run(weights)[1].sum(), weights)
    (alone,) = torch.autograd.grad(functional_call(net, {name: weights[1, 0]}, (z,)).sum(), weights)
    assert_close(gradient, alone)
    assert gradient[0].abs().sum() == gradient[2].abs().sum() == 0 < gradient[1].abs().sum()

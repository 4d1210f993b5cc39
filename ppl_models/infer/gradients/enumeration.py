"""Sums over all joint states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_models.core.checks import check_count
from ppl_models.core.traces import PARTICLES
from ppl_models.infer.gradients.score import (
    Run,
    Score,
    base_of,
    kind_of,
    replaced,
)


class _States(Messenger):
    """Give some sites all their joint states, one in each particle."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.states: list[Tensor] = []

    def __enter__(self) -> Any:
        self.states = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        fn = msg["fn"]
        own = _joint_states(fn)
        many = next(f.size for f in msg["cond_indep_stack"] if f.name == PARTICLES)
        axis = next(f.dim for f in msg["cond_indep_stack"] if f.name == PARTICLES)
        before = math.prod(len(states) for states in self.states)
        place = torch.arange(many, device=own.device) // before % len(own)
        value = own[place].reshape(many, *(1,) * (-axis - 1), *fn.event_shape)
        msg["value"] = value.expand(*fn.batch_shape, *fn.event_shape)
        msg["done"] = True
        self.states.append(own)


@dataclass(frozen=True, repr=False)
class Enumerate(Score):
    """The exact gradient: the sum over all joint states of the discrete latents of a row.

    What it takes doubles with each binary unit. Latents that are marked for enumeration and that the
    guide leaves out are summed by `pyro.infer.TraceEnum_ELBO()`, which `fit` takes as objective.

    Arguments:
        most: Joint states of a row, at most.

    Example:
        >>> import torch
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> from ppl_models.infer import ELBO
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(3,))
        >>> guide, x = Amortized(model), model(size=4)
        >>> one, other = (ELBO(score=Enumerate())(model, guide, x)[1] for _ in range(2))
        >>> torch.equal(one, other)  # nothing is drawn
        True
    """

    vectorized: ClassVar[bool] = True
    most: int = 4096
    names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_count("Enumerate", "most", self.most)

    def refuses(self, name: str, fn: Any) -> str | None:
        """Say why it does not fit a site: it takes finite supports."""
        if not base_of(fn).has_enumerate_support:
            return f"its distribution is {kind_of(fn)}, whose support is not finite"
        try:
            _number_of_states(fn)
        except NotImplementedError:  # such as binomials of different totals
            return f"its distribution is {kind_of(fn)}, of elements with different supports"
        return None

    def refuses_all(self, nodes: Mapping[str, Any]) -> str | None:
        """Say why it does not fit sites together; None if it does."""
        sizes = {name: _number_of_states(node["fn"]) for name, node in nodes.items()}
        many = math.prod(sizes.values())
        if many <= self.most:
            return None
        return (
            f"sites {list(sizes)}: a row has {many:,} joint states of them, more than "
            f"most={self.most:,}"
        )

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> Enumerate:
        """Return one that knows the sites."""
        return replaced(self, names=tuple(nodes))

    def runs(self, nodes: Mapping[str, Any]) -> int:
        """Return the number of joint states."""
        return math.prod(_number_of_states(node["fn"]) for node in nodes.values())

    def handler(self, runs: int) -> Messenger:
        """Return what goes through the states."""
        return _States(self.names)

    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return nothing: the sum over states has its own gradient."""
        raise NotImplementedError


def _number_of_states(fn: Any) -> int:
    """Return how many values a draw can have; a plate has a draw in each place."""
    base = base_of(fn)
    elements = fn.event_shape.numel() // base.event_shape.numel()
    return len(base.enumerate_support(expand=False)) ** elements


def _joint_states(fn: Any) -> Tensor:
    """Return all values of a draw, shape (states, *event)."""
    base = base_of(fn)
    one = base.enumerate_support(expand=False)
    one = one.reshape(len(one), *base.event_shape)
    elements = fn.event_shape.numel() // base.event_shape.numel()
    codes = torch.arange(len(one) ** elements, device=one.device).unsqueeze(1)
    digits = codes // len(one) ** torch.arange(elements, device=one.device) % len(one)
    return one[digits].reshape(-1, *fn.event_shape)

"""Ensembles: a handful of points in place of a density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import biject_to

from guides.base import SiteGuide, check_values, key
from guides.conditionals import Bijected, Conditional, moved
from guides.families import Family
from ppl_models.core.batch import as_batch
from ppl_models.core.checks import check_count, check_known, check_positive
from ppl_models.core.modes import evaluating
from ppl_models.core.sites import Site, describe
from ppl_models.core.store import own_parameters, scratch_store
from ppl_models.core.traces import draw_latents
from ppl_models.core.types import Distribution


class Ensemble(SiteGuide):
    r"""K points, each as probable as the others: a deep ensemble.

    .. math::

        q(w) = \frac{1}{K} \sum_k \delta(w - w_k), \qquad
        w_k \to \arg\max_w \log p(y, w) \text{ near where it started}

    A draw is one member, for all sites together. Training by `ELBO()` takes each member to a mode
    of the joint density, in the model's own coordinates: a MAP estimate. With one particle a step
    moves one member drawn at random; with `ELBO(particles=K)` it moves each once. What members
    differ by is where they started: unless `start_at` says otherwise, draws from the prior.

    It is no bound: points have no density, their term is left out, and what is reported is the mean
    of :math:`\log p(y, w_k)` over members. Compare it with no bound and with no other model's.

    Arguments:
        model: A Pyro model whose latents are all global and continuous, such as
            `BayesianNeuralNetwork`.
        members: Points K.
        example: A batch of two or more rows to trace the model with; required unless the model can
            draw one with `model(size=2)`.
        plate: Name of the plate over rows.

    Raises:
        ValueError: If `members` is not positive, or a latent is discrete or local to a row.

    Source:
        Lakshminarayanan, Pritzel & Blundell (2017). https://arxiv.org/abs/1612.01474

    Example:
        >>> from ppl_models import BayesianNeuralNetwork
        >>> model = BayesianNeuralNetwork(data_dim=3, hidden=(8,))
        >>> x = torch.randn(20, 3)
        >>> guide = Ensemble(model, members=5, example=(x, x[:, 0]))
        >>> guide.members()["0.weight"].shape
        torch.Size([5, 8, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        members: int = 5,
        example: Any = None,
        plate: str = "data",
    ) -> None:
        check_count("Ensemble", "members", members)
        super().__init__(model, family=_Point(), example=example, plate=plate)
        self.size = members
        self._drawn: Tensor | None = None  # the member in force, while it is called
        batch = as_batch(self._example, model)
        with (
            torch.no_grad(), poutine.block(), scratch_store(), own_parameters(model),
            evaluating(model),
        ):  # fmt: skip
            starts = [draw_latents(model, *batch) for _ in range(members)]
        for name in self._sites:
            numbers = torch.stack([self._numbers(name, start[name]) for start in starts])
            self.global_parameters[key(name)] = nn.Parameter(numbers)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """Draw a member, the same at every site; returns its values by site."""
        shape = _shape_of_plates()
        # Particles take turns, from a member drawn at random on: as many as there are members move
        # each once.
        like = {"dtype": self._like.dtype, "device": self._like.device}
        first = (torch.rand((), **like) * self.size).long()
        turns = torch.arange(math.prod(shape), device=self._like.device)
        self._drawn = ((first + turns) % self.size).reshape(shape)
        try:
            return super().forward(*batch)
        finally:
            self._drawn = None

    def q(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Distribution:
        """Return the point that the member in force has at a site, or that of one drawn now.

        Its `log_prob` is 0 everywhere: see the class.
        """
        drawn = torch.randint(self.size, ()) if self._drawn is None else self._drawn
        # The plates of the site, of size 1 in what was drawn outside of them, are in the table.
        drawn = drawn[(..., *(0,) * min(drawn.ndim, len(self._sites[site].batch_shape)))]
        table = self.global_parameters[key(site)]
        chosen = table.index_select(0, drawn.flatten().to(table.device))
        return self.conditional(site)(chosen.reshape(*drawn.shape, *table.shape[1:]))

    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Never called: no latent is local."""
        raise NotImplementedError

    def members(self) -> dict[str, Tensor]:
        """Return the values of all members, shape (K, *plates, *event) a site."""
        return {
            name: self.conditional(name)(self.global_parameters[key(name)].detach()).mean
            for name in self._sites
        }

    def start_at(self, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Place the members, such as at networks that were made K times over.

        Arguments:
            members: The values of each member by site, as `dict(net.named_parameters())` has them
                for the weights of a network. Sites left out stay where they are.

        Raises:
            ValueError: If there are not K of them, or a site is unknown or a value has another
                shape.
        """
        if len(members) != self.size:
            raise ValueError(
                f"Ensemble: start_at takes the values of {self.size} members, got {len(members)}."
            )
        found = []
        for member, values in enumerate(members):
            check_values("Ensemble: start_at, or start_around,", values)
            for name, value in values.items():
                check_known("latent", name, self._sites)
                want = self._sites[name].value.shape
                if value.shape != want:
                    raise ValueError(
                        f"Ensemble: the value for '{name}' must have shape {tuple(want)}, got "
                        f"{tuple(value.shape)} for member {member}."
                    )
                found.append((name, member, self._numbers(name, value.detach().to(self._like))))
        with torch.no_grad():
            for name, member, numbers in found:
                self.global_parameters[key(name)][member] = numbers

    def start_around(self, values: Mapping[str, Tensor], *, scale: float = 0.05) -> None:
        """Place the members around values, `scale` apart on the unconstrained space.

        Arguments:
            values: One for each site, as `bayesian(...).starts()` returns them.
            scale: Standard deviation.

        Raises:
            ValueError: As `start_at`, or if `scale` is not positive and finite.
        """
        check_positive("Ensemble", "scale", scale)
        self.start_at([values] * self.size)
        with torch.no_grad():
            for name in values:
                numbers = self.global_parameters[key(name)]
                numbers.add_(scale * torch.randn_like(numbers))

    def _numbers(self, site: str, value: Tensor) -> Tensor:
        point: Any = self.conditional(site)
        return point.numbers_of(value)


class _Point(Family):
    """The family of an ensemble; the user has no choice of it."""

    wants = "continuous values, global"

    def refuses(self, site: Site) -> str | None:
        if site.local:
            return "each row has its own, and members are points for what all rows share"
        if site.discrete:
            return f"its support, {describe(site.support)}, is discrete"
        return None

    def build(self, site: Site) -> Conditional:
        if reason := self.refuses(site):
            raise ValueError(
                f"Ensemble: all latents must be global and continuous, but '{site.name}' is not: "
                f"{reason}. Use guides.Local or guides.Amortized."
            )
        return self._build(site)

    def _build(self, site: Site) -> Conditional:
        return _PointOnSupport(site)


class _PointOnSupport(Bijected):
    """A point, from its coordinates on the unconstrained space."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.size = self.features
        self._event_dim = len(site.event_shape)

    def forward(self, parameters: Tensor) -> Distribution:
        value = parameters.reshape((*parameters.shape[:-1], *self._shape))
        if self._support is not None:
            value = biject_to(moved(self._support, value))(value)
        return _Undensed(value, event_dim=self._event_dim)

    def numbers_of(self, value: Tensor) -> Tensor:
        if self._support is not None:
            value = biject_to(moved(self._support, value)).inv(value)
        return value.reshape((*value.shape[: value.ndim - len(self._shape)], self.features))


class _Undensed(dist.Delta):
    """A point whose density is left out, so that the points of other members can be scored too."""

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.ndim - self.event_dim])


def _shape_of_plates() -> tuple[int, ...]:
    """Return the shape of the plates that a guide is called in, such as that of particles."""
    sizes = {frame.dim: frame.size for frame in get_plates() if frame.dim is not None}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))

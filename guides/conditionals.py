"""From a few numbers to a distribution over one value of a site: the modules behind families."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.contrib.zuko import ZukoToPyro
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as T

from guides.flows import zuko
from ppl_models.core.sites import Site, base_support, value_support
from ppl_models.core.types import Distribution


class Conditional(nn.Module, abc.ABC):
    """A distribution over one value of a site, as a function of `size` numbers.

    Attributes:
        size: The numbers it takes.
    """

    size: int

    @abc.abstractmethod
    def forward(self, parameters: Float[Tensor, "*batch P"]) -> Distribution:
        """Return a distribution with batch shape `*batch` and the event shape of the site."""

    def initial(self) -> Float[Tensor, " P"]:
        """Return the numbers that free parameters start from."""
        return torch.zeros(self.size)


class Bijected(Conditional):
    """What the normal families share: the way from a flat real vector to the support."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        support = value_support(site)
        self._support = None if base_support(support)[0] is constraints.real else support
        bijection = None if self._support is None else biject_to(self._support)
        self._shape = Size(
            site.event_shape if bijection is None else bijection.inverse_shape(site.event_shape)
        )
        self.features = math.prod(self._shape)

    def around(self, value: Tensor, scale: float) -> Float[Tensor, " P"]:
        """Return the numbers of a normal around a value, `scale` wide on the unconstrained space."""
        numbers = self.initial().to(value)
        if self._support is not None:
            value = biject_to(moved(self._support, value)).inv(value)
        numbers[: self.features] = value.flatten()
        numbers[self.features : 2 * self.features] = 2.0 * math.log(scale)
        return numbers

    def _carry(self, base: Distribution, like: Tensor, *, flat: bool = True) -> Distribution:
        """Carry a distribution over the unconstrained space to the support, where `like` is."""
        steps: list[Any] = []
        if flat and len(self._shape) != 1:
            steps.append(T.ReshapeTransform(Size((self.features,)), self._shape))
        if self._support is not None:
            steps.append(biject_to(moved(self._support, like)))
        return dist.TransformedDistribution(base, steps) if steps else base


class DiagonalNormal(Bijected):
    """Independent normal elements, from loc and log squared scale."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.size = 2 * self.features
        self._positive = is_half_line(base_support(value_support(site))[0])

    def forward(self, parameters: Tensor) -> Distribution:
        shape = (*parameters.shape[:-1], *self._shape)
        loc, log_square = parameters.split(self.features, dim=-1)
        loc, scale = loc.reshape(shape), (log_square.reshape(shape) / 2).exp()
        if self._positive:
            return dist.LogNormal(loc, scale).to_event(len(self._shape))  # knows its mean
        base = dist.Normal(loc, scale)
        return self._carry(base.to_event(len(self._shape)), parameters, flat=False)

    def initial(self) -> Tensor:
        return _loc_and_log_square(self.features)


class LowRankCovariance(Bijected):
    """Normal with a low-rank covariance, from loc, log squared scale and factor."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__(site)
        self.rank = rank
        self.size = self.features * (2 + rank)

    def forward(self, parameters: Tensor) -> Distribution:
        n = self.features
        loc, log_square, factor = parameters.split([n, n, n * self.rank], dim=-1)
        factor = factor.reshape(*factor.shape[:-1], n, self.rank)
        return self._carry(
            dist.LowRankMultivariateNormal(loc, factor, log_square.exp()), parameters
        )

    def initial(self) -> Tensor:
        # At a factor of 0 its gradient is 0, too: start beside it.
        factor = 0.01 * torch.randn(self.features * self.rank)
        return torch.cat([_loc_and_log_square(self.features), factor])


class FullCovariance(Bijected):
    """Normal with a full covariance, from loc, log squared diagonal and what is below it."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        n = self.features
        self.size = 2 * n + n * (n - 1) // 2
        # Where each element below the diagonal comes from; all others point at an appended 0.
        order = torch.full((n, n), n * (n - 1) // 2)
        rows, columns = torch.tril_indices(n, n, -1)
        order[rows, columns] = torch.arange(len(rows))
        self._order: Tensor
        self.register_buffer("_order", order, persistent=False)

    def forward(self, parameters: Tensor) -> Distribution:
        n = self.features
        loc, log_square, below = parameters.split([n, n, self.size - 2 * n], dim=-1)
        padded = torch.nn.functional.pad(below, (0, 1))
        factor = padded[..., self._order] + torch.diag_embed((log_square / 2).exp())
        return self._carry(dist.MultivariateNormal(loc, scale_tril=factor), parameters)

    def initial(self) -> Tensor:
        rest = torch.zeros(self.size - 2 * self.features)
        return torch.cat([_loc_and_log_square(self.features), rest])


class FlowConditional(Bijected):
    """A zuko flow on the unconstrained space, conditional on its numbers."""

    def __init__(
        self, site: Site, make: Callable[[int], nn.Module], *, context: int, inverse: bool
    ) -> None:
        super().__init__(site)
        self.size = context
        self.flow = make(self.features)
        self._inverse = inverse

    def forward(self, parameters: Tensor) -> Distribution:
        flow = self.flow(parameters)
        if self._inverse:
            flow = zuko.distributions.NormalizingFlow(flow.transform.inv, flow.base)
        return self._carry(_Zuko(flow), parameters)

    def initial(self) -> Tensor:
        return 0.1 * torch.randn(self.size)


class _Zuko(ZukoToPyro):
    """A zuko flow that can be the base of a transformed distribution."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self(sample_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Zuko:
        return _Zuko(self.dist.expand(Size(batch_shape)))


class Elementwise(Conditional):
    """A distribution over each element, from a few numbers each."""

    def __init__(self, site: Site, numbers: int, make: Callable[..., Distribution]) -> None:
        super().__init__()
        self._shape = site.event_shape
        self._numbers = numbers
        self._make = make
        self.size = numbers * math.prod(self._shape)

    def forward(self, parameters: Tensor) -> Distribution:
        shape = (*parameters.shape[:-1], self._numbers, *self._shape)
        numbers = parameters.reshape(shape).unbind(-len(self._shape) - 1)
        return self._make(*numbers).to_event(len(self._shape))


class SmoothBernoulli(dist.Bernoulli):
    """Bernoulli, whose draws carry a gradient that is biased.

    Arguments:
        logits: Log odds of a one.
        temperature: Of the logistic variable that is above 0 where the draw is 1.
        rounds: Draw zeros and ones, with the gradient of what they were rounded from; or draw that.
    """

    has_rsample = True
    biased = True  # so that tables can say it

    def __init__(self, logits: Tensor, temperature: float, *, rounds: bool) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.temperature, self.rounds = temperature, rounds

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, along a path."""
        logits = self.logits.expand(self._extended_shape(Size(sample_shape)))
        u = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
        z = logits + torch.log(u) - torch.log1p(-u)
        smooth = torch.sigmoid(z / self.temperature)
        return (z > 0.0).to(z.dtype) + (smooth - smooth.detach()) if self.rounds else smooth

    def expand(self, batch_shape: Any, _instance: Any = None) -> SmoothBernoulli:
        """Return it with another batch shape."""
        return SmoothBernoulli(
            self.logits.expand(batch_shape), self.temperature, rounds=self.rounds
        )


class SmoothElements(Elementwise):
    """Bernoulli elements, from logits, with biased gradients; rounded while it is evaluated."""

    def __init__(self, site: Site, temperature: float, *, rounds: bool) -> None:
        def make(logits: Tensor) -> Distribution:
            return SmoothBernoulli(logits, temperature, rounds=rounds or not self.training)

        super().__init__(site, 1, make)


class Lastwise(Conditional):
    """A distribution whose numbers are a vector in the last dimension, such as logits."""

    def __init__(
        self,
        site: Site,
        numbers: int,
        make: Callable[[Tensor], Distribution],
        *,
        appended: bool = False,
    ) -> None:
        super().__init__()
        outer = site.event_shape if appended else site.event_shape[:-1]
        self._shape = (*outer, numbers)
        self._make = make
        self.size = math.prod(self._shape)

    def forward(self, parameters: Tensor) -> Distribution:
        numbers = parameters.reshape(*parameters.shape[:-1], *self._shape)
        return self._make(numbers).to_event(len(self._shape) - 1)


def is_half_line(base: constraints.Constraint) -> bool:
    """Whether a support is that of positive numbers, with 0 or without."""
    half_lines = (type(constraints.positive), type(constraints.nonnegative))
    return isinstance(base, half_lines) and not torch.as_tensor(base.lower_bound).any()


def moved(support: constraints.Constraint, like: Tensor) -> constraints.Constraint:
    """Bring the bounds of a support to where the parameters are."""
    base, dims = base_support(support)
    if not any(isinstance(bound, Tensor) for bound in vars(base).values()):
        return support
    own = copy.copy(base)
    for name, bound in vars(base).items():
        if isinstance(bound, Tensor):
            setattr(own, name, bound.to(like))
    return constraints.independent(own, dims) if dims else own


def _loc_and_log_square(features: int) -> Tensor:
    """Start free normal parameters at 0, with a scale of 0.1."""
    return torch.cat([torch.zeros(features), torch.full((features,), 2 * math.log(0.1))])

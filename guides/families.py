"""Families: the distribution that a guide gives a latent, as a function of parameters.

A family is built for one site and becomes a module: from `size` numbers to a distribution over one
value of that site. Where the numbers come from, a network or a table, is the guide's business.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import biject_to, constraints

from guides.conditionals import (
    Conditional,
    DiagonalNormal,
    Elementwise,
    FlowConditional,
    FullCovariance,
    Lastwise,
    LowRankCovariance,
    SmoothElements,
    is_half_line,
)
from guides.flows import zuko
from ppl_models.core.sites import Site, base_support, describe


class Family(abc.ABC):
    """A family of distributions, which `build` makes fit for one site."""

    #: The values it can take, in words.
    wants: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return type(self).__name__

    @abc.abstractmethod
    def refuses(self, site: Site) -> str | None:
        """Say why this family cannot serve a site; None if it can."""

    def build(self, site: Site) -> Conditional:
        """Make the module that serves one site.

        Raises:
            ValueError: If the family cannot serve the support of that site.
        """
        if reason := self.refuses(site):
            fitting = ", ".join(family.name for family in ALL if family.refuses(site) is None)
            raise ValueError(
                f"family {self.name} cannot serve site '{site.name}': {reason}. "
                f"Families that can: {fitting or 'none'}. For several sites pass "
                f"family={{'{site.name}': ...}}; sites left out get a default."
            )
        return self._build(site)

    @abc.abstractmethod
    def _build(self, site: Site) -> Conditional: ...


class _Unconstrained(Family):
    """Lives on the unconstrained space, and is carried to the support by a bijection."""

    wants = "continuous values, on a support with a bijection from the real vectors"

    def refuses(self, site: Site) -> str | None:
        if site.discrete:
            return f"its support, {describe(site.support)}, is discrete"
        try:
            biject_to(site.support)
        except NotImplementedError:
            return f"torch has no bijection from a real vector to its support, {site.support}"
        return None


@dataclass(frozen=True)
class Normal(_Unconstrained):
    r"""Diagonal normal: log-normal on positive sites, logistic normal on simplices, and so on.

    Its numbers are loc and :math:`\log \sigma^2`, as in the lecture.
    """

    def _build(self, site: Site) -> Conditional:
        return DiagonalNormal(site)


@dataclass(frozen=True)
class LowRankNormal(_Unconstrained):
    r"""Normal with covariance :math:`F F^T + \mathrm{diag}(\sigma^2)`.

    Arguments:
        rank: Columns of :math:`F`.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LowRankNormal: rank must be at least 1, got {self.rank}.")

    def _build(self, site: Site) -> Conditional:
        return LowRankCovariance(site, self.rank)


@dataclass(frozen=True)
class FullNormal(_Unconstrained):
    """Normal with a full covariance matrix, by its Cholesky factor."""

    def _build(self, site: Site) -> Conditional:
        return FullCovariance(site)


class Flow(_Unconstrained):
    """A normalising flow by zuko, conditional on the numbers it is given.

    Arguments:
        flow: Makes a flow from `features`, `context` and options, such as `zuko.flows.MAF`, the
            default, `zuko.flows.NSF`, or your own.
        context: Numbers that the flow is conditional on.
        inverse: Draw in one pass and score other values slowly (an inverse autoregressive flow),
            which is what variational inference needs; False is the other way round.
        options: Passed to `flow`, such as `transforms=3, hidden_features=(64, 64)`.

    Source:
        Kingma et al. (2016), https://arxiv.org/abs/1606.04934; Papamakarios, Pavlakou & Murray
        (2017), https://arxiv.org/abs/1705.07057; Durkan et al. (2019),
        https://arxiv.org/abs/1906.04032
    """

    def __init__(
        self,
        flow: Callable[..., nn.Module] = zuko.flows.MAF,
        *,
        context: int = 16,
        inverse: bool = True,
        **options: Any,
    ) -> None:
        if context < 1:
            raise ValueError(f"Flow: context must be at least 1, got {context}.")
        self.flow = flow
        self.context = context
        self.inverse = inverse
        self.options = options

    def arguments(self) -> dict[str, Any]:
        """Return what it was made with, by name: what a saved run rebuilds it from."""
        return {
            "flow": self.flow,
            "context": self.context,
            "inverse": self.inverse,
            "options": self.options,
        }

    def _build(self, site: Site) -> Conditional:
        return FlowConditional(
            site,
            lambda features: self.flow(features=features, context=self.context, **self.options),
            context=self.context,
            inverse=self.inverse,
        )

    def __repr__(self) -> str:
        return f"Flow({getattr(self.flow, '__name__', self.flow)}, context={self.context})"


@dataclass(frozen=True)
class _OneSupport(Family):
    """Serves the sites whose elements have one kind of support."""

    def refuses(self, site: Site) -> str | None:
        base, _ = base_support(site.support)
        if self._serves(base):
            return None
        return f"its support is {describe(site.support)}, and {self.name} needs {self.wants}"

    @abc.abstractmethod
    def _serves(self, base: constraints.Constraint) -> bool: ...


@dataclass(frozen=True)
class Gamma(_OneSupport):
    """Gamma, for positive sites; its numbers are log concentration and log rate.

    Of the concentration, what is above a least one: draws of concentration a are below the smallest
    number of single precision, 1e-38, with probability 1e-38 to the power of a. Kept there, they
    would all have one value, which a density of a small enough concentration makes improbable: what
    is reported would be above the evidence. At .05 it is one draw in 80, at .1 one in 6,000.

    Arguments:
        min_concentration: The least concentration.
    """

    wants = "positive values"
    min_concentration: float = 0.05

    def __post_init__(self) -> None:
        if not self.min_concentration >= 0.0:
            raise ValueError(
                f"Gamma: min_concentration must be >= 0, got {self.min_concentration}."
            )

    def _serves(self, base: constraints.Constraint) -> bool:
        return is_half_line(base)

    def _build(self, site: Site) -> Conditional:
        least = self.min_concentration
        return Elementwise(site, 2, lambda a, b: dist.Gamma(least + a.exp(), b.exp()))


@dataclass(frozen=True)
class Beta(_OneSupport):
    """Beta, for sites in the unit interval; its numbers are the logs of both concentrations."""

    wants = "values in the unit interval"

    def _serves(self, base: constraints.Constraint) -> bool:
        return isinstance(base, type(constraints.unit_interval)) and (
            base.lower_bound == 0 and base.upper_bound == 1
        )

    def _build(self, site: Site) -> Conditional:
        return Elementwise(site, 2, lambda a, b: dist.Beta(a.exp(), b.exp()))


@dataclass(frozen=True)
class Dirichlet(_OneSupport):
    """Dirichlet, for simplices; its numbers are log concentrations."""

    wants = "values on a simplex"

    def _serves(self, base: constraints.Constraint) -> bool:
        return base is constraints.simplex

    def _build(self, site: Site) -> Conditional:
        return Lastwise(site, site.event_shape[-1], lambda a: dist.Dirichlet(a.exp()))


@dataclass(frozen=True)
class Bernoulli(_OneSupport):
    """Bernoulli, for binary sites; its numbers are logits."""

    wants = "binary values"

    def _serves(self, base: constraints.Constraint) -> bool:
        return base is constraints.boolean

    def _build(self, site: Site) -> Conditional:
        return Elementwise(site, 1, lambda logits: dist.Bernoulli(logits=logits))


@dataclass(frozen=True)
class StraightThrough(_OneSupport):
    r"""Bernoulli, with the gradient of a smooth version of its draws: biased.

    Draws are zeros and ones, so what is reported is a bound; its gradient is that of
    :math:`\sigma((\phi + \epsilon) / \lambda)`, from which they were rounded. Its numbers are logits.

    Arguments:
        temperature: :math:`\lambda`: lower for less bias and more variance.

    Source:
        Bengio, Leonard & Courville (2013), https://arxiv.org/abs/1308.3432; Jang, Gu & Poole (2017),
        https://arxiv.org/abs/1611.01144
    """

    wants = "binary values"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"{self.name}: temperature must be above 0, got {self.temperature}.")

    def _serves(self, base: constraints.Constraint) -> bool:
        return base is constraints.boolean

    def _build(self, site: Site) -> Conditional:
        return SmoothElements(site, self.temperature, rounds=True)


@dataclass(frozen=True)
class Concrete(StraightThrough):
    """Bernoulli, smooth while it is trained: biased.

    The model sees values between 0 and 1, to which its log density is extended as that of a Bernoulli
    variable is: what is reported in training is no bound. In evaluation mode draws are rounded. In
    plain Pyro turn validation off, `pyro.enable_validation(False)`.

    Arguments:
        temperature: Of the smooth draws: lower for less bias and more variance.

    Source:
        Maddison, Mnih & Teh (2017), https://arxiv.org/abs/1611.00712; Jang, Gu & Poole (2017),
        https://arxiv.org/abs/1611.01144
    """

    def _build(self, site: Site) -> Conditional:
        return SmoothElements(site, self.temperature, rounds=False)


@dataclass(frozen=True)
class Categorical(_OneSupport):
    """Categorical, for sites with values 0, 1, ..., n; its numbers are logits."""

    wants = "integers from 0 to a bound that is the same everywhere"

    def _serves(self, base: constraints.Constraint) -> bool:
        return isinstance(base, constraints.integer_interval) and _upper(base) is not None

    def _build(self, site: Site) -> Conditional:
        upper = _upper(base_support(site.support)[0])
        assert upper is not None
        return Lastwise(
            site, upper + 1, lambda logits: dist.Categorical(logits=logits), appended=True
        )


@dataclass(frozen=True)
class OneHotCategorical(_OneSupport):
    """Categorical in one-hot form; its numbers are logits."""

    wants = "one-hot vectors"

    def _serves(self, base: constraints.Constraint) -> bool:
        return base is constraints.one_hot

    def _build(self, site: Site) -> Conditional:
        make = lambda logits: dist.OneHotCategorical(logits=logits)
        return Lastwise(site, site.event_shape[-1], make)


@dataclass(frozen=True)
class Poisson(_OneSupport):
    """Poisson, for counts without a bound; its numbers are log rates."""

    wants = "non-negative integers"

    def _serves(self, base: constraints.Constraint) -> bool:
        return base is constraints.nonnegative_integer

    def _build(self, site: Site) -> Conditional:
        return Elementwise(site, 1, lambda log_rate: dist.Poisson(log_rate.exp()))


#: Every family, the default for a support first.
ALL: tuple[Family, ...] = (
    Normal(),
    LowRankNormal(),
    FullNormal(),
    Flow(),
    Gamma(),
    Beta(),
    Dirichlet(),
    Bernoulli(),
    StraightThrough(),
    Concrete(),
    Categorical(),
    OneHotCategorical(),
    Poisson(),
)


def default(site: Site) -> Family:
    """Return the family that a site gets unless the user chooses one.

    Raises:
        ValueError: If no family can serve it.
    """
    for family in ALL:
        if family.refuses(site) is None:
            return family
    raise ValueError(
        f"no family can serve site '{site.name}' with support {describe(site.support)}. Write a "
        "`families.Family` for it and pass family={'" + site.name + "': YourFamily()}."
    )


def _upper(base: Any) -> int | None:
    low, high = torch.as_tensor(base.lower_bound), torch.as_tensor(base.upper_bound)
    if low.any() or (high != high.flatten()[0]).any():
        return None
    return int(high.flatten()[0])

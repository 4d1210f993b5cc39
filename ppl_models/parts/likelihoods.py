"""Likelihoods: from the numbers that a decoder puts out to a distribution of one row.

Each is a callable with an attribute `size`: the numbers it needs for each element of the data. A
decoder puts out an array of shape (size, *event) for a row, or anything with as many numbers. A
likelihood with numbers of its own that are to be inferred has `latents()`, and takes their values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_models.core.checks import check_count
from ppl_models.core.types import Distribution


@runtime_checkable
class Likelihood(Protocol):
    """A distribution of one row, given the numbers that a decoder puts out."""

    @property
    def size(self) -> int:
        """Numbers for each element of the data."""
        ...

    def __call__(self, outputs: Tensor, event_dim: int) -> Distribution:
        """Turn outputs of shape (*batch, size, *event) into a distribution over (*event)."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli elements; the outputs are logits. Data are floats, 0 or 1."""

    size: int = field(default=1, init=False)

    def __call__(self, outputs: Float[Tensor, "*batch 1 *event"], event_dim: int) -> Distribution:
        """Turn logits into a distribution."""
        return dist.Bernoulli(logits=outputs.squeeze(-event_dim - 1)).to_event(event_dim)


@dataclass(frozen=True)
class Gaussian:
    r"""Independent normal elements, each with a learnt scale.

    The outputs are loc and :math:`\log \sigma^2`, and the scale is `min_scale` plus sigma. Without
    a minimum the likelihood of an element that hardly varies grows without bound.

    Arguments:
        min_scale: Smallest standard deviation, in the units of the data.
    """

    min_scale: float = 1e-3
    size: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        if not self.min_scale >= 0.0:
            raise ValueError(f"Gaussian: min_scale must be >= 0, got {self.min_scale}.")

    def __call__(self, outputs: Float[Tensor, "*batch 2 *event"], event_dim: int) -> Distribution:
        """Turn loc and log squared scale into a distribution."""
        loc, log_square = outputs.unbind(-event_dim - 1)
        return dist.Normal(loc, self.min_scale + (log_square / 2).exp()).to_event(event_dim)


@dataclass(frozen=True)
class Categorical:
    """Independent categorical elements; the outputs are logits, and data are one-hot floats.

    A row has shape (*event, classes): with codes 0, 1, ... in `codes`, pass
    `torch.nn.functional.one_hot(codes, classes).float()`.

    Arguments:
        classes: Values that an element can take, at least 2.
    """

    classes: int

    def __post_init__(self) -> None:
        check_count("Categorical", "classes", self.classes, 2)

    @property
    def size(self) -> int:
        """One logit a class."""
        return self.classes

    def __call__(self, outputs: Float[Tensor, "*batch C *event"], event_dim: int) -> Distribution:
        """Turn logits into a distribution over one-hot arrays."""
        logits = outputs.movedim(-event_dim - 1, -1)
        return dist.OneHotCategorical(logits=logits).to_event(event_dim)


@dataclass(frozen=True)
class Homoscedastic:
    r"""Independent normal elements around the outputs, with one scale for all rows.

    Arguments:
        scale: Their standard deviation, in the units of the data; or its prior, a distribution of
            one positive number, which makes it the global latent ``noise_scale``.
    """

    scale: float | Distribution = field(default_factory=lambda: dist.LogNormal(-1.0, 1.0))
    size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Distribution):
            number = torch.as_tensor(self.scale)
            if number.numel() != 1 or not 0.0 < number.item() < math.inf:
                raise ValueError(
                    f"Homoscedastic: scale must be > 0 and finite, one number, got {self.scale}."
                )
            return
        support = self.scale.support
        least = torch.as_tensor(getattr(support, "lower_bound", -1.0))
        if self.scale.shape() != () or support.is_discrete or not bool((least >= 0.0).all()):
            raise ValueError(
                "Homoscedastic: the prior of scale must be a distribution of one positive number, "
                f"such as LogNormal(-1.0, 1.0), got {self.scale}."
            )

    def latents(self) -> dict[str, Distribution]:
        """Return the prior of the scale, where it is inferred."""
        return {"noise_scale": self.scale} if isinstance(self.scale, Distribution) else {}

    def __call__(
        self,
        outputs: Float[Tensor, "*batch 1 *event"],
        event_dim: int,
        *,
        noise_scale: Tensor | None = None,
    ) -> Distribution:
        """Turn locs, and the scale where it is inferred, into a distribution."""
        scale = self.scale
        if noise_scale is not None:
            scale = noise_scale[(..., *(None,) * event_dim)]
        if isinstance(scale, Distribution):
            raise ValueError(
                "Homoscedastic: its scale is to be inferred, but this model infers no latents of its "
                "likelihood. Give a known scale, Homoscedastic(scale=0.1)."
            )
        return dist.Normal(outputs.squeeze(-event_dim - 1), scale).to_event(event_dim)

    def check(self, values: Tensor) -> None:
        """Refuse data that do not vary, where the scale is inferred.

        Raises:
            ValueError: If all rows are the same.
        """
        if self.latents() and len(values) > 1 and bool((values == values[0]).all()):
            raise ValueError(
                f"Homoscedastic: all {len(values)} rows are the same, {values[0].tolist()}, so there "
                "is no noise whose scale could be inferred: the smaller, the likelier. Look at the "
                "data, or give a known scale, Homoscedastic(scale=0.1)."
            )


@dataclass(frozen=True)
class Classes:
    """Independent categorical elements; the outputs are logits, and data are integers from 0.

    Arguments:
        classes: Values that an element can take, at least 2.
    """

    classes: int

    def __post_init__(self) -> None:
        check_count("Classes", "classes", self.classes, 2)

    @property
    def size(self) -> int:
        """One logit a class."""
        return self.classes

    def __call__(self, outputs: Float[Tensor, "*batch C *event"], event_dim: int) -> Distribution:
        """Turn logits into a distribution over codes."""
        logits = outputs.movedim(-event_dim - 1, -1)
        return dist.Categorical(logits=logits).to_event(event_dim)


@dataclass(frozen=True)
class Counts:
    """Independent Poisson elements; the outputs are log rates, and data are whole numbers from 0."""

    size: int = field(default=1, init=False)

    def __call__(self, outputs: Float[Tensor, "*batch 1 *event"], event_dim: int) -> Distribution:
        """Turn log rates into a distribution."""
        return dist.Poisson(outputs.squeeze(-event_dim - 1).exp()).to_event(event_dim)

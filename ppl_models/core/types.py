"""The few types that the whole library speaks in."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

#: What `pyro.sample` takes. (`dist.TorchDistribution` would turn `Independent` away.)
Distribution: TypeAlias = TorchDistributionMixin

#: The arguments of a model and of its guides: tensors with the same leading length N.
Batch: TypeAlias = tuple[Tensor, ...]


@runtime_checkable
class Model(Protocol):
    """A generative story: a callable that makes `pyro.sample` statements.

    `model(*batch)` conditions on the batch. A generative model also takes `size=n` alone and
    returns the batch of n rows that it draws.
    """

    def __call__(self, *batch: Any, **options: Any) -> Any:
        """Run the story on a batch."""
        ...


@runtime_checkable
class Guide(Protocol):
    """A callable with the model's arguments that samples every latent of the model."""

    def __call__(self, *batch: Any) -> Any:
        """Sample the latents, given a batch."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What `fit` ascends.

    Returns the surrogate, whose gradient is used, and the bound, the only number ever reported:
    both are scalars, in nats, in total over the rows of the whole data set.
    """

    def __call__(self, model: Model, guide: Guide, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the evidence of a batch."""
        ...


@runtime_checkable
class Points(Guide, Protocol):
    """A guide that is a few points, each as probable as the others, and no density."""

    def members(self) -> dict[str, Tensor]:
        """Return all of its points, shape (K, ...) a site."""
        ...


@runtime_checkable
class Refinable(Guide, Protocol):
    """A guide with parameters of its own for each row, which new rows need fitted afresh."""

    def refine(self, *batch: Tensor, **options: Any) -> Guide:
        """Return a guide of the same kind fitted to new rows, the model left as it is."""
        ...

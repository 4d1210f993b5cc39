"""Simulated data whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import accepts_size, describe_program, stochastic_nodes
from ppl_models.core.store import own_parameters
from ppl_models.core.types import Batch


@dataclass(frozen=True)
class Simulation:
    """What a model drew.

    Attributes:
        batch: The data: what the model returns.
        latents: The other draws behind it, by site.
    """

    batch: Batch = field(repr=False)
    latents: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class LinearGaussian:
    """Rows x = loc + loading z + noise, and what made them.

    Attributes:
        x: The rows, shape (N, D).
        z: Their latents, shape (N, K).
        loading: Shape (D, K).
        loc: Shape (D,).
        noise_scale: Standard deviation of the noise.
    """

    x: Float[Tensor, "N D"] = field(repr=False)
    z: Float[Tensor, "N K"] = field(repr=False)
    loading: Float[Tensor, "D K"] = field(repr=False)
    loc: Float[Tensor, " D"] = field(repr=False)
    noise_scale: float


def simulate(model: Callable[..., Any], size: int, *, seed: int | None = None) -> Simulation:
    """Draw rows from a generative model, and keep the latents behind them.

    Arguments:
        model: Any Pyro model that takes `size`.
        size: Rows to draw.
        seed: An integer isolates and reproduces; None draws from the global random stream.

    Raises:
        ValueError: If the model takes no `size`, or `size` is not positive.

    Example:
        >>> from ppl_models import PPCA
        >>> drawn = simulate(PPCA(data_dim=5, latent_dim=2), 7, seed=0)
        >>> drawn.batch[0].shape, drawn.latents["z"].shape
        (torch.Size([7, 5]), torch.Size([7, 2]))
    """
    if not accepts_size(model):
        raise ValueError(f"simulate: {describe_program(model)} takes no `size=`.")
    check_count("simulate", "size", size)
    with own_parameters(model), seeded(seed), evaluating(model), poutine.trace() as tracer:
        drawn = model(size=size)
    batch = tuple(drawn) if isinstance(drawn, tuple | list) else (drawn,)
    latents = {
        name: node["value"]
        for name, node in stochastic_nodes(tracer.trace)
        if not any(node["value"] is value for value in batch)
    }
    return Simulation(batch, latents)


def linear_gaussian(
    size: int = 500,
    *,
    data_dim: int = 8,
    latent_dim: int = 2,
    noise_scale: float = 0.5,
    seed: int | None = 0,
) -> LinearGaussian:
    """Draw rows from a linear-Gaussian model with orthogonal loadings of falling length.

    Arguments:
        size: Rows N.
        data_dim: Features D.
        latent_dim: Latents K, at most D.
        noise_scale: Standard deviation of the noise.
        seed: An integer isolates and reproduces; None draws from the global random stream.

    Raises:
        ValueError: If a size is not positive, K exceeds D, or the noise is not positive.

    Example:
        >>> linear_gaussian(100, data_dim=5, latent_dim=2).x.shape
        torch.Size([100, 5])
    """
    if min(size, data_dim, latent_dim) < 1 or latent_dim > data_dim or not noise_scale > 0:
        raise ValueError(
            "linear_gaussian: size, data_dim and latent_dim must be positive, latent_dim at most "
            f"data_dim and noise_scale > 0, got {size=}, {data_dim=}, {latent_dim=}, "
            f"{noise_scale=}."
        )
    with seeded(seed):
        basis = torch.linalg.qr(torch.randn(data_dim, latent_dim)).Q
        loading = basis * torch.linspace(3.0, 1.5, latent_dim)
        loc = torch.randn(data_dim)
        z = torch.randn(size, latent_dim)
        x = loc + z @ loading.mT + noise_scale * torch.randn(size, data_dim)
    return LinearGaussian(x, z, loading, loc, noise_scale)

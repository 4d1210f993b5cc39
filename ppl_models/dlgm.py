"""Deep latent Gaussian models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_models.core.checks import check_count, check_known, check_positive, checked_sizes
from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.likelihoods import Bernoulli, Likelihood
from ppl_models.parts.nn import Network, mlp
from ppl_models.parts.rows import plate_size

Activation = Literal["tanh", "sigmoid", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
}


class DeepLatentGaussian(NamedModule):
    r"""Layers of normal latents, each drawn around a function of the layer above it.

    .. math::

        z_L \sim \mathcal{N}(0, I), \qquad
        z_l \mid z_{l+1} \sim \mathcal{N}(T_l(z_{l+1}), \mathrm{diag}(s_l^2)), \qquad
        x \mid z_1 \sim p(x \mid T_0(z_1))

    Sites: ``z1`` (next to the data) to ``zL`` (top), latent, events ``(latent_dims[l - 1],)``; ``x``
    observed; plate ``data``. The functions are tanh networks, or linear; `sigmoid` and `relu` make
    the lecture's forms.

    Arguments:
        data_dim: Observed features of a row.
        latent_dims: Features of each layer of latents, from the data upwards.
        hidden: Units of each tanh layer between one layer and the next; none leaves it linear.
        likelihood: Distribution of a row given what the lowest network puts out, by default
            `Bernoulli()`: see `ppl_models.parts.likelihoods`.
        noise_scale: In place of a likelihood, :math:`x \sim \mathcal{N}(T_0(z_1), \sigma^2 I)`, with
            a scale that is learnt from here on.
        activation: What bends the units of `hidden`: "tanh", "sigmoid" or "relu".
        bias: Whether the functions add constants.

    Raises:
        ValueError: If a dimension is no positive integer, a scale not positive and finite, there is
            no layer, or both a likelihood and a noise scale.

    Source:
        Rezende, Mohamed & Wierstra (2014), https://arxiv.org/abs/1401.4082; the noise of a layer is
        diagonal here.

    Example:
        >>> model = DeepLatentGaussian(data_dim=6, latent_dims=(3, 2))
        >>> model(size=4).shape
        torch.Size([4, 6])
    """

    explicit = True  # p(x) has a density

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (50, 20),
        *,
        hidden: Sequence[int] = (200,),
        likelihood: Likelihood | None = None,
        noise_scale: float | None = None,
        activation: Activation = "tanh",
        bias: bool = True,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        check_count(kind, "data_dim", data_dim)
        latent_dims = checked_sizes(kind, "latent_dims", latent_dims, least=1)
        hidden = checked_sizes(kind, "hidden", hidden)
        if noise_scale is not None:
            check_positive(kind, "noise_scale", noise_scale)
            if likelihood is not None:
                raise ValueError(
                    f"{kind}: noise_scale takes the place of a likelihood, so only one of them can be "
                    f"given, got {noise_scale=}, {likelihood=}."
                )
        check_known("activation", activation, ACTIVATIONS)
        self.data_dim = data_dim
        self.latent_dims = latent_dims
        self.observation = Bernoulli() if likelihood is None else likelihood
        self.log_noise_scale = None
        if noise_scale is not None:
            self.log_noise_scale = nn.Parameter(torch.tensor(noise_scale).log())
        outputs = data_dim * (self.observation.size if noise_scale is None else 1)
        options: dict[str, Any] = {"activation": ACTIVATIONS[activation], "bias": bias}
        self.layers = nn.ModuleList(
            Network(mlp(above, hidden, below, **options))
            for below, above in pairwise((outputs, *latent_dims))
        )
        self.log_scales = nn.ParameterList(torch.zeros(dim) for dim in latent_dims[:-1])
        self.register_buffer("prior_loc", torch.zeros(latent_dims[-1]), persistent=False)

    @classmethod
    def sigmoid(
        cls, data_dim: int, latent_dim: int, *, hidden: int = 200, noise_scale: float = 1.0
    ) -> DeepLatentGaussian:
        r"""Return the lecture's form :math:`x \sim \mathcal{N}(W \sigma(V z), \sigma^2 I)`."""
        return cls(
            data_dim,
            (latent_dim,),
            hidden=(hidden,),
            noise_scale=noise_scale,
            activation="sigmoid",
            bias=False,
        )

    @classmethod
    def relu(
        cls, data_dim: int, latent_dim: int, *, hidden: int = 200, noise_scale: float = 1.0
    ) -> DeepLatentGaussian:
        r"""Return the lecture's form :math:`x \sim \mathcal{N}(W \max(V z, 0), \sigma^2 I)`."""
        return cls(
            data_dim,
            (latent_dim,),
            hidden=(hidden,),
            noise_scale=noise_scale,
            activation="relu",
            bias=False,
        )

    def forward(
        self, x: Float[Tensor, "N D"] | None = None, *, size: int | None = None
    ) -> Float[Tensor, "*batch N D"]:
        """Tell the story of `x`, or of `size` new rows."""
        with pyro.plate("data", plate_size(x, size)):
            top = len(self.latent_dims)
            z = pyro.sample(f"z{top}", self.prior())
            for level in range(top - 1, 0, -1):
                z = pyro.sample(f"z{level}", self.conditional(level, z))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def prior(self) -> Distribution:
        """Return p(z_L)."""
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def conditional(self, level: int, above: Float[Tensor, "*batch K"]) -> Distribution:
        """Return p(z_level | z_{level + 1})."""
        scale = self.log_scales[level - 1].exp()
        return dist.Normal(self.layers[level](above), scale).to_event(1)

    def likelihood(self, z: Float[Tensor, "*batch K"]) -> Distribution:
        """Return p(x | z_1)."""
        outputs = self.layers[0](z)
        if self.log_noise_scale is not None:
            return dist.Normal(outputs, self.log_noise_scale.exp()).to_event(1)
        shape = (*z.shape[:-1], self.observation.size, self.data_dim)
        return self.observation(outputs.reshape(shape), 1)

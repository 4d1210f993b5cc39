"""Variational autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_models.core.checks import check_count, checked_sizes
from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.likelihoods import Bernoulli, Likelihood
from ppl_models.parts.nn import Network, check_network, mlp
from ppl_models.parts.rows import plate_size


class VAE(NamedModule):
    r"""The generative half of a variational autoencoder.

    .. math::

        z_n \sim \mathcal{N}(0, I_K), \qquad h_n = \tanh(W_3 z_n + b_3), \qquad
        x_n \mid z_n \sim p(x \mid W_4 h_n + b_4, \ldots)

    Sites: ``z`` latent, event ``(K,)``; ``x`` observed; plate ``data``. The other half is a guide,
    such as `guides.Amortized`, whose default encoder has the same form.

    Arguments:
        data_dim: Observed features :math:`D`, or the shape of one row, such as ``(1, 28, 28)``.
        latent_dim: Latent features :math:`K`.
        hidden: Units of each tanh layer of the decoder.
        likelihood: Distribution of a row given the decoder's outputs: see
            `ppl_models.parts.likelihoods`.
        decoder: Any network that maps ``(rows, K)`` to ``(rows, ...)`` with `likelihood.size`
            numbers for each element of the data, in place of the tanh network.

    Raises:
        ValueError: If a dimension is no positive integer, or the decoder puts out another count.

    Source:
        Kingma & Welling (2014). https://arxiv.org/abs/1312.6114
        Rezende, Mohamed & Wierstra (2014). https://arxiv.org/abs/1401.4082

    Example:
        >>> model = VAE(data_dim=64, latent_dim=2, hidden=(32,))
        >>> model(size=3).shape
        torch.Size([3, 64])
    """

    explicit = True  # p(x) has a density

    def __init__(
        self,
        data_dim: int | Sequence[int],
        latent_dim: int,
        *,
        hidden: Sequence[int] = (200,),
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        shape = checked_sizes("VAE", "data_dim", data_dim, least=1, alone=True)
        check_count("VAE", "latent_dim", latent_dim)
        hidden = checked_sizes("VAE", "hidden", hidden)
        self.data_shape = shape
        self.latent_dim = latent_dim
        self.observation = Bernoulli() if likelihood is None else likelihood
        outputs = self.observation.size * math.prod(shape)
        self.decoder = Network(mlp(latent_dim, hidden, outputs) if decoder is None else decoder)
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        if decoder is not None:
            of = f"{self.observation.size} for each element of {shape}"
            check_network("VAE: decoder", decoder, (latent_dim,), outputs, of)

    def forward(
        self, x: Float[Tensor, "N *event"] | None = None, *, size: int | None = None
    ) -> Float[Tensor, "*batch N *event"]:
        """Tell the story of `x`, or of `size` new rows."""
        with pyro.plate("data", plate_size(x, size)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def prior(self) -> Distribution:
        """Return p(z)."""
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def likelihood(self, z: Float[Tensor, "*batch K"]) -> Distribution:
        """Return p(x | z)."""
        shape = (*z.shape[:-1], self.observation.size, *self.data_shape)
        return self.observation(self.decoder(z).reshape(shape), len(self.data_shape))

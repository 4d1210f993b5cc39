"""Sigmoid belief networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_models.core.checks import check_count, checked_sizes
from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.nn import Network, mlp
from ppl_models.parts.rows import plate_size

STATES = 2**20  # joint states of the latents, up to which they are summed over


class SigmoidBeliefNetwork(NamedModule):
    r"""Layers of binary units, each drawn given the layer above it.

    .. math::

        h_L \sim \mathrm{Bernoulli}(\sigma(b_L)), \qquad
        h_l \mid h_{l+1} \sim \mathrm{Bernoulli}(\sigma(W_l h_{l+1} + b_l)), \qquad
        x \mid h_1 \sim \mathrm{Bernoulli}(\sigma(W_0 h_1 + b_0))

    Sites: ``h1`` (next to the data) to ``hL`` (top), latent, events ``(latent_dims[l - 1],)``; ``x``
    observed; plate ``data``. No draw carries a gradient: `fit` takes a score estimator such as
    ``ELBO(score=DisARM())``, or ``VIMCO``.

    Arguments:
        data_dim: Binary features of a row.
        latent_dims: Units of each layer of latents, from the data upwards.
        hidden: Units of deterministic tanh layers between each layer and the next; none leaves it
            linear.

    Raises:
        ValueError: If a dimension is not positive, or there is no layer.

    Source:
        Neal (1992), https://doi.org/10.1016/0004-3702(92)90065-6; Mnih & Gregor (2014),
        https://arxiv.org/abs/1402.0030

    Example:
        >>> model = SigmoidBeliefNetwork(data_dim=6, latent_dims=(3, 2))
        >>> x = model(size=4)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    explicit = True  # p(x) has a density

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (200, 200),
        *,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        check_count(kind, "data_dim", data_dim)
        latent_dims = checked_sizes(kind, "latent_dims", latent_dims, least=1)
        hidden = checked_sizes(kind, "hidden", hidden)
        self.data_dim = data_dim
        self.latent_dims = latent_dims
        self.top_logits = nn.Parameter(torch.zeros(latent_dims[-1]))
        sizes = (data_dim, *latent_dims)
        self.layers = nn.ModuleList(
            Network(mlp(above, hidden, below)) for below, above in pairwise(sizes)
        )

    def forward(
        self, x: Float[Tensor, "N D"] | None = None, *, size: int | None = None
    ) -> Float[Tensor, "*batch N D"]:
        """Tell the story of `x`, or of `size` new rows."""
        with pyro.plate("data", plate_size(x, size)):
            top = len(self.latent_dims)
            h = pyro.sample(f"h{top}", self.prior())
            for level in range(top - 1, 0, -1):
                h = pyro.sample(f"h{level}", self.conditional(level, h))
            return pyro.sample("x", self.likelihood(h), obs=x)

    def prior(self) -> Distribution:
        """Return p(h_L)."""
        return dist.Bernoulli(logits=self.top_logits).to_event(1)

    def conditional(self, level: int, above: Float[Tensor, "*batch H"]) -> Distribution:
        """Return p(h_level | h_{level + 1}); level 0 is the data."""
        return dist.Bernoulli(logits=self.layers[level](above)).to_event(1)

    def likelihood(self, h: Float[Tensor, "*batch H"]) -> Distribution:
        """Return p(x | h_1)."""
        return self.conditional(0, h)

    def log_evidence(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Return log p(x) of each row, nats, by summing over the states of each layer in turn.

        Raises:
            ValueError: If a layer, or two neighbouring layers together, have too many states.
        """
        message = self._message()
        states = _states(self.latent_dims[0], x)
        rows = 1 + STATES // max(1, len(states) * self.data_dim)  # at once
        found = []
        for part in x.split(rows):
            value = self.likelihood(states.unsqueeze(1)).log_prob(part)  # (states, rows)
            found.append(torch.logsumexp(value + message.unsqueeze(1), 0))
        return torch.cat(found)

    def _message(self) -> Float[Tensor, " states"]:
        """Return log p(h_1) of all states of the lowest layer."""
        sizes = (0, *self.latent_dims)
        for below, above in pairwise(sizes):
            if 2 ** (below + above) > STATES:
                raise ValueError(
                    f"SigmoidBeliefNetwork: layers of {self.latent_dims} units have too many states "
                    "to be summed over. Use evaluate.log_evidence(model, guide, x), which draws."
                )
        above = _states(self.latent_dims[-1], self.top_logits)
        message = self.prior().log_prob(above)
        for level in range(len(self.latent_dims) - 1, 0, -1):
            below = _states(self.latent_dims[level - 1], self.top_logits)
            steps = self.conditional(level, above).log_prob(below.unsqueeze(1))  # (below, above)
            message = torch.logsumexp(steps + message, 1)
            above = below
        return message


def _states(units: int, like: Tensor) -> Float[Tensor, "states H"]:
    """Return all states of some binary units."""
    codes = torch.arange(2**units, device=like.device).unsqueeze(1)
    return (codes >> torch.arange(units, device=like.device) & 1).to(like.dtype)

"""Deep exponential families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_models.core.checks import check_count, check_known, check_positive, checked_sizes
from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.rows import plate_size

LAYERS = ("gamma", "normal", "poisson", "bernoulli")
OBSERVATIONS = ("poisson", "bernoulli", "normal")


class DeepExponentialFamily(NamedModule):
    r"""Layers of latents from exponential families, each with a mean set by the layer above it.

    With gamma layers and counts, the sparse gamma DEF:

    .. math::

        w_l \sim \mathrm{Gamma}(\beta, \text{rate } \gamma), \quad
        z_L \sim \mathrm{Gamma}(\alpha, \alpha), \quad
        z_l \mid z_{l+1} \sim \mathrm{Gamma}(\alpha, \alpha / (z_{l+1} w_l)), \quad
        x \mid z_1 \sim \mathrm{Poisson}(z_1 w_0)

    Weights from a gamma layer to a gamma or Poisson one are gamma variables, as above. All others are
    normal, and the layer below has :math:`\eta = z w + b` for its loc if it is normal, for its logits
    if it is Bernoulli, and softplus of it for its mean if it is gamma or Poisson.

    Sites: ``z1`` (next to the data) to ``zL`` (top), latent, events ``(latent_dims[l - 1],)``; ``x``
    observed; plate ``data``. Outside of it, unless they are parameters, the weights ``w0`` (to the
    data) to ``w{L - 1}``, latent, events (units above, units below).

    Arguments:
        data_dim: Observed features of a row.
        latent_dims: Units of each layer of latents, from the data upwards.
        family: Of the layers: "gamma", "normal", "poisson" or "bernoulli", or one for each, from the
            data upwards.
        observation: Of the data: "poisson" (counts), "bernoulli" (0 or 1) or "normal".
        latent_weights: Weights are latents with a prior; otherwise they are parameters.
        shape: :math:`\alpha` of gamma layers; below 1, most of a layer is next to 0.
        weight_shape: :math:`\beta` of gamma weights.
        weight_rate: :math:`\gamma` of gamma weights.
        weight_scale: Standard deviation of normal weights, around 0.

    Raises:
        ValueError: If a dimension is no positive integer, a shape, rate or scale not positive and
            finite, there is no layer, or a name of a family is unknown.

    Source:
        Ranganath, Tang, Charlin & Blei (2015). https://arxiv.org/abs/1411.2581

    Example:
        >>> model = DeepExponentialFamily(data_dim=6, latent_dims=(3, 2))
        >>> model(size=4).shape
        torch.Size([4, 6])
    """

    explicit = True  # p(x) has a density

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (100, 40, 15),
        family: str | Sequence[str] = "gamma",
        *,
        observation: str = "poisson",
        latent_weights: bool = True,
        shape: float = 0.1,
        weight_shape: float = 0.1,
        weight_rate: float = 0.3,
        weight_scale: float = 1.0,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        check_count(kind, "data_dim", data_dim)
        latent_dims = checked_sizes(kind, "latent_dims", latent_dims, least=1)
        families = (family,) * len(latent_dims) if isinstance(family, str) else tuple(family)
        if len(families) != len(latent_dims):
            raise ValueError(
                f"{kind}: family must be one name, or one for each of the {len(latent_dims)} layers, "
                f"from the data upwards; got {families}."
            )
        for name in families:
            check_known("family of a layer", name, LAYERS)
        check_known("observation", observation, OBSERVATIONS)
        positive = {
            "shape": shape,
            "weight_shape": weight_shape,
            "weight_rate": weight_rate,
            "weight_scale": weight_scale,
        }
        for name, value in positive.items():
            check_positive(kind, name, value)
        self.data_dim = data_dim
        self.latent_dims = latent_dims
        self.families = (observation, *families)  # of each level; level 0 is the data
        self.latent_weights = latent_weights
        self.shape = shape
        self.weight_shape, self.weight_rate = weight_shape, weight_rate
        self.weight_scale = weight_scale
        self.sizes = (data_dim, *latent_dims)
        self.intercepts = nn.ParameterDict()
        self.free_weights = nn.ParameterDict()  # of gamma weights the logarithms
        for level, (below, above) in enumerate(pairwise(self.sizes)):
            start = torch.randn(above, below) / 10.0
            if self.gamma_weights(level):
                start = start - torch.tensor(float(above)).log()  # the layer above has mean 1
            else:
                self.intercepts[str(level)] = nn.Parameter(torch.zeros(below))
            if not latent_weights:
                self.free_weights[str(level)] = nn.Parameter(start)
        if observation == "normal":
            self.log_noise_scale = nn.Parameter(torch.zeros(()))
        self._like: Tensor  # precision and device, where there is no parameter
        self.register_buffer("_like", torch.zeros(()))

    def forward(
        self, x: Float[Tensor, "N D"] | None = None, *, size: int | None = None
    ) -> Float[Tensor, "*batch N D"]:
        """Tell the story of `x`, or of `size` new rows."""
        rows, top = plate_size(x, size), len(self.latent_dims)
        self._check_columns(x)
        w = [self.weights(level) for level in range(top)]
        with pyro.plate("data", rows):
            z = pyro.sample(f"z{top}", self.prior())
            for level in range(top - 1, 0, -1):
                z = pyro.sample(f"z{level}", self.conditional(level, z, w[level]))
            return pyro.sample("x", self.conditional(0, z, w[0]), obs=x)

    def weights(self, level: int) -> Float[Tensor, "*batch above below"]:
        """Draw the weights from layer `level + 1` to `level`, or return the parameters."""
        if self.latent_weights:
            return pyro.sample(f"w{level}", self.weight_prior(level))
        free = self.free_weights[str(level)]
        return free.exp() if self.gamma_weights(level) else free

    def weight_prior(self, level: int) -> Distribution:
        """Return p(w_level)."""
        ones = self._like.new_ones(self.sizes[level + 1], self.sizes[level])
        if self.gamma_weights(level):
            return dist.Gamma(self.weight_shape * ones, self.weight_rate).to_event(2)
        return dist.Normal(0.0 * ones, self.weight_scale).to_event(2)

    def prior(self) -> Distribution:
        """Return p(z_L), of mean 1, 0, 1 or 1/2."""
        ones = self._like.new_ones(self.latent_dims[-1])
        means = {"gamma": ones, "normal": 0.0 * ones, "poisson": ones, "bernoulli": 0.0 * ones}
        return self._layer(len(self.latent_dims), means[self.families[-1]])

    def conditional(
        self, level: int, above: Float[Tensor, "*batch H"], w: Float[Tensor, "*batch H K"]
    ) -> Distribution:
        """Return p(z_level | z_{level + 1}, w_level); level 0 is the data."""
        total = _times(above, w)
        if not self.gamma_weights(level):
            total = total + self.intercepts[str(level)]
            if self.families[level] in ("gamma", "poisson"):
                total = F.softplus(total)
        return self._layer(level, total)

    def likelihood(
        self, z: Float[Tensor, "*batch H"], w: Float[Tensor, "*batch H D"]
    ) -> Distribution:
        """Return p(x | z_1, w_0)."""
        return self.conditional(0, z, w)

    def gamma_weights(self, level: int) -> bool:
        """Whether the weights from layer `level + 1` to `level` are gamma variables."""
        below, above = self.families[level : level + 2]
        return above == "gamma" and below in ("gamma", "poisson")

    @property
    def noise_scale(self) -> Float[Tensor, "*batch"]:
        """Standard deviation of normal observations, in the units of ``x``."""
        return self.log_noise_scale.exp()

    def top_words(
        self,
        vocabulary: Sequence[str],
        n: int = 10,
        *,
        weights: Float[Tensor, "H D"] | None = None,
    ) -> list[list[str]]:
        """Return the words of largest weight of each unit next to the data, largest first.

        Arguments:
            vocabulary: The word that each column of the data counts.
            n: Words of each unit.
            weights: Values of ``w0``, such as their posterior means, `guide.q("w0").mean`; left out
                where they are parameters.

        Raises:
            ValueError: If there is not one word a column, fewer than `n` of them, or weights have
                another shape, are not finite, or are needed and were not given.
        """
        check_count("top_words", "n", n)
        if isinstance(vocabulary, Mapping | set):
            raise ValueError(
                "top_words: vocabulary must be a sequence of words in the order of the columns, got a "
                f"{type(vocabulary).__name__}."
            )
        if len(vocabulary) != self.data_dim:
            raise ValueError(
                f"top_words: vocabulary must have a word for each of the {self.data_dim} columns, got "
                f"{len(vocabulary)} words."
            )
        if n > self.data_dim:
            raise ValueError(f"top_words: n must be at most {self.data_dim} words, got {n}.")
        if weights is None:
            if self.latent_weights:
                raise ValueError(
                    "top_words: the weights of this model are latents, so weights= is required, such "
                    "as their posterior means, weights=guide.q('w0').mean."
                )
            weights = self.weights(0)
        weights = torch.as_tensor(weights).detach()
        want = (self.latent_dims[0], self.data_dim)
        if weights.shape != want:
            raise ValueError(
                f"top_words: weights must have shape {want}, got {tuple(weights.shape)}."
            )
        if not weights.isfinite().all():
            raise ValueError(
                f"top_words: weights must be finite, got {int((~weights.isfinite()).sum())} numbers "
                "that are not."
            )
        best = weights.topk(n).indices
        return [[vocabulary[int(place)] for place in row] for row in best]

    def _layer(self, level: int, parameter: Tensor) -> Distribution:
        """Return the distribution of a layer: by its mean if that is positive, by logits, by loc."""
        match self.families[level]:
            case "gamma":
                mean = _floored(parameter, self.shape)
                # Draws of shape .1 reach down to 1e-38 at once in 6,000, where single precision ends:
                # torch keeps them at its smallest normal number, so that log z stays finite.
                fn = dist.Gamma(torch.full_like(mean, self.shape), self.shape / mean)
            case "poisson":
                fn = dist.Poisson(_floored(parameter))
            case "bernoulli":
                fn = dist.Bernoulli(logits=parameter)
            case _:
                scale = self.noise_scale.unsqueeze(-1) if level == 0 else 1.0
                fn = dist.Normal(parameter, scale)
        return fn.to_event(1)

    def _check_columns(self, x: Any) -> None:
        if isinstance(x, Tensor) and x.shape[1:] != (self.data_dim,):
            raise ValueError(
                f"DeepExponentialFamily: x must have shape (N, {self.data_dim}), rows and their "
                f"data_dim={self.data_dim} columns, got {tuple(x.shape)}."
            )


def _times(z: Float[Tensor, "*batch H"], w: Float[Tensor, "*batch H K"]) -> Tensor:
    """Multiply rows by weights, which are the same for all rows.

    Drawn particles of weights have a dimension of 1 where rows have their plate: without it the
    product is one of matrices, and no row gets a copy of the weights.
    """
    if w.ndim > 2 and w.shape[-3] == 1:
        return z @ w.squeeze(-3)
    return z @ w if w.ndim == 2 else torch.einsum("...h,...hk->...k", z, w)


def _floored(mean: Tensor, shape: float = 1.0) -> Tensor:
    """Keep a mean off 0, where products of small numbers end in finite precision.

    The least is that of normal numbers, or what `shape / mean` does not overflow at.
    """
    return mean.clamp(min=torch.finfo(mean.dtype).tiny * max(1.0, shape))

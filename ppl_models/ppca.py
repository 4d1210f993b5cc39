"""Probabilistic principal component analysis."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_models.core.batch import as_batch
from ppl_models.core.checks import check_count, check_positive
from ppl_models.core.module import NamedModule
from ppl_models.core.random import seeded
from ppl_models.core.types import Distribution
from ppl_models.parts.rows import plate_size


class PPCA(NamedModule):
    r"""Probabilistic principal component analysis.

    .. math::

        z_n \sim \mathcal{N}(0, I_K), \qquad
        x_n \mid z_n \sim \mathcal{N}(\mu + W z_n, \sigma^2 I_D)

    Sites: ``z`` latent, event ``(K,)``; ``x`` observed, event ``(D,)``; plate ``data``.

    Arguments:
        data_dim: Observed features :math:`D`.
        latent_dim: Latent features :math:`K`, with :math:`1 \le K \le D`.
        noise_scale: Initial :math:`\sigma`, a standard deviation in the units of ``x``.

    Raises:
        ValueError: If ``latent_dim`` is outside ``[1, data_dim]``, or ``noise_scale`` not positive.

    Source:
        Tipping & Bishop (1999), section 3. https://doi.org/10.1111/1467-9868.00196

    Example:
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=7)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([7, 5]), torch.Size([7]))
    """

    explicit = True  # p(x) has a density

    def __init__(self, data_dim: int, latent_dim: int, *, noise_scale: float = 1.0) -> None:
        super().__init__()
        check_count("PPCA", "data_dim", data_dim)
        check_count("PPCA", "latent_dim", latent_dim)
        if latent_dim > data_dim:
            raise ValueError(f"PPCA: latent_dim must be in [1, {data_dim}], got {latent_dim}.")
        check_positive("PPCA", "noise_scale", noise_scale)
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.loading = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(latent_dim))
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.log_noise_scale = nn.Parameter(torch.tensor(float(noise_scale)).log())

    def forward(
        self, x: Float[Tensor, "N D"] | None = None, *, size: int | None = None
    ) -> Float[Tensor, "*batch N D"]:
        """Tell the story of `x`, or of `size` new rows."""
        with pyro.plate("data", plate_size(x, size)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def prior(self) -> Distribution:
        """Return p(z)."""
        return dist.Normal(self.loc.new_zeros(self.latent_dim), 1.0).to_event(1)

    def likelihood(self, z: Float[Tensor, "*batch K"]) -> Distribution:
        """Return p(x | z)."""
        loc = self.loc + torch.einsum("...k,...dk->...d", z, self.loading)
        return dist.Normal(loc, self.noise_scale.unsqueeze(-1)).to_event(1)

    @property
    def noise_scale(self) -> Float[Tensor, "*batch"]:
        """Standard deviation of the noise, in the units of ``x``."""
        return self.log_noise_scale.exp()

    def posterior(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        r"""Return :math:`p(z \mid x) = \mathcal{N}(M^{-1} W^T (x - \mu), \sigma^2 M^{-1})`.

        Here :math:`M = W^T W + \sigma^2 I_K` (Tipping & Bishop 1999, equation 6).
        """
        scaled = self.loading / self.noise_scale[..., None, None]
        precision = scaled.mT @ scaled + torch.eye(self.latent_dim).to(scaled)
        factor = torch.linalg.cholesky(precision)
        shift = (x - self.loc) / self.noise_scale.unsqueeze(-1)
        shift = torch.einsum("...d,...dk->...k", shift, scaled).unsqueeze(-1)
        loc = torch.cholesky_solve(shift, factor).squeeze(-1)
        covariance = torch.cholesky_inverse(factor)
        return dist.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(covariance))

    def log_evidence(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        r"""Return :math:`\log p(x) = \log \mathcal{N}(x; \mu, W W^T + \sigma^2 I)`, nats per row."""
        diagonal = (self.noise_scale**2).unsqueeze(-1).expand(*self.loc.shape)
        return dist.LowRankMultivariateNormal(self.loc, self.loading, diagonal).log_prob(x)

    @torch.no_grad()
    def maximize(self, x: Float[Tensor, "N D"], *, z: Float[Tensor, "S N K"]) -> None:
        r"""Set the parameters to the maximum of the mean log density of `x` and draws of `z`.

        It is the M-step of EM: the regression of `x` on `z`, whose mean squared residual is
        :math:`\sigma^2` (ibid., equations 27 and 28, with means over draws for expectations).
        """
        design = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        gram = torch.einsum("snj,snk->jk", design, design)
        cross = torch.einsum("nd,snk->kd", x, design)
        coefficients = torch.linalg.solve(gram, cross)
        self.loading.copy_(coefficients[:-1].mT)
        self.loc.copy_(coefficients[-1])
        self.log_noise_scale.copy_((x - design @ coefficients).square().mean().log() / 2)

    @classmethod
    def maximum_likelihood(cls, x: Float[Tensor, "N D"], latent_dim: int) -> PPCA:
        r"""Return the model that maximises the likelihood of `x`.

        :math:`W = U_K (\Lambda_K - \sigma^2 I)^{1/2}`, with the first K eigenvectors of the sample
        covariance, and :math:`\sigma^2` the mean of the discarded eigenvalues (ibid., equations 7
        and 8).

        Arguments:
            x: Data, in the units of the model, in its own precision.
            latent_dim: Latent features, fewer than D: with K = D no noise is left.

        Raises:
            ValueError: If `latent_dim` is outside ``[1, D - 1]``, there are fewer than 2 rows, or
                the data lie in a subspace of `latent_dim` dimensions, where the likelihood has no
                maximum.
        """
        (x,) = as_batch(x)
        rows, data_dim = x.shape
        if not 1 <= latent_dim < data_dim:
            raise ValueError(
                f"PPCA: maximum_likelihood needs latent_dim in [1, {data_dim - 1}], so that an "
                f"eigenvalue is left for the noise; got {latent_dim}."
            )
        if rows < 2:
            raise ValueError(f"PPCA: maximum_likelihood needs at least 2 rows, got {rows}.")
        loc = x.mean(0)
        values, vectors = torch.linalg.eigh((x - loc).mT @ (x - loc) / rows)
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[latent_dim:].mean()
        if not variance > torch.finfo(x.dtype).eps * values[0]:
            raise ValueError(
                f"PPCA: the data vary in {latent_dim} dimensions or fewer, so no variance is left "
                "for the noise and the likelihood has no maximum. Use a smaller latent_dim."
            )
        with seeded(0), torch.no_grad():
            model = cls(data_dim, latent_dim).to(x)
            model.loc.copy_(loc)
            model.log_noise_scale.copy_(variance.log() / 2)
            model.loading.copy_(vectors[:, :latent_dim] * (values[:latent_dim] - variance).sqrt())
        return model

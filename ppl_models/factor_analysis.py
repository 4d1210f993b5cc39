"""Factor analysis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from numbers import Real

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


def ecme(
    root: Float[Tensor, "R D"],
    latent_dim: int,
    start: Float[Tensor, " D"],
    least: Float[Tensor, " D"],
) -> Iterator[tuple[Float[Tensor, "D K"], Float[Tensor, " D"], Float[Tensor, ""]]]:
    r"""Climb the likelihood of factor analysis by ECME, for as long as the caller asks.

    A step from noise variances :math:`\psi` has three parts, none of which lowers the likelihood
    of data with covariance :math:`S`:

    1. :math:`W` becomes its maximiser given :math:`\psi`, from the first K eigenvectors of
       :math:`\Psi^{-1/2} S \Psi^{-1/2}`.
    2. An EM step. It leaves that :math:`W` where it is, and :math:`\psi` becomes the diagonal of
       :math:`S - W W^T`.
    3. Each :math:`\psi_d` in turn becomes its maximiser given all else. With :math:`\Sigma = W W^T
       + \Psi`, :math:`a = (\Sigma^{-1})_{dd}` and :math:`b = (\Sigma^{-1} S \Sigma^{-1})_{dd}` that
       is :math:`\psi_d + (b - a) / a^2`.

    The first two alone, which are what scikit-learn iterates, take steps that shrink with a
    :math:`\psi_d` that goes to zero, and so never arrive there.

    Arguments:
        root: A matrix :math:`R` with :math:`R^T R = S`, the covariance with divisor N.
        latent_dim: K, at most D.
        start: Noise variances to start from.
        least: Smallest noise variances.

    Yields:
        Loading, noise variances and log-likelihood in nats per row, after each step; first those
        of the start.

    Source:
        Liu & Rubin (1994). https://doi.org/10.1093/biomet/81.4.633. The parts: Jöreskog (1967),
        https://doi.org/10.1007/BF02289658; Rubin & Thayer (1982),
        https://doi.org/10.1007/BF02293851; Zhao, Yu & Jiang (2008),
        https://doi.org/10.1007/s11222-007-9042-y.
    """
    variance = torch.maximum(start, least)
    while True:
        # In units of the noise, where a small one costs no digits; nor does a root, unlike a square.
        unit = variance.sqrt()
        scaled = root / unit
        _, lengths, vectors = torch.linalg.svd(scaled, full_matrices=False)
        values = lengths.square()
        explained = values[:latent_dim].clamp(min=1.0)
        loading = vectors[:latent_dim].mT * (explained - 1.0).sqrt()
        log_det = variance.log().sum() + explained.log().sum()
        square = (values[:latent_dim] / explained).sum() + values[latent_dim:].sum()
        value = -0.5 * (len(variance) * math.log(2 * math.pi) + log_det + square)
        yield unit.unsqueeze(-1) * loading, variance, value
        ratio = scaled.square().sum(0) - loading.square().sum(-1)
        ratio = torch.maximum(ratio, least / variance)
        ratio = _one_by_one(scaled, loading, ratio, least / variance)
        variance = torch.maximum(ratio * variance, least)


def _one_by_one(root: Tensor, loading: Tensor, variance: Tensor, least: Tensor) -> Tensor:
    """Maximise the likelihood over each noise variance in turn."""
    variance = variance.clone()
    precision = torch.cholesky_inverse(
        torch.linalg.cholesky(loading @ loading.mT + variance.diag())
    )
    weighted = root @ precision
    weighted = weighted.mT @ weighted
    for d in range(len(variance)):
        a, b = precision[d, d], weighted[d, d]
        better = torch.maximum(variance[d] + (b - a) / a**2, least[d])
        step = better - variance[d]
        variance[d] = better
        # The covariance changed by step * e e^T, so its inverse changes by a matrix of rank one.
        shrink = step / (1.0 + step * a)
        column = precision[:, d].clone()
        other = shrink * weighted[:, d] - 0.5 * shrink**2 * b * column
        precision -= torch.outer(shrink * column, column)
        weighted -= torch.outer(column, other) + torch.outer(other, column)
    return variance


class FactorAnalysis(NamedModule):
    r"""Factor analysis: linear and Gaussian, each column with noise of its own.

    .. math::

        z_n \sim \mathcal{N}(0, I_K), \qquad
        x_n \mid z_n \sim \mathcal{N}(\mu + W z_n, \mathrm{diag}(\sigma_1^2, \ldots, \sigma_D^2))

    Sites: ``z`` latent, event ``(K,)``; ``x`` observed, event ``(D,)``; plate ``data``.

    The noise scale is `min_scale` plus the exponential of a free parameter: without a minimum the
    likelihood has no maximum where a column is constant, or a combination of the factors.

    Arguments:
        data_dim: Observed features :math:`D`.
        latent_dim: Latent features :math:`K`, with :math:`1 \le K \le D`.
        noise_scale: Initial :math:`\sigma_d`, a standard deviation in the units of ``x``, more than
            `min_scale`.
        min_scale: Smallest :math:`\sigma_d`, in the units of ``x``.

    Raises:
        ValueError: If ``latent_dim`` is outside ``[1, data_dim]``, ``min_scale`` not positive, or
            ``noise_scale`` not more than it.

    Source:
        Bishop (2006), Pattern Recognition and Machine Learning, section 12.2.4.

    Example:
        >>> model = FactorAnalysis(data_dim=5, latent_dim=2)
        >>> x = model(size=7)
        >>> x.shape, model.log_evidence(x).shape, model.noise_scale.shape
        (torch.Size([7, 5]), torch.Size([7]), torch.Size([5]))
    """

    explicit = True  # p(x) has a density

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        noise_scale: float = 1.0,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        check_count("FactorAnalysis", "data_dim", data_dim)
        check_count("FactorAnalysis", "latent_dim", latent_dim)
        if latent_dim > data_dim:
            raise ValueError(
                f"FactorAnalysis: latent_dim must be in [1, {data_dim}], got {latent_dim}."
            )
        _check_min_scale(min_scale)
        if not isinstance(noise_scale, Real) or not min_scale < noise_scale < math.inf:
            raise ValueError(
                f"FactorAnalysis: noise_scale must be > min_scale={min_scale} and finite, got "
                f"{noise_scale!r}."
            )
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.min_scale = float(min_scale)
        self.loading = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(latent_dim))
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.log_noise_scale = nn.Parameter(
            torch.full((data_dim,), math.log(noise_scale - min_scale))
        )

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
        return dist.Normal(loc, self.noise_scale).to_event(1)

    @property
    def noise_scale(self) -> Float[Tensor, "*batch D"]:
        """Standard deviation of the noise of each column, in the units of ``x``."""
        return self.min_scale + self.log_noise_scale.exp()

    def posterior(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        r"""Return :math:`p(z \mid x) = \mathcal{N}(M^{-1} W^T \Psi^{-1} (x - \mu), M^{-1})`.

        Here :math:`\Psi = \mathrm{diag}(\sigma_d^2)` and :math:`M = I_K + W^T \Psi^{-1} W`
        (Bishop 2006, equations 12.66 to 12.68).
        """
        scaled = self.loading / self.noise_scale.unsqueeze(-1)
        precision = scaled.mT @ scaled + torch.eye(self.latent_dim).to(scaled)
        factor = torch.linalg.cholesky(precision)
        shift = torch.einsum("...d,...dk->...k", (x - self.loc) / self.noise_scale, scaled)
        loc = torch.cholesky_solve(shift.unsqueeze(-1), factor).squeeze(-1)
        covariance = torch.cholesky_inverse(factor)
        return dist.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(covariance))

    def log_evidence(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        r"""Return :math:`\log p(x) = \log \mathcal{N}(x; \mu, W W^T + \Psi)`, nats per row.

        By Bayes' rule at the posterior mean, which adds squares and so loses no digits where a
        noise scale is small: :math:`\log p(x) = \log p(z) + \log p(x \mid z) - \log p(z \mid x)`.
        """
        posterior = self.posterior(x)
        z = posterior.mean
        joint = self.prior().log_prob(z) + self.likelihood(z).log_prob(x)
        return joint - posterior.log_prob(z)

    @classmethod
    def maximum_likelihood(
        cls,
        x: Float[Tensor, "N D"],
        latent_dim: int,
        *,
        min_scale: float = 1e-3,
        tolerance: float = 1e-9,
        steps: int = 1000,
    ) -> FactorAnalysis:
        r"""Return the model that maximises the likelihood of `x`, found by ECME.

        ECME is EM with steps that climb the likelihood itself between its own: see `ecme`. It works
        on the columns divided by their standard deviations, in double precision on the CPU; a step
        takes time in :math:`D^3`. The likelihood can have several local maxima; the best from two
        starts is returned, one with noise of half the variance of each column, one with what
        the other columns leave unexplained of it (Jöreskog 1967). Nothing is random.

        Arguments:
            x: Data, in the units of the model, in its own precision.
            latent_dim: Latent features, fewer than D.
            min_scale: Smallest noise scale, in the units of `x`; or 1e-7 of the standard deviation
                of a column, if that is more.
            tolerance: Stop when a step gains less, in nats per row.
            steps: Most steps from each start.

        Raises:
            ValueError: If `latent_dim` is outside ``[1, D - 1]``, there are fewer than 2 rows, or
                `min_scale` or `tolerance` is not positive.

        Warns:
            UserWarning: If columns are constant, the noise of other columns comes down to
                `min_scale` (a Heywood case), or `steps` are too few.
        """
        (x,) = as_batch(x)
        if x.ndim != 2:
            raise ValueError(
                "FactorAnalysis: maximum_likelihood needs data of shape (N, D), got "
                f"{tuple(x.shape)}."
            )
        rows, data_dim = x.shape
        if not 1 <= latent_dim < data_dim:
            raise ValueError(
                f"FactorAnalysis: maximum_likelihood needs latent_dim in [1, {data_dim - 1}], "
                f"fewer than there are columns; got {latent_dim}."
            )
        if rows < 2:
            raise ValueError(
                f"FactorAnalysis: maximum_likelihood needs at least 2 rows, got {rows}."
            )
        _check_min_scale(min_scale)
        check_positive("FactorAnalysis", "tolerance", tolerance)
        check_count("FactorAnalysis", "steps", steps)
        data = x.detach().to("cpu", torch.float64)
        loc = data.mean(0)
        constant = data.amax(0) == data.amin(0)
        unit = torch.where(constant, 1.0, data.std(0, correction=0))
        data = torch.where(constant, 0.0, (data - loc) / unit) / math.sqrt(rows)
        root = torch.linalg.qr(data, mode="r").R
        if len(root) < latent_dim:  # fewer rows than factors: some factors will have no loading
            root = torch.cat([root, root.new_zeros(latent_dim - len(root), data_dim)])
        least = (min_scale / unit).clamp(min=1e-7).square()  # below is beyond double precision
        found = [
            _climb(root, latent_dim, start, least, tolerance, steps)
            for start in _starts(root, latent_dim)
        ]
        loading, variance, _, gain = max(found, key=lambda end: float(end[2]))
        if gain >= tolerance:
            warnings.warn(
                f"FactorAnalysis: maximum_likelihood stopped after {steps} steps, the last of "
                f"which gained {gain:.1e} nats per row, not yet less than tolerance={tolerance}. "
                "Raise steps or tolerance.",
                stacklevel=2,
            )
        if constant.any():
            warnings.warn(
                f"FactorAnalysis: {_columns(constant)} constant, so the likelihood has no maximum "
                f"but for min_scale={min_scale}, which is what their noise scale is set to. "
                "Drop them, or raise min_scale.",
                stacklevel=2,
            )
        explained = (variance <= least) & ~constant
        if explained.any():
            warnings.warn(
                f"FactorAnalysis: {_columns(explained)} explained by the factors but for noise of "
                f"min_scale={min_scale} (a Heywood case), so the likelihood depends on it. Use a "
                "smaller latent_dim, or a min_scale that suits the units of these columns.",
                stacklevel=2,
            )
        excess = (unit * variance.sqrt() - min_scale).clamp(min=min_scale * 1e-16)
        with seeded(0), torch.no_grad():
            model = cls(data_dim, latent_dim, noise_scale=2 * min_scale, min_scale=min_scale)
            model = model.to(x if x.is_floating_point() else torch.empty(()))
            model.loc.copy_(loc)
            model.log_noise_scale.copy_(excess.log())
            model.loading.copy_(unit.unsqueeze(-1) * loading)
        return model


def _check_min_scale(min_scale: float) -> None:
    if not isinstance(min_scale, Real) or not min_scale > 0:
        raise ValueError(
            f"FactorAnalysis: min_scale must be > 0, got {min_scale!r}. Without a minimum the "
            "likelihood is unbounded."
        )


def _starts(root: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    covariance = root.mT @ root
    variance = covariance.diagonal()
    # A little more on the diagonal, so that a singular covariance has an inverse too.
    precision = torch.linalg.inv(covariance + 1e-6 * torch.eye(len(variance)).to(variance))
    unexplained = (1.0 - latent_dim / (2 * len(variance))) / precision.diagonal()
    return variance / 2, unexplained


def _climb(
    root: Tensor,
    latent_dim: int,
    start: Tensor,
    least: Tensor,
    tolerance: float,
    steps: int,
) -> tuple[Tensor, Tensor, float, float]:
    """Return loading, variances, log-likelihood and the gain of the last step."""
    climb = ecme(root, latent_dim, start, least)
    loading, variance, value = next(climb)
    gain = math.inf
    for _ in range(steps):
        new_loading, new_variance, new_value = next(climb)
        gain = float(new_value - value)
        if gain > 0:  # else rounding is all that is left
            loading, variance, value = new_loading, new_variance, new_value
        if gain < tolerance:
            break
    return loading, variance, float(value), gain


def _columns(which: Tensor) -> str:
    """Say which columns are meant, and the verb that follows."""
    index = which.nonzero().flatten().tolist()
    if len(index) == 1:
        return f"column {index[0]} of {len(which)} is"
    few = ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "")
    return f"{len(index)} of {len(which)} columns ({few}) are"

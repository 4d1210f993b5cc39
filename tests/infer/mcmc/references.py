"""Ten posteriors whose moments are known: of posteriordb (stan-dev/posteriordb, BSD-3), in Pyro.

Data and moments are read from the folder `posteriordb` of the cache, which `PPL_MODELS_DATA` moves.
Everything is float64. No model has a plate: each likelihood is one event, so that leading
dimensions of chains go through as they are. Flat priors are masked; latents in order are a value
and a positive gap; a support that depends on another latent is a share of it, with its Jacobian.

    reference("arK-arK").model(*reference("arK-arK").arguments)

Source: https://github.com/stan-dev/posteriordb
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_models.data.cache import folder as cache_folder

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Moments:
    """What is known of each reported parameter.

    Attributes:
        names: Of the parameters.
        mean: Posterior means.
        sd: Posterior standard deviations.
        ess: Effective draws behind them.
    """

    names: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    ess: Tensor


@dataclass(frozen=True)
class Reference:
    """A posterior whose moments are known.

    Attributes:
        name: As posteriordb calls it.
        model: In Pyro.
        arguments: Its data.
        moments: Of its reported parameters.
        transform: From draws of the model's sites, shape (*batch, *event), to the reported
            parameters, shape (*batch, parameters), in the order of `moments.names`.
    """

    name: str
    model: Callable[..., None]
    arguments: tuple[Tensor, ...]
    moments: Moments
    transform: Callable[[Draws], Tensor]


def reference(name: str) -> Reference:
    """Return one of the posteriors in `NAMES`."""
    found = _moments()[name]
    columns = (torch.tensor(found[key], dtype=torch.float64) for key in ("mean", "sd", "ess"))
    data = json.loads((folder() / "data" / found["data"]).read_text(encoding="utf-8"))
    model, arguments, transform = _MAKERS[name](data)
    return Reference(name, model, arguments, Moments(tuple(found["names"]), *columns), transform)


def folder() -> Path:
    """Return where data and moments are."""
    return cache_folder() / "posteriordb"


@cache
def _moments() -> dict[str, Any]:
    return json.loads((folder() / "reference_moments.json").read_text(encoding="utf-8"))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(loc: float, scale: float, *shape: int) -> Any:
    return dist.Normal(number(loc), number(scale)).expand(list(shape)).to_event(len(shape))


def flat(*shape: int) -> Any:
    return normal(0.0, 1.0, *shape).mask(False)


def flat_positive() -> Any:
    return dist.HalfNormal(number(1.0)).mask(False)


def flat_share() -> Any:
    return dist.Uniform(number(0.0), number(1.0)).mask(False)


def joined(draws: Draws, *names: str) -> Tensor:
    """Put sites side by side, some of them numbers and some vectors."""
    batch = min(draws[name].ndim for name in names)
    return torch.cat([draws[name].reshape(*draws[name].shape[:batch], -1) for name in names], -1)


def eight_schools(data: Any) -> Any:
    def model(y: Tensor, sigma: Tensor) -> None:
        t = pyro.sample("t", normal(0.0, 1.0, len(y)))
        mu = pyro.sample("mu", normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(number(5.0)))
        theta = mu[..., None] + tau[..., None] * t
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    def transform(draws: Draws) -> Tensor:
        mu, tau = draws["mu"][..., None], draws["tau"][..., None]
        return torch.cat([mu + tau * draws["t"], mu, tau], -1)

    return model, (vector(data["y"]), vector(data["sigma"])), transform


def regression(
    design: Tensor, y: Tensor, prior: Callable[[int], Any], noise: Callable[[], Any]
) -> Any:
    """y ~ normal(X b, s): reported are b and s."""

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", prior(x.shape[-1]))
        sigma = pyro.sample("sigma", noise())
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=y)

    return model, (design, y), lambda draws: joined(draws, "beta", "sigma")


def kidscore_momiq(data: Any) -> Any:
    iq = vector(data["mom_iq"])
    design = torch.stack([torch.ones_like(iq), iq], -1)
    return regression(design, vector(data["kid_score"]), flat, lambda: dist.HalfCauchy(number(2.5)))


def logearn_interaction(data: Any) -> Any:
    height, male = vector(data["height"]), vector(data["male"])
    design = torch.stack([torch.ones_like(height), height, male, height * male], -1)
    return regression(design, vector(data["earn"]).log(), flat, flat_positive)


def nes(data: Any) -> Any:
    age = torch.tensor(data["age_discrete"])
    columns = {name: vector(data[name]) for name in data if isinstance(data[name], list)}
    ages = [(age == group).double() for group in (2, 3, 4)]
    before = [columns[name] for name in ("real_ideo", "race_adj")]
    after = [columns[name] for name in ("educ1", "gender", "income")]
    design = torch.stack([torch.ones(len(age)).double(), *before, *ages, *after], -1)
    return regression(design, columns["partyid7"], flat, flat_positive)


def ar_k(data: Any) -> Any:
    y, order = vector(data["y"]), data["K"]
    # Row t has y_{t-1}, ..., y_{t-K}.
    lags = y.unfold(0, order, 1)[:-1].flip(-1)

    def model(lags: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", normal(0.0, 10.0))
        beta = pyro.sample("beta", normal(0.0, 10.0, order))
        sigma = pyro.sample("sigma", dist.HalfCauchy(number(2.5)))
        loc = alpha[..., None] + beta @ lags.mT
        pyro.sample("y", dist.Normal(loc, sigma[..., None]).to_event(1), obs=y)

    return model, (lags, y[order:]), lambda draws: joined(draws, "alpha", "beta", "sigma")


def blr(data: Any) -> Any:
    return regression(
        torch.tensor(data["X"], dtype=torch.float64),
        vector(data["y"]),
        lambda columns: normal(0.0, 10.0, columns),
        lambda: dist.HalfNormal(number(10.0)),
    )


def garch11(data: Any) -> Any:
    first = data["sigma1"] ** 2

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", flat())
        alpha0 = pyro.sample("alpha0", flat_positive())
        alpha1 = pyro.sample("alpha1", flat_share())
        # beta1 is flat on (0, 1 - alpha1).
        share = pyro.sample("share", flat_share())
        pyro.factor("jacobian", torch.log1p(-alpha1))
        beta1 = (1.0 - alpha1) * share
        mu = mu[..., None]
        news = alpha0[..., None] + alpha1[..., None] * (y[:-1] - mu).square()
        start = torch.full_like(news[..., :1], first)
        variance = recurrence(torch.cat([start, news], -1), beta1[..., None])
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)

    def transform(draws: Draws) -> Tensor:
        beta1 = (1.0 - draws["alpha1"]) * draws["share"]
        return torch.stack([draws["mu"], draws["alpha0"], draws["alpha1"], beta1], -1)

    return model, (vector(data["y"]),), transform


def recurrence(news: Tensor, decay: Tensor) -> Tensor:
    """Solve h_t = news_t + decay h_{t-1} along the last dimension, in log2(T) steps."""
    step, length = 1, news.shape[-1]
    while step < length:
        # After this, h_t has the news of the last 2 `step` times.
        news = news + decay * F.pad(news[..., :-step], (step, 0))
        decay, step = decay * decay, 2 * step
    return news


def gp_pois_regr(data: Any) -> Any:
    def covariance_root(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
        gaps = (x[:, None] - x).square()
        rho, alpha = rho[..., None, None], alpha[..., None, None]
        kernel = alpha.square() * torch.exp(-0.5 * gaps / rho.square())
        return torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(x), dtype=x.dtype))

    def model(x: Tensor, k: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(number(25.0), number(4.0)))
        alpha = pyro.sample("alpha", dist.HalfNormal(number(2.0)))
        white = pyro.sample("white", normal(0.0, 1.0, len(x)))
        f = (covariance_root(x, rho, alpha) @ white[..., None])[..., 0]
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    x, k = vector(data["x"]), vector(data["k"])

    def transform(draws: Draws) -> Tensor:
        rho, alpha = draws["rho"], draws["alpha"]
        f = (covariance_root(x, rho, alpha) @ draws["white"][..., None])[..., 0]
        return torch.cat([rho[..., None], alpha[..., None], f], -1)

    return model, (x, k), transform


def low_dim_gauss_mix(data: Any) -> Any:
    def model(y: Tensor) -> None:
        mu1 = pyro.sample("mu1", normal(0.0, 2.0))
        gap = pyro.sample("gap", flat_positive())
        pyro.factor("mu2", normal(0.0, 2.0).log_prob(mu1 + gap))
        sigma = pyro.sample("sigma", dist.HalfNormal(number(2.0)).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(number(5.0), number(5.0)))
        mu = torch.stack([mu1, mu1 + gap], -1)
        share = torch.stack([theta.log(), torch.log1p(-theta)], -1)
        terms = dist.Normal(mu[..., None, :], sigma[..., None, :]).log_prob(y[:, None])
        pyro.factor("y", torch.logsumexp(share[..., None, :] + terms, -1).sum(-1))

    def transform(draws: Draws) -> Tensor:
        both = {**draws, "mu2": draws["mu1"] + draws["gap"]}
        return joined(both, "mu1", "mu2", "sigma", "theta")

    return model, (vector(data["y"]),), transform


def hmm_example(data: Any) -> Any:
    def model(y: Tensor) -> None:
        flat_simplex = dist.Dirichlet(torch.ones(2, dtype=torch.float64))
        theta = [pyro.sample(name, flat_simplex) for name in ("theta1", "theta2")]
        mu1 = pyro.sample("mu1", flat_positive())
        gap = pyro.sample("gap", flat_positive())
        pyro.factor("mu", normal(3.0, 1.0).log_prob(mu1) + normal(10.0, 1.0).log_prob(mu1 + gap))
        mu = torch.stack([mu1, mu1 + gap], -1)
        emission = dist.Normal(mu[..., None, :], number(1.0)).log_prob(y[:, None])
        steps = torch.stack(theta, -2).log()[..., None, :, :] + emission[..., 1:, None, :]
        paths = emission[..., 0, :, None] + log_product(steps)
        pyro.factor("y", paths.logsumexp((-2, -1)))

    def transform(draws: Draws) -> Tensor:
        mu2 = draws["mu1"] + draws["gap"]
        mu = torch.stack([draws["mu1"], mu2], -1)
        return torch.cat([draws["theta1"], draws["theta2"], mu], -1)

    return model, (vector(data["y"]),), transform


def log_product(factors: Tensor) -> Tensor:
    """Multiply matrices in log space, (*batch, T, K, K) to (*batch, K, K), in log2(T) steps."""
    while (length := factors.shape[-3]) > 1:
        left, right = factors[..., : length - 1 : 2, :, :], factors[..., 1::2, :, :]
        pairs = (left[..., :, :, None] + right[..., None, :, :]).logsumexp(-2)
        factors = torch.cat([pairs, factors[..., length - length % 2 :, :, :]], -3)
    return factors[..., 0, :, :]


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "earnings-logearn_interaction": logearn_interaction,
    "nes2000-nes": nes,
    "garch-garch11": garch11,
    "gp_pois_regr-gp_pois_regr": gp_pois_regr,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "arK-arK": ar_k,
    "hmm_example-hmm_example": hmm_example,
    "sblrc-blr": blr,
}
NAMES = tuple(_MAKERS)

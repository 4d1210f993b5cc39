"""Ready-made models and pairs, by name: tests, benchmarks and the command line iterate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from guides import families
from guides.amortized import Amortized
from guides.deep_exponential_family import LogCounts, start_near
from guides.deep_set import DeepSet
from guides.dlgm import Ladder
from guides.ensemble import Ensemble
from guides.exact import Exact
from guides.flows import zuko
from guides.local import Local
from ppl_models.bnn import BayesianNeuralNetwork, Tasks
from ppl_models.core.checks import check_known
from ppl_models.core.dynamic import Dynamic
from ppl_models.core.random import seeded
from ppl_models.core.sites import example_batch, site_table
from ppl_models.core.types import Batch, Objective
from ppl_models.data.dataset import Binarize, Dataset
from ppl_models.deep_exponential_family import DeepExponentialFamily
from ppl_models.dlgm import DeepLatentGaussian
from ppl_models.factor_analysis import FactorAnalysis
from ppl_models.infer.gradients import SCORES, DisARM, DReG, StickingTheLanding
from ppl_models.infer.objectives import ELBO, IWAE, VIMCO, ReweightedWakeSleep
from ppl_models.parts.likelihoods import (
    Bernoulli,
    Categorical,
    Classes,
    Counts,
    Gaussian,
    Homoscedastic,
)
from ppl_models.parts.priors import Bayesian, bayesian, hierarchical, normal, scale_mixture
from ppl_models.ppca import PPCA
from ppl_models.sbn import SigmoidBeliefNetwork
from ppl_models.vae import VAE

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Pair:
    """A small model and a guide for it, ready to run.

    Attributes:
        name: Its name.
        model: Makes the model.
        guide: Makes the guide from the model and the number of rows.
        batch: Draws a batch of some rows from the model.
        evidence: Log p(x) of each row, nats, where it is known.
        sampled: Whether MCMC can sample its latents: whether all are continuous.
        row_wise: Whether all its latents are local, so that each row is a target of its own.
    """

    name: str
    model: Callable[[], Any]
    guide: Callable[[Any, int], Any]
    batch: Callable[[Any, int], Batch] = lambda model, rows: example_batch(model, size=rows)
    evidence: Callable[[Any, Batch], Tensor] | None = None
    sampled: bool = True
    row_wise: bool = True


@dataclass(frozen=True)
class ModelEntry:
    """A model that the command line can build for a data set.

    Attributes:
        name: Its name.
        summary: What it is, in a line.
        build: Makes it for a data set and its sizes.
        sizes: The sizes that can be chosen, and what they are otherwise.
        binarize: How grey data are made binary for it unless told otherwise; None if they are not.
        guides: Guides that `compare` takes unless told otherwise; `fit` takes the first.
        objective: What it is trained by.
    """

    name: str
    summary: str
    build: Callable[..., Any]
    sizes: Mapping[str, Any]
    binarize: Binarize | None
    guides: tuple[str, ...]
    objective: Objective = field(default_factory=ELBO)


def _ppca() -> PPCA:
    return PPCA(data_dim=5, latent_dim=2)


def _factor_analysis() -> FactorAnalysis:
    return FactorAnalysis(data_dim=5, latent_dim=2)


def _vae(**options: Any) -> VAE:
    return VAE(data_dim=6, latent_dim=2, hidden=(8,), **options)


def _convolutional_vae() -> VAE:
    decoder = nn.Sequential(
        nn.Linear(2, 4 * 2 * 2),
        nn.Unflatten(-1, (4, 2, 2)),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 1, kernel_size=2, stride=2),
    )
    return VAE(data_dim=(1, 4, 4), latent_dim=2, decoder=decoder)


def _convolutional_guide(model: Any, rows: int) -> Amortized:
    encoder = nn.Sequential(nn.Conv2d(1, 4, kernel_size=2, stride=2), nn.Tanh(), nn.Flatten())
    return Amortized(model, encoder=encoder)


def _sbn() -> SigmoidBeliefNetwork:
    return SigmoidBeliefNetwork(data_dim=6, latent_dims=(3, 2))


def _dlgm() -> DeepLatentGaussian:
    return DeepLatentGaussian(data_dim=6, latent_dims=(3, 2), hidden=(4,))


def _def(family: str | tuple[str, ...] = "gamma", **options: Any) -> DeepExponentialFamily:
    return DeepExponentialFamily(6, (3, 2), family, shape=0.5, **options)


def _def_near(data: Dataset, latent_dims: Sequence[int]) -> DeepExponentialFamily:
    """Make one for the kind of values that there are, started near their means."""
    x = data.x.draw(seed=0) if isinstance(data.x, Dynamic) else data.x
    counts = bool(((x >= 0) & (x == x.round())).all())
    observation = "bernoulli" if data.binarize else "poisson" if counts else "normal"
    model = DeepExponentialFamily(
        x.shape[-1], latent_dims, observation=observation, latent_weights=False
    )
    start_near(Local(model, rows=len(x)), x)  # for what it sets of the model; the guide is let go
    return model


def _log_counts(model: Any, hidden: Sequence[int]) -> Amortized:
    """Make a guide that reads log(1 + x), gamma where latents are positive."""
    batch = example_batch(model, size=2)
    gamma = families.Gamma()
    sites = site_table(model, *batch).locals
    family = {site.name: gamma for site in sites if gamma.refuses(site) is None}
    encoder = LogCounts(batch[0][0].numel(), hidden)
    return Amortized(model, encoder=encoder, family=family, mean_field=True)


def _bnn(**options: Any) -> BayesianNeuralNetwork:
    return BayesianNeuralNetwork(3, hidden=(4,), **options)


def _convolutional_bnn() -> BayesianNeuralNetwork:
    net = nn.Sequential(nn.Conv2d(1, 2, kernel_size=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return BayesianNeuralNetwork((1, 3, 3), likelihood=Classes(3), net=net)


def _conditional_batch(model: Any, rows: int) -> Batch:
    """Draw covariates, and what a conditional model makes of them."""
    like = next(value for value in model.buffers() if value.is_floating_point())
    with seeded(0), torch.no_grad():
        x = torch.randn(rows, *model.data_shape).to(like)
        return x, model(x)


def _tasks_batch(model: Tasks, rows: int) -> Batch:
    """Draw the covariates of tasks with four rows each, and what the model makes of them."""
    like = next(value for value in model.buffers() if value.is_floating_point())
    with seeded(0), torch.no_grad():
        x = torch.randn(rows, 4, *model.single.data_shape).to(like)
        return x, model(x)


def _global(model: Any, rows: int, **options: Any) -> Local:
    """Make a guide for global latents only, around the weights that the network came with."""
    guide = Local(model, example=_conditional_batch(model, 2), **options)
    guide.start_around(model.net.starts(), scale=0.3)
    return guide


def _evidence(model: Any, batch: Batch) -> Tensor:
    return model.log_evidence(*batch)


PAIRS: tuple[Pair, ...] = (
    Pair("ppca-exact", _ppca, lambda model, rows: Exact(model), evidence=_evidence),
    Pair(
        "ppca-amortized",
        _ppca,
        lambda model, rows: Amortized(model, hidden=()),
        evidence=_evidence,
    ),
    Pair("ppca-local", _ppca, lambda model, rows: Local(model, rows=rows), evidence=_evidence),
    Pair(
        "ppca-low-rank",
        _ppca,
        lambda model, rows: Local(model, rows=rows, family=families.LowRankNormal(rank=1)),
        evidence=_evidence,
    ),
    Pair(
        "ppca-full",
        _ppca,
        lambda model, rows: Amortized(model, hidden=(4,), family=families.FullNormal()),
        evidence=_evidence,
    ),
    Pair(
        "ppca-bayesian",
        lambda: bayesian(_ppca(), dist.Normal(0.0, 1.0)),
        lambda model, rows: Amortized(model, hidden=(4,)),
        row_wise=False,
    ),
    Pair(
        "factor-analysis-exact",
        _factor_analysis,
        lambda model, rows: Exact(model),
        evidence=_evidence,
    ),
    Pair(
        "factor-analysis-amortized",
        _factor_analysis,
        lambda model, rows: Amortized(model, hidden=()),
        evidence=_evidence,
    ),
    Pair("vae-amortized", _vae, lambda model, rows: Amortized(model, hidden=(8,))),
    Pair("vae-local", _vae, lambda model, rows: Local(model, rows=rows)),
    Pair(
        "vae-maf",
        _vae,
        lambda model, rows: Amortized(
            model,
            hidden=(8,),
            family=families.Flow(zuko.flows.MAF, transforms=2, hidden_features=(8,)),
        ),
    ),
    Pair(
        "vae-nsf",
        _vae,
        lambda model, rows: Local(
            model,
            rows=rows,
            family=families.Flow(
                zuko.flows.NSF, context=4, transforms=1, bins=4, hidden_features=(8,)
            ),
        ),
    ),
    Pair(
        "vae-gaussian",
        lambda: _vae(likelihood=Gaussian(min_scale=0.1)),
        lambda model, rows: Amortized(model, hidden=(8,)),
    ),
    Pair(
        "vae-categorical",
        lambda: _vae(likelihood=Categorical(classes=3)),
        lambda model, rows: Amortized(model, hidden=(8,)),
    ),
    Pair("vae-convolutional", _convolutional_vae, _convolutional_guide),
    Pair(
        "dlgm-bottom-up",
        _dlgm,
        lambda model, rows: Amortized(model, hidden=(8,), bottom_up=True),
    ),
    Pair("dlgm-ladder", _dlgm, lambda model, rows: Ladder(model, hidden=(8,))),
    Pair(
        "dlgm-local",
        lambda: DeepLatentGaussian.relu(6, 2, hidden=4),
        lambda model, rows: Local(model, rows=rows),
    ),
    Pair(
        "sbn-amortized",
        _sbn,
        lambda model, rows: Amortized(model, hidden=(8,), bottom_up=True),
        evidence=_evidence,
        sampled=False,
    ),
    Pair(
        "sbn-local",
        _sbn,
        lambda model, rows: Local(model, rows=rows),
        evidence=_evidence,
        sampled=False,
    ),
    Pair(
        "def-local",
        _def,
        lambda model, rows: start_near(Local(model, rows=rows), torch.ones(rows, 6)),
        row_wise=False,
    ),
    Pair(
        "def-gamma",
        lambda: _def(latent_weights=False),
        lambda model, rows: Amortized(
            model, encoder=LogCounts(6, (8,)), family=families.Gamma(), mean_field=True
        ),
    ),
    Pair(
        "def-mixed",
        lambda: _def(("bernoulli", "normal"), observation="normal"),
        lambda model, rows: Amortized(model, hidden=(8,), bottom_up=True),
        sampled=False,
        row_wise=False,
    ),
    Pair(
        "bnn-mean-field",
        _bnn,
        _global,
        batch=_conditional_batch,
        row_wise=False,
    ),
    Pair(
        "bnn-low-rank",
        lambda: _bnn(likelihood=Homoscedastic(0.5), prior=scale_mixture()),
        lambda model, rows: _global(model, rows, family=families.LowRankNormal(rank=1)),
        batch=_conditional_batch,
        row_wise=False,
    ),
    Pair(
        "bnn-counts",
        lambda: _bnn(likelihood=Counts(), prior=hierarchical(0.5)),
        _global,
        batch=_conditional_batch,
        row_wise=False,
    ),
    Pair(
        "bnn-ensemble",
        _bnn,
        lambda model, rows: Ensemble(model, members=3, example=_conditional_batch(model, 2)),
        batch=_conditional_batch,
        row_wise=False,
    ),
    Pair(
        "bnn-deep-set",
        lambda: Tasks(_bnn(prior=hierarchical())),
        lambda model, rows: DeepSet(model, hidden=(8,), example=_tasks_batch(model, 2)),
        batch=_tasks_batch,
    ),
    Pair(
        "bnn-convolutional", _convolutional_bnn, _global, batch=_conditional_batch, row_wise=False
    ),
)

MODELS: Mapping[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            "ppca",
            "probabilistic PCA: linear, Gaussian, with an exact posterior",
            lambda data, latent_dim: PPCA(data.x.shape[-1], latent_dim, noise_scale=0.3),
            {"latent_dim": 8},
            None,
            ("exact", "amortized", "local"),
        ),
        ModelEntry(
            "factor-analysis",
            "factor analysis: linear, Gaussian, each column with noise of its own",
            lambda data, latent_dim: FactorAnalysis(data.x.shape[-1], latent_dim, noise_scale=0.3),
            {"latent_dim": 8},
            None,
            ("exact", "amortized", "local"),
        ),
        ModelEntry(
            "vae",
            "variational autoencoder with Bernoulli pixels",
            lambda data, **sizes: VAE(data.x.shape[-1], **sizes),
            {"latent_dim": 8, "hidden": (64,)},
            "threshold",
            ("amortized", "local", "flow"),
        ),
        ModelEntry(
            "vae-gaussian",
            "variational autoencoder with real values, each with a learnt scale",
            lambda data, **sizes: VAE(
                data.x.shape[-1], likelihood=Gaussian(min_scale=0.05), **sizes
            ),
            {"latent_dim": 8, "hidden": (64,)},
            None,
            ("amortized", "local", "flow"),
        ),
        ModelEntry(
            "dlgm",
            "deep latent Gaussian model: layers of normal latents, binary pixels",
            lambda data, **sizes: DeepLatentGaussian(data.x.shape[-1], **sizes),
            {"latent_dims": (16, 8), "hidden": (64,)},
            "threshold",
            ("bottom-up", "amortized", "local"),
        ),
        ModelEntry(
            "sbn",
            "sigmoid belief network: layers of binary latents, binary pixels",
            lambda data, **sizes: SigmoidBeliefNetwork(data.x.shape[-1], **sizes),
            {"latent_dims": (32, 16), "hidden": ()},
            "threshold",
            ("bottom-up", "amortized", "local"),
            ELBO(score=DisARM()),
        ),
        ModelEntry(
            "def",
            "deep exponential family: layers of sparse positive latents; counts, 0 or 1, real values",
            lambda data, **sizes: _def_near(data, **sizes),
            {"latent_dims": (20, 10)},
            None,
            ("log-counts", "amortized", "local"),
        ),
    )
}

#: Guides by name, made from a model, the number of training rows, and the units of each tanh layer
#: of the encoder, where there is one.
GUIDES: Mapping[str, Callable[[Any, int, Sequence[int]], Any]] = {
    "amortized": lambda model, rows, hidden: Amortized(model, hidden=hidden),
    "bottom-up": lambda model, rows, hidden: Amortized(model, hidden=hidden, bottom_up=True),
    "exact": lambda model, rows, hidden: Exact(model),
    "flow": lambda model, rows, hidden: Amortized(
        model, hidden=hidden, family=families.Flow(transforms=2, hidden_features=(32,))
    ),
    "full": lambda model, rows, hidden: Amortized(
        model, hidden=hidden, family=families.FullNormal()
    ),
    "ladder": lambda model, rows, hidden: Ladder(model, hidden=hidden),
    "local": lambda model, rows, hidden: Local(model, rows=rows),
    "log-counts": lambda model, rows, hidden: _log_counts(model, hidden),
    "low-rank": lambda model, rows, hidden: Amortized(
        model, hidden=hidden, family=families.LowRankNormal()
    ),
}


_FLOWS = ("BPF", "CNF", "GF", "MAF", "NAF", "NCSF", "NICE", "NSF", "SOSPF", "UNAF")
_PRIORS = ("Cauchy", "Exponential", "Gamma", "HalfCauchy", "HalfNormal", "InverseGamma", "Laplace")
_PRIORS += ("LogNormal", "Normal", "StudentT")

#: What a saved run may be built of, by name: nothing else is ever made from its JSON.
BLOCKS: Mapping[str, Callable[..., Any]] = {
    **{
        f"models.{made.__name__}": made
        for made in (
            PPCA,
            FactorAnalysis,
            VAE,
            DeepLatentGaussian,
            SigmoidBeliefNetwork,
            DeepExponentialFamily,
            BayesianNeuralNetwork,
            Tasks,
            Bayesian,
        )
    },
    **{
        f"guides.{made.__name__}": made
        for made in (Amortized, DeepSet, Ensemble, Exact, Ladder, Local)
    },
    "encoders.LogCounts": LogCounts,
    **{f"families.{family.name}": type(family) for family in families.ALL},
    **{
        f"likelihoods.{made.__name__}": made
        for made in (Bernoulli, Categorical, Classes, Counts, Gaussian, Homoscedastic)
    },
    **{f"flows.{name}": getattr(zuko.flows, name) for name in _FLOWS},
    **{f"priors.{name}": getattr(dist, name) for name in _PRIORS},
    **{f"priors.{made.__name__}": made for made in (normal, scale_mixture, hierarchical)},
    **{f"objectives.{made.__name__}": made for made in (ELBO, IWAE, VIMCO, ReweightedWakeSleep)},
    **{f"estimators.{made.__name__}": made for made in (*SCORES, StickingTheLanding, DReG)},
}


def lookup(kind: str, name: str, known: Mapping[str, Entry]) -> Entry:
    """Find an entry by name.

    Raises:
        ValueError: If there is none; the message has the nearest name.
    """
    check_known(kind, name, known)
    return known[name]


def build(name: str, data: Dataset, *, seed: int = 0, **sizes: Any) -> Any:
    """Build a model by name for a data set.

    Arguments:
        name: A key of `MODELS`.
        data: The data set.
        seed: Of its initial parameters; the global random state is left as it was.
        sizes: Sizes to choose, such as `latent_dim=2`; see `ModelEntry.sizes`.

    Raises:
        ValueError: If there is no such model, or it has no such size.
    """
    entry = lookup("model", name, MODELS)
    for size in sizes:
        if size not in entry.sizes:
            raise ValueError(
                f"{name} has no {size}; what can be chosen is {', '.join(entry.sizes)}."
            )
    with seeded(seed):
        return entry.build(data, **{**entry.sizes, **sizes})

"""Gradient estimators by name, which of them fit a pair, and what they bring along, trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_models.core.batch import as_batch
from ppl_models.core.checks import check_count, check_known
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.traces import run_pair
from ppl_models.infer.gradients import (
    ARM,
    NVIL,
    REBAR,
    RELAX,
    DisARM,
    DReG,
    Enumerate,
    LeaveOneOut,
    Reinforce,
    RunningAverage,
    StickingTheLanding,
)
from ppl_models.infer.objectives import (
    ELBO,
    IWAE,
    VIMCO,
    Bound,
    ReweightedWakeSleep,
    analytic_divergences,
)

#: For latents whose draws carry no gradient, such as discrete ones.
BY_SCORE: Mapping[str, Bound] = {
    "reinforce-all": ELBO(score=Reinforce(rao_blackwell=False)),
    "reinforce": ELBO(score=Reinforce()),
    "running-average": ELBO(score=RunningAverage()),
    "nvil": ELBO(score=NVIL()),
    "leave-one-out": ELBO(2, score=LeaveOneOut()),
    "arm": ELBO(score=ARM()),
    "disarm": ELBO(score=DisARM()),
    "rebar": ELBO(score=REBAR()),
    "relax": ELBO(score=RELAX()),
    "vimco": VIMCO(5),
    "reweighted-wake-sleep": ReweightedWakeSleep(5),
    "enumerate": ELBO(score=Enumerate()),
}

#: For latents whose draws carry their gradients.
BY_PATH: Mapping[str, Bound] = {
    "path": ELBO(),
    "sticking-the-landing": ELBO(path=StickingTheLanding()),
    "analytic-kl": ELBO(analytic_kl=True),
    "reinforce-everywhere": ELBO(score=Reinforce(everywhere=True)),
    "iwae": IWAE(5),
    "iwae-dreg": IWAE(5, path=DReG()),
}

ESTIMATORS: Mapping[str, Bound] = {**BY_SCORE, **BY_PATH}


@dataclass(frozen=True)
class Fitting:
    """The estimators of a pair.

    Attributes:
        objectives: Those that fit, by name.
        others: Why the others do not, by name.
    """

    objectives: Mapping[str, Bound]
    others: Mapping[str, str]


def estimators_for(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    names: Iterable[str] | None = None,
) -> Fitting:
    """Ask estimators whether they fit a pair.

    Arguments:
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        batch: The data.
        names: Keys of `ESTIMATORS`; by default those of `BY_SCORE` if the draws at a latent carry no
            gradient, and those of `BY_PATH` otherwise.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(20,))
        >>> found = estimators_for(model, Amortized(model), model(size=4))
        >>> "disarm" in found.objectives
        True
        >>> list(found.others)  # 2^20 joint states are too many for a sum
        ['enumerate']
    """
    data = as_batch(batch, model, guide)
    objectives: dict[str, Bound] = {}
    others: dict[str, str] = {}
    with own_parameters(model, guide), seeded(0), unchanged_on_error(), torch.enable_grad():
        by_path = _refusal(ELBO(score=Reinforce()), model, guide, *data)
        if names is None:
            names = BY_PATH if by_path else BY_SCORE
        for name in names:
            check_known("estimator", name, ESTIMATORS)
            objective = ESTIMATORS[name]
            if name == "path" and not by_path:
                others[name] = "path: a latent's draw carries no gradient. Look at 'reinforce'."
            elif reason := _refusal(objective, model, guide, *data):
                others[name] = reason
            else:
                objectives[name] = objective
    return Fitting(objectives, others)


def tuned(
    objective: Bound,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    rows: int,
    steps: int = 500,
    lr: float = 1e-2,
    seed: int | None = None,
) -> Bound:
    """Train what an objective brings along, such as baseline networks; model and guide stay.

    `fit` trains it with the rest. Where the parameters are fixed, as in `gradient_variance`, nothing
    does, and an estimator that relies on it is no better than one without. What is returned goes on
    with what was learnt.

    Arguments:
        objective: The objective.
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        data: A tensor, or a tuple of several of the same length.
        rows: Rows in a step.
        steps: Steps of Adam; 0 prepares it only.
        lr: Learning rate of these.
        seed: Of rows and draws; None draws from the global random stream.

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> from ppl_models.evaluate import gradient_variance
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(3,))
        >>> guide, x = Amortized(model), model(size=20)
        >>> nvil = tuned(ESTIMATORS["nvil"], model, guide, x, rows=10, steps=5, seed=0)
        >>> found = gradient_variance(model, guide, x[:10], objectives={"nvil": nvil}, draws=2)
        >>> found.draws
        2
    """
    check_count("tuned", "rows", rows)
    check_count("tuned", "steps", steps, least=0)
    batch = as_batch(data, model, guide)
    size = len(batch[0])
    with own_parameters(model, guide), seeded(seed), unchanged_on_error(), torch.enable_grad():
        ready = objective.prepare(model, guide, *(value[:rows] for value in batch))
        if own := ready.parameters():
            adam = torch.optim.Adam(own, lr=lr)
            for _ in range(steps):
                index = torch.randperm(size)[:rows].to(batch[0].device)
                part = batch if rows >= size else tuple(value[index] for value in batch)
                surrogate, _ = ready(model, guide, *part)
                slopes = torch.autograd.grad(-surrogate / len(part[0]), own, allow_unused=True)
                for leaf, slope in zip(own, slopes, strict=True):
                    leaf.grad = slope
                adam.step()
            adam.zero_grad()
    return ready


def _refusal(objective: Bound, model: Any, guide: Any, *batch: Tensor) -> str | None:
    """Say why an objective does not fit a pair; None if it does."""
    try:
        objective.prepare(model, guide, *batch)
    except ValueError as error:
        return str(error)
    if isinstance(objective, ELBO) and objective.analytic_kl:
        with evaluation_mode(model, guide), torch.no_grad():
            if not analytic_divergences(run_pair(model, guide, *batch)):
                return "ELBO: KL(q || p) has no closed form at any latent."
    return None

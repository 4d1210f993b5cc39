"""Gradient estimators: what stands in where the gradient of a bound must be estimated.

The gradient of an expectation under a guide is taken in one of two ways. Along the *path* of a draw,
where the draw is a differentiable function of the parameters and of noise; or by *score*, the
gradient of log q times what the draw cost, where it is not, as for discrete latents. Both come in
several forms, of the same mean and of different variance: an objective takes one of each, such as
`ELBO(score=DisARM())` or `IWAE(64, path=DReG())`.
"""

from __future__ import annotations

from ppl_models.infer.gradients.bernoulli import ARM, REBAR, RELAX, DisARM
from ppl_models.infer.gradients.enumeration import Enumerate
from ppl_models.infer.gradients.path import DReG, Path, StickingTheLanding
from ppl_models.infer.gradients.score import (
    NVIL,
    Detached,
    LeaveOneOut,
    Reinforce,
    Run,
    RunningAverage,
    Score,
    Term,
)

__all__ = [
    "ARM", "NVIL", "REBAR", "RELAX", "SCORES", "DReG", "Detached", "DisARM", "Enumerate", "LeaveOneOut",
    "Path", "Reinforce", "Run", "RunningAverage", "Score", "StickingTheLanding", "Term",
]  # fmt: skip

#: All estimators by score, in the order of their age.
SCORES: tuple[type[Score], ...] = (
    Reinforce, RunningAverage, NVIL, REBAR, RELAX, LeaveOneOut, ARM, DisARM, Enumerate,
)  # fmt: skip

"""Estimators along the path of a draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """An estimator for sites whose draws carry a gradient."""


@dataclass(frozen=True)
class StickingTheLanding(Path):
    r"""The path derivative alone: log q is differentiated by its draw, not by its parameters.

    What is left out has mean zero. Where q is the posterior, no variance is left.

    Source:
        Roeder, Wu & Duvenaud (2017). https://arxiv.org/abs/1703.09194
    """


@dataclass(frozen=True)
class DReG(Path):
    """The doubly reparametrised gradient of an importance-weighted bound.

    The guide's gradient is that along the path, with squared weights; its signal-to-noise ratio
    rises with the number of particles, where the plain one's falls.

    Source:
        Tucker, Lawson, Gu & Maddison (2019). https://arxiv.org/abs/1810.04152
    """

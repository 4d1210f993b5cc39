"""What can be asked of the samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ppl_models.core.checks import check_count


@dataclass(frozen=True)
class NUTS:
    """The no-U-turn sampler, all chains at once.

    Arguments:
        target_accept: Acceptance probability that step sizes are adapted to.
        max_depth: A trajectory has at most `2 ** max_depth - 1` leapfrog steps.
        dense: Adapt a full metric, not only a scale of each coordinate.
        float32: Keep positions and energies in single precision.

    Source:
        Hoffman & Gelman (2014). https://jmlr.org/papers/v15/hoffman14a.html
    """

    target_accept: float = 0.8
    max_depth: int = 10
    dense: bool = False
    float32: bool = False

    def __post_init__(self) -> None:
        for name in ("dense", "float32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"NUTS: {name} must be True or False, got {getattr(self, name)!r}."
                )
        for name, kind in (("target_accept", float), ("max_depth", int)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"NUTS: {name} must be of type {kind.__name__}, got {getattr(self, name)!r}."
                )
        if not 0.0 < self.target_accept < 1.0:
            raise ValueError(f"NUTS: target_accept must be in (0, 1), got {self.target_accept}.")
        if not 1 <= self.max_depth <= 20:
            raise ValueError(f"NUTS: max_depth must be from 1 to 20, got {self.max_depth}.")


@dataclass(frozen=True)
class GibbsWithGradients:
    """Flips binary latents by the gradient, all chains at once; NUTS moves continuous ones.

    Arguments:
        flips: Flips that are proposed for each draw, by default as many as a target has units.
        nuts: What moves continuous latents, by a transition for each draw.

    Source:
        Grathwohl, Swersky, Hashemi, Duvenaud & Maddison (2021). https://arxiv.org/abs/2102.04509
    """

    flips: int | None = None
    nuts: NUTS = NUTS()

    def __post_init__(self) -> None:
        if self.flips is not None:
            check_count("GibbsWithGradients", "flips", self.flips)
        if not isinstance(self.nuts, NUTS):
            raise ValueError(
                f"GibbsWithGradients: nuts must be an instance such as NUTS(), got {self.nuts!r}."
            )


NOISE = 0.05  # variance of the noise of minibatches, as a share of that injected, in a default step
LONGEST = 0.2  # default step: its square over 4 is the discretisation's share of a variance


@dataclass(frozen=True)
class SGHMC:
    r"""Stochastic gradient Hamiltonian Monte Carlo: chains that see a minibatch of rows at each step.

    .. math::

        v \leftarrow (1 - \alpha) v + \eta \nabla \tilde{U}(u) + \mathcal{N}(0, 2 \alpha \eta),
        \qquad u \leftarrow u + v, \qquad \eta = \epsilon^2 s^2

    :math:`\tilde U` is the log density on the unconstrained space, its rows those of a minibatch,
    scaled by N / `batch_size`. Each chain draws its own, uniformly with replacement; with
    `batch_size` = N it takes all rows instead. Scales :math:`s` are those of the guide that is given
    as `init=`, coordinate by coordinate; without one they are all :math:`1 / \sqrt{N}`, and
    :math:`\epsilon^2` is the learning rate of gradient ascent, with momentum :math:`1 - \alpha`, on
    the mean log density of a row.

    Nothing is accepted or rejected, so that draws are biased by two things. Where :math:`s` is the
    scale of the posterior, steps of finite size make variances too large by a share of
    :math:`\epsilon^2 / (4 - 2 \alpha)`, and the noise of minibatches (the paper's
    :math:`\hat B`, here taken as 0) by about :math:`\epsilon^2 N / (2 \alpha B)`. The second is measured:
    `Posterior.gradient_noise`. Halving the step quarters both, and takes four times as many steps
    to the next independent draw, about :math:`2 \alpha / \epsilon^2`. Draws with half the step say
    whether the bias matters.

    Arguments:
        batch_size: Rows :math:`B` of a minibatch.
        step_size: :math:`\epsilon`, in units of :math:`s`. By default that at which minibatches add
            a twentieth to the variance, by the formula above, but at most 0.2; it is shortened for
            each chain after half of the warm-up, where they are measured to add more.
        friction: :math:`\alpha`, the share of the velocity that is lost in a step, in (0, 1];
            1 is Langevin dynamics.
        resample: Steps after which a chain draws its velocity anew; None leaves that to friction.
        thin: Steps to each draw.

    Source:
        Chen, Fox & Guestrin (2014), equation 15. https://arxiv.org/abs/1402.4102
    """

    batch_size: int
    step_size: float | None = None
    friction: float = 0.1
    resample: int | None = None
    thin: int = 10

    def __post_init__(self) -> None:
        for name in ("batch_size", "resample", "thin"):
            if name != "resample" or self.resample is not None:
                check_count("SGHMC", name, getattr(self, name))
        for name, most in (("step_size", math.inf), ("friction", 1.0)):
            value = getattr(self, name)
            if name == "step_size" and value is None:
                continue
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            if not fits or not 0.0 < value <= most or math.isinf(value):
                limit = "positive and finite" if math.isinf(most) else "in (0, 1]"
                raise ValueError(f"SGHMC: {name} must be a number, {limit}, got {value!r}.")

    def step(self, size: int) -> float:
        """Return the step size to begin with, for a data set of some rows."""
        if self.step_size is not None:
            return self.step_size
        if self.batch_size == size:
            return LONGEST
        return min(LONGEST, math.sqrt(2.0 * NOISE * self.friction * self.batch_size / size))

"""What can be asked of the samplers."""

from __future__ import annotations

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

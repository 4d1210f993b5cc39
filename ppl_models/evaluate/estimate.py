"""A number with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate, in nats per row.

    Attributes:
        mean: Mean over rows; for a model with global latents, the total over rows divided by N.
        se: Standard error of `mean`: Monte Carlo error only, not what other rows would give. NaN
            for a single particle.
        rows: One estimate a row, shape (N,); None where only the total has a meaning.
        rows_se: Their standard errors, shape (N,).
        bias: Estimated bias of `mean`, where it has one.
        rows_bias: Estimated bias of each row, shape (N,).
        particles: Draws from the guide behind each row.
    """

    mean: float
    se: float
    rows: Tensor | None = field(repr=False)
    rows_se: Tensor | None = field(repr=False)
    particles: int
    bias: float = 0.0
    rows_bias: Tensor | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if not self.se > 0.0:  # unknown, or none
            return f"{self.mean:.3f} nats/row"
        digits = min(8, max(2, 1 - math.floor(math.log10(self.se))))  # two of them significant
        return f"{self.mean:.{digits}f} +- {self.se:.{digits}f} nats/row"

"""The posteriors of `nuts.py` in words and numbers: read by each side, so it imports none of them.

A side is a process of its own. All of them write the models with the same names of sites; what is
compared are functions of the draws that do not depend on how a model is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]
Measured = Callable[[Arrays, Arrays], np.ndarray]

HIDDEN = 50  # units of the network
LATENT = 8  # of the VAE, whose other widths are those of its data and weights


def sites(*names: str) -> Measured:
    """Measure all elements of the sites, side by side: (chains, draws, elements)."""

    def measure(draws: Arrays, data: Arrays) -> np.ndarray:
        flat = [np.asarray(draws[name], np.float64) for name in names]
        return np.concatenate([value.reshape(*value.shape[:2], -1) for value in flat], -1)

    return measure


def predictions(draws: Arrays, data: Arrays) -> np.ndarray:
    """Measure what a network says of 20 rows, and its noise: its weights are not identified."""
    w1, b1, w2, b2, noise = (
        np.asarray(draws[name], np.float64) for name in ("w1", "b1", "w2", "b2", "noise")
    )
    hidden = np.tanh(np.einsum("rd,cndh->cnrh", data["x"][:20], w1) + b1[:, :, None, :])
    y = np.einsum("cnrh,cnh->cnr", hidden, w2) + b2[..., None]
    return np.concatenate([y, noise[..., None]], -1)


@dataclass(frozen=True)
class Case:
    """One posterior.

    Attributes:
        story: The model in a line.
        measure: What of its draws is compared, (chains, draws, quantities).
        rows: How many rows are targets of their own; 0 if it is one joint posterior.
        chains: Numbers of chains that make sense; none for all.
    """

    story: str
    measure: Measured
    rows: int = 0
    chains: tuple[int, ...] = ()


CASES = {
    "eight_schools": Case(
        "8 schools, non-centred: t ~ N(0, 1), mu ~ N(0, 5), tau ~ half-Cauchy(5), y ~ N(mu + tau t, "
        "sigma)",
        sites("t", "mu", "tau"),
    ),
    "german_credit": Case(
        "logistic regression, 1000 rows, intercept and 24 standardised columns, w ~ N(0, 1)",
        sites("w"),
    ),
    "german_hierarchical": Case(
        "the same with w = scale t, t ~ N(0, 1), scale ~ half-Cauchy(1) of all columns",
        sites("t", "scale"),
    ),
    "gp_poisson": Case(
        "Poisson counts at 11 places, squared-exponential process, rho ~ Gamma(25, 4), alpha ~ "
        "half-normal(2)",
        sites("rho", "alpha", "white"),
    ),
    "arK": Case(
        "autoregression of order 5, 200 steps, coefficients ~ N(0, 10), noise ~ half-Cauchy(2.5)",
        sites("alpha", "beta", "noise"),
    ),
    "network": Case(
        f"tanh network of 1 x {HIDDEN} units on 100 rows of uci/yacht, weights ~ N(0, 1) by the root "
        "of the inputs of a layer, noise ~ half-normal(1); measured are 20 predictions and the noise",
        predictions,
    ),
    "vae": Case(
        f"decoder {LATENT}-64-64 with fixed weights, 1000 binary rows, z ~ N(0, 1) of each row",
        sites("z"),
        rows=1000,
        chains=(4,),
    ),
}

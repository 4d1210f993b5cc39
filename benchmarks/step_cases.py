"""The models of `step.py` in numbers: read by each side of the comparison, so it imports neither.

A side is a process of its own (torch here, JAX there). All of them build a case from these numbers,
start it at the same parameters and give those the same names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        story: The model in a line.
        kind: Which program: "vae", "regression" or "mixture".
        rows: Rows of the data set.
        batch: Rows of a step; `rows` for all of them.
        lr: Learning rate of Adam.
        widths: Of a VAE: features of a row, hidden units of encoder and decoder, latent features.
        scan: Steps of one call of `lax.scan`.
        training: Steps after which all variants must have arrived at the same bound.
    """

    story: str
    kind: str
    rows: int
    batch: int
    lr: float
    widths: tuple[int, int, int] = (0, 0, 0)
    scan: int = 1000
    training: int = 1000


COMPONENTS = 3  # of the mixture
CASES = {
    "tiny": Case("VAE 16-16-4, batch 16 of 256 binary rows", "vae", 256, 16, 1e-3, (16, 16, 4)),
    "small": Case(
        "VAE 64-64-10, batch 64 of 1437 binary rows", "vae", 1437, 64, 1e-3, (64, 64, 10)
    ),
    "large": Case(
        "VAE 784-400-50, batch 128 of 10000 binary rows",
        "vae",
        10000,
        128,
        1e-3,
        (784, 400, 50),
        scan=200,
        training=200,
    ),
    "regression": Case("intercept and slope, all 100 rows", "regression", 100, 100, 1e-2),
    "mixture": Case(
        "3 normal components, the component of each row enumerated, all 200 rows",
        "mixture",
        200,
        200,
        1e-2,
    ),
}

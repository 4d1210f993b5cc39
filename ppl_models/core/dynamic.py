"""Data that are drawn anew for each epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_models.core.random import seeded


class Dynamic:
    r"""Binary rows that are drawn anew for each epoch of `fit`.

    .. math::

        x_{nd} \sim \mathrm{Bernoulli}(p_{nd})

    Everything else that takes data, such as `elbo`, sees one draw of it, always the same. It is no
    tensor: for arithmetic, pictures or another library, take `x.probabilities`, the grey values, or
    `x.draw()`, one binary tensor.

    Arguments:
        probabilities: The probability of a one, such as a grey value in [0, 1], shape (N, ...).

    Raises:
        ValueError: If a probability is outside [0, 1].

    Example:
        >>> x = Dynamic(torch.full((3, 2), 0.5))
        >>> len(x), x.shape, x[:2].shape, x.draw(seed=0).shape
        (3, torch.Size([3, 2]), torch.Size([2, 2]), torch.Size([3, 2]))
    """

    def __init__(self, probabilities: Tensor) -> None:
        if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
            raise ValueError(
                "Dynamic: probabilities must be in [0, 1], got values from "
                f"{probabilities.min().item():.4g} to {probabilities.max().item():.4g}."
            )
        self.probabilities = probabilities

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, rows: slice | Tensor) -> Dynamic:
        return Dynamic(self.probabilities[rows])

    def __repr__(self) -> str:
        return f"Dynamic(shape={tuple(self.shape)})"

    @property
    def shape(self) -> torch.Size:
        """Shape of a draw, (N, ...)."""
        return self.probabilities.shape

    def draw(self, seed: int | None = None) -> Tensor:
        """Draw all rows once.

        Arguments:
            seed: An integer isolates and reproduces; None draws from the global random stream.
        """
        with seeded(seed):
            return torch.bernoulli(self.probabilities)

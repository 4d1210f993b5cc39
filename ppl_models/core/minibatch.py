"""Minibatches that are right by construction."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

from ppl_models.core.checks import check_count


class minibatch(Messenger):
    r"""Declare that the batch is a part of the data set: rows `index` of `size`.

    Every site inside the plate has its log-density multiplied by `size / len(index)`, so that a
    bound on the batch is an unbiased estimate of the bound on the whole data set. Models and guides
    keep writing the plain ``pyro.plate("data", len(x))`` and see the same rows, because neither of
    them draws them. A plate that subsamples by itself is left alone.

    Use it as a context, or as a decorator where outer handlers are hidden, as inside `MCMC.run`.

    Arguments:
        index: Rows of the data set that make up the batch, an integer tensor of shape (B,).
        size: Rows N in the whole data set.
        plate: Name of the plate over rows.
        scale: What to multiply by, instead of `size / len(index)`: a number, or one number a row
            in a tensor of shape (B,).

    Raises:
        ValueError: At construction, for an index that is not a list of rows of the data set. Inside
            the model, when the plate has another length than `index`, or when a second handler
            for the same plate would scale again. On exit, when no site was inside the plate.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> rows = torch.tensor([1, 3])
        >>> with minibatch(rows, size=10), pyro.poutine.trace() as trace:
        ...     model(torch.randn(10)[rows])
        >>> trace.trace.nodes["x"]["scale"]
        5.0
    """

    def __init__(
        self,
        index: Tensor,
        size: int,
        *,
        plate: str = "data",
        scale: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(index, Tensor) or index.ndim != 1 or index.numel() == 0:
            got = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(
                f"minibatch: index must be a tensor of shape (B,) with B >= 1, got {got}."
            )
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"minibatch: index must hold integers, got {index.dtype}.")
        check_count("minibatch", "size", size)
        if index.device.type == "cpu" and not (index.min() >= 0 and index.max() < size):
            raise ValueError(
                f"minibatch: index must name rows 0 to {size - 1}, got {int(index.min())} to "
                f"{int(index.max())}."
            )
        if isinstance(scale, Tensor) and scale.ndim and scale.shape != index.shape:
            raise ValueError(
                f"minibatch: scale must be a number or have one number a row, shape "
                f"{tuple(index.shape)}, got {tuple(scale.shape)}."
            )
        self.index = index
        self.size = size
        self.plate = plate
        self.scale = size / len(index) if scale is None else scale
        self._met = False

    def __enter__(self) -> Self:
        self._met = False
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None and not self._met:
            raise ValueError(
                f"minibatch: no site was inside plate '{self.plate}', so nothing was scaled. Write "
                f'`with pyro.plate("{self.plate}", len(x)):` around the rows, or name the plate '
                "with `minibatch(..., plate=...)`."
            )

    def _pyro_sample(self, msg: Any) -> None:
        frame = next((f for f in msg["cond_indep_stack"] if f.name == self.plate), None)
        if frame is None:
            return
        self._met = True
        if _subsamples_itself(frame):
            return
        if frame.size != len(self.index):
            raise ValueError(
                f"minibatch: plate '{self.plate}' has {frame.size} rows at site '{msg['name']}', "
                f"but the minibatch has {len(self.index)}."
            )
        if self.plate in msg.get("minibatches", ()):
            raise ValueError(
                f"minibatch: plate '{self.plate}' is scaled twice at site '{msg['name']}': one "
                "minibatch handler is inside another. Keep one (`fit` brings its own)."
            )
        msg["minibatches"] = (*msg.get("minibatches", ()), self.plate)
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim and frame.dim is not None:
            scale = scale.reshape((-1,) + (1,) * (-frame.dim - 1))
        elif isinstance(scale, Tensor) and scale.ndim:
            # A sequential plate counts its rows from 1, and on if it is looped over again.
            scale = scale[(frame.counter - 1) % len(scale)]
        msg["scale"] = msg["scale"] * scale

    def _pyro_current_minibatch(self, msg: Any) -> None:
        if msg["args"][0] == self.plate and msg["value"] is None:
            msg["value"] = self
            msg["done"] = True


def current_minibatch(plate: str = "data") -> minibatch | None:
    """Return the innermost `minibatch` handler in force for a plate, or None.

    A guide with parameters of its own for each row reads its rows from `.index`.
    """
    return _current_minibatch(plate)


@effectful(type="current_minibatch")
def _current_minibatch(plate: str) -> minibatch | None:
    return None


def _subsamples_itself(frame: CondIndepStackFrame) -> bool:
    return frame.full_size is not None and frame.full_size != frame.size

"""From unconstrained numbers to the latents of a model and back, as effect handlers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, VonMises, biject_to, constraints, identity_transform
from torch.overrides import TorchFunctionMode

from ppl_models.core.sites import SiteTable, base_distribution, base_support, describe
from ppl_models.core.types import Distribution


@dataclass(frozen=True)
class Part:
    """Where a latent is among the unconstrained numbers of one target, and its form in the model."""

    name: str
    span: slice
    free: torch.Size  # of its unconstrained numbers
    shape: torch.Size
    axis: int | None  # of the plate over rows in a value, from the right
    dtype: torch.dtype
    binary: bool  # whether the numbers are zeros and ones
    circular: bool  # whether they are angles, of which those from -pi to pi are enough


class Bijection(Messenger):
    """Give each latent its value, and add up the log determinants of the Jacobians."""

    def __init__(
        self,
        parts: dict[str, Part],
        *,
        own: bool,
        summed: bool,
        u: Tensor | None = None,
        values: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.numbers: dict[str, Tensor] = {}
        self.log_det: Tensor | float = 0.0
        self._parts, self._own, self._summed = parts, own, summed
        self._u, self._given = u, values or {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        part = self._parts.get(name)
        if part is None:
            raise ValueError(
                f"sample: site '{name}' is reached for some values of the latents only; they were "
                f"{list(self._parts)}. The latents must be the same ones whatever their values."
            )
        transform = _bijection(name, fn)
        numbers, value = self._both(part, transform)
        now = fn.shape()
        if self._summed:  # sites that are enumerated add dimensions on the left
            now = now[max(0, len(now) - len(part.shape)) :]
        if value.shape != part.shape or now != part.shape:
            raise ValueError(
                f"sample: site '{name}' has shape {tuple(fn.shape())} here and {tuple(part.shape)} "
                "at other values of the latents. Shapes must not depend on values, and a support "
                "not on an enumerated site."
            )
        self.log_det = self.log_det + _log_det(transform, fn, numbers, value).sum()
        self.values[name], self.numbers[name] = value, numbers
        msg["value"] = value.to(part.dtype) if self._own else value
        msg["done"] = True

    def _both(self, part: Part, transform: Any) -> tuple[Tensor, Tensor]:
        if self._u is None:
            value = self._given[part.name]
            return transform.inv(value), value
        numbers = self._u[part.span].reshape(part.free)
        return numbers, transform(numbers)


class Summed(EnumMessenger):
    """Sum out what is marked for it: in parallel, also what is marked to be taken one by one."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("enumerate") == "sequential":
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
        super()._pyro_sample(msg)


class Lenient(TorchFunctionMode):
    """Return NaN where a matrix has no factor or no inverse, in place of an error for all chains.

    Arguments:
        double: Make what is made of numbers, such as `torch.eye(3)`, in double precision.
    """

    def __init__(self, *, double: bool) -> None:
        super().__init__()
        self._double = double

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a function that raises, or the precision of one that makes a tensor."""
        options = kwargs or {}
        if func == _data.__get__:  # which Pyro reads shapes off, and vmap refuses
            return args[0].detach()
        safe = _SAFE.get(func)
        if safe is None or "out" in options:
            result = func(*args, **options)
            if self._double and func in _MAKERS and options.get("dtype") is None:
                # By name, not by torch's default: a recording is replayed under any.
                precise = result.dtype == torch.float32
                return func(*args, **(options | {"dtype": torch.float64})) if precise else result
            return result
        result, info = safe(*args, **options)
        failed = info.reshape(info.shape + (1,) * (result.ndim - info.ndim)) != 0
        return torch.where(failed, math.nan, result)


_data: Any = Tensor.data

_MAKERS = {
    torch.arange,
    torch.as_tensor,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.tensor,
    torch.zeros,
}

_SAFE: dict[Any, Callable[..., Any]] = {
    torch.linalg.cholesky: torch.linalg.cholesky_ex,
    torch.cholesky: lambda a, upper=False: torch.linalg.cholesky_ex(a, upper=upper),
    Tensor.cholesky: lambda a, upper=False: torch.linalg.cholesky_ex(a, upper=upper),
    torch.linalg.inv: torch.linalg.inv_ex,
    torch.inverse: torch.linalg.inv_ex,
    Tensor.inverse: torch.linalg.inv_ex,
    torch.linalg.solve: torch.linalg.solve_ex,
}


def log_of_sum(total: Tensor) -> Tensor:
    """Take the logarithm of a sum of probabilities, with the exact gradient; zero has gradient zero.

    Pyro's own bounds the gradient, wrongly where a sum is below machine precision, and it cannot be
    vectorised.
    """
    some = total > 0
    return torch.where(some, torch.where(some, total, 1.0).log(), -math.inf)


def layout(table: SiteTable) -> dict[str, Part]:
    """Lay the latents of a target out, one after the other."""
    parts: dict[str, Part] = {}
    stop = 0
    for site in table.latents:
        shape = site.fn.shape()
        free = torch.Size(_bijection(site.name, site.fn).inverse_shape(shape))
        start, stop = stop, stop + math.prod(free)
        axis = None if site.data_dim is None else site.data_dim - len(site.event_shape)
        parts[site.name] = Part(
            site.name,
            slice(start, stop),
            free,
            shape,
            axis,
            site.value.dtype,
            is_binary(site.fn),
            isinstance(base_distribution(site.fn), VonMises),
        )
    return parts


def is_binary(fn: Distribution) -> bool:
    """Whether the elements of a site are zeros and ones: they are their own coordinates."""
    return base_support(fn.support)[0] is constraints.boolean


def _bijection(name: str, fn: Distribution) -> Transform:
    if is_binary(fn):
        return identity_transform
    try:
        return biject_to(fn.support)
    except NotImplementedError:
        known = "a support that is not known"
        with suppress(NotImplementedError):
            known = f"support '{describe(fn.support)}'"
        raise ValueError(
            f"sample: site '{name}' has {known}, to which no bijection leads from unconstrained "
            "numbers. Sample it on another support and transform it in the model, or register one "
            "with torch.distributions.biject_to."
        ) from None


def _log_det(transform: Transform, fn: Distribution, numbers: Tensor, value: Tensor) -> Tensor:
    """Return the log determinant of the Jacobian: NaN where the support is empty."""
    log_det = transform.log_abs_det_jacobian(numbers, value)
    support, _ = base_support(fn.support)
    if isinstance(support, (constraints.interval, constraints.half_open_interval)):
        some = support.lower_bound < support.upper_bound
        if isinstance(some, Tensor):
            return torch.where(some.all(), log_det, math.nan)
    return log_det

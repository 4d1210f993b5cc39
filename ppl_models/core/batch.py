"""Data from outside: converted once, checked once, refused with a reason."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_models.core.dynamic import Dynamic
from ppl_models.core.sites import (
    Site,
    SiteTable,
    argument_names,
    base_support,
    describe,
    describe_program,
    move_notes,
    site_table,
)
from ppl_models.core.types import Batch


def as_batch(data: Any, *programs: Any, device: torch.device | str | None = None) -> Batch:
    """Turn what a user has into a batch: tensors with the same leading length.

    Arguments:
        data: A tensor, a numpy array, a data frame, a sparse matrix of torch or SciPy (which becomes a
            dense one), a `Dynamic`, a `torch.utils.data.Dataset`, or a tuple of those with the same
            leading length. An empty tuple is a model without data.
        programs: The model, and its guide. Floating data take the dtype of their parameters and,
            unless `device` is given, the device. Without parameters, tensors stay as they are and
            arrays take torch's default dtype.
        device: Where the batch goes.

    Raises:
        ValueError: For an empty argument, lengths that differ, NaN, infinity, or data that are not
            numbers.
    """
    arguments = arguments_of(data)
    names = argument_names(programs[0], len(arguments)) if programs else []
    names = names or [f"argument {i + 1}" for i in range(len(arguments))]
    like = parameter_like(*programs)
    drawn: dict[int, Tensor] = {}
    tensors = []
    for i, (value, name) in enumerate(zip(arguments, names, strict=True)):
        if not isinstance(value, Dynamic):
            tensors.append(_tensor(value, name, like, device))
            continue
        if id(value) not in drawn:  # the same data twice are the same draws
            drawn[id(value)] = _tensor(value.draw(seed=i), name, like, device)
        tensors.append(drawn[id(value)])
    batch = tuple(tensors)
    lengths = [len(value) for value in batch]
    if len(set(lengths)) > 1:
        listed = ", ".join(f"{name}: {n}" for name, n in zip(names, lengths, strict=True))
        raise ValueError(
            f"data: all arguments must have the same number of rows, got {listed}. "
            "Rows are the first dimension of each."
        )
    return batch


def has_dynamic(data: Any) -> bool:
    """Whether any of what `as_batch` takes is to be drawn anew for each epoch."""
    parts = data if isinstance(data, tuple | list) else (data,)
    return any(isinstance(part, Dynamic) for part in parts)


def redrawn(data: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return what of a batch is to be drawn anew for each epoch, in place, and its probabilities.

    Arguments:
        data: What `as_batch` made the batch from.
        batch: The batch.
    """
    if not has_dynamic(data):
        return []  # and a torch Dataset is not read again
    return [
        (value, source.probabilities.to(value))
        for i, (source, value) in enumerate(zip(arguments_of(data), batch, strict=True))
        if isinstance(source, Dynamic) and not any(value is other for other in batch[:i])
    ]


def first_table(model: Callable[..., Any], batch: Batch, *, plate: str, tries: int) -> SiteTable:
    """Tabulate a model at the first draw of its prior at which it can be run; see `site_table`."""
    for seed in range(tries - 1):
        with suppress(ValueError, RuntimeError, ArithmeticError):
            return site_table(model, *batch, plate=plate, seed=seed)
    return site_table(model, *batch, plate=plate, seed=tries - 1)


def check_model(
    model: Callable[..., Any], batch: Batch, *, plate: str, rows: int, tries: int = 1
) -> SiteTable:
    """Run a model on the first rows of a batch, and check that the batch is what it describes.

    Arguments:
        model: Any Pyro model.
        batch: Its arguments, all rows.
        plate: Name of the plate over rows.
        rows: How many rows the model sees at once.
        tries: Draws of its prior, of which one must go through.

    Returns:
        The site table of the model on those rows.

    Raises:
        ValueError: If the model fails on the batch, or an observed site has values of another
            shape than its distribution's, of integers where it is continuous, or outside its
            support.
    """
    part = tuple(value[:rows] for value in batch)
    try:
        table = first_table(model, part, plate=plate, tries=tries)
    except Exception as error:
        names = argument_names(model, len(part))
        shapes = ", ".join(
            f"{name} {tuple(value.shape)} {value.dtype}"
            for name, value in zip(names, part, strict=True)
        )
        reason = f"{type(error).__name__}: {error}"
        refusal = ValueError(
            f"{describe_program(model)} cannot be run on this data. It was called with "
            f"{shapes or 'no arguments'} and said:\n  {reason}"
        )
        move_notes(error, refusal)
        raise refusal from error
    table.check_plates()
    names = argument_names(model, len(batch))
    for site in table.observed:
        # Rows beyond the first few are checked too, if the site observes an argument as it is.
        match = next((i for i, value in enumerate(part) if value is site.value), None)
        if match is None:
            _check_observed(site, site.value, f"site '{site.name}'")
        else:
            _check_observed(site, batch[match], f"argument '{names[match]}' (site '{site.name}')")
    return table


def check_data(model: Callable[..., Any], batch: Batch) -> None:
    """Let a model look at all the data that it is to be fitted to.

    A model that cannot learn from some data, such as a scale from targets that do not vary, has a
    method `check_data(*batch)`, which raises a ValueError that says so.
    """
    check = getattr(model, "check_data", None)
    if check is not None:
        check(*batch)


def check_programs(caller: str, **programs: Any) -> None:
    """Refuse a `model` or a `guide` that is no callable, or a class in place of an instance.

    Raises:
        ValueError: Saying which, and what came.
    """
    for role, program in programs.items():
        if isinstance(program, type) or not callable(program):
            what = (
                f"the class {program.__name__}"
                if isinstance(program, type)
                else reprlib.repr(program)
            )
            kind = "guide" if role == "init" else role
            raise ValueError(
                f"{caller}: {role} must be a Pyro {kind}, a function or an instance of a module, "
                f"got {what}."
            )


def parameter_like(*programs: Any) -> Tensor | None:
    """Return the first floating parameter or buffer of the programs, if there is one."""
    for program in programs:
        if isinstance(program, nn.Module):
            for value in [*program.parameters(), *program.buffers()]:
                if value.is_floating_point():
                    return value
    return None


def check_device(device: torch.device | str | None) -> torch.device | None:
    """Return a device that exists here.

    Raises:
        ValueError: If torch does not know it, or this machine does not have it.
    """
    if device is None:
        return None
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: torch knows no device {device!r}: {error}") from error
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device: '{device}' was asked for, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA devices here. Use device='cpu', or install a torch "
            "built for CUDA."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: '{device}' cannot be used here: {reason}") from error
    return device


@contextmanager
def moved(device: torch.device | None, *programs: Any) -> Iterator[None]:
    """Move modules to a device; back again if the block fails."""
    modules = [p for p in programs if isinstance(p, nn.Module)]
    if device is None:
        yield
        return
    origins = [next((p.device for p in module.parameters()), device) for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    except BaseException:
        for module, origin in zip(modules, origins, strict=True):
            module.to(origin)
        raise


def arguments_of(data: Any) -> tuple[Any, ...]:
    """Tell the arguments apart in what `as_batch` takes."""
    if isinstance(data, tuple) and len(data) == 1 and not isinstance(data[0], Tensor | Dynamic):
        data = data[0]  # elbo(model, guide, dataset) takes what fit(model, guide, dataset) takes
    if isinstance(data, torch.utils.data.Dataset):
        rows = [data[i] for i in range(len(data))]  # pyright: ignore[reportArgumentType]
        if not rows:
            raise ValueError("data: the Dataset is empty; at least one row is required.")
        rows = [row if isinstance(row, tuple | list) else (row,) for row in rows]
        try:
            return tuple(
                torch.stack([torch.as_tensor(v) for v in column])
                for column in zip(*rows, strict=True)
            )
        except (TypeError, ValueError, RuntimeError) as error:
            kinds = dict.fromkeys(
                tuple(tuple(np.shape(v)) if hasattr(v, "shape") else type(v).__name__ for v in row)
                for row in rows
            )
            raise ValueError(
                "data: every item of the Dataset must be a row of numbers, or a tuple of them, of "
                f"the same shapes throughout, got {', '.join(map(str, list(kinds)[:3]))}."
            ) from error
    if isinstance(data, list) and not all(
        isinstance(v, Tensor | np.ndarray | Dynamic) for v in data
    ):
        return (data,)  # a list of rows, not of arguments
    return tuple(data) if isinstance(data, tuple | list) else (data,)


def _tensor(
    value: Any, name: str, like: Tensor | None, device: torch.device | str | None
) -> Tensor:
    dtype = like.dtype if like is not None else None
    if isinstance(value, Tensor):
        value = value if value.layout == torch.strided else value.to_dense()
    else:
        # A sparse matrix of SciPy would become a single object.
        value = value.toarray() if hasattr(value, "toarray") else value
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"data: argument '{name}' must hold numbers, got {type(value).__name__} of dtype "
                f"{array.dtype}. Encode categories as numbers first."
            )
        # A copy in native byte order: torch takes no negative strides and warns of read-only data.
        value = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        dtype = dtype or torch.get_default_dtype()
    if value.ndim == 0 or len(value) == 0:
        raise ValueError(
            f"data: argument '{name}' must have at least one row, got shape {tuple(value.shape)}."
        )
    value = value.detach()
    if value.is_floating_point():
        bad = ~torch.isfinite(value)
        if bad.any():
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"data: argument '{name}' must be finite, but {int(bad.sum())} of {bad.numel()} "
                f"values are NaN or infinite, the first at {first}. Drop or impute those rows."
            )
        value = value.to(dtype or value.dtype)
    if device is None and like is not None:
        device = like.device
    return value.to(device)


def _check_observed(site: Site, value: Tensor, what: str) -> None:
    want = tuple(site.fn.shape())
    got = tuple(site.value.shape)
    if got != want:
        hint = "The first dimension is rows; the others must be the model's own."
        if got[1:] == want[1:]:
            hint = "If the size of a plate is written out in the model, use len(x) there."
        raise ValueError(
            f"{what}: the model describes values of shape {want} ({_axes(site)}), but got {got}. "
            f"{hint}"
        )
    support = site.support
    if not value.is_floating_point() and (not support.is_discrete or _is_boolean(support)):
        raise ValueError(
            f"{what}: {site.distribution} needs floating point values, got {value.dtype}. "
            "Convert with x.float()."
        )
    if value.shape != site.value.shape and not _same_everywhere(support):
        value = site.value  # each row has a support of its own, and those of others are not at hand
    masked = site.mask is not None and site.mask is not True
    if masked:
        value = site.value  # the mask is at hand for these rows only
    inside = support.check(value)
    if masked:
        counts = torch.as_tensor(site.mask, device=inside.device)
        inside = inside | ~counts.expand_as(inside)
    if not bool(inside.all()):
        share = 1.0 - inside.double().mean().item()
        low, high = value.min().item(), value.max().item()
        hint = (
            " Binarise first, as load(..., binarize='threshold') does, or choose a likelihood for "
            "continuous data."
            if _is_boolean(support)
            else ""
        )
        raise ValueError(
            f"{what}: {site.distribution} has support '{describe(support)}', but {share:.2%} of "
            f"the values are outside it (they range from {low:.4g} to {high:.4g}).{hint}"
        )


def _same_everywhere(support: constraints.Constraint) -> bool:
    base, _ = base_support(support)
    return not any(isinstance(bound, Tensor) and bound.ndim for bound in vars(base).values())


def _is_boolean(support: constraints.Constraint) -> bool:
    return base_support(support)[0] is constraints.boolean


def _axes(site: Site) -> str:
    return f"plates {tuple(site.batch_shape)}, one value {tuple(site.event_shape)}"

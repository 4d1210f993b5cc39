"""Stochastic variational inference: fit a model and a guide to data."""

from __future__ import annotations

import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from ppl_models.core.batch import (
    as_batch,
    check_data,
    check_device,
    check_model,
    check_programs,
    moved,
    redrawn,
)
from ppl_models.core.checks import check_count, check_positive
from ppl_models.core.minibatch import minibatch
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.sites import SiteTable, describe_program, recorded
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.traces import check_sites
from ppl_models.core.types import Batch, Objective
from ppl_models.infer.objectives import ELBO, Bound
from ppl_models.infer.progress import progress_bar
from ppl_models.infer.step import Compile, Diverged, Evaluation, Steps

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCH = 128  # rows in a minibatch unless the caller says otherwise


@dataclass(frozen=True)
class Fit:
    """What `fit` did. The model and the guide were trained in place.

    Attributes:
        model: The model.
        guide: The guide.
        bounds: The objective's bound at each step, nats per row, shape (steps,), float64. Each is
            a noisy estimate from one minibatch; see `ppl_models.evaluate.elbo` for a good one.
        steps: Steps taken.
        epochs: Passes over the data that they make up.
        batch_size: Rows in a step.
        parameters: Trained numbers of the guide.
        seconds: Time taken, in seconds.
        compiled: How the steps were run: compiled, by a traced graph or by the Pyro programs
            themselves; and if not the first, why.
        interrupted: Whether Ctrl-C or a callback ended it early.
        settings: What was asked for, in words and numbers that JSON can hold.
        example: The first rows of the data, two at most: what a saved run is rebuilt with.
        objective: What was ascended, with what its estimators have learnt: `fit` and
            `gradient_variance` go on with it. In a run that was loaded, None for what is not the
            library's own.
    """

    model: Callable[..., Any] = field(repr=False)
    guide: Callable[..., Any] = field(repr=False)
    bounds: Tensor = field(repr=False)
    steps: int
    epochs: float
    batch_size: int
    parameters: int
    seconds: float
    compiled: str
    interrupted: bool
    settings: dict[str, Any] = field(repr=False)
    example: Batch = field(repr=False)
    objective: Any = field(default=None, repr=False)

    def plot(self, *, ax: Axes | None = None) -> Figure:
        """Draw the bound of each step and its running mean.

        Steps far below the rest, such as the first dive, are left below the picture, which says
        how many they are.

        Arguments:
            ax: Axes to draw into, such as `plt.gca()` for a window; by default a new picture,
                which shows itself in a notebook and has `savefig`.

        Example:
            >>> from guides import Amortized
            >>> from ppl_models import PPCA
            >>> model = PPCA(data_dim=5, latent_dim=2)
            >>> figure = fit(model, Amortized(model), model(size=64), steps=3, seed=0).plot()
            >>> figure.axes[0].get_ylabel()
            'bound (nats per row)'
        """
        from ppl_models.infer.plots import plot_bounds

        return plot_bounds(self, ax=ax)


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any = (),
    *,
    objective: Objective | PyroELBO | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    lr: float = 1e-3,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    fixed_model: bool = False,
    plate: str = "data",
    compile: Compile = True,
    progress: bool | str | None = None,
    callbacks: Sequence[Callable[[int, float], Any]] = (),
) -> Fit:
    r"""Fit the parameters of a model and of a guide by stochastic gradient ascent on a bound.

    Both are trained in place. Ctrl-C ends the training after the step under way, and what has been
    learnt so far is returned; a second Ctrl-C interrupts at once.

    Arguments:
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        data: A tensor, array or data frame of N rows, a tuple of several with the same N, or a
            torch `Dataset`. Floating data take the dtype of the model's parameters. What is
            `Dynamic` (`load(..., binarize="dynamic")`) is drawn anew for each epoch.
        objective: The bound, by default `ELBO()`; or any ELBO of `pyro.infer`.
        steps: Optimisation steps; 1000 if `epochs` is not given either.
        epochs: Passes over the data, instead of `steps`.
        batch_size: Rows in a step, by default 128, or all of them where there are fewer or the
            model has no plate over rows. Rows are shuffled anew for each epoch; the last batch of
            an epoch may be smaller.
        optimizer: Makes a torch optimiser from parameters and `lr`, by default Adam.
        lr: Learning rate. The objective is per row, so it does not depend on N.
        schedule: Makes a torch learning-rate scheduler from the optimiser, stepped at every step.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        device: Where to train, by default where the model's parameters are. Modules are moved.
        fixed_model: Train the guide only.
        plate: Name of the plate over rows.
        compile: Whether to run recorded and compiled graphs in place of the programs: the same
            numbers, sooner. The compiler works while the recorded graph serves, and takes over at
            a step that is fixed, so that results stay reproducible; "now" waits for it at the
            first step. False runs the programs at each step. `Fit.compiled` says what ran, and why.
        progress: Whether to show a bar, or a label for it; None shows it on a terminal.
        callbacks: Called after each step with its number, from 1, and its bound in nats per row;
            one that returns True ends the training.

    Raises:
        ValueError: If an argument is out of range, the data are not what the model describes, or
            the guide does not fit the model. Nothing has changed then.
        FloatingPointError: If the bound or its gradient is not finite at a step. The parameters
            are those before that step.

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> result = fit(model, Amortized(model), model(size=64), steps=3, seed=0)
        >>> result.bounds.shape
        torch.Size([3])
    """
    _check_choices(steps, epochs, batch_size, lr, compile)
    check_programs("fit", model=model, guide=guide)
    if objective is not None and not (callable(objective) or isinstance(objective, PyroELBO)):
        raise ValueError(
            f"fit: objective must be a callable such as ELBO() or pyro.infer.Trace_ELBO(), got "
            f"{objective!r}."
        )
    place = check_device(device)
    batch = as_batch(data, model, guide, device=place)
    drawn = redrawn(data, batch)
    size = len(batch[0]) if batch else 1
    with (
        moved(place, model, guide),
        own_parameters(model, guide),
        seeded(seed),
        torch.enable_grad(),
    ):
        rows, table = _choose_rows(model, batch, plate, batch_size)
        check_data(model, batch)
        _check_minibatches(table, guide, objective, rows, size)
        part = tuple(value[:rows] for value in batch)
        index = torch.arange(rows)
        objective = ELBO() if objective is None else objective
        objective_name = _name(objective)
        scaled = minibatch(index, size, plate=plate) if rows < size else nullcontext()
        with unchanged_on_error(), scaled, evaluation_mode(model, guide):
            enumerates = isinstance(objective, PyroELBO) and not isinstance(objective, Trace_ELBO)
            leaves, own = _leaves(
                model, guide, part, fixed_model=fixed_model, enumerates=enumerates
            )
            if isinstance(objective, Bound):
                objective = objective.prepare(model, guide, *part, plate=plate)
                leaves += objective.parameters()
        optimise = make_optimiser(
            "fit", optimizer or partial(torch.optim.Adam, fused=True), leaves, lr
        )
        scheduler = schedule(optimise) if schedule is not None else None
        evaluate = Evaluation(model, guide, objective, leaves, plate, size)
        in_epoch = -(-size // rows)
        total = epochs * in_epoch if epochs is not None else steps or 1000
        label = progress if isinstance(progress, str) else "fit"
        show = True if isinstance(progress, str) else progress
        bounds = array("d")
        order: Tensor | None = None
        start = time.perf_counter()
        with (
            _no_gradients_after(model, guide, leaves),
            progress_bar(total, label, show) as bar,
            interruptible() as interrupted,
        ):

            def wait() -> bool:
                bar(len(bounds), "waiting for the compiler")
                return not interrupted.wait(0.02)

            taking = Steps(
                evaluate,
                batch,
                optimise,
                scheduler,
                rows=rows if rows < size else None,
                total=total,
                compile=compile,
                wait=wait,
            )
            while (taken := len(bounds)) < total and not interrupted.is_set():
                place = taken % in_epoch
                if place == 0:
                    if drawn:
                        with named_step("fit", taken):
                            taking.renew()
                    for value, probabilities in drawn:
                        value.copy_(torch.bernoulli(probabilities))
                    order = torch.randperm(size).to(batch[0].device) if rows < size else None
                if order is None:
                    here, left, chunk = None, 1 if drawn else total, None
                else:
                    here, left = _batches_left(place, rows, size)
                    chunk = order[place * rows :]
                count = 1 if callbacks else min(left, total - taken, taking.most(here))
                with named_step("fit", taken + 1):
                    bounds.extend(taking.take(chunk, here, count))
                speed = len(bounds) * rows / (time.perf_counter() - start)
                status = f"bound {bounds[-1]:.4g} nats/row, {speed:,.0f} rows/s, {taking.rung}"
                bar(len(bounds), status)
                if callbacks:
                    taking.tell()
                for callback in callbacks:
                    if callback(len(bounds), bounds[-1]) is True:
                        interrupted.set()
                if callbacks:
                    with named_step("fit", len(bounds)):
                        taking.look()
            with named_step("fit", len(bounds)):
                taking.renew()
        return Fit(
            model=model,
            guide=guide,
            bounds=torch.tensor(bounds, dtype=torch.float64),
            steps=len(bounds),
            epochs=len(bounds) / in_epoch,
            batch_size=rows,
            parameters=own,
            seconds=time.perf_counter() - start,
            compiled=taking.describe(),
            objective=objective,
            interrupted=interrupted.is_set(),
            settings={
                "rows": size,
                "batch_size": rows,
                "steps": total,
                "objective": objective_name,
                "optimizer": type(optimise).__name__,
                "lr": float(lr),
                "schedule": None if scheduler is None else type(scheduler).__name__,
                "seed": None if seed is None else int(seed),
                "fixed_model": fixed_model,
                "plate": plate,
                "compile": compile,
            },
            example=tuple(value[:2].clone() for value in batch),
        )


@contextmanager
def named_step(caller: str, step: int, unit: str = "step") -> Iterator[None]:
    """Say in a line what went wrong at which step, and that the parameters are those before it."""
    try:
        yield
    except Diverged as error:
        raise FloatingPointError(
            f"{caller}: at {unit} {error.step or step} {error}; training has stopped before that step. "
            "Try a smaller lr, or a likelihood with a minimum scale."
        ) from None
    except ValueError as error:
        if not str(error).startswith("Expected parameter"):
            raise
        what = " ".join(str(error).split()).partition(", but found")[0]
        raise FloatingPointError(
            f"{caller}: at {unit} {step} training diverged ({what}); it has stopped before that step. "
            "Try a smaller lr."
        ) from error


def _batches_left(place: int, rows: int, size: int) -> tuple[int, int]:
    """Rows of the next batch of an epoch, and how many batches of as many rows follow in it."""
    whole = size // rows
    return (rows, whole - place) if place < whole else (size - whole * rows, 1)


def _leaves(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    *,
    fixed_model: bool,
    enumerates: bool,
) -> tuple[list[Tensor], int]:
    """Find what to train: parameters of modules, and whatever `pyro.param` is asked for.

    Returns:
        The tensors, and how many numbers of them are the guide's.
    """
    with recorded(guide) as guided:
        guide(*batch)
    guide_trace = guided.trace
    with poutine.trace(param_only=True) as capture, recorded(model) as told:
        poutine.replay(model, trace=guide_trace)(*batch)
    check_sites(model, told.trace, guide_trace, enumerates=enumerates)

    of_model = {id(value): value for value in trainable(model, capture.trace)}
    of_guide = {id(value): value for value in trainable(guide, guide_trace)}
    if fixed_model:
        leaves = [value for key, value in of_guide.items() if key not in of_model]
    else:
        leaves = list((of_model | of_guide).values())
    if not leaves:
        raise ValueError(
            f"fit: there is nothing to train. Neither {describe_program(model)} nor "
            f"{describe_program(guide)} has a parameter with requires_grad=True"
            f"{' of its own (fixed_model=True)' if fixed_model else ''}."
        )
    shared = set(of_model) & set(of_guide)
    return leaves, sum(v.numel() for key, v in of_guide.items() if key not in shared)


def trainable(program: Callable[..., Any], trace: Trace) -> list[Tensor]:
    """Return the parameters of a module, and what `pyro.param` was asked for in a run of it."""
    own = list(program.parameters()) if isinstance(program, nn.Module) else []
    nodes: dict[str, Any] = dict(trace.nodes)
    asked = [n["value"].unconstrained() for n in nodes.values() if n["type"] == "param"]
    return [value for value in [*own, *asked] if value.requires_grad and value.is_leaf]


def _check_choices(
    steps: int | None, epochs: int | None, batch_size: int | None, lr: float, compile: Compile
) -> None:
    if steps is not None and epochs is not None:
        raise ValueError(f"fit: give either steps or epochs, got both, {steps=} and {epochs=}.")
    for name, value in (("steps", steps), ("epochs", epochs), ("batch_size", batch_size)):
        if value is not None:
            check_count("fit", name, value)
    check_positive("fit", "lr", lr)
    if not isinstance(compile, bool) and compile != "now":
        raise ValueError(f"fit: compile must be True, False or 'now', got {compile!r}.")


def _name(objective: Any) -> str:
    if isinstance(objective, PyroELBO):
        return f"pyro.infer.{type(objective).__name__}"
    return repr(objective) if isinstance(objective, Bound) else describe_program(objective)


def make_optimiser(
    caller: str, make: Callable[..., Optimizer], leaves: list[Tensor], lr: float
) -> Optimizer:
    """Make the optimiser of some leaves.

    Raises:
        ValueError: If it cannot be made so, or steps with a closure.
    """
    try:
        made = make(leaves, lr=lr)
    except TypeError as error:
        raise ValueError(
            f"{caller}: optimizer must make a torch optimiser when called as optimizer(parameters, lr="
            f"{lr}), but {describe_program(make)} said: {error}. Write torch.optim.SGD, or "
            "functools.partial(torch.optim.SGD, momentum=0.9)."
        ) from error
    if not isinstance(made, Optimizer) or isinstance(made, torch.optim.LBFGS):
        raise ValueError(
            f"{caller}: optimizer must make a torch.optim.Optimizer that steps without a closure, got "
            f"{type(made).__name__}. Pyro's own wrappers and LBFGS are not of that kind."
        )
    return made


def _choose_rows(
    model: Callable[..., Any], batch: Batch, plate: str, batch_size: int | None
) -> tuple[int, SiteTable]:
    """Choose how many rows a step has, and tabulate the model on as many."""
    size = len(batch[0]) if batch else 1
    rows = min(batch_size or BATCH, size)
    try:
        table = check_model(model, batch, plate=plate, rows=rows)
    except ValueError:
        if batch_size is not None or rows == size:
            raise
        return size, check_model(model, batch, plate=plate, rows=size)  # one that takes all rows
    if batch_size is None and (not table.row_wise or table.subsamples_itself):
        rows = size
    return rows, table


def _check_minibatches(table: SiteTable, guide: Any, objective: Any, rows: int, size: int) -> None:
    if rows >= size:
        return
    if not table.row_wise:
        raise ValueError(
            f"fit: batch_size={rows} of {size} rows needs a model with a plate over rows, but no "
            f"site is inside plate '{table.plate}'. Write `with pyro.plate('{table.plate}', "
            "len(x)):`, name the plate with plate=..., or leave batch_size out."
        )
    if table.subsamples_itself:
        raise ValueError(
            f"fit: plate '{table.plate}' subsamples by itself, so batch_size={rows} of {size} rows "
            "would subsample twice. Leave batch_size out, or write the plain "
            f"`pyro.plate('{table.plate}', len(x))`."
        )
    if isinstance(objective, RenyiELBO):
        raise ValueError(
            f"fit: RenyiELBO scales inside its logarithm, so with batch_size={rows} of {size} rows "
            f"it is no bound. Use batch_size={size}, or another objective."
        )
    if isinstance(guide, AutoGuide) and table.locals:
        raise ValueError(
            f"fit: {type(guide).__name__} ties the parameters of {[s.name for s in table.locals]} "
            f"to positions in the batch, not to rows, so batch_size must be {size} (all rows), got "
            f"{rows}. Use guides.Local or guides.Amortized for minibatches."
        )


@contextmanager
def _no_gradients_after(model: Any, guide: Any, leaves: list[Tensor]) -> Iterator[None]:
    """Leave no gradients behind: not those of a fixed model, which Pyro computes all the same."""
    modules = [p for p in (model, guide) if isinstance(p, nn.Module)]
    try:
        yield
    finally:
        for value in [*leaves, *(p for module in modules for p in module.parameters())]:
            value.grad = None


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is torn; the second one interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)

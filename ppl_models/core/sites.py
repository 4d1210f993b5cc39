"""What a model is, as far as inference cares: its table of sites."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution, Unit
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import apply_stack
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.store import own_parameters, scratch_store
from ppl_models.core.table import text_table
from ppl_models.core.types import Batch, Distribution


@dataclass(frozen=True)
class Site:
    """One `pyro.sample` statement.

    Attributes:
        name: Its name.
        fn: Its distribution, as traced.
        value: Its value, as traced.
        mask: Which elements count, as `poutine.mask` says; None for all.
        observed: Whether it is conditioned on.
        enumerated: Whether the model marks it to be summed out.
        plates: Frame of each plate around it, with `name`, `dim` (None for a sequential plate),
            `size` and, if it subsamples by itself, a larger `full_size`.
        plate: Name of the plate over rows.
        deterministic: Whether it is a `pyro.deterministic` statement, which has no density.
        log_density: Of the value, scaled and masked as it counts, nats in total: what `explain`
            adds; None where it is unknown.
        auxiliary: Whether it is one of a guide alone, marked `infer={"is_auxiliary": True}`.
    """

    name: str
    fn: Distribution
    value: Tensor
    mask: Tensor | bool | None
    observed: bool
    enumerated: bool
    plates: tuple[CondIndepStackFrame, ...]
    plate: str
    deterministic: bool = False
    log_density: float | None = None
    auxiliary: bool = False

    @property
    def latent(self) -> bool:
        """Whether a guide must sample it."""
        return not self.observed and not self.enumerated and not self.deterministic

    @property
    def role(self) -> str:
        """What it is: 'local latent', 'global latent', 'observed', 'factor', 'deterministic', ..."""
        kind = self._kind
        return (
            f"{'local' if self.local else 'global'} {kind}"
            if kind in ("latent", "enumerated")
            else kind
        )

    @property
    def _kind(self) -> str:
        if self.deterministic:
            return "deterministic"
        if self.observed:
            return "factor" if isinstance(base_distribution(self.fn), Unit) else "observed"
        if self.auxiliary:
            return "auxiliary"
        return "enumerated" if self.enumerated else "latent"

    @property
    def local(self) -> bool:
        """Whether it is inside the plate over rows."""
        return any(frame.name == self.plate for frame in self.plates)

    @property
    def data_dim(self) -> int | None:
        """Dimension of the plate over rows: None outside it, and where it is sequential."""
        return next((f.dim for f in self.plates if f.name == self.plate), None)

    @property
    def distribution(self) -> str:
        """Name of its distribution, without what Pyro puts around it."""
        return type(base_distribution(self.fn)).__name__

    @property
    def support(self) -> constraints.Constraint:
        """Values that it can take."""
        return self.fn.support

    @property
    def discrete(self) -> bool:
        """Whether its values are discrete."""
        return self.support.is_discrete

    @property
    def batch_shape(self) -> torch.Size:
        """Shape over plates."""
        return self.fn.batch_shape

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one value."""
        return self.fn.event_shape


@dataclass(frozen=True)
class SiteTable:
    """The sites of a model, in the order in which the story reaches them."""

    sites: tuple[Site, ...]
    plate: str

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site '{name}'; the sites are {[site.name for site in self.sites]}")

    @property
    def latents(self) -> tuple[Site, ...]:
        """What a guide must sample."""
        return tuple(site for site in self.sites if site.latent)

    @property
    def locals(self) -> tuple[Site, ...]:
        """Latents inside the plate over rows."""
        return tuple(site for site in self.latents if site.local)

    @property
    def globals(self) -> tuple[Site, ...]:
        """Latents outside the plate over rows."""
        return tuple(site for site in self.latents if not site.local)

    @property
    def observed(self) -> tuple[Site, ...]:
        """What is conditioned on."""
        return tuple(site for site in self.sites if site.observed)

    @cached_property
    def row_wise(self) -> bool:
        """Whether the model has a plate over rows."""
        return any(site.local for site in self.sites)

    @property
    def subsamples_itself(self) -> bool:
        """Whether the plate over rows draws a part of the rows by itself."""
        frames = [f for site in self for f in site.plates if f.name == self.plate]
        return any(f.full_size is not None and f.full_size != f.size for f in frames)

    @property
    def plate_dims(self) -> int:
        """Dimensions that plates use: Pyro's `max_plate_nesting`."""
        return max((-f.dim for site in self for f in site.plates if f.dim is not None), default=0)

    def check_plates(self) -> None:
        """Refuse a batch dimension that no plate declares.

        Raises:
            ValueError: Naming the site, its shape, and the two ways to mend it.
        """
        for site in self.sites:
            dims = {frame.dim for frame in site.plates}
            shape = site.batch_shape
            stray = [
                i - len(shape) for i, n in enumerate(shape) if n > 1 and i - len(shape) not in dims
            ]
            if stray:
                raise ValueError(
                    f"model: site '{site.name}' has batch shape {tuple(shape)}, but no plate "
                    f"declares its dimension {stray[-1]}. If its elements are rows, write `with "
                    f"pyro.plate('{self.plate}', len(x)):` around the site; if they make up one "
                    "value, add `.to_event(1)` to its distribution."
                )

    def __str__(self) -> str:
        head = ("site", "role", "plates", "batch", "event", "support")
        rows = [
            (
                site.name,
                site.role,
                ", ".join(frame.name for frame in site.plates) or "-",
                *cells(site),
            )
            for site in self.sites
        ]
        return text_table(head, rows)


def site_table(
    model: Callable[..., Any], *batch: Tensor, plate: str = "data", seed: int = 0
) -> SiteTable:
    """Trace a model once, out of reach of handlers outside, and tabulate its sites.

    Neither the global random state nor the parameters of a module change.

    Arguments:
        model: Any Pyro model.
        batch: Its arguments; what the model then does not observe is latent.
        plate: Name of the plate over rows.
        seed: Of the draws.

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> print(site_table(model, model(size=7)))
        site  role          plates  batch  event  support
        z     local latent  data    (7,)   (2,)   real vector
        x     observed      data    (7,)   (5,)   real vector
    """
    with (
        poutine.block(),
        scratch_store(),
        own_parameters(model),
        seeded(seed),
        evaluating(model),
        recorded(model) as record,
    ):
        model(*batch)
    return table_of(record.trace, plate)


def table_of(trace: Trace, plate: str = "data") -> SiteTable:
    """Tabulate the sites of a trace that is at hand."""
    return SiteTable(
        tuple(_site(name, node, plate) for name, node in stochastic_nodes(trace)), plate
    )


def all_sites(trace: Trace, plate: str = "data") -> Iterator[tuple[Site, Any]]:
    """Yield each site of a trace and its node, `deterministic` statements too."""
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node):
            yield _site(name, node, plate), node


def stochastic_nodes(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Yield the sample statements of a trace: no plates, no parameters, no `deterministic`."""
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if _is_deterministic(node):
            continue
        yield name, node


@contextmanager
def recorded(program: Callable[..., Any]) -> Iterator[TraceMessenger]:
    """Record the statements of a block that runs a program: its `.trace`.

    An error of shapes, or another of the program's own, comes through as it is, with a note that
    tabulates the sites that the program had reached. (`poutine.trace(program)` would raise a copy
    of it.) The library's own errors say all there is to say, and get no note.

    Arguments:
        program: A model or a guide, to name it in the note.
    """
    with poutine.trace() as record:
        try:
            yield record
        except (ValueError, RuntimeError, IndexError) as error:
            # The note must not hide the error, whatever a half-run program left behind.
            with suppress(Exception):
                if not _is_own(error) and not getattr(error, "__notes__", ()):
                    error.add_note(_progress(program, record.trace, error))
            raise


def failing_site(error: BaseException) -> Any:
    """Return the sample statement in which an error was raised, as Pyro's message, or None."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is apply_stack.__code__:
            message = frame.f_locals["initial_msg"]
            if message["type"] == "sample" and not site_is_subsample(message):
                found = message
    return found


def failing_place(trace: Trace, error: BaseException) -> str:
    """Say in words where a program failed: at a site, after one, or before the first."""
    message = failing_site(error)
    if message is not None:
        fn = message["fn"]
        said = f"at site '{message['name']}'"
        if not isinstance(fn, Distribution):
            return said
        return (
            f"{said}, {type(base_distribution(fn)).__name__} with batch shape "
            f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}"
        )
    names = [site.name for site, _ in all_sites(trace)]
    return f"after site '{names[-1]}'" if names else "before its first site"


def _progress(program: Callable[..., Any], trace: Trace, error: BaseException) -> str:
    said = f"{describe_program(program)} failed {failing_place(trace, error)}."
    rows = [
        (
            site.name,
            site._kind,
            describe_plates(site.plates),
            *cells(site)[:2],
            str(tuple(site.value.shape)),  # not batch + event, if the guide drew it otherwise
        )
        for site, _ in all_sites(trace)
    ]
    if not rows:
        return said
    head = ("site", "role", "plates", "batch", "event", "value")
    lines = text_table(head, rows).splitlines()
    return "\n  ".join([f"{said} Its sites so far:", *lines])


def _is_own(error: BaseException) -> bool:
    """Whether the library raised an error, rather than torch or a user."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError) and module.split(".")[0] in ("ppl_models", "guides")


def move_notes(source: BaseException, target: BaseException) -> None:
    """Hang the notes of an error on the one that is raised in its place."""
    for note in source.__dict__.pop("__notes__", ()):
        target.add_note(note)


def example_batch(model: Callable[..., Any], example: Any = None, size: int = 2) -> Batch:
    """Return a small batch to trace a model with.

    Arguments:
        model: Any Pyro model.
        example: A batch, if the caller has one.
        size: Rows to draw with `model(size=size)` otherwise.

    Raises:
        ValueError: If there is no example and the model cannot draw one.
    """
    if example is not None:
        return tuple(example) if isinstance(example, tuple | list) else (example,)
    if not accepts_size(model):
        raise ValueError(
            f"{describe_program(model)} cannot draw a batch by itself, because it takes no `size=`."
            " Pass one: example=(x[:2],), or example=(x[:2], y[:2]) for two arguments."
        )
    with (
        poutine.block(),
        scratch_store(),
        own_parameters(model),
        seeded(0),
        evaluating(model),
        recorded(model),
    ):
        batch = model(size=size)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def accepts_size(model: Callable[..., Any]) -> bool:
    """Whether a model is generative: whether it can be called as `model(size=n)`."""
    return "size" in _signature(model).parameters


def argument_names(model: Callable[..., Any], count: int) -> list[str]:
    """Name the positional arguments of a model, for messages."""
    names = list(_signature(model).parameters)
    return [names[i] if i < len(names) else f"argument {i + 1}" for i in range(count)]


def describe_program(program: Any) -> str:
    """Name a model or a guide in a message."""
    return getattr(program, "__name__", None) or type(program).__name__


def base_distribution(fn: Any) -> Any:
    """Strip what Pyro puts around a distribution: shapes, plates and masks."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def cells(site: Site) -> tuple[str, str, str]:
    """Write the batch shape, the event shape and the support of a site."""
    support = "-"
    if site._kind not in ("deterministic", "factor"):
        with suppress(NotImplementedError):
            support = describe(site.support)
    return str(tuple(site.batch_shape)), str(tuple(site.event_shape)), support


def describe_plates(plates: Iterable[CondIndepStackFrame]) -> str:
    """Write plates with their sizes and dimensions: 'data 7 at -1', 'time 3 in a loop'."""
    return ", ".join(map(_describe_plate, plates)) or "-"


def _describe_plate(frame: CondIndepStackFrame) -> str:
    part = frame.full_size is not None and frame.full_size != frame.size
    size = f"{frame.size} of {frame.full_size}" if part else f"{frame.size}"
    return f"{frame.name} {size} {'in a loop' if frame.dim is None else f'at {frame.dim}'}"


def describe(support: constraints.Constraint) -> str:
    """Name a support in words: 'real vector', 'simplex', 'integers 0 to 3'."""
    support, dims = base_support(support)
    text = str(support).removesuffix("()")
    words = {
        "Real": "real",
        "GreaterThan(lower_bound=0.0)": "positive",
        "GreaterThanEq(lower_bound=0.0)": "non-negative",
        "IntegerGreaterThan(lower_bound=0)": "non-negative integer",
        "Interval(lower_bound=0.0, upper_bound=1.0)": "unit interval",
    }
    text = words.get(text, text)
    if isinstance(support, constraints.integer_interval):
        low, high = support.lower_bound, support.upper_bound
        text = f"integers {int(_extreme(low, min))} to {int(_extreme(high, max))}"
    kind = {0: "", 1: " vector", 2: " matrix"}.get(dims, f" array of {dims} dimensions")
    return text[:1].lower() + text[1:] + kind


def base_support(support: constraints.Constraint) -> tuple[constraints.Constraint, int]:
    """Strip `constraints.independent`: the constraint on one element, and the dimensions of it."""
    dims = 0
    while isinstance(support, constraints.independent):
        dims += support.reinterpreted_batch_ndims
        support = support.base_constraint
    return support, dims


def _signature(program: Any) -> inspect.Signature:
    # A wrapper says with `__signature__` what it wraps; a module is called through `forward`.
    if not hasattr(program, "__signature__"):
        program = getattr(program, "forward", program)
    return inspect.signature(program)


def value_support(site: Site) -> constraints.Constraint:
    """Return the support of one value of a site, without its plates.

    Raises:
        ValueError: If bounds differ between the elements of a plate.
    """
    base, dims = base_support(site.support)
    bounds = {name: b for name, b in vars(base).items() if isinstance(b, Tensor)}
    if not bounds:
        return site.support
    own = copy.copy(base)
    for name, bound in bounds.items():
        rows = bound.expand(site.fn.shape()).reshape(-1, *site.event_shape)
        if (rows != rows[0]).any():
            raise ValueError(moving_support(site))
        first = rows[0].flatten()
        same = first.numel() > 0 and bool((first == first[0]).all())
        setattr(own, name, first[0].item() if same else rows[0])
    return constraints.independent(own, dims) if dims else own


def moving_support(site: Site) -> str:
    """Say what to do about bounds that are not constant."""
    return (
        f"site '{site.name}' has a support whose bounds depend on data, on a parameter or on "
        "another latent, and a family has one support. Sample it on a fixed support, and transform "
        "it in the model: u ~ Uniform(0, 1), then pyro.deterministic(..., low + (high - low) * u)."
    )


def _extreme(bound: Any, choose: Callable[..., Any]) -> float:
    return choose(bound.flatten().tolist()) if isinstance(bound, Tensor) else bound


def _site(name: str, node: Any, plate: str) -> Site:
    frames = sorted(node["cond_indep_stack"], key=lambda frame: frame.dim or 0)
    deterministic = _is_deterministic(node)
    return Site(
        name=name,
        fn=node["fn"],
        value=node["value"],
        mask=node["mask"],
        observed=node["is_observed"] and not deterministic,
        enumerated=not node["is_observed"] and node["infer"].get("enumerate") is not None,
        plates=tuple(frames),
        plate=plate,
        deterministic=deterministic,
        auxiliary=bool(node["infer"].get("is_auxiliary", False)),
    )


def _is_deterministic(node: Any) -> bool:
    return node["infer"].get("_deterministic", False)

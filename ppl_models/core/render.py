"""Programs as graphs: who depends on whom, in which plates. `diagram.py` draws them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppl_models.core.batch import check_programs
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import (
    Site,
    all_sites,
    argument_names,
    describe_program,
    recorded,
)
from ppl_models.core.store import own_parameters, scratch_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind: TypeAlias = Literal["latent", "enumerated", "observed", "factor", "given"]


@final
@dataclass(frozen=True)
class Node:
    """A site, or an argument that sites depend on.

    Attributes:
        name: Its name.
        kind: 'latent', 'enumerated', 'observed', 'factor', or 'given' for an argument.
        distribution: Name of its distribution; empty for an argument.
        plates: Names of the plates around it, the widest first.
    """

    name: str
    kind: Kind
    distribution: str = ""
    plates: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Graph:
    """A program as a graph.

    Attributes:
        program: Its name.
        nodes: By name, in the order in which the program reaches them; arguments come last.
        edges: Pairs (parent, child).
        plates: What is written beside each plate, by name: 'data: 7'.
        arrows: Whether the edges are known.
    """

    program: str
    nodes: dict[str, Node]
    edges: frozenset[tuple[str, str]]
    plates: dict[str, str]
    arrows: bool = True


def render(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *batch: Any,
    plate: str = "data",
    ax: Axes | None = None,
) -> Figure:
    """Draw a model and a guide for it side by side: sites, plates, and who depends on whom.

    What is observed is shaded; an arrow says that the density of a site reads another's value, or
    an argument's, directly or through `pyro.deterministic`. Arrows are found by one run with tensors
    that remember where they come from, so a value that leaves torch, as by `.item()`, leaves no
    arrow; where a program does not run on such tensors, the picture says that arrows are unknown.

    Arguments:
        model: Any Pyro model.
        guide: A guide for it; None for the model alone.
        batch: Their arguments.
        plate: Name of the plate over rows, into which arguments with as many rows are drawn.
        ax: Axes to draw into; by default those of a new picture, which shows itself in a notebook
            and has `savefig`.

    Raises:
        ValueError: If `model` or `guide` is not callable, or is a class in place of an instance.

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> picture = render(model, Amortized(model), model(size=7))
        >>> [text.get_text() for text in picture.axes[0].texts if ": " in text.get_text()][:3]
        ['model: PPCA', 'data: 7', 'guide: Amortized']
    """
    check_programs("render", model=model, **({} if guide is None else {"guide": guide}))
    graphs = {"model": graph_of(model, *batch, plate=plate)}
    if guide is not None:
        names = argument_names(model, len(batch))
        graphs["guide"] = graph_of(guide, *batch, plate=plate, names=names)
    from ppl_models.core.diagram import draw_graphs

    return draw_graphs(graphs, ax=ax)


def graph_of(
    program: Callable[..., Any],
    *batch: Any,
    plate: str = "data",
    names: Sequence[str] | None = None,
) -> Graph:
    """Run a program once and return its graph, arrows where they can be found.

    Arguments:
        program: Any Pyro model or guide.
        batch: Its arguments.
        plate: Name of the plate over rows.
        names: What the arguments are called; by default as the program calls them.

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> graph_of(model, model(size=7)).edges
        frozenset({('z', 'x')})
    """
    named = dict(zip(names or argument_names(program, len(batch)), batch, strict=True))
    for arguments in (True, False):
        # Whatever breaks on tensors that are not plain ones shows again below, if it is a fault.
        with suppress(Exception):
            return _graph(program, named, plate, sites=True, arguments=arguments)
    return _graph(program, named, plate, sites=False, arguments=False)


class _Origins(Messenger):
    """Let the value of each site remember its name, and note which arguments are observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observes: set[tuple[Any, str]] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic", False):
            return
        if msg["is_observed"]:
            self.observes |= {(origin, msg["name"]) for origin in get_provenance(msg["value"])}
        value = detach_provenance(msg["value"])
        msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))


# These read the shape of their first argument, or its dtype, and none of its values.
_BLANK = {getattr(torch, f"{kind}_like") for kind in ("empty", "full", "ones", "zeros")}
_BLANK |= {getattr(torch, f"{kind}_like") for kind in ("rand", "randint", "randn")}
_BLANK |= {getattr(Tensor, f"new_{kind}") for kind in ("empty", "full", "ones", "tensor", "zeros")}


class _Blanks(TorchFunctionMode):
    """Let a tensor that is only shaped like another forget it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _BLANK and args:
            args = (detach_provenance(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _graph(
    program: Callable[..., Any],
    batch: Mapping[str, Any],
    plate: str,
    *,
    sites: bool,
    arguments: bool,
) -> Graph:
    """Run a program on tensors that remember: values of sites, and arguments."""
    origins = _Origins()
    passed = [
        ProvenanceTensor(value, frozenset({("given", name)}))
        if arguments and isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    ]
    with (
        poutine.block(),
        scratch_store(),
        own_parameters(program),
        seeded(0),
        evaluating(program),
        pyro.validation_enabled(False),
        _Blanks() if sites else nullcontext(),
        origins if sites else nullcontext(),
    ):
        with recorded(program) as record:
            program(*passed)
        found = _edges(record.trace) if sites else set()
    shown = [(site, node) for site, node in all_sites(record.trace) if not site.deterministic]
    frames = _frames(node["cond_indep_stack"] for _, node in shown)
    nodes = {
        site.name: Node(
            site.name,
            _kind(site),
            site.distribution,
            tuple(name for name in frames if any(f.name == name for f in site.plates)),
        )
        for site, _ in shown
    }
    edges = {(a, b) for a, b in found if isinstance(a, str)}
    for name, value in batch.items():
        origin = ("given", name)
        # A site that observes an argument is that argument.
        read = {b for a, b in found if a == origin and (origin, b) not in origins.observes}
        if not read:
            continue
        label = f"{name} (given)" if name in nodes else name
        inside = plate in frames and value.ndim > 0 and len(value) == frames[plate].size
        nodes[label] = Node(label, "given", plates=(plate,) if inside else ())
        edges |= {(label, child) for child in read}
    return Graph(
        describe_program(program),
        nodes,
        frozenset(edges),
        {name: _describe_plate(frame) for name, frame in frames.items()},
        arrows=sites,
    )


def _edges(trace: Trace) -> set[tuple[Any, str]]:
    """Find whose values the density of each site reads, itself aside."""
    edges = set()
    for site, node in all_sites(trace):
        if not site.deterministic:
            density = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
            edges |= {(origin, site.name) for origin in get_provenance(density) - {site.name}}
    return edges


def _frames(stacks: Iterable[Iterable[CondIndepStackFrame]]) -> dict[str, CondIndepStackFrame]:
    """List plates, the widest first: those around more sites, then those entered first."""
    frames: dict[str, CondIndepStackFrame] = {}
    uses: Counter[str] = Counter()
    for stack in stacks:
        for frame in stack:
            frames.setdefault(frame.name, frame)
            uses[frame.name] += 1
    return {name: frames[name] for name in sorted(frames, key=lambda name: -uses[name])}


def _kind(site: Site) -> Kind:
    if site.enumerated:
        return "enumerated"
    if site.latent:
        return "latent"
    return "factor" if site.role == "factor" else "observed"


def _describe_plate(frame: CondIndepStackFrame) -> str:
    if frame.dim is None:
        return f"{frame.name}: loop of {frame.size}"
    if frame.full_size is not None and frame.full_size != frame.size:
        return f"{frame.name}: {frame.size} of {frame.full_size}"
    return f"{frame.name}: {frame.size}"

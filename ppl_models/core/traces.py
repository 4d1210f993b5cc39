"""One joint run of a guide and a model: draws from the guide, scored by both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_models.core.modes import evaluation_mode
from ppl_models.core.sites import (
    SiteTable,
    describe_program,
    recorded,
    stochastic_nodes,
    table_of,
)

PARTICLES = "particles"  # name of the plate over particles


@dataclass(frozen=True)
class Pair:
    """Traces of a guide and of the model replayed on its draws.

    Attributes:
        model: Trace of the model.
        guide: Trace of the guide.
        particles: Draws in the leftmost plate, or None for a single draw without that plate.
        handler: What the guide was run in, if anything.
    """

    model: Trace
    guide: Trace
    particles: int | None
    handler: Messenger | None = None


def run_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Tensor,
    particles: int | None = None,
    dim: int | None = None,
    handler: Messenger | None = None,
) -> Pair:
    """Draw from the guide, replay the model on the draws, and check that the two agree.

    Arguments:
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        batch: Their arguments.
        particles: If given, that many draws at once, in a plate to the left of all others.
        dim: Dimension of that plate.
        handler: Run the guide in it, outside of that plate.

    Raises:
        ValueError: As `check_sites`.
    """
    # A plate object for each program: both allocate the same dimension.
    with handler or nullcontext(), _particle_plate(particles, dim), recorded(guide) as guided:
        guide(*batch)
    with _particle_plate(particles, dim), recorded(model) as told:
        poutine.replay(_lenient(model, guided.trace), trace=guided.trace)(*batch)
    check_sites(model, told.trace, guided.trace)
    return Pair(told.trace, guided.trace, particles, handler)


class Unchecked(Messenger):
    """Take values off their support at some sites: smooth versions of discrete draws."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["fn"] = unchecked(msg["fn"])


def unchecked(fn: Any) -> Any:
    """Return a distribution that does not look at the values it is asked about."""
    fn = copy.copy(fn)
    fn._validate_args = False
    if hasattr(fn, "base_dist"):
        fn.base_dist = unchecked(fn.base_dist)
    return fn


def _lenient(model: Callable[..., Any], guided: Trace) -> Callable[..., Any]:
    """Let a model take the smooth draws of a guide."""
    nodes = stochastic_nodes(guided)
    smooth = {name for name, node in nodes if node["infer"].get("smooth") or _is_smooth(node["fn"])}
    return Unchecked(smooth)(model) if smooth else model


def _is_smooth(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return getattr(fn, "rounds", True) is False


def joint_table(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, plate: str = "data"
) -> tuple[SiteTable, int]:
    """Tabulate a model as its guide runs it, and the dimensions that the plates of both use."""
    with torch.no_grad():
        pair = run_pair(model, guide, *batch)
    table = table_of(pair.model, plate)
    return table, max(table.plate_dims, table_of(pair.guide, plate).plate_dims)


def log_weights(pair: Pair, plate: str = "data") -> tuple[Tensor | None, Tensor]:
    r"""Return :math:`\log p(x, z) - \log q(z \mid x)`, split by rows.

    Returns:
        Terms of each row, shape (S, N), or None if nothing is inside a vectorised plate over rows,
        and terms outside of it, shape (S,), for S particles; in nats.
    """
    rows: Tensor | None = None
    whole: Tensor | float = 0.0
    for trace, sign in ((pair.model, 1.0), (pair.guide, -1.0)):
        trace.compute_log_prob()
        for _, node in stochastic_nodes(trace):
            dims = {f.name: f.dim for f in node["cond_indep_stack"] if f.dim is not None}
            value = node["log_prob"]
            if plate in dims:
                term = keep(value, dims.get(PARTICLES), dims[plate])
                rows = sign * term if rows is None else rows + sign * term
            else:
                whole = whole + sign * keep(value, dims.get(PARTICLES))
    like = rows if rows is not None else whole
    particles = pair.particles or 1
    zero = like.new_zeros(particles) if isinstance(like, Tensor) else torch.zeros(particles)
    return rows, zero + whole


def vectorizes(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Tensor,
    dim: int,
) -> bool:
    """Whether model and guide compute the same, particle by particle, under a plate of particles.

    Code that was not written for leading dimensions may fail there, or worse, run and mix
    particles: so two particles are drawn at once, and each is scored again by itself.
    """
    try:
        with evaluation_mode(model, guide):
            pair = run_pair(model, guide, *batch, particles=2, dim=dim)
            both = _site_sums(pair)
            for particle in range(2):
                one = _replay_one(model, guide, *batch, pair=pair, particle=particle)
                for name, value in _site_sums(one).items():
                    if not torch.allclose(both[name][particle], value[0], rtol=1e-3, atol=1e-4):
                        return False
    except Exception:  # noqa: BLE001 - whatever user code raises on shapes it was not written for
        return False
    return True


def _replay_one(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, pair: Pair, particle: int
) -> Pair:
    """Score one particle of a vectorised run by itself."""
    values = {}
    for name, node in stochastic_nodes(pair.guide):
        lead = node["fn"].event_dim - min(
            (f.dim for f in node["cond_indep_stack"] if f.name == PARTICLES), default=0
        )
        value = node["value"][particle] if node["value"].ndim == lead else node["value"]
        # What is left of the plate over particles may be a run of ones to the left.
        inner = node["fn"].event_dim + max(
            (-f.dim for f in node["cond_indep_stack"] if f.dim and f.name != PARTICLES), default=0
        )
        while value.ndim > inner and value.shape[0] == 1:
            value = value[0]
        values[name] = value
    return replayed_pair(model, guide, *batch, values=values)


def replayed_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Tensor,
    values: Mapping[str, Tensor],
    particles: int | None = None,
    dim: int | None = None,
) -> Pair:
    """Score values of the latents by a guide and by its model; see `run_pair`."""
    drawn = Trace()
    for name, value in values.items():
        drawn.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    with _particle_plate(particles, dim), recorded(guide) as guided:
        poutine.replay(guide, trace=drawn)(*batch)
    with _particle_plate(particles, dim), recorded(model) as told:
        poutine.replay(_lenient(model, guided.trace), trace=drawn)(*batch)
    return Pair(told.trace, guided.trace, particles)


def draw_latents(
    guide: Callable[..., Any], *batch: Tensor, particles: int | None = None, dim: int | None = None
) -> dict[str, Tensor]:
    """Draw from a guide alone, as `run_pair` does."""
    with _particle_plate(particles, dim), recorded(guide) as guided:
        guide(*batch)
    nodes = stochastic_nodes(guided.trace)
    return {name: node["value"] for name, node in nodes if not node["is_observed"]}


def _particle_plate(particles: int | None, dim: int | None) -> Any:
    return nullcontext() if particles is None else pyro.plate(PARTICLES, particles, dim=dim)


def _site_sums(pair: Pair) -> dict[str, Tensor]:
    sums = {}
    for half, trace in (("model", pair.model), ("guide", pair.guide)):
        trace.compute_log_prob()
        for name, node in stochastic_nodes(trace):
            dims = {f.name: f.dim for f in node["cond_indep_stack"] if f.dim is not None}
            sums[f"{half} {name}"] = keep(node["log_prob"], dims.get(PARTICLES))
    return sums


def keep(value: Tensor, *dims: int | None) -> Tensor:
    """Sum all dimensions but `dims`, given from left to right; one that is None becomes 1."""
    present = [dim for dim in dims if dim is not None]
    drop = [dim for dim in range(-value.ndim, 0) if dim not in present]
    value = value.sum(drop) if drop else value
    for position, dim in enumerate(dims):
        if dim is None:
            value = value.unsqueeze(position)
    return value


def check_sites(
    model: Callable[..., Any], model_trace: Trace, guide_trace: Trace, *, enumerates: bool = False
) -> None:
    """Check that a guide samples the latents of a model, less those that are summed out.

    Raises:
        ValueError: If the guide misses a latent, samples an observed or an unknown site, or gives a
            latent another shape or other plates than the model does.
    """
    latents, observed = set(), set()
    model_nodes = dict(stochastic_nodes(model_trace))
    for name, node in model_nodes.items():
        (observed if node["is_observed"] else latents).add(name)
    sampled = set()
    guide_nodes = dict(stochastic_nodes(guide_trace))
    for name, node in guide_nodes.items():
        if not node["is_observed"] and not node["infer"].get("is_auxiliary", False):
            sampled.add(name)
    if enumerates:
        marked = {n for n in latents if model_nodes[n]["infer"].get("enumerate") is not None}
        latents -= marked - sampled
    twice = sorted(set(guide_nodes) & observed)
    if latents == sampled and not twice:
        for name in sorted(sampled):
            _check_site(name, model_nodes[name], guide_nodes[name], enumerates=enumerates)
        return
    if twice:
        raise ValueError(
            f"guide: it samples {twice}, which the model observes. A guide samples latents only: "
            f"{sorted(latents)}."
        )
    if missing := sorted(latents - sampled):
        marked = [name for name in missing if model_nodes[name]["infer"].get("enumerate")]
        hint = (
            f" {marked} are marked for enumeration, which `sample` and "
            "`fit(..., objective=pyro.infer.TraceEnum_ELBO())` do; elsewhere let the guide sample them."
            if marked
            else " Add `pyro.sample` statements with those names to the guide."
        )
        raise ValueError(
            f"guide: it must sample every latent of {describe_program(model)}, {sorted(latents)}, "
            f"but it samples {sorted(sampled)}: {missing} missing.{hint}"
        )
    raise ValueError(
        f"guide: it samples {sorted(sampled - latents)}, which {describe_program(model)} does not "
        f"have; its latents are {sorted(latents)}. Mark helper variables with "
        "infer={'is_auxiliary': True}."
    )


def _check_site(name: str, p: Any, q: Any, *, enumerates: bool) -> None:
    """Check that model and guide speak of the same latent: a broadcast would hide that they do not."""
    plates = [
        sorted(f.name for f in node["cond_indep_stack"] if f.name != PARTICLES) for node in (p, q)
    ]
    if plates[0] != plates[1]:
        raise ValueError(
            f"guide: site '{name}' must be in the plates {plates[0]}, as in the model, but it is in "
            f"{plates[1]}. Minibatches scale what is inside plate 'data': write the model's plates "
            "around the site."
        )
    want, got = p["fn"], q["fn"]
    same = want.event_shape == got.event_shape
    if same and not enumerates:
        # Under a replay the model's site is not expanded to its plates; the guide's is.
        both = [want.batch_shape, got.batch_shape]
        same = all(
            m in (1, n) for m, n in zip(reversed(both[0]), reversed(both[1]), strict=False)
        ) and len(both[0]) <= len(both[1])
    if not same:
        raise ValueError(
            f"guide: site '{name}' must have event shape {tuple(want.event_shape)} and batch shape "
            f"{tuple(want.batch_shape)}, as in the model, got event {tuple(got.event_shape)} and "
            f"batch {tuple(got.batch_shape)}. Was the guide made for another model?"
        )

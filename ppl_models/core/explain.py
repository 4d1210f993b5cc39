"""A program explained: what each of its statements is, and what it adds to the log-density."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace

from ppl_models.core.batch import as_batch, check_programs
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import (
    Site,
    SiteTable,
    all_sites,
    cells,
    describe_plates,
    describe_program,
    failing_place,
    recorded,
)
from ppl_models.core.store import own_parameters, scratch_store
from ppl_models.core.table import text_table
from ppl_models.core.traces import check_sites


@final
@dataclass(frozen=True)
class Explanation:
    """The sites of one run of a program, by name; prints as a table.

    Attributes:
        program: Name of the model or the guide.
        sites: As the run reached them, each with its `log_density`; `deterministic` ones too.
        failure: Where and why the run ended early or a site has no density, or None.
        guide: The run of the guide that drew the latents, if one was given.
        mismatch: Why model and guide are no pair, or None.
    """

    program: str
    sites: SiteTable
    failure: str | None = None
    guide: Explanation | None = None
    mismatch: str | None = None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        return self.sites[name]

    @property
    def log_density(self) -> float | None:
        """Log-density of the run, nats in total; None where it failed or a part is unknown."""
        parts = [site.log_density for site in self.sites if not site.deterministic]
        known = [part for part in parts if part is not None]
        return sum(known) if self.failure is None and len(known) == len(parts) else None

    @property
    def elbo(self) -> float | None:
        """The ELBO's estimate from this one draw, nats in total; None without a guide that fits."""
        if self.guide is None or self.mismatch is not None:
            return None
        model, guide = self.log_density, self.guide.log_density
        return None if model is None or guide is None else model - guide

    def __str__(self) -> str:
        lines = [self._table()]
        if self.guide is not None:
            lines += ["", self.guide._table(), ""]
            lines.append(f"ELBO of this one draw, log p - log q: {_nats(self.elbo)} nats")
            if self.mismatch is not None:
                lines.append(self.mismatch)
        return "\n".join(lines)

    def _table(self) -> str:
        head = ("site", "role", "plates", "batch", "event", "support", "distribution")
        rows = [
            (
                site.name,
                site.role,
                describe_plates(site.plates),
                *cells(site),
                "-" if site.deterministic else site.distribution,
                _nats(site.log_density),
            )
            for site in self.sites
        ]
        total = ("total", *[""] * (len(head) - 1), _nats(self.log_density))
        table = text_table((*head, "log density"), [*rows, total], right=" " * len(head) + "r")
        return "\n".join(
            [
                f"{self.program}, nats in total",
                table,
                *([] if self.failure is None else [f"failed {self.failure}"]),
            ]
        )


def explain(
    model: Callable[..., Any],
    *batch: Any,
    guide: Callable[..., Any] | None = None,
    plate: str = "data",
    seed: int = 0,
) -> Explanation:
    """Run a model once, and say of each site what it is and what it adds to the log-density.

    The run is out of reach of handlers outside and in evaluation mode; neither the global random
    state nor the parameters and buffers of a module change. A program that fails half way is
    explained as far as it came.

    Arguments:
        model: Any Pyro model.
        batch: Its arguments, arrays and data frames as `fit` takes them; what the model then does
            not observe is drawn.
        guide: A guide for it, from which the latents are then drawn; it is explained as well.
        plate: Name of the plate over rows.
        seed: Of the draws.

    Returns:
        The sites by name, such as `explain(model, x)["z"].log_density`, nats in total: scaled and
        masked as Pyro does. It prints as a table.

    Raises:
        ValueError: If `model` or `guide` is not callable, or is a class in place of an instance.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).mask(False))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0 * w, 1.0), obs=x)
        >>> print(explain(model, torch.zeros(3)))
        model, nats in total
        site   role           plates        batch  event  support  distribution  log density
        w      global latent  -             ()     ()     real     Normal              0.000
        x      observed       data 3 at -1  (3,)   ()     real     Normal             -2.757
        total                                                                         -2.757
    """
    check_programs("explain", model=model, **({} if guide is None else {"guide": guide}))
    programs = [program for program in (model, guide) if program is not None]
    batch = tuple(as_batch(value, *programs)[0] if _is_table(value) else value for value in batch)
    with (
        poutine.block(),
        scratch_store(),
        own_parameters(*programs),
        seeded(seed),
        evaluating(*programs),
    ):
        if guide is None:
            return _run(model, batch, plate)[0]
        drawn, guide_trace = _run(guide, batch, plate)
        told, model_trace = _run(model, batch, plate, None if drawn.failure else guide_trace)
        mismatch = None
        if drawn.failure is None and told.failure is None:
            try:
                check_sites(model, model_trace, guide_trace)
            except ValueError as error:
                mismatch = str(error)
        return replace(told, guide=drawn, mismatch=mismatch)


def _run(
    program: Callable[..., Any], batch: tuple[Any, ...], plate: str, draws: Trace | None = None
) -> tuple[Explanation, Trace]:
    """Run a program, on the draws of another if there are any, and score its sites."""
    failure = None
    with ExitStack() as scope:
        record = scope.enter_context(recorded(program))
        if draws is not None:
            scope.enter_context(poutine.replay(trace=draws))
        try:
            program(*batch)
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            failure = f"{failing_place(record.trace, error)}: {_said(error)}"
    sites = []
    for site, node in all_sites(record.trace, plate):
        density = None
        if not site.deterministic:
            try:
                density = _log_density(node)
            except Exception as error:  # noqa: BLE001 - as above
                failure = failure or f"to score site '{site.name}': {_said(error)}"
        sites.append(replace(site, log_density=density))
    return Explanation(
        describe_program(program), SiteTable(tuple(sites), plate), failure
    ), record.trace


def _log_density(node: Any) -> float | None:
    try:
        terms = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
    except NotImplementedError:
        return None
    return scale_and_mask(terms, node["scale"], node["mask"]).sum().item()


def _is_table(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "to_numpy")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

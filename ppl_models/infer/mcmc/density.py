"""The log density of a model's latents on the unconstrained space: one value per chain."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.special import _SafeLog
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_models.core.batch import first_table
from ppl_models.core.minibatch import minibatch
from ppl_models.core.random import seeded
from ppl_models.core.sites import (
    SiteTable,
    describe,
    describe_program,
)
from ppl_models.core.types import Batch
from ppl_models.infer import backend, capture
from ppl_models.infer.mcmc.transform import Bijection, Lenient, Part, Summed, layout, log_of_sum

# Loops run along the last dimension. That is chains, but within wide sites for few of them, and for
# models so large that what they are made of is.
WIDE, FEW, LARGE = 32, 16, 100
STARTS = 20  # draws of the prior, one of which must have a density
FAR = 1e4  # unconstrained numbers, where nothing proper has the density that it has near 0
COARSE = 0.01  # standard deviations, that rounding may move a draw by
CHUNK = 2**22  # numbers at the sites of all targets that are transformed at once


class Density:
    r"""The log density of a model's latents on the unconstrained space, with its gradient.

    .. math::

        \log p(u) = \log p\bigl(x, T(u)\bigr) + \log \lvert \det J_T(u) \rvert

    :math:`T` is made of each latent's bijection, which may depend on earlier latents. Enumerated
    sites are summed out. A target is what has chains: the joint posterior, or, with `rows`, the
    latents of one row. Made by `density_of`.

    Where the batch is a part of a data set, rows count for more, as in `minibatch`, and each chain
    may be given rows of its own.

    Attributes:
        dim: Unconstrained numbers :math:`D` of one target.
        targets: How many targets there are.
        size: Numbers at the sites of one target.
        double: Whether the model runs in double precision, whatever its parameters' own.
        dtype: Of the unconstrained numbers that `unconstrain` returns.
        binary: Which of them are zeros and ones, shape (dim,); between these the log density is
            that which Bernoulli variables extend it to.
        device: Where they are.
        reason: Why chains are run one by one; None if they are vectorised.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        batch: Batch,
        table: SiteTable,
        *,
        rows: bool,
        double: bool,
        whole: Batch | None = None,
    ) -> None:
        self.targets = len(batch[0]) if rows else 1
        self.double = double
        self.reason: str | None = None
        self._model, self._rows, self._table = model, rows, table
        self._parts = layout(table)
        self.dim = max(part.span.stop for part in self._parts.values())
        self.size = sum(site.value.numel() for site in table)
        self.dtype = torch.float64 if double else _widest(self._parts.values())
        self.device = table.latents[0].value.device
        self.binary = torch.zeros(self.dim, dtype=torch.bool, device=self.device)
        for part in self._parts.values():
            self.binary[part.span] = part.binary
        # Places of values that are observed, at a site that is observed in part: kept near 0.
        self._idle = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        self._idles = False
        self._wide = max(site.value.numel() for site in table) >= WIDE
        self._summed = any(site.enumerated for site in table)
        self._evaluator: TraceEinsumEvaluator | None = None
        self._given = self._batch = batch
        self._whole = whole
        self._scaled = None
        if whole is not None:
            first = torch.arange(len(batch[0]), device=self.device)
            self._scaled = minibatch(first, len(whole[0]), plate=table.plate)

    def __call__(
        self, u: Float[Tensor, "D T"], index: Int[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, " T"], Float[Tensor, "D T"]]:
        """Evaluate all chains at once.

        Arguments:
            u: Column `c * targets + n` is chain `c` of target `n`.
            index: Rows of the whole data set for each chain, as many as the batch has; None for
                those of the batch.

        Returns:
            The log density in nats, up to the evidence's constant, and its gradient.

        Raises:
            ValueError: If the shape of `u` is not that, or the model changes its sites.
        """
        if u.ndim != 2 or u.shape[0] != self.dim or u.shape[1] % self.targets:
            raise ValueError(
                f"density: u must have shape (dim, chains * targets) with dim {self.dim} and "
                f"targets {self.targets}, got {tuple(u.shape)}."
            )
        with self._conditions(), torch.no_grad():
            logp, grad = self._evaluate(u, index)
            if self._idles:
                still = self._idle.unsqueeze(1) * u
                return logp - 0.5 * (still * u).sum(0), grad - still
            return logp, grad

    def _evaluate(self, u: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.reason is not None:
            return self._one_by_one(u, index)
        try:
            return self._at_once(u, index)
        except backend.LinAlgError:
            if backend.recording():
                raise  # a graph must not be made of what happened at one point
            return self._one_by_one(u, index)

    def some(self, rows: int) -> Density:
        """Return that of some rows: of the first ones, until it is told to `take` others."""
        part = copy.copy(self)
        part.targets = rows
        part._batch = tuple(value[:rows].clone() for value in self._batch)
        return part

    def take(self, rows: Int[Tensor, " R"], whole: Density) -> None:
        """Be that of other rows of `whole`, as many, in place: graphs of it then are of these."""
        for own, value in zip(self._batch, whole._batch, strict=True):
            own.copy_(value[rows])

    def constrain(self, u: Float[Tensor, "*lead D"]) -> dict[str, Tensor]:
        """Return the value of each latent, without gradient.

        In the site's dtype, unless that would round their differences away.

        Arguments:
            u: Shape (*lead, dim), or (*lead, targets, dim) for rows.

        Returns:
            Values of shape (*lead, *batch, *event), computed in bounded memory.
        """
        depth = 2 if self._rows else 1
        if u.shape[u.ndim - depth :] != torch.Size((self.targets, self.dim)[-depth:]):
            raise ValueError(
                f"density: u must have shape (*lead, {'targets, ' * self._rows}dim), dim "
                f"{self.dim}, targets {self.targets}, got {tuple(u.shape)}."
            )
        lead = u.shape[:-depth]
        flat = u.reshape(math.prod(lead), self.targets, self.dim)
        found = self._each(self._values, {"u": flat})
        values = {}
        for part in self._parts.values():
            value = _from_targets(found[part.name], part)
            if part.circular:
                value = torch.remainder(value + math.pi, 2.0 * math.pi) - math.pi
            value = _rounded(value, part.dtype)
            values[part.name] = value.reshape(*lead, *value.shape[1:])
        return values

    def unconstrain(self, values: dict[str, Tensor]) -> Float[Tensor, "*lead D"]:
        """Return the unconstrained numbers of values: the inverse of `constrain`.

        Raises:
            ValueError: If a latent is missing, has another shape or is outside its support.
        """
        given: dict[str, Tensor] = {}
        lead = torch.Size()
        for part in self._parts.values():
            if part.name not in values:
                raise ValueError(
                    f"density: values must hold every latent, {list(self._parts)}, but "
                    f"'{part.name}' is missing from {list(values)}."
                )
            value = values[part.name]
            want = list(part.shape)
            if self._rows and part.axis is not None:
                want[part.axis] = self.targets
            split = value.ndim - len(want)
            if (
                split < 0
                or list(value.shape[split:]) != want
                or (given and value.shape[:split] != lead)
            ):
                raise ValueError(
                    f"density: values of '{part.name}' must have shape (*lead, "
                    f"{', '.join(map(str, want))}) with the same leading dimensions at all sites, "
                    f"got {tuple(value.shape)}."
                )
            lead = value.shape[:split]
            value = value.detach().to(self.dtype).reshape(math.prod(lead), *want)
            given[part.name] = _to_targets(value, part if self._rows else None)
        u = self._each(self._numbers, given)["u"]
        for part in self._parts.values():
            if not torch.isfinite(u[..., part.span]).all():
                raise ValueError(
                    f"density: values of '{part.name}' must lie inside its support, "
                    f"{describe(self._table[part.name].support)}; some are outside or at its edge."
                )
        return u.reshape(*lead, *((self.targets,) if self._rows else ()), self.dim)

    def __repr__(self) -> str:
        how = "at once" if self.reason is None else "one by one"
        return f"Density(dim={self.dim}, targets={self.targets}, chains {how})"

    def _at_once(self, u: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        one = torch.func.grad_and_value(self._log_density)
        if index is not None:
            batch = self._rows_of(index.T)
            chains = torch.func.vmap(one, in_dims=(0, *_firsts(batch)), randomness="different")
            grad, logp = chains(u.T.contiguous(), *batch)
            grad = grad.T
        elif not self._rows and self._wide and (u.shape[1] < FEW or self.dim >= LARGE):
            chains = torch.func.vmap(lambda u: one(u, *self._batch), randomness="different")
            grad, logp = chains(u.T.contiguous())
            grad = grad.T
        elif not self._rows:
            chains = torch.func.vmap(
                lambda u: one(u, *self._batch), in_dims=-1, out_dims=(-1, 0), randomness="different"
            )
            grad, logp = chains(u)
        else:
            rows = torch.func.vmap(one, in_dims=(0, *_firsts(self._batch)), randomness="different")
            chains = torch.func.vmap(lambda u: rows(u, *self._batch), randomness="different")
            # As networks like it: chains and rows first, so that all of them make one product.
            first = u.reshape(self.dim, -1, self.targets).permute(1, 2, 0).contiguous()
            grad, logp = chains(first)
            grad = grad.permute(2, 0, 1)
        return logp.reshape(-1), grad.reshape(u.shape).contiguous()

    def _rows_of(self, index: Tensor) -> Batch:
        """Return rows (*index, ...) of the whole data set."""
        whole = self._batch if self._whole is None else self._whole
        return tuple(v[index].to(b.dtype) for v, b in zip(whole, self._batch, strict=True))

    def _one_by_one(self, u: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        columns = [
            self._alone(
                u[:, t],
                self._row(t % self.targets) if index is None else self._rows_of(index[:, t]),
            )
            for t in range(u.shape[1])
        ]
        return (
            torch.stack([logp for logp, _ in columns]),
            torch.stack([grad for _, grad in columns], -1),
        )

    def _alone(self, u: Tensor, row: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            try:
                logp = self._log_density(u, *row)
            except backend.LinAlgError:
                if backend.recording():
                    raise
                return u.new_full((), math.nan), torch.full_like(u, math.nan)
            if not logp.requires_grad:
                return logp, torch.zeros_like(u)
            (grad,) = torch.autograd.grad(logp, u, materialize_grads=True)
        return logp.detach(), grad

    def _row(self, target: int) -> Sequence[Tensor]:
        return [value[target] for value in self._batch] if self._rows else self._batch

    def _log_density(self, u: Tensor, *row: Tensor) -> Tensor:
        bijection, trace = self._run(row, u=u)
        if self._summed and self._evaluator is None:
            self._evaluator = TraceEinsumEvaluator(trace, True, self._table.plate_dims)
        logp: Any = self._evaluator.log_prob(trace) if self._evaluator else trace.log_prob_sum()
        return (logp + bijection.log_det).to(u.dtype)

    def _values(self, given: dict[str, Tensor], *row: Tensor) -> dict[str, Tensor]:
        return self._run(row, u=given["u"])[0].values

    def _numbers(self, given: dict[str, Tensor], *row: Tensor) -> dict[str, Tensor]:
        numbers = self._run(row, values=given)[0].numbers
        return {"u": torch.cat([numbers[name].flatten() for name in self._parts])}

    def _run(self, row: Sequence[Tensor], **given: Any) -> tuple[Bijection, Trace]:
        """Run the model on one target: from its numbers `u`, or from its `values`."""
        batch = [value.unsqueeze(0) for value in row] if self._rows else row
        bijection = Bijection(self._parts, own=not self.double, summed=self._summed, **given)
        with ExitStack() as stack:
            stack.enter_context(poutine.block())
            record = stack.enter_context(poutine.trace())
            stack.enter_context(bijection)
            if self._summed:
                stack.enter_context(Summed(first_available_dim=-1 - self._table.plate_dims))
            if self._scaled is not None:
                stack.enter_context(self._scaled)
            self._model(*batch)
        missing = [name for name in self._parts if name not in bijection.values]
        if missing:
            raise ValueError(
                f"sample: {describe_program(self._model)} reaches {missing} for some values of the "
                "other latents only. The latents must be the same ones whatever their values: "
                "sample them always, and choose with torch.where or poutine.mask."
            )
        return bijection, record.trace

    def _each(
        self, function: Callable[..., dict[str, Tensor]], given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Apply a function to each (lead, target), a bounded number at a time."""
        count = len(next(iter(given.values())))
        largest = max(1, sum(site.value.numel() for site in self._table))
        rows = max(1, min(self.targets, CHUNK // largest))
        leads = max(1, CHUNK // (largest * rows))
        lines = []
        with self._conditions(), torch.no_grad():
            for i in range(0, count, leads):
                line = [
                    self._block(
                        function,
                        {name: v[i : i + leads, n : n + rows] for name, v in given.items()},
                        n,
                    )
                    for n in range(0, self.targets, rows)
                ]
                lines.append({name: torch.cat([one[name] for one in line], 1) for name in line[0]})
        if not lines:
            raise ValueError("density: there is nothing to transform; a leading size is 0.")
        return {name: torch.cat([line[name] for line in lines]) for name in lines[0]}

    def _block(
        self, function: Callable[..., dict[str, Tensor]], given: dict[str, Tensor], start: int
    ) -> dict[str, Tensor]:
        leads, rows = next(iter(given.values())).shape[:2]
        if self.reason is None:
            batch = tuple(v[start : start + rows] if self._rows else v for v in self._batch)
            inner = torch.func.vmap(
                function,
                in_dims=(0, *(_firsts(batch) if self._rows else [None] * len(batch))),
                randomness="different",
            )
            # Some layers, such as a GRU, have a batching rule with a gradient and none without.
            with suppress(RuntimeError):
                return torch.func.vmap(lambda one: inner(one, *batch), randomness="different")(
                    given
                )
        grid = [
            function({name: v[i, n] for name, v in given.items()}, *self._row(start + n))
            for i in range(leads)
            for n in range(rows)
        ]
        return {
            name: torch.stack([one[name] for one in grid]).unflatten(0, (leads, rows))
            for name in grid[0]
        }

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """What an evaluation needs, for a block: nothing that looks at values, nothing raised."""
        with (
            capture.unvalidated(),
            patch.object(_SafeLog, "apply", log_of_sum),
            Lenient(double=self.double),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*performance drop")  # of vmap
            yield

    def _settle(self) -> None:
        """Find by trials how the model can be run; refuse one that has no density."""
        u = self._points(2)
        alone = self._take_precision(u)
        self._refuse_noise(u[:, 0])
        self._refuse_flat(u, *alone)
        self._idles = bool(self._idle.any())
        whole, targets = self._batch, self.targets
        if self._rows:
            self._batch = tuple(value[:2] for value in whole)
            self.targets = min(targets, 2)
        try:
            with self._conditions(), torch.no_grad():
                together = self._at_once(u.repeat_interleave(self.targets, 1))
                if self._whole is not None:
                    size, count = len(self._batch[0]), u.shape[1]  # and on rows of their own
                    index = torch.arange(count * size, device=u.device) % len(self._whole[0])
                    index = index.reshape(count, size).T
                    together = (*together, *self._at_once(u, index))
                    alone = (*alone, *self._one_by_one(u, index))
            gap = max(_gap(a, b) for a, b in zip(together, alone, strict=True))
            if gap > (1e-6 if self.double else 1e-3):
                self.reason = f"chains at once differ from one chain alone by {gap:.1g}"
        except Exception as error:  # noqa: BLE001 - whatever torch or the model raises
            self.reason = capture._reason(error)
        self._batch, self.targets = whole, targets
        if self.reason is not None:  # what a loop can do may depend on values: look at more of them
            with self._conditions(), torch.no_grad():
                self._one_by_one(self._points(16, spread=1.5))

    def _points(self, count: int, *, spread: float = 0.5) -> Tensor:
        """Return points to try the density at, (dim, count), units at 0 or 1."""
        generator = torch.Generator().manual_seed(0)
        u = spread * torch.randn(self.dim, count, generator=generator)
        u = u.to(self.device, self.dtype)
        return torch.where(self.binary.unsqueeze(1), (u > 0.0).to(u), u)

    def _take_precision(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Take the highest precision in which the model runs, and return a few densities."""
        rows = min(self.targets, 2)
        if self.double:
            # Data in double precision too: layers with parameters may want theirs as they are.
            raised = tuple(v.double() if v.is_floating_point() else v for v in self._given)
            for batch in (raised, self._given):
                with suppress(Exception):
                    return self._trial(u, rows, batch)
        self.double = False
        try:
            return self._trial(u, rows, self._given)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"sample: the log density of {describe_program(self._model)} cannot be evaluated: "
                f"{capture._reason(error)}"
            ) from error

    def _trial(self, u: Tensor, rows: int, batch: Batch) -> tuple[Tensor, Tensor]:
        self._batch, self._evaluator = batch, None
        with self._conditions(), torch.no_grad():
            pairs = [
                self._alone(u[:, c], self._row(n)) for c in range(u.shape[1]) for n in range(rows)
            ]
        return torch.stack([logp for logp, _ in pairs]), torch.stack([g for _, g in pairs], -1)

    def _refuse_flat(self, u: Tensor, logp: Tensor, grad: Tensor) -> None:
        """Refuse a latent of which nothing says where it is: its posterior is improper."""
        if logp.numel() == 0 or not torch.isfinite(logp).all():
            return
        still = (grad == 0.0).all(1) & ~self.binary
        for place in still.nonzero().flatten().tolist():
            far = u.clone()
            far[place] = FAR
            away = self._trial(far, min(self.targets, 2), self._batch)[0]
            far[place] = -FAR
            if torch.equal(away, logp) and torch.equal(
                self._trial(far, min(self.targets, 2), self._batch)[0], logp
            ):
                part = next(p for p in self._parts.values() if p.span.start <= place < p.span.stop)
                if part.name.endswith("_unobserved"):  # the place of a value that is observed
                    self._idle[place] = 0.0 if self._rows else 1.0
                    continue
                raise ValueError(
                    f"sample: nothing in {describe_program(self._model)} says where "
                    f"'{part.name}' is: its log density is the same at element "
                    f"{place - part.span.start} of {part.span.stop - part.span.start} whatever its "
                    "value, so the posterior is improper. Give it a prior, or take it out."
                )

    def _refuse_rows_that_depend(self) -> None:
        """Refuse a model whose rows, taken one by one, are not what they are together."""
        count = min(3, self.targets)
        if count < 2 or self._summed:
            return
        whole, targets = self._batch, self.targets
        self._batch, self.targets = tuple(value[:count] for value in whole), count
        try:
            values = self.constrain(self._points(count).T[None])
            if self.double:  # as the data are, which a layer may multiply them by
                values = {
                    name: value.double() if value.is_floating_point() else value
                    for name, value in values.items()
                }
            axes = {part.name: part.axis for part in self._parts.values()}
            together = self._joint({name: value[0] for name, value in values.items()}, self._batch)
            apart = [
                self._joint(
                    {
                        name: value[0].narrow(axis, n, 1)
                        for name, value in values.items()
                        if (axis := axes[name]) is not None
                    },
                    tuple(value[n : n + 1] for value in self._batch),
                )
                for n in range(count)
            ]
        finally:
            self._batch, self.targets = whole, targets
        total = sum(apart)
        if math.isfinite(together) and abs(total - together) > 1e-3 * (1.0 + abs(together)):
            raise ValueError(
                f"sample: rows=True takes each row by itself, but in {describe_program(self._model)} "
                f"rows depend on each other or on their number: the log density of the first {count} "
                f"rows together is {together:.6g}, of each by itself {total:.6g} in all. Take what "
                "belongs to a row from the arguments, or use rows=False."
            )

    def _joint(self, values: dict[str, Tensor], batch: Batch) -> float:
        """Return the log density of values of the latents and of the data, without Jacobians."""
        with self._conditions(), torch.no_grad(), poutine.block(), poutine.trace() as record:
            poutine.condition(self._model, data=values)(*batch)
        return float(record.trace.log_prob_sum())

    def _refuse_noise(self, u: Tensor) -> None:
        traces = []
        for seed in (0, 1):
            with self._conditions(), torch.no_grad(), seeded(seed):
                traces.append(self._run(self._row(0), u=u)[1])
                traces[-1].compute_log_prob()
        for name, node in traces[0].nodes.items():
            other = traces[1].nodes.get(name)
            if node["type"] != "sample" or other is None:
                continue
            part = site_is_subsample(node)
            one, two = (each["value" if part else "log_prob"] for each in (node, other))
            if one.shape == two.shape and torch.allclose(one, two, rtol=1e-6, equal_nan=True):
                continue
            what = f"plate '{name}', which draws a part of its rows," if part else f"site '{name}'"
            raise ValueError(
                f"sample: {describe_program(self._model)} draws at random outside its latents: "
                f"{what} differs between two runs at the same values. A posterior needs a density "
                "that stays the same: take the noise out of the model (subsampling, dropout, "
                "torch.randn), or make it a latent with pyro.sample."
            )


def density_of(
    model: Callable[..., Any],
    batch: Batch,
    table: SiteTable,
    *,
    rows: bool,
    plate: str,
    double: bool = True,
    whole: Batch | None = None,
) -> Density:
    """Build the log density of a model's latents, given a batch.

    Arguments:
        model: Any Pyro model with continuous latents; discrete ones are marked for enumeration.
        batch: Its arguments.
        table: Its sites on that batch.
        rows: Whether each row's latents are a target of their own.
        plate: Name of the plate over rows.
        double: Evaluate in double precision, if the model takes it.
        whole: The data set of which the batch is a part, if it is one: its rows then count for as
            many as the data set has.

    Raises:
        ValueError: If a latent's support has no bijection to unconstrained numbers, its shape or
            the set of latents changes with their values, or the model draws at random besides.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from ppl_models.core.sites import site_table
        >>> model = lambda: pyro.sample("scale", dist.Exponential(1.0))
        >>> density = density_of(model, (), site_table(model), rows=False, plate="data")
        >>> logp, grad = density(torch.zeros(1, 2))  # -exp(u) + u, at 0
        >>> logp, grad
        (tensor([-1., -1.]), tensor([[0., 0.]]))
    """
    if rows:
        table = _of_one_row(model, batch, plate)
        for site in table.latents:
            if site.data_dim is None:
                raise ValueError(
                    f"sample: rows=True needs plate '{plate}' as a context, `with pyro.plate(...):`"
                    f", but site '{site.name}' is outside it or in a loop over it. Use rows=False."
                )
    density = Density(model, batch, table, rows=rows, double=double, whole=whole)
    density._settle()
    if rows:
        density._refuse_rows_that_depend()
    return density


def _of_one_row(model: Callable[..., Any], batch: Batch, plate: str) -> SiteTable:
    try:
        first = tuple(value[:1] for value in batch)
        return first_table(model, first, plate=plate, tries=STARTS)
    except Exception as error:
        raise ValueError(
            f"sample: rows=True runs {describe_program(model)} on single rows, and it fails on the "
            f"first: {capture._reason(error)}. Take what belongs to a row from the arguments, or use "
            "rows=False."
        ) from error


def _from_targets(value: Tensor, part: Part) -> Tensor:
    """Move targets from the second dimension to the plate of rows."""
    if part.axis is None or value.shape[1] == 1:
        return value.squeeze(1)
    return value.squeeze(part.axis).movedim(1, part.axis)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return draws (n, ...) in a dtype, unless it is too coarse for them."""
    if value.dtype != torch.float64 or dtype == torch.float64 or not len(value):
        return value.to(dtype)
    error = (value - value.to(dtype).double()).abs().amax(0)
    spread = value.std(0) if len(value) > 1 else torch.full_like(error, math.inf)
    fine = (error <= COARSE * spread) | (error == 0.0) | ~torch.isfinite(value).all(0)
    return value.to(dtype) if bool(fine.all()) else value


def _to_targets(value: Tensor, part: Part | None) -> Tensor:
    if part is None or part.axis is None:
        return value.unsqueeze(1)
    return value.movedim(part.axis, 1).unsqueeze(part.axis)


def _firsts(batch: Batch) -> list[int]:
    return [0] * len(batch)


def _widest(parts: Any) -> torch.dtype:
    widest = torch.float32
    for part in parts:
        widest = torch.promote_types(widest, part.dtype)
    return widest


def _gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite among non-numbers."""
    fine = torch.isfinite(other)
    if (torch.isfinite(one) != fine).any():
        return math.inf
    size = 1.0 + other[fine].abs().amax().item() if fine.any() else 1.0
    return ((one - other)[fine].abs() / size).amax().item() if fine.any() else 0.0

"""Bounds on the evidence, and estimates of it, with their errors.

All of them stream: over particles, and over rows where rows are independent, so that memory stays
bounded for any number of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_models.core.batch import as_batch, check_model, check_programs
from ppl_models.core.checks import check_count
from ppl_models.core.minibatch import minibatch
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import SiteTable, describe_program, table_of
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.traces import log_weights, run_pair, vectorizes
from ppl_models.core.types import Batch
from ppl_models.evaluate.estimate import Estimate

ELEMENTS = 2**21  # values of all sites that one chunk may hold: a few hundred MiB with activations
PROBE = 128  # rows that the programs are looked at with
GROUPS = 100  # of particles, each left out once by the jackknife


def elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    particles: int = 100,
    seed: int | None = None,
    plate: str = "data",
) -> Estimate:
    r"""Estimate the evidence lower bound :math:`\mathbb{E}_q[\log p(x, z) - \log q(z \mid x)]`.

    Arguments:
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        batch: The data; all of it, if the model has global latents.
        particles: Draws from the guide.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Returns:
        The bound, nats per row. Rows are None if the model or the guide has a site outside the
        plate over rows, or that plate subsamples by itself: the bound is then one number for the
        whole data set.

    Raises:
        ValueError: If the data are not what the model describes, or the guide does not fit it.

    Example:
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=7).detach()
        >>> bound = elbo(model, Exact(model), x, particles=1)
        >>> torch.allclose(bound.rows, model.log_evidence(x).double(), atol=1e-4)
        True
    """
    with _weights(model, guide, batch, particles, plate, seed) as weights:
        if not weights.row_wise:
            size = len(weights.batch[0]) if weights.batch else 1
            totals = torch.cat(
                [
                    whole if rows is None else whole + rows.sum(1)
                    for rows, whole in weights.draw(particles)
                ]
            ).double()
            se = totals.std().item() / math.sqrt(particles) if particles > 1 else math.nan
            return Estimate(totals.mean().item() / size, se / size, None, None, particles)
        means, variances = [], []
        for rows in weights.row_chunks():
            pivot = total = square = torch.zeros(())
            for part, _ in weights.draw(particles, rows):
                assert part is not None
                value = part.double()
                # Sums around the first mean: no cancellation, and -inf stays -inf.
                pivot = pivot if pivot.ndim else value.mean(0).nan_to_num(neginf=0.0)
                total = total + (value - pivot).sum(0)
                square = square + (value - pivot).square().sum(0)
            means.append(pivot + total / particles)
            variances.append((square - total.square() / particles) / max(1, particles - 1))
        mean = torch.cat(means)
        if particles == 1:
            return _by_row(mean, torch.full_like(mean, math.nan), particles)
        return _by_row(mean, (torch.cat(variances).clamp(min=0.0) / particles).sqrt(), particles)


def iwae_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    particles: int = 50,
    repeats: int = 20,
    seed: int | None = None,
    plate: str = "data",
) -> Estimate:
    r"""Estimate the importance-weighted bound of K particles.

    .. math::

        \mathcal{L}_K = \mathbb{E}\left[\log \frac{1}{K} \sum_{k=1}^K
        \frac{p(x, z_k)}{q(z_k \mid x)}\right], \qquad
        \mathcal{L}_1 = \mathrm{ELBO} \le \mathcal{L}_K \le \log p(x)

    Arguments:
        model: Any Pyro model whose sites are all inside the plate over rows.
        guide: Any Pyro guide for it.
        batch: The data.
        particles: K.
        repeats: Independent evaluations that are averaged.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Raises:
        ValueError: As `log_evidence`.

    Source:
        Burda, Grosse & Salakhutdinov (2016). https://arxiv.org/abs/1509.00519
    """
    check_count("iwae_bound", "repeats", repeats)
    with _weights(model, guide, batch, particles, plate, seed) as weights:
        weights.require_rows("iwae_bound")
        values = []
        for _ in range(repeats):
            parts = [weights.sums(particles, rows) for rows in weights.row_chunks()]
            values.append(torch.cat([sums.log_mean() for sums in parts]))
        rows = torch.stack(values)
        se = rows.std(0) / math.sqrt(repeats) if repeats > 1 else torch.full_like(rows[0], math.nan)
        return _by_row(rows.mean(0), se, particles)


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    particles: int = 1000,
    jackknife: bool = False,
    seed: int | None = None,
    plate: str = "data",
) -> Estimate:
    r"""Estimate :math:`\log p(x)` of each row by importance sampling from the guide.

    .. math::

        \log \hat p(x) = \log \frac{1}{K} \sum_k w_k, \quad w_k = p(x, z_k) / q(z_k \mid x),
        \qquad \mathrm{se}^2 = \frac{\mathrm{var}(w)}{K \bar w^2}, \quad
        \mathrm{bias} \approx -\tfrac12 \mathrm{se}^2

    The mean never exceeds the truth in expectation. Error and bias are to first order: where a few
    particles carry all the weight, both are understated.

    Arguments:
        model: Any Pyro model whose sites are all inside the plate over rows.
        guide: Any Pyro guide for it.
        batch: The data.
        particles: K.
        jackknife: Take the bias off, by leaving out a hundredth of the particles at a time. The
            estimate is then no lower bound, not even in expectation.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Returns:
        The estimate, nats per row, with `bias` and `rows_bias` (0 after the jackknife).

    Raises:
        ValueError: If a site is outside the plate over rows, the data are not what the model
            describes, or the guide does not fit it.

    Source:
        Burda, Grosse & Salakhutdinov (2016), https://arxiv.org/abs/1509.00519; Nowozin (2018),
        https://openreview.net/forum?id=HyZoi-WRb

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> log_evidence(model, Amortized(model), model(size=7), particles=10).rows.shape
        torch.Size([7])
    """
    with _weights(model, guide, batch, particles, plate, seed) as weights:
        weights.require_rows("log_evidence")
        parts = [weights.sums(particles, rows) for rows in weights.row_chunks()]
    se = torch.cat([sums.se() for sums in parts])
    if jackknife:
        rows = torch.cat([sums.jackknife() for sums in parts])
        return _by_row(rows, se, particles)
    rows = torch.cat([sums.log_mean() for sums in parts])
    return _by_row(rows, se, particles, bias=-se.square() / 2)


def _by_row(rows: Tensor, se: Tensor, particles: int, bias: Tensor | None = None) -> Estimate:
    return Estimate(
        mean=rows.mean().item(),
        se=se.square().sum().sqrt().item() / len(rows),
        rows=rows,
        rows_se=se,
        particles=particles,
        bias=0.0 if bias is None else bias.mean().item(),
        rows_bias=torch.zeros_like(rows) if bias is None else bias,
    )


@dataclass
class _Sums:
    """Sums of importance weights of each row, by group of particles; all of them as logs."""

    groups: Tensor  # log of the sum of weights in each group, (G, n)
    squares: Tensor  # log of the sum of squared weights, (n,)
    sizes: Tensor  # particles in each group, (G,)

    def add(self, logs: Tensor, start: int) -> None:
        self.squares = torch.logaddexp(self.squares, (2.0 * logs).logsumexp(0))
        while len(logs) > 0:  # particle k belongs to group k mod G
            first = start % len(self.groups)
            block = logs[: len(self.groups) - first]
            part = slice(first, first + len(block))
            self.groups[part] = torch.logaddexp(self.groups[part], block)
            self.sizes[part] += 1
            logs, start = logs[len(block) :], start + len(block)

    def log_mean(self) -> Tensor:
        return self.groups.logsumexp(0) - self.sizes.sum().log()

    def se(self) -> Tensor:
        count = self.sizes.sum()
        if count < 2:
            return torch.full_like(self.squares, math.nan)
        ratio = count * (self.squares - 2.0 * self.groups.logsumexp(0)).exp()
        return ((ratio - 1.0).clamp(min=0.0) / (count - 1)).sqrt()

    def jackknife(self) -> Tensor:
        count = len(self.groups)
        if count < 2:
            return self.log_mean()
        # Not the sum less a group: where one carries all the weight, nothing would be left.
        nothing = torch.full_like(self.groups[:1], -math.inf)
        before = torch.cat([nothing, self.groups[:-1]]).logcumsumexp(0)
        after = torch.cat([self.groups[1:], nothing]).flip(0).logcumsumexp(0).flip(0)
        sizes = (self.sizes.sum() - self.sizes).unsqueeze(-1)
        without = torch.logaddexp(before, after) - sizes.log()
        return count * self.log_mean() - (count - 1) * without.mean(0)


@dataclass
class _Weights:
    """Log importance weights of a model and a guide on a batch, drawn chunk by chunk."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    batch: Batch
    table: SiteTable
    seen: int  # rows that the programs were looked at with: all of them, if they take no fewer
    outside: list[str]  # sites outside the plate over rows
    subsampled: bool  # whether that plate draws its rows by itself
    dim: int | None  # of the plate over particles, None to run them one by one
    plate: str

    @property
    def row_wise(self) -> bool:
        return not self.outside and not self.subsampled

    def require_rows(self, caller: str) -> None:
        if self.outside:
            name = self.outside[0]
            shape = tuple(self.table[name].batch_shape) if name in self._names() else ()
            raise ValueError(
                f"{caller} scores rows one by one, but site '{name}' has log-density shape {shape},"
                f" not ({len(self.batch[0]) if self.batch else 'N'},): it is not inside plate "
                f"'{self.plate}' of {describe_program(self.model)}, or in a sequential one. Use "
                "`elbo`, which bounds the whole data set."
            )
        if self.subsampled:
            raise ValueError(
                f"{caller} scores rows one by one, but plate '{self.plate}' of "
                f"{describe_program(self.model)} subsamples by itself: other rows at each run. "
                f"Write the plain `pyro.plate('{self.plate}', len(x))`, or use `elbo`, which "
                "bounds the whole data set."
            )

    def row_chunks(self) -> Iterator[range]:
        size = len(self.batch[0])
        step = max(1, ELEMENTS // self._width()) if self.seen <= PROBE else size
        for start in range(0, size, step):
            yield range(start, min(start + step, size))

    def draw(
        self, particles: int, rows: range | None = None
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield blocks of log weights, (S, n) and (S,), S adding up to `particles`."""
        size = len(self.batch[0]) if self.batch else 1
        rows = range(size) if rows is None else rows
        part, scope = self.batch, nullcontext()
        if len(rows) < size:
            index = torch.arange(rows.start, rows.stop)
            part = tuple(value[rows.start : rows.stop] for value in self.batch)
            scope = minibatch(index, size, plate=self.plate, scale=1.0)
        step = max(1, ELEMENTS // (self._width() * len(rows)))
        while particles > 0:
            count = min(step, particles) if self.dim is not None else 1
            with scope:
                pair = run_pair(
                    self.model,
                    self.guide,
                    *part,
                    particles=count if self.dim is not None else None,
                    dim=self.dim,
                )
                yield log_weights(pair, self.plate)
            particles -= count

    def sums(self, particles: int, rows: range) -> _Sums:
        n, groups = len(rows), min(particles, GROUPS)
        like = self.batch[0]
        sizes = torch.zeros(groups, dtype=torch.float64, device=like.device)
        nothing = torch.full_like(sizes[:, None].expand(groups, n), -math.inf)
        sums = _Sums(nothing, nothing[0].clone(), sizes)
        seen = 0
        for logs, _ in self.draw(particles, rows):
            assert logs is not None
            sums.add(logs.double(), seen)
            seen += len(logs)
        return sums

    def _names(self) -> list[str]:
        return [site.name for site in self.table]

    def _width(self) -> int:
        """Values that all sites hold for one row."""
        shapes = [(site.fn.shape(), self.seen if site.local else 1) for site in self.table]
        values = sum(math.prod(shape) / rows for shape, rows in shapes)
        return max(1, math.ceil(values))


@contextmanager
def _weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: tuple[Any, ...],
    particles: int,
    plate: str,
    seed: int | None,
) -> Iterator[_Weights]:
    """Check everything that can be checked, and take the decisions, before the first draw."""
    check_count("evaluate", "particles", particles)
    check_programs("evaluate", model=model, guide=guide)
    batch = as_batch(data, model, guide)
    size = len(batch[0]) if batch else 1
    with own_parameters(model, guide), seeded(seed), evaluating(model, guide):
        try:
            weights = _inspect(model, guide, batch, particles, plate, rows=min(size, PROBE))
        except Exception:  # programs that take all rows or none, as Pyro's own guides do
            if size <= PROBE:
                raise
            weights = _inspect(model, guide, batch, particles, plate, rows=size)
        yield weights


def _inspect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    particles: int,
    plate: str,
    *,
    rows: int,
) -> _Weights:
    """Look at the programs on the first rows, which says what is to be known of all."""
    size = len(batch[0]) if batch else 1
    part = tuple(value[:rows] for value in batch)
    table = check_model(model, batch, plate=plate, rows=rows)
    index = torch.arange(rows)
    scope = minibatch(index, size, plate=plate, scale=1.0) if rows < size else nullcontext()
    with unchanged_on_error(), seeded(0), scope:
        pair = run_pair(model, guide, *part)
        guided = table_of(pair.guide, plate)
        dim = -1 - max(table.plate_dims, guided.plate_dims)
        carried = particles > 1 and vectorizes(model, guide, *part, dim=dim)
    sites = [*table, *guided]
    return _Weights(
        model=model,
        guide=guide,
        batch=batch,
        table=table,
        seen=rows,
        outside=list(dict.fromkeys(site.name for site in sites if site.data_dim is None)),
        subsampled=table.subsamples_itself,
        dim=dim if carried else None,
        plate=plate,
    )

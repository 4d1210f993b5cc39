"""Sample a posterior by Markov chain Monte Carlo."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Independent

from ppl_models.core.batch import (
    as_batch,
    check_data,
    check_device,
    check_model,
    check_programs,
    moved,
)
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.sites import Site, SiteTable, base_distribution, describe, describe_program
from ppl_models.core.store import own_parameters
from ppl_models.core.types import Batch
from ppl_models.infer.mcmc.adaptation import groups_of, warm_up, windows
from ppl_models.infer.mcmc.advice import too_long
from ppl_models.infer.mcmc.density import STARTS, Density, density_of
from ppl_models.infer.mcmc.engine import PART, Draws, Engine
from ppl_models.infer.mcmc.gibbs import Gibbs
from ppl_models.infer.mcmc.posterior import Posterior
from ppl_models.infer.mcmc.samplers import NUTS, SGHMC, GibbsWithGradients
from ppl_models.infer.mcmc.sghmc import Chains
from ppl_models.infer.mcmc.start import anywhere, at_guide
from ppl_models.infer.mcmc.transform import is_binary
from ppl_models.infer.progress import progress_bar

Compile = bool | Literal["now"]
Sampler = NUTS | GibbsWithGradients | SGHMC

NUMBERS = 2**27  # that the chains of rows that are sampled together may hold
CACHED = 2**18  # numbers that columns may hold which are run in turn, and
COLUMNS = 128  # how few columns these may be
ROUND = 128  # draws of all rows, after which they wait for each other
TREE = 8  # leapfrog steps of a transition, as expected
LEAPFROGS, TICKS = 20_000, 4_000  # expected of all chains, and of each: below, nothing is compiled


def sample(
    model: Callable[..., Any],
    *batch: Any,
    sampler: Sampler | None = None,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 1000,
    rows: bool = False,
    init: Callable[..., Any] | None = None,
    compile: Compile = True,
    seed: int | None = None,
    device: torch.device | str | None = None,
    plate: str = "data",
    progress: bool | str | None = None,
) -> Posterior:
    r"""Sample the posterior of a model's latents, its parameters fixed.

    All chains, and with `rows` all rows, advance together by one leapfrog step at a time, each in
    its own trajectory.

    Arguments:
        model: Any Pyro model with continuous latents. Discrete ones must be marked for enumeration.
        batch: The data that it is conditioned on; nothing for a model without arguments.
        sampler: By default `NUTS()`; for binary latents `GibbsWithGradients()`; for data too many
            to look at in each step `SGHMC(batch_size)`, which is biased.
        chains: Independent chains. From 16 on they learn step size and metric together.
        draws: Draws kept from each chain.
        warmup: Transitions before that, for adaptation.
        rows: False samples the joint posterior of all latents. True says that each row's local
            latents are a target of their own, given the parameters; a model with global latents
            is refused.
        init: A fitted guide, whose draws are where chains start and give the first metric, which
            `SGHMC` keeps; by default chains start uniformly in (-2, 2) on the unconstrained space.
        compile: Whether long sampling is compiled, which takes seconds for a model that is new;
            "now" compiles any, False none.
        seed: An integer isolates and reproduces; None draws from the global random stream. The
            draws of a chain depend on the seed and on its number, with up to 15 chains on nothing
            else.
        device: Where to sample, by default where the model's parameters are. A module is moved.
        plate: Name of the plate over rows.
        progress: Whether to show a bar, or a label for it; None shows it on a terminal.

    Returns:
        Draws of each site, shape (chains, draws, *batch, *event). Ctrl-C keeps those so far.

    Raises:
        ValueError: If an argument is out of range, the data are not what the model describes, a
            latent is discrete, there is none, no start with a finite density is found, the draws
            do not fit into memory, or `rows` or the sampler does not apply.

    Warns:
        RuntimeWarning: If chains of `SGHMC` left the finite numbers.

    Source:
        Hoffman & Gelman (2014). https://jmlr.org/papers/v15/hoffman14a.html

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=3, latent_dim=1)
        >>> sample(model, model(size=2), chains=2, draws=5, warmup=5, rows=True, seed=0)
        Posterior({'z': (2, 5, 2, 1)}, divergences=0)
    """
    for name, value, least in (("chains", chains, 1), ("draws", draws, 4), ("warmup", warmup, 0)):
        check_count("sample", name, value, least)
    check_programs("sample", model=model, **({} if init is None else {"init": init}))
    if compile not in (True, False, "now"):
        raise ValueError(f"sample: compile must be True, False or 'now', got {compile!r}.")
    if not isinstance(sampler, Sampler | None):
        raise ValueError(
            "sample: sampler must be an instance such as NUTS() or GibbsWithGradients(), got "
            f"{sampler!r}."
        )
    place = check_device(device)
    arguments = as_batch(batch, model, device=place)
    start = time.perf_counter()
    with (
        moved(place, model, init),
        own_parameters(model, init),
        _frozen(model),
        torch.enable_grad(),
        evaluation_mode(model, init),
        seeded(seed),
    ):
        size = len(arguments[0]) if arguments else 1
        if isinstance(sampler, SGHMC):
            _check_rows(model, sampler, arguments, rows=rows)
        seen = sampler.batch_size if isinstance(sampler, SGHMC) else size
        table = check_model(model, arguments, plate=plate, rows=seen, tries=STARTS)
        check_data(model, arguments)
        with suppress(Exception), seeded(0), torch.no_grad(), poutine.block():
            # What it makes by pyro.param is made in its own precision.
            model(*(value[:seen] for value in arguments))
        _check_latents(model, table, sampler, rows=rows)
        task = _Task(
            sampler=NUTS() if sampler is None else sampler,
            chains=chains,
            draws=draws,
            warmup=warmup,
            seed=seed if seed is not None else int(torch.randint(2**31, ())),
            compile=compile,
            init=init,
        )
        axes = {
            site.name: site.data_dim - len(site.event_shape)
            for site in table.latents
            if site.data_dim is not None
        }
        at_once = _rows_at_once(table, size, task) if rows else size
        _check_memory(table, chains * draws)
        label = progress if isinstance(progress, str) else "sample"
        show = True if isinstance(progress, str) else progress
        firsts = [min(first, size - at_once) for first in range(0, size, at_once)]
        outcomes: list[_Outcome] = []
        with progress_bar(len(firsts) * (warmup + draws), label, show) as bar:
            for number, first in enumerate(firsts):
                part = tuple(value[first : first + at_once] for value in arguments)
                density = density_of(
                    model,
                    tuple(value[:seen] for value in part),
                    table,
                    rows=rows,
                    plate=plate,
                    double=not (task.nuts and task.nuts.float32),
                    whole=part if seen < size else None,
                )
                before = number * (warmup + draws)
                outcome = task.run(
                    density,
                    part,
                    first if rows else None,
                    lambda done, status, before=before: bar(before + done, status),
                )
                known = number * at_once - first  # rows of the last part that others had
                outcomes.append(outcome.without(known, axes) if known else outcome)
                if outcome.interrupted and number < len(firsts) - 1:
                    raise KeyboardInterrupt  # the other rows have no draws yet
    discrete = [site.name for site in table.latents if site.discrete]
    lost = [chain for part in outcomes for chain in part.lost]
    if lost:
        warnings.warn(f"sample: {too_long(lost, chains)}", RuntimeWarning, stacklevel=2)
    return _posterior(outcomes, axes, discrete, task, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class _Outcome:
    """What a run has come to: values (chains, draws, ...), and statistics of each transition.

    These have shape (chains, draws), or (chains, draws, rows).
    """

    values: dict[str, Tensor]
    statistics: dict[str, Tensor]
    step_size: Tensor | None  # (chains,) or (chains, rows)
    noise: float | None  # of gradients
    rung: str
    interrupted: bool
    restarted: int
    warmup_seconds: float
    sampling_seconds: float

    @property
    def lost(self) -> list[int]:
        """Chains of stochastic gradients that are at no finite place any more."""
        if self.noise is None:
            return []
        return self.statistics["divergent"].any(1).nonzero().flatten().tolist()

    def without(self, rows: int, axes: dict[str, int]) -> _Outcome:
        """Return it without the first rows."""
        return replace(
            self,
            values={
                name: value.narrow(axes[name], rows, value.shape[axes[name]] - rows)
                for name, value in self.values.items()
            },
            statistics={name: value[..., rows:] for name, value in self.statistics.items()},
            step_size=None if self.step_size is None else self.step_size[..., rows:],
        )


@dataclass(frozen=True)
class _Task:
    """What is asked for, of the joint posterior or of some rows."""

    sampler: Sampler
    chains: int
    draws: int
    warmup: int
    seed: int
    compile: Compile
    init: Callable[..., Any] | None

    @property
    def nuts(self) -> NUTS | None:
        """What moves continuous latents by trajectories."""
        if isinstance(self.sampler, GibbsWithGradients):
            return self.sampler.nuts
        return self.sampler if isinstance(self.sampler, NUTS) else None

    def run(
        self,
        density: Density,
        batch: Batch,
        first_row: int | None,
        report: Callable[[int, str], None],
    ) -> _Outcome:
        """Sample a density, whose first row has some number among all rows."""
        targets, device = density.targets, density.device
        ids = torch.arange(self.chains, device=device).repeat_interleave(targets)
        if first_row is not None:
            row = torch.arange(first_row, first_row + targets, device=device)
            ids = ids + (row << 20).repeat(self.chains)
        first_metric = None
        report(0, "preparing")
        if self.init is None:
            positions = anywhere(density, ids, self.seed)
        else:
            positions, first_metric = at_guide(density, self.init, batch, self.chains, self.seed)
        slots = max(self.draws, *(window.transitions for window in windows(self.warmup)), 1)
        engine, expected = self._engine(
            density, positions, ids, slots, len(batch[0]) if batch else 1
        )
        if self._compiles(expected, 0, len(ids)):
            engine.compile(lambda: _waited(report, 0))
        groups = groups_of(self.chains, targets, device)
        if first_metric is not None:
            engine.learn(first_metric, torch.arange(targets, device=device).repeat(self.chains))

        def watch(made: int) -> bool:
            report(made, engine.status())
            return True

        def look_again(made: int, seen: Draws) -> None:
            leaves = seen.leaves.sum(1).max().item() / len(seen)
            if self._compiles(leaves, made, len(ids)):
                engine.compile(lambda: _waited(report, made))

        ready = time.perf_counter()
        if isinstance(engine, Chains):
            half = self.warmup // 2
            made = len(engine.run(half, adapts=False, watch=watch))
            if made == half:
                engine.settle()
                made += len(
                    engine.run(
                        self.warmup - half, adapts=False, watch=lambda now: watch(half + now)
                    )
                )
            if made < self.warmup:
                raise KeyboardInterrupt
        elif bool(density.binary.all()):  # nothing to adapt
            if len(engine.run(self.warmup, adapts=False, watch=watch)) < self.warmup:
                raise KeyboardInterrupt
        elif not warm_up(engine, groups, windows(self.warmup), watch, look_again):
            raise KeyboardInterrupt
        noise = engine.noise() if isinstance(engine, Chains) else None
        warm = time.perf_counter()
        # Of rows in blocks only those draws are kept that all blocks have made.
        often: dict[str, Any] = (
            {} if first_row is None or not isinstance(engine, Engine) else {"part": ROUND}
        )
        draws = engine.run(
            self.draws, adapts=False, watch=lambda made: watch(self.warmup + made), **often
        )
        end = time.perf_counter()
        if len(draws) < min(4, self.draws):
            raise KeyboardInterrupt

        def shaped(value: Tensor) -> Tensor:  # (C, n, ...) to (chains, n, [rows,] ...)
            value = value.unflatten(0, (self.chains, targets))
            return value.squeeze(1) if first_row is None else value.transpose(1, 2)

        statistics = {"accept": draws.accept, "divergent": draws.divergent}
        step = None
        if isinstance(engine, Chains):
            step = engine.step_size
        elif not bool(density.binary.all()):
            step = engine.tuning.step.clone().unflatten(0, (self.chains, targets))
            step = step.squeeze(1) if first_row is None else step
            statistics["depth"] = draws.depth
        if isinstance(engine, Engine):
            statistics |= {"leapfrogs": draws.leaves, "energy": draws.energy}
        return _Outcome(
            density.constrain(shaped(draws.u)),
            {name: shaped(value) for name, value in statistics.items()},
            step,
            noise,
            engine.rung
            if density.reason is None
            else f"{engine.rung}; one by one: {density.reason}",
            len(draws) < self.draws,
            engine.restarted,
            warmup_seconds=warm - ready,
            sampling_seconds=end - warm,
        )

    def _engine(
        self, density: Density, positions: Tensor, ids: Tensor, slots: int, size: int
    ) -> tuple[Engine | Gibbs | Chains, float]:
        """Return the chains, and how many ticks a transition is expected to take."""
        if isinstance(self.sampler, SGHMC):
            chains = Chains(
                density,
                positions,
                sampler=self.sampler,
                size=size,
                seed=self.seed,
                ids=ids,
                slots=slots,
            )
            return chains, self.sampler.thin
        if isinstance(self.sampler, GibbsWithGradients):
            chains = Gibbs(
                density, positions, sampler=self.sampler, seed=self.seed, ids=ids, slots=slots
            )
            return chains, chains.flips
        engine = Engine(
            density,
            positions,
            seed=self.seed,
            ids=ids,
            depth=self.sampler.max_depth,
            target=self.sampler.target_accept,
            slots=slots,
            dense=self.sampler.dense,
            steady=True,
            rows=self._rows_in_cache(density),
        )
        return engine, TREE

    def _rows_in_cache(self, density: Density) -> int:
        """How many rows a compiled loop takes at a time on a CPU; 0 for all of them.

        As many as a core's own cache holds; then also fewer wait for the longest trajectories.
        """
        if density.targets == 1 or density.reason is not None or density.device.type != "cpu":
            return 0
        depth = self.nuts.max_depth if self.nuts else 0
        column = 8 * density.size + (20 + 4 * depth) * density.dim
        most = max(COLUMNS, CACHED // column) // self.chains
        return 0 if density.targets <= 1.5 * most else _even(density.targets, most)

    def _compiles(self, leaves: float, made: int, columns: int) -> bool:
        """Whether the compiler pays, given the leapfrog steps of a transition and how many are made."""
        ticks = leaves * (self.warmup + self.draws - made)
        pays = ticks * columns >= LEAPFROGS and ticks >= TICKS
        return self.compile == "now" or (self.compile is True and pays)


def _waited(report: Callable[[int, str], None], made: int) -> bool:
    """Wait a little for the compiler."""
    report(made, "compiling")
    time.sleep(0.02)
    return True


def _posterior(
    outcomes: list[_Outcome],
    axes: dict[str, int],
    discrete: list[str],
    task: _Task,
    seconds: float,
) -> Posterior:
    """Put the rows together again."""
    first = outcomes[0]
    values, statistics, step_size = first.values, first.statistics, first.step_size
    if len(outcomes) > 1:
        values = {
            name: torch.cat([part.values[name] for part in outcomes], axis)
            for name, axis in axes.items()
        }
        statistics = {
            name: torch.cat([part.statistics[name] for part in outcomes], -1) for name in statistics
        }
        steps = [part.step_size for part in outcomes if part.step_size is not None]
        step_size = torch.cat(steps, -1) if steps else None
    accept = statistics["accept"].double().flatten(1).mean(1)
    return Posterior(
        values,
        **{name: value for name, value in statistics.items() if name != "accept"},
        accept=accept,
        step_size=step_size,
        max_depth=task.nuts and task.nuts.max_depth,
        target_accept=task.nuts and task.nuts.target_accept,
        gradient_noise=first.noise,
        interrupted=first.interrupted,
        restarted=sum(part.restarted for part in outcomes),
        compiled=first.rung,
        row_axis=axes,
        discrete=discrete,
        seconds=seconds,
        warmup_seconds=sum(part.warmup_seconds for part in outcomes),
        sampling_seconds=sum(part.sampling_seconds for part in outcomes),
        warmup=task.warmup,
    )


def _rows_at_once(table: SiteTable, size: int, task: _Task) -> int:
    """How many rows can be sampled together: as many in each part, but for a few in the last."""
    numbers = sum(site.value.numel() for site in table) / size
    latents = sum(site.value.numel() for site in table.latents) / size
    depth = task.nuts.max_depth if task.nuts else 0
    column = 8 * numbers + (20 + 4 * depth + PART) * latents
    most = max(1, int(NUMBERS / (column * task.chains)))
    return _even(size, most)


def _even(size: int, most: int) -> int:
    """Return into parts of which size to divide, when none is to be larger than `most`."""
    return -(-size // -(-size // max(1, most)))


def _check_memory(table: SiteTable, draws: int) -> None:
    """Refuse draws that would not fit, before they are made."""
    need = 16.0 * draws * sum(site.value.numel() for site in table.latents)
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return  # not told on this system
    if need > free:
        raise ValueError(
            f"sample: {draws:,} draws of all chains need about {need / 2**30:.0f} GiB, and this "
            f"machine has {free / 2**30:.0f}. Ask for fewer draws, chains or rows."
        )


def _instead(site: Site) -> str:
    """What to do with a discrete latent that NUTS cannot sample."""
    flips = "Use sampler=GibbsWithGradients(), which flips binary latents. Or: " * is_binary(
        site.fn
    )
    if isinstance(site.fn, Independent):
        return flips + (
            "Pyro does not sum over all states of several elements at once: fit a guide instead, "
            "as in fit(..., objective=ELBO(2, score=LeaveOneOut())), or make each element a site "
            "of its own that is marked to be summed out."
        )
    if not getattr(base_distribution(site.fn), "has_enumerate_support", False):
        return (
            "Its values have no end, so that they cannot be summed over: fit a guide instead, as in "
            "fit(..., objective=ELBO(2, score=LeaveOneOut())), or give it an upper bound, as a "
            "Categorical has."
        )
    return flips + (
        "Mark it to be summed out, pyro.sample(..., infer={'enumerate': 'parallel'}), or fit a "
        "guide instead."
    )


def _check_latents(
    model: Callable[..., Any], table: SiteTable, sampler: Sampler | None, *, rows: bool
) -> None:
    name = describe_program(model)
    if not table.latents:
        raise ValueError(
            f"sample: {name} has no latent left to sample; its sites are "
            f"{[site.name for site in table]}, all observed or enumerated."
        )
    flips = isinstance(sampler, GibbsWithGradients)
    for site in table.latents:
        if site.discrete and not (flips and is_binary(site.fn)):
            what = (
                "GibbsWithGradients needs binary or continuous"
                if flips
                else f"{'SGHMC' if isinstance(sampler, SGHMC) else 'NUTS'} needs continuous"
            )
            raise ValueError(
                f"sample: {what} latents, but site '{site.name}' is discrete "
                f"({describe(site.support)}). {_instead(site)}"
            )
    if flips and not any(site.discrete for site in table.latents):
        raise ValueError(
            f"sample: GibbsWithGradients flips binary latents, and {name} has none: its latents are "
            f"{[site.name for site in table.latents]}. Use sampler=NUTS()."
        )
    if isinstance(sampler, SGHMC):
        _check_shared(model, table)
    if rows and not table.row_wise:
        raise ValueError(
            f"sample: rows=True needs a model with a plate over rows, but no site of {name} is "
            f"inside plate '{table.plate}'. Use rows=False for the joint posterior."
        )
    if rows and table.globals:
        raise ValueError(
            "sample: rows=True takes each row's latents by themselves, but "
            f"{[site.name for site in table.globals]} are shared by all rows of {name}. "
            "Use rows=False for the joint posterior."
        )


def _check_rows(model: Callable[..., Any], sampler: SGHMC, batch: Batch, *, rows: bool) -> None:
    """Refuse data of which there are no minibatches."""
    if rows:
        raise ValueError(
            "sample: SGHMC takes minibatches of rows for latents that all rows share, so that "
            "rows=True, which makes each row a target of its own, does not apply. Use NUTS()."
        )
    if not batch:
        raise ValueError(
            f"sample: SGHMC takes minibatches of rows, but {describe_program(model)} was given no "
            "data. Use NUTS()."
        )
    if sampler.batch_size > len(batch[0]):
        raise ValueError(
            f"sample: SGHMC needs batch_size to be at most the number of rows, {len(batch[0])}, got "
            f"{sampler.batch_size}."
        )


def _check_shared(model: Callable[..., Any], table: SiteTable) -> None:
    """Refuse latents that SGHMC cannot sample from minibatches."""
    name = describe_program(model)
    marked = [site.name for site in table if site.enumerated]
    local = [site.name for site in table.latents if site.local]
    if marked:
        raise ValueError(
            f"sample: SGHMC cannot sum out discrete latents on minibatches, but {name} marks "
            f"{marked} for enumeration. Sum them in the model's densities (pyro.distributions."
            "MixtureSameFamily), or use NUTS()."
        )
    if local:
        raise ValueError(
            f"sample: SGHMC samples latents that all rows share, but {local} of {name} are inside "
            f"plate '{table.plate}', one for each row. Use NUTS(), or fit a guide."
        )
    if not table.row_wise:
        raise ValueError(
            f"sample: SGHMC scales the rows of a minibatch up to all rows, but no site of {name} is "
            f"inside plate '{table.plate}'. Write `with pyro.plate(\"{table.plate}\", len(x)):` "
            "around the rows, name the plate with plate=, or use NUTS()."
        )


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Spare the sampler the gradients of parameters."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

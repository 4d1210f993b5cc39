"""Expectation maximisation: infer the latents of each row, then the parameters, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ppl_models.core.batch import as_batch, check_model, check_programs
from ppl_models.core.checks import check_count, check_positive
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.sites import Site, SiteTable, describe_program, recorded
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.traces import PARTICLES, draw_latents, joint_table, run_pair, vectorizes
from ppl_models.core.types import Batch
from ppl_models.infer.mcmc.run import Sampler, sample
from ppl_models.infer.objectives import ELBO, Bound
from ppl_models.infer.progress import progress_bar
from ppl_models.infer.step import Diverged
from ppl_models.infer.svi import interruptible, make_optimiser, named_step, trainable

Draws = Mapping[str, Tensor]
MStep = Callable[..., Any]


@dataclass(frozen=True)
class VariationalE:
    """Infer the latents by gradient steps on the bound, the parameters of the model fixed.

    Arguments:
        guide: For all rows of the data, such as `Local(model, rows=len(x))`. It goes on from one
            iteration to the next. One without parameters of its own, such as `Exact`, makes the EM
            of models whose posterior is known.
        steps: Gradient steps in an iteration.
        lr: Learning rate of Adam.
        objective: The bound.
        draws: Draws of the guide in each step for the parameters.
    """

    guide: Callable[..., Any]
    steps: int = 10
    lr: float = 0.05
    objective: Bound = field(default_factory=ELBO)
    draws: int = 8


@dataclass(frozen=True)
class MonteCarloE:
    """Infer the latents by sampling their posterior in each row, the parameters fixed.

    Chains start at draws of the iteration before, so a short warm-up serves.

    Arguments:
        sampler: As in `sample`.
        chains: Chains for each row.
        draws: Draws of each chain, 4 or more.
        warmup: Transitions before them.
    """

    sampler: Sampler | None = None
    chains: int = 4
    draws: int = 5
    warmup: int = 20


@dataclass(frozen=True)
class EM:
    """What `expectation_maximization` did. The model, and the guide if any, were trained in place.

    Attributes:
        model: The model.
        complete: Mean over the draws of the log density of data and latents after each iteration,
            nats per row, shape (iterations,), float64. It is no bound: the entropy is not in it.
        bounds: The bound after each E-step, nats per row, shape (iterations,), float64; None with
            `MonteCarloE`, which has none.
        iterations: E-steps taken, and M-steps.
        seconds: Time taken, in seconds.
        interrupted: Whether Ctrl-C or a callback ended it early.
    """

    model: Callable[..., Any] = field(repr=False)
    complete: Tensor = field(repr=False)
    bounds: Tensor | None = field(repr=False)
    iterations: int
    seconds: float
    interrupted: bool


def expectation_maximization(
    model: Callable[..., Any],
    data: Any,
    e_step: VariationalE | MonteCarloE,
    *,
    iterations: int = 100,
    m_step: MStep | None = None,
    steps: int = 10,
    lr: float = 1e-2,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    seed: int | None = None,
    plate: str = "data",
    progress: bool | str | None = None,
    callbacks: Sequence[Callable[[int, float], Any]] = (),
) -> EM:
    r"""Maximise the likelihood of the parameters :math:`\theta` of a model, row by row.

    Each iteration takes an E-step, which infers the latents of every row given :math:`\theta`, by
    variational inference or by Markov chain Monte Carlo, and an M-step, which raises

    .. math::

        Q(\theta) = \frac{1}{S} \sum_{s=1}^S \log p_\theta(x, z^{(s)})

    over draws of these latents: by gradient steps, or at once where the maximum is known. Ctrl-C
    ends it after the iteration under way.

    Arguments:
        model: Any Pyro model with parameters.
        data: As in `fit`; every iteration takes all rows.
        e_step: `VariationalE(guide)` for variational EM, `MonteCarloE()` for Monte Carlo EM.
        iterations: E-steps, and M-steps.
        m_step: Sets the parameters to the maximum of Q, called as `m_step(model, *batch, **draws)`
            with the draws of each site, shape (S, N, *event): such as `PPCA.maximize`. By default,
            gradient steps.
        steps: Gradient steps of an M-step.
        lr: Their learning rate.
        optimizer: Makes their torch optimiser from parameters and `lr`.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.
        progress: Whether to show a bar, or a label for it; None shows it on a terminal.
        callbacks: Called after each iteration with its number, from 1, and its `complete`; one that
            returns True ends it.

    Raises:
        ValueError: If an argument is out of range, the data are not what the model describes, the
            guide does not fit the model, there is nothing to train, or, with `MonteCarloE`, the
            model has latents outside of the plate over rows. Nothing has changed then.
        FloatingPointError: If a bound, Q or a gradient of them is not finite, or a distribution
            refuses its parameters. The parameters are those before that gradient step.

    Source:
        Dempster, Laird & Rubin (1977), https://doi.org/10.1111/j.2517-6161.1977.tb01600.x;
        Wei & Tanner (1990), https://doi.org/10.1080/01621459.1990.10474930; Neal & Hinton (1998),
        https://doi.org/10.1007/978-94-011-5014-9_12

    Example:
        >>> from guides import Local
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=64)
        >>> inner = VariationalE(Local(model, rows=64))
        >>> expectation_maximization(model, x, inner, iterations=3, seed=0).iterations
        3
    """
    caller = "expectation_maximization"
    _check_choices(caller, e_step, iterations, steps, lr, m_step)
    guide = e_step.guide if isinstance(e_step, VariationalE) else None
    programs = {"guide": guide} if isinstance(e_step, VariationalE) else {}
    check_programs(caller, model=model, **programs)
    batch = as_batch(data, model, *(() if guide is None else (guide,)))
    rows = len(batch[0]) if batch else 1
    with (
        own_parameters(model, guide),
        seeded(seed),
        torch.enable_grad(),
        evaluation_mode(model, guide),
    ):
        with unchanged_on_error():
            table = check_model(model, batch, plate=plate, rows=rows)
            theta = _parameters(model, batch)
            if not theta:
                raise ValueError(
                    f"{caller}: there is nothing to train, as {describe_program(model)} has no "
                    "parameter with requires_grad=True."
                )
            infer: _Variational | _MonteCarlo
            if isinstance(e_step, VariationalE):
                infer = _Variational(e_step, model, batch, theta, plate)
            elif table.globals:
                raise ValueError(
                    f"{caller}: MonteCarloE samples each row's latents by themselves, but "
                    f"{[site.name for site in table.globals]} are global. Use VariationalE(guide), "
                    "or sample(model, x) for the joint posterior."
                )
            else:
                infer = _MonteCarlo(e_step, model, batch, table, plate)
            climb = make_optimiser(caller, optimizer, theta, lr)
        score = _Complete(model, batch, table)
        complete: list[float] = []
        bounds: list[float] = []
        label = progress if isinstance(progress, str) else "EM"
        show = True if isinstance(progress, str) else progress
        start = time.perf_counter()
        with progress_bar(iterations, label, show) as bar, interruptible() as interrupted:
            while len(complete) < iterations and not interrupted.is_set():
                with named_step(caller, len(complete) + 1, "iteration"):
                    bound = infer()
                    draws = infer.draw()
                    if m_step is not None:
                        with torch.no_grad():
                            m_step(model, *batch, **draws)
                    else:
                        for _ in range(steps):
                            _ascend(climb, theta, score(draws) / rows, "Q")
                            draws = infer.draw()
                    with torch.no_grad():
                        complete.append(score(draws).item() / rows)
                bounds += [] if bound is None else [bound / rows]
                bar(len(complete), f"complete data {complete[-1]:.4g} nats/row")
                for callback in callbacks:
                    if callback(len(complete), complete[-1]) is True:
                        interrupted.set()
    return EM(
        model=model,
        complete=torch.tensor(complete, dtype=torch.float64),
        bounds=None if guide is None else torch.tensor(bounds, dtype=torch.float64),
        iterations=len(complete),
        seconds=time.perf_counter() - start,
        interrupted=interrupted.is_set(),
    )


class _Variational:
    """The E-step by a guide, which is trained in place."""

    def __init__(
        self,
        options: VariationalE,
        model: Callable[..., Any],
        batch: Batch,
        theta: list[Tensor],
        plate: str,
    ) -> None:
        self.options, self.model, self.batch = options, model, batch
        run_pair(model, options.guide, *batch)  # checks that the sites agree
        known = {id(value) for value in theta}
        found = _parameters(options.guide, batch)
        self.leaves = [value for value in found if id(value) not in known]
        self.objective = options.objective.prepare(model, options.guide, *batch, plate=plate)
        self.leaves += self.objective.parameters()
        table, dims = joint_table(model, options.guide, *batch, plate=plate)
        self.shapes = {site.name: (*site.batch_shape, *site.event_shape) for site in table.latents}
        self.dim = -1 - dims
        with torch.no_grad():
            self.at_once = vectorizes(model, options.guide, *batch, dim=self.dim)
        self.climb = torch.optim.Adam(self.leaves, lr=options.lr) if self.leaves else None

    def __call__(self) -> float:
        """Take the steps of an iteration; return the bound, in nats in total."""
        if self.climb is not None:
            for _ in range(self.options.steps):
                surrogate, _ = self._bound()
                _ascend(self.climb, self.leaves, surrogate / len(self.batch[0]), "the bound")
        with torch.no_grad():
            return self._bound()[1].item()

    def draw(self) -> Draws:
        """Return draws of each site, shape (S, *batch, *event)."""
        guide, count = self.options.guide, self.options.draws
        with torch.no_grad():
            if not self.at_once:
                each = [draw_latents(guide, *self.batch) for _ in range(count)]
                return {name: torch.stack([one[name] for one in each]) for name in self.shapes}
            drawn = draw_latents(guide, *self.batch, particles=count, dim=self.dim)
            return {name: drawn[name].reshape(count, *s) for name, s in self.shapes.items()}

    def _bound(self) -> tuple[Tensor, Tensor]:
        return self.objective(self.model, self.options.guide, *self.batch)


class _MonteCarlo:
    """The E-step by sampling."""

    def __init__(
        self,
        options: MonteCarloE,
        model: Callable[..., Any],
        batch: Batch,
        table: SiteTable,
        plate: str,
    ) -> None:
        self.table = table
        self.draws: Draws = {}
        self.sample = partial(
            sample,
            model,
            *batch,
            sampler=options.sampler,
            chains=options.chains,
            draws=options.draws,
            rows=True,
            compile=False,  # each iteration has parameters of its own, and few transitions
            plate=plate,
            progress=False,
        )
        self.warmup = options.warmup
        self()  # says what does not fit; from (-2, 2), so that the next one starts where mass is

    def __call__(self) -> None:
        """Draw from the posterior of each row."""
        seed = int(torch.randint(2**31, ()))
        init = partial(_again, self.draws) if self.draws else None
        found = self.sample(warmup=self.warmup, init=init, seed=seed)
        self.draws = {
            name: _rounded(value.flatten(0, 1), self.table[name]) for name, value in found.items()
        }

    def draw(self) -> Draws:
        """Return draws of each site, shape (S, *batch, *event)."""
        return self.draws


def _rounded(value: Tensor, site: Site) -> Tensor:
    """Round draws, which are in double precision, to that of the model, but nothing to 0."""
    rounded = value.to(site.value.dtype)
    if site.discrete:
        return rounded
    least = torch.full_like(rounded, torch.finfo(rounded.dtype).tiny).copysign(rounded)
    return torch.where(rounded.abs() < least.abs(), least, rounded)


def _again(draws: Draws, *batch: Tensor) -> None:
    """Repeat one of some draws: a guide to start chains at."""
    which = int(torch.randint(len(next(iter(draws.values()))), ()))
    for name, value in draws.items():
        pyro.sample(name, dist.Delta(value[which], event_dim=value.ndim - 1))


class _Complete:
    """The mean over draws of the log density of data and latents, in nats in total."""

    def __init__(self, model: Callable[..., Any], batch: Batch, table: SiteTable) -> None:
        self.model, self.batch = model, batch
        self.event_dims = {site.name: len(site.event_shape) for site in table.latents}
        self.dims = table.plate_dims
        prior = poutine.block(model, hide=[site.name for site in table.observed])
        with torch.no_grad():
            self.at_once = vectorizes(model, prior, *batch, dim=-1 - self.dims)

    def __call__(self, draws: Draws) -> Tensor:
        count = len(next(iter(draws.values())))
        if not self.at_once:
            each = [{name: value[s] for name, value in draws.items()} for s in range(count)]
            return torch.stack([self._score(one) for one in each]).mean()
        aligned = {}
        for name, value in draws.items():
            batch_dims = value.ndim - 1 - self.event_dims[name]
            ones = (1,) * (self.dims - batch_dims)
            aligned[name] = value.reshape(count, *ones, *value.shape[1:])
        with pyro.plate(PARTICLES, count, dim=-1 - self.dims):
            return self._score(aligned) / count

    def _score(self, values: Draws) -> Tensor:
        with recorded(self.model) as told, poutine.condition(data=dict(values)):
            self.model(*self.batch)
        return torch.as_tensor(told.trace.log_prob_sum())  # a float where there is no site


def _parameters(program: Callable[..., Any], batch: Batch) -> list[Tensor]:
    """What a program trains: parameters of modules, and whatever `pyro.param` is asked for."""
    with torch.no_grad(), recorded(program) as run:
        program(*batch)
    return list({id(value): value for value in trainable(program, run.trace)}.values())


def _ascend(climb: Optimizer, leaves: list[Tensor], value: Tensor, what: str) -> None:
    """Take a gradient step up."""
    slopes = torch.autograd.grad(-value, leaves, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([slope for slope in slopes if slope is not None])
    if not (torch.isfinite(value) and torch.isfinite(norm)):
        raise Diverged(
            f"{what} is {value.item():.4g} and the norm of its gradient {norm.item():.4g}"
        )
    for leaf, slope in zip(leaves, slopes, strict=True):
        leaf.grad = slope
    climb.step()
    climb.zero_grad(set_to_none=True)


def _check_choices(
    caller: str, e_step: Any, iterations: int, steps: int, lr: float, m_step: Any
) -> None:
    if not isinstance(e_step, VariationalE | MonteCarloE):
        raise ValueError(
            f"{caller}: e_step must be VariationalE(guide) or MonteCarloE(), got {e_step!r}."
        )
    counts = {"iterations": iterations, "steps": steps}
    rates = {"lr": lr}
    if isinstance(e_step, VariationalE):
        counts |= {"steps of the E-step": e_step.steps, "draws of the E-step": e_step.draws}
        rates["lr of the E-step"] = e_step.lr
        if not isinstance(e_step.objective, Bound):
            raise ValueError(
                f"{caller}: objective of the E-step must be a bound of ppl_models.infer, such as "
                f"ELBO(), got {e_step.objective!r}."
            )
    for name, count in counts.items():
        check_count(caller, name, count)
    for name, rate in rates.items():
        check_positive(caller, name, rate)
    if m_step is not None and not callable(m_step):
        raise ValueError(
            f"{caller}: m_step must be called as m_step(model, *batch, **draws), got {m_step!r}."
        )

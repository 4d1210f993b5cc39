"""What a conditional model predicts, how far to trust it, and why no further."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import one_hot

from ppl_models.core.batch import arguments_of, as_batch, check_model, check_programs
from ppl_models.core.checks import check_count, check_known
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded
from ppl_models.core.sites import SiteTable, base_distribution, describe_program, site_table
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.traces import draw_latents, keep
from ppl_models.core.types import Batch, Distribution, Points
from ppl_models.evaluate.estimate import Estimate
from ppl_models.infer.mcmc.predictive import MEMORY, Made, at_once, thinned

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = 100  # of draws, whose means tell the error of the mean of all


@dataclass(frozen=True)
class Prediction:
    r"""A posterior predictive distribution, row by row.

    The variance of a new :math:`y` is what is left when the latents :math:`w` are known, and how
    much they matter while they are not:

    .. math::

        \mathrm{var}(y) = \underbrace{\mathbb{E}_w[\mathrm{var}(y \mid w)]}_{\text{aleatoric}}
        + \underbrace{\mathrm{var}_w(\mathbb{E}[y \mid w])}_{\text{epistemic}}

    Attributes:
        mean: Predictive mean, shape (N, *event); for classes their probabilities, (N, C).
        aleatoric: Root of the first term, in the units of y, shape of `mean`. More data of the
            same kind leave it as it is.
        epistemic: Root of the second, which more data make smaller.
        log_density: Of each given y, nats per row: the log of the mean of the density over draws.
            None where no y was given.
        draws: Draws of the latents.
        levels: For each given y, where it falls among as many predictive draws, between 0 and 1:
            uniform if the predictions are calibrated. None without y, and for classes.
        hits: For given classes, 1 at the class of each row, (N, C).
    """

    mean: Tensor = field(repr=False)
    aleatoric: Tensor = field(repr=False)
    epistemic: Tensor = field(repr=False)
    log_density: Estimate | None
    draws: int
    levels: Tensor | None = field(default=None, repr=False)
    hits: Tensor | None = field(default=None, repr=False)

    @property
    def scale(self) -> Tensor:
        """Predictive standard deviation: both terms together."""
        return (self.aleatoric.square() + self.epistemic.square()).sqrt()

    def plot(self, *, ax: Axes | None = None) -> Figure:
        """Draw how often what was predicted came true.

        For numbers, the share of rows whose y lies below each predictive quantile, with the band
        that 95 % of calibrated curves keep within all along; for classes, how often a class was the
        one against its predicted probability.

        Arguments:
            ax: Axes to draw into, such as `plt.gca()` for a window; by default a new picture,
                which shows itself in a notebook and has `savefig`.

        Raises:
            ValueError: If no y was given.
        """
        if self.levels is None and self.hits is None:
            raise ValueError(
                "Prediction.plot compares predictions with what came true: give y to `predict`."
            )
        from ppl_models.evaluate.plots import plot_calibration

        return plot_calibration(self, ax=ax)


def predict(
    model: Callable[..., Any],
    posterior: Callable[..., Any] | Mapping[str, Tensor],
    x: Any,
    y: Any = None,
    *,
    draws: int = 1000,
    site: str | None = None,
    seed: int | None = None,
    plate: str = "data",
) -> Prediction:
    r"""Predict rows by the mean over the posterior, and split the doubt into its two kinds.

    .. math::

        \log p(y_n \mid x_n, \mathrm{data}) \approx
        \log \frac{1}{S} \sum_s p(y_n \mid x_n, w_s)

    Draws are taken in chunks that keep within a quarter of a gibibyte, and only sums are kept.

    Arguments:
        model: A conditional Pyro model, `model(x, y=None)`, that draws y where it is not given.
        posterior: A guide, which is called with `x` alone; an ensemble, of which each member is
            taken once; or draws of the latents, as `sample` returns them, shape (chains, draws,
            ...).
        x: Covariates; a tuple for several arguments.
        y: What was observed there, to be scored.
        draws: Draws of the latents; of a posterior with more, as many, evenly over all. Not used
            for an ensemble, whose predictions are exact.
        site: Name of the site of y, if the model observes several.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.

    Returns:
        Means, scales and log densities. The error of a log density is of first order, by the means
        of up to 100 groups of draws; of a chain's draws, which hang together, of longer groups.

    Raises:
        ValueError: If the data are not what the model describes, the posterior does not have its
            latents, or y is not inside the plate over rows or has no mean.

    Example:
        >>> from guides import Local
        >>> from ppl_models import BayesianNeuralNetwork
        >>> model = BayesianNeuralNetwork(data_dim=3, hidden=(8,))
        >>> x, y = torch.randn(20, 3), torch.randn(20)
        >>> found = predict(model, Local(model, example=(x, y)), x, y, draws=10)
        >>> found.mean.shape, found.log_density.rows.shape
        (torch.Size([20]), torch.Size([20]))
    """
    check_count("predict", "draws", draws)
    guide = None if isinstance(posterior, Mapping) else posterior
    check_programs("predict", model=model, **({} if guide is None else {"guide": guide}))
    programs = [model] if guide is None else [model, guide]
    if isinstance(posterior, Mapping) and not posterior:
        raise ValueError("predict: posterior must hold draws of the latents, got none at all.")
    covariates = arguments_of(x)
    with own_parameters(*programs), seeded(seed), evaluating(*programs), unchanged_on_error():
        given = as_batch(covariates if y is None else (*covariates, y), *programs)
        batch = given[: len(covariates)]
        table = check_model(model, given, plate=plate, rows=len(batch[0]))
        if y is not None:
            table = site_table(model, *batch, plate=plate)
        if isinstance(posterior, Mapping):
            kept = thinned(posterior, draws)
            draws = len(next(iter(kept.values())))
            groups = max(2, math.isqrt(draws))
            source = ({key: value[i] for key, value in kept.items()} for i in range(draws))
        elif isinstance(posterior, Points):
            members = posterior.members()
            draws = groups = len(next(iter(members.values())))
            source = ({key: value[i] for key, value in members.items()} for i in range(draws))
        else:
            guide, groups = posterior, GROUPS
            source = (draw_latents(guide, *batch) for _ in range(draws))
        first = next(source)
        name = _response(model, table, first, site)
        _check_draws(table, first)
        target = given[-1] if y is not None else None
        sums = _Sums(draws, min(groups, draws), target, is_all=isinstance(posterior, Points))
        for part in _chunks(_once(model, batch, table, name, target), first, source):
            sums.add(part)
        return sums.prediction(is_class=_is_class(table[name].fn))


def _response(
    model: Callable[..., Any], table: SiteTable, latents: Mapping[str, Tensor], site: str | None
) -> str:
    """Name the site of y: what is in the plate over rows and has no draws."""
    rest = [one for one in table.latents if one.name not in latents]
    if missing := [one.name for one in rest if not one.local]:
        raise ValueError(
            f"predict: latent {missing} of {describe_program(model)} has no draws; there are draws "
            f"of {list(latents)}."
        )
    known = [one.name for one in rest]
    if site is not None:
        check_known("observed site", site, known)
    if site is None and len(known) != 1:
        raise ValueError(
            f"predict: {describe_program(model)} must draw one site inside plate '{table.plate}' "
            f"when y is not given, got {known} beside the latents {list(latents)}. "
            + ("Name it with site=." if known else "Is y its last argument, and None by default?")
        )
    return site or known[0]


def _check_draws(table: SiteTable, draws: Mapping[str, Tensor]) -> None:
    for name, value in draws.items():
        check_known("latent", name, [site.name for site in table.latents])
        want, got = tuple(table[name].value.shape), tuple(value.shape)
        if want != got:
            raise ValueError(
                f"predict: latent '{name}' has shape {want} on these rows, but its draws have {got}. "
                "Local latents are known for the rows they were sampled on only."
            )


def _once(
    model: Callable[..., Any],
    batch: Batch,
    table: SiteTable,
    name: str,
    y: Tensor | None,
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what is to be known of the response given one draw of the latents."""
    rows = table[name].data_dim

    def once(values: dict[str, Tensor]) -> dict[str, Tensor]:
        with poutine.block(), poutine.trace() as record, poutine.condition(data=values):
            model(*batch)
        node: Any = record.trace.nodes[name]
        mean, variance = _moments(name, node["fn"])
        found = {"mean": mean, "variance": variance}
        if y is not None:
            found["log_density"] = keep(node["fn"].log_prob(y), rows)
            found["drawn"] = node["value"]
        return found

    return once


def _is_class(fn: Distribution) -> bool:
    classes = torch.distributions.Categorical, torch.distributions.OneHotCategorical
    return isinstance(base_distribution(fn), (*classes, torch.distributions.Bernoulli))


def _moments(name: str, fn: Distribution) -> tuple[Tensor, Tensor]:
    """Return mean and variance; of a code, those of the indicator of each class."""
    base = base_distribution(fn)
    if isinstance(base, torch.distributions.Categorical):
        probs = base.probs.expand(*fn.shape(), -1)
        return probs, probs * (1.0 - probs)
    try:
        return fn.mean, fn.variance
    except NotImplementedError as error:
        raise ValueError(
            f"predict: site '{name}' has a distribution without mean and variance, {base}."
        ) from error


def _chunks(
    once: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    first: dict[str, Tensor],
    source: Iterator[dict[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Run a function on each draw, as many at once as memory is meant for."""
    with Made() as made:
        found = once(first)
    if nans := int(found["mean"].isnan().sum()):
        raise ValueError(
            f"predict: y must have a mean, but {nans} of {found['mean'].numel()} are NaN. Does its "
            "distribution have none, as a Cauchy has, or does the network put out NaN?"
        )
    yield {key: value[None] for key, value in found.items()}
    used = made.bytes + sum(value.numel() * value.element_size() for value in first.values())
    size = max(1, MEMORY // max(1, used))
    together = size > 1
    while block := list(islice(source, size)):
        part = {key: torch.stack([draw[key] for draw in block]) for key in first}
        results = at_once(once, part) if together else None
        together = results is not None  # what `vmap` cannot do, the first chunk tells
        if results is not None:
            yield results
        else:
            for draw in block:
                yield {key: value[None] for key, value in once(draw).items()}


class _Sums:
    """Sums over draws, in float64."""

    def __init__(self, draws: int, groups: int, y: Tensor | None, *, is_all: bool) -> None:
        self.draws = draws
        self.is_all = is_all  # the posterior itself, and no sample of it
        self.seen = 0
        self.y = y
        # Neighbours are in one group: draws of a chain hang together.
        self.group = torch.arange(draws) * groups // draws
        self.sizes = torch.bincount(self.group, minlength=groups).double()
        self.parts: dict[str, Tensor] = {}

    def add(self, part: dict[str, Tensor]) -> None:
        """Add what some draws say, shape (draws, N, ...) each."""
        mean, group = part["mean"].double(), self.group[self.seen : self.seen + len(part["mean"])]
        self.seen += len(mean)
        if not self.parts:
            zeros = torch.zeros_like(mean[0])
            # Sums around the first mean: no cancellation.
            self.parts = {"pivot": mean[0].clone(), "total": zeros, "square": zeros, "noise": zeros}
        away = mean - self.parts["pivot"]
        self._plus("total", away.sum(0))
        self._plus("square", away.square().sum(0))
        self._plus("noise", part["variance"].double().sum(0))
        if self.y is None:
            return
        logs, drawn = part["log_density"].double(), part["drawn"]
        if "logs" not in self.parts:
            self.parts["logs"] = logs.new_full((len(self.sizes), logs.shape[1]), -math.inf)
            self.parts["below"] = self.parts["equal"] = torch.zeros_like(drawn[0]).double()
        for g in group.unique().tolist():
            more = logs[(group == g).to(logs.device)].logsumexp(0)
            self.parts["logs"][g] = torch.logaddexp(self.parts["logs"][g], more)
        self._plus("below", (drawn < self.y).double().sum(0))
        self._plus("equal", (drawn == self.y).double().sum(0))

    def prediction(self, *, is_class: bool) -> Prediction:
        """Return what the sums say."""
        parts, draws = self.parts, self.draws
        spread = parts["square"] - parts["total"].square() / draws
        mean = parts["pivot"] + parts["total"] / draws
        levels = hits = None
        if self.y is not None and is_class:
            shape = mean.shape
            hits = self.y if self.y.shape == shape else one_hot(self.y.long(), shape[-1])
            hits = hits.double()
        elif self.y is not None:
            ties = torch.rand_like(parts["below"]) * (parts["equal"] + 1.0)
            levels = (parts["below"] + ties) / (draws + 1.0)
        return Prediction(
            mean=mean,
            aleatoric=(parts["noise"] / draws).sqrt(),
            epistemic=(spread / max(1, draws - (not self.is_all))).clamp(min=0.0).sqrt(),
            log_density=None if self.y is None else self._log_density(),
            draws=draws,
            levels=levels,
            hits=hits,
        )

    def _log_density(self) -> Estimate:
        logs, count = self.parts["logs"], len(self.sizes)
        sizes = self.sizes.to(logs.device)
        rows = logs.logsumexp(0) - math.log(self.draws)
        if self.is_all:
            error, se = torch.zeros_like(rows), 0.0
        elif count < 2:
            error, se = torch.full_like(rows, math.nan), math.nan
        else:
            # How far the mean of each group is off, as a part of the mean of all.
            share = (sizes / self.draws).unsqueeze(-1)
            off = share * ((logs - sizes.log().unsqueeze(-1) - rows).exp() - 1.0)
            error = (off.square().sum(0) * count / (count - 1)).sqrt()
            # All rows see the same draws: their errors do not average out.
            se = math.sqrt(off.mean(1).square().sum().item() * count / (count - 1))
        bias = -error.square() / 2.0
        return Estimate(rows.mean().item(), se, rows, error, self.draws, bias.mean().item(), bias)

    def _plus(self, key: str, value: Tensor) -> None:
        self.parts[key] = self.parts[key] + value

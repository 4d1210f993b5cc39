"""Objectives: what `fit` ascends."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.sites import (
    accepts_size,
    base_distribution,
    describe_program,
    recorded,
    stochastic_nodes,
)
from ppl_models.core.traces import (
    PARTICLES,
    Pair,
    draw_latents,
    joint_table,
    keep,
    replayed_pair,
    run_pair,
    vectorizes,
)
from ppl_models.core.types import Refinable
from ppl_models.infer.dependencies import Dependencies, dependencies
from ppl_models.infer.gradients import (
    SCORES,
    Detached,
    DReG,
    Enumerate,
    Path,
    Reinforce,
    Run,
    Score,
    StickingTheLanding,
    Term,
)

_EXAMPLES = {"score": "LeaveOneOut()", "path": "StickingTheLanding()"}


@dataclass(frozen=True)
class Bound(abc.ABC):
    """What all bounds share: particles, and how gradients are estimated."""

    particles: int = 1
    vectorized: bool = True
    score: Score | None = None
    path: Path | None = None
    plate: str = "data"
    plate_dims: int | None = None
    depends: Dependencies | None = field(default=None, repr=False, compare=False)
    runs: int = field(default=1, repr=False)
    sites: Collection[str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, "particles", self.particles)
        for argument, value, kind in (("score", self.score, Score), ("path", self.path, Path)):
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"{name}: {argument} must be one of the estimators of "
                    f"ppl_models.infer.gradients, such as {_EXAMPLES[argument]}, got {value!r}."
                )
        if self.score is not None and self.particles < self.score.least:
            raise ValueError(
                f"{name}: {type(self.score).__name__} needs at least {self.score.least} particles, "
                f"got {self.particles}."
            )
        if self._at_once and not self.vectorized:
            raise ValueError(
                f"{name}: {type(self.score).__name__} compares particles, so they must run at "
                "once; got vectorized=False."
            )

    def __repr__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        defaults = {f.name: f.default for f in fields(self)}
        given = [
            f"{name}={value!r}"
            for name, value in told.items()
            if name not in ("plate", "plate_dims") and not _same(value, defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def bias(self) -> str | None:
        """How the mean of the gradient differs from that of the bound; None if it does not."""
        return None if self.score is None else self.score.bias

    @abc.abstractmethod
    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the bound of a batch."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained along with model and guide, once it is prepared."""
        return [] if self.score is None else self.score.parameters()

    def arguments(self) -> dict[str, Any]:
        """Return what it can be made from again, what its estimator has learnt included."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {"depends": None, "plate_dims": None}  # of programs; `prepare` looks again

    def prepare(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *batch: Tensor,
        plate: str = "data",
    ) -> Self:
        """Take, once and before the first step, every decision that needs a look at the programs.

        Estimators that learn, such as `NVIL`, begin anew, but for those of an objective that was
        prepared for the same sites and arguments, of the same shapes: these go on.

        Raises:
            ValueError: If particles are vectorised and the programs do not carry them, or an
                estimator does not fit a site.
        """
        if plate != self.plate:
            return replace(self, plate=plate).prepare(model, guide, *batch, plate=plate)
        name = type(self).__name__
        with evaluation_mode(model, guide), torch.set_grad_enabled(self.path is not None):
            _, dims = joint_table(model, guide, *batch)
            pair = run_pair(model, guide, *batch)
            pair.model.compute_log_prob()
            pair.guide.compute_score_parts()
        scored = {n: node for n, node in _latents(pair) if self._is_scored(node)}
        self._check(pair, scored, model, guide)
        score = self.score
        sites = _signature(scored, batch)
        if score is not None and self.sites != sites:  # else it goes on as it is
            score = score.prepared(scored, batch)
        runs = 1 if score is None else score.runs(scored)
        if (self.particles > 1 or runs > 1) and self.vectorized:
            with torch.no_grad():
                carried = vectorizes(model, guide, *batch, dim=-1 - dims)
            if not carried:
                otherwise = f", or use {name}(particles={self.particles}, vectorized=False)"
                raise ValueError(
                    f"{name}: {self.particles * runs} particles are to run at once, but this model "
                    "or guide computes something else under a leading dimension. Write `z @ w` and "
                    "the like so that dimensions on the left are carried along"
                    f"{'' if self._at_once else otherwise}."
                ) from _fault(model, guide, *batch, dim=-1 - dims)
        return replace(
            self,
            score=score,
            plate_dims=dims,
            runs=runs,
            sites=sites,
            depends=dependencies(model, guide, *batch) if scored else None,
        )

    def _misfit(self, score: Score, pair: Pair, scored: Mapping[str, Any]) -> str | None:
        """Say which site an estimator does not fit, and why."""
        found = ((site, score.refuses(site, node["fn"])) for site, node in scored.items())
        return next((f"site '{site}': {reason}" for site, reason in found if reason), None)

    def _loses(self, node: Any) -> bool:
        """Whether no gradient reaches the parameters of a site."""
        return self._is_everywhere and isinstance(base_distribution(node["fn"]), Delta)

    @property
    def _at_once(self) -> bool:
        """Whether particles have to run at once."""
        return self.score is not None and self.score.vectorized

    def _is_scored(self, node: Any) -> bool:
        scores = node["score_parts"].score_function
        return self._is_everywhere or not is_identically_zero(scores)

    @property
    def _is_everywhere(self) -> bool:
        """Whether the draws at all sites are taken to carry no gradient."""
        return self.score is not None and self.score.everywhere

    def _check(self, pair: Pair, scored: Mapping[str, Any], model: Any, guide: Any) -> None:
        """Refuse estimators that do not fit."""
        name = type(self).__name__
        if self.score is not None:
            if not scored:
                sites = [n for n, _ in _latents(pair)]
                raise ValueError(
                    f"{name}: score={self.score!r} has nothing to do: the draws at all latents, "
                    f"{sites}, carry their gradients. Leave score out, or compare with "
                    "score=Reinforce(everywhere=True)."
                )
            if reason := self._misfit(self.score, pair, scored):
                fitting = [m.__name__ for m in SCORES if not self._misfit(m(), pair, scored)]
                raise ValueError(
                    f"{name}: score={self.score!r} does not fit {reason}. Estimators that do: "
                    f"{', '.join(fitting)}."
                )
        if points := [n for n, node in _latents(pair) if self._loses(node)]:
            raise ValueError(
                f"{name}: site '{points[0]}' is a point (Delta), which learns by the gradient of its "
                f"draw alone, and {self!r} takes none. Use ELBO()."
            )
        if self.path is None:
            return
        if scored:
            raise ValueError(
                f"{name}: path={self.path!r} does not fit site '{next(iter(scored))}', whose draws "
                "carry no gradient. Estimators that do are those of score=, such as "
                "score=LeaveOneOut()."
            )
        named = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
        named = {n: p for n, p in named.items() if p.requires_grad}
        density = sum((node["log_prob"].sum() for _, node in _latents(pair)), torch.zeros(()))
        if not named or not density.requires_grad:
            return
        slopes = torch.autograd.grad(density, list(named.values()), allow_unused=True)
        if shared := [n for n, slope in zip(named, slopes, strict=True) if slope is not None]:
            raise ValueError(
                f"{name}: path={self.path!r} takes it that the guide does not depend on the model's "
                f"parameters, but it does, on {shared}. Leave path out."
            )

    def _prepared(self, model: Any, guide: Any, *batch: Tensor) -> Self:
        """Return it ready to run: `fit` has seen to that, others may not."""
        many = self.particles > 1 and self.vectorized
        if self.plate_dims is None and (many or self.score is not None or self.path is not None):
            return self.prepare(model, guide, *batch, plate=self.plate)
        return self

    def _handler(self) -> Messenger | None:
        return None if self.score is None else self.score.handler(self.runs)

    def _pairs(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> Iterator[Pair]:
        handler = self._handler()
        if not self.vectorized or self.particles * self.runs == 1:
            for _ in range(self.particles):
                yield run_pair(model, guide, *batch, handler=handler)
            return
        assert self.plate_dims is not None
        yield run_pair(
            model, guide, *batch, particles=self.particles * self.runs, dim=-1 - self.plate_dims,
            handler=handler,
        )  # fmt: skip

    def _fixed(self, model: Any, guide: Any, *batch: Tensor) -> Iterator[_Fixed]:
        """Draw, and score the draws as leaves."""
        at_once = self.vectorized and self.particles > 1
        about: dict[str, Any] = {}
        if at_once:
            assert self.plate_dims is not None
            about = {"particles": self.particles, "dim": -1 - self.plate_dims}
        for _ in range(1 if at_once else self.particles):
            draws = draw_latents(guide, *batch, **about)
            leaves = {name: draw.detach().requires_grad_() for name, draw in draws.items()}
            pair = replayed_pair(model, guide, *batch, values=leaves, **about)
            pair.model.compute_log_prob()
            pair.guide.compute_log_prob()
            yield _Fixed(pair, draws, leaves)


@dataclass(frozen=True, repr=False)
class ELBO(Bound):
    r"""The evidence lower bound.

    .. math::

        \mathcal{L} = \mathbb{E}_{q(z \mid x)}\left[\log p(x, z) - \log q(z \mid x)\right]
        \le \log p(x)

    Its gradient is taken by reparametrisation at every site that can be, and by score function,
    with the terms that hang on a draw as its cost, at every site that cannot.

    Arguments:
        particles: Draws from the guide in each evaluation.
        vectorized: Run all particles at once, in a plate to the left of all others. False runs
            them one by one, for models that were not written for leading dimensions.
        score: Estimator for sites whose draws carry no gradient: one of
            `ppl_models.infer.gradients`, by default `Reinforce()`.
        path: Estimator for the other sites: None for the full gradient, or `StickingTheLanding()`.
        analytic_kl: Use the closed form of KL(q || p) at each site that has one, in place of a
            sampled one: the same mean, usually with less variance.
        kl_weight: Factor of the terms of latents in what is ascended, for warm-up: a number, or a
            tensor () that a callback changes. The bound that is reported has none.

    Returns (when called):
        The surrogate, whose gradient estimates that of the bound, and the bound: scalars in nats,
        in total over the data set.

    Raises:
        ValueError: If `particles` is less than 1 or than an estimator needs, the guide does not fit
            the model, or an estimator does not fit a site.

    Source:
        Kingma & Welling (2014), https://arxiv.org/abs/1312.6114; Ranganath, Gerrish & Blei (2014),
        https://arxiv.org/abs/1401.0118

    Example:
        >>> import torch
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=7).detach()
        >>> _, bound = ELBO()(model, Exact(model), x)  # exact, whatever is drawn
        >>> torch.allclose(bound, model.log_evidence(x).sum(), atol=1e-4)
        True
    """

    analytic_kl: bool = False
    kl_weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.path, DReG):
            raise ValueError("ELBO: path=DReG() is for IWAE; here it is StickingTheLanding().")
        if self.analytic_kl and self.path is not None:
            raise ValueError("ELBO: give either analytic_kl or path; got both.")
        weight = self.kl_weight
        is_number = isinstance(weight, int | float) or (
            isinstance(weight, Tensor) and weight.ndim == 0
        )
        if not is_number or not 0.0 <= float(weight) < math.inf:
            raise ValueError(
                f"ELBO: kl_weight must be a number or a tensor of shape (), at least 0, got {weight!r}."
            )

    def _misfit(self, score: Score, pair: Pair, scored: Mapping[str, Any]) -> str | None:
        reason = super()._misfit(score, pair, scored)
        if reason or not isinstance(score, Enumerate):
            return reason
        by_row = _rows_of(pair, self.plate) is not None
        allowed = {self.plate} if by_row else set()
        for site, node in scored.items():
            if other := {f.name for f in node["cond_indep_stack"]} - allowed:
                return (
                    f"site '{site}': it goes through the joint states of a row if all sites are in "
                    f"plate '{self.plate}' and in no other, or of latents that all rows share, and "
                    f"this is in {sorted(other)}; a guide may leave it out and mark it for "
                    "enumeration, with objective=pyro.infer.TraceEnum_ELBO()"
                )
        return score.refuses_all(scored)

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the bound of a batch."""
        ready = self._prepared(model, guide, *batch)
        if ready.path is not None:
            return ready._along_the_path(model, guide, *batch)
        found = [ready._estimate(pair, *batch) for pair in ready._pairs(model, guide, *batch)]
        surrogates, bounds = zip(*found, strict=True)
        return _mean(surrogates), _mean(bounds)

    def _estimate(self, pair: Pair, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return surrogate and bound of one run: means over its particles."""
        pair.model.compute_log_prob()
        pair.guide.compute_score_parts()
        if isinstance(self.score, Enumerate):
            return self._summed(pair)
        latents = dict(_latents(pair))
        divergences = analytic_divergences(pair) if self.analytic_kl else {}
        surrogate, bound = torch.zeros(()), torch.zeros(())
        terms: list[Term] = []
        for half, name, node in _nodes(pair):
            value = node["log_prob"] if half == "model" else -node["log_prob"]
            if name in divergences:
                if half == "guide":
                    continue
                value = -divergences[name]
            weighted = self.kl_weight * value if name in latents else value
            bound = bound + self._counted(node, value).detach().sum()
            terms.append(Term(f"{half}.{name}", node["cond_indep_stack"], weighted))
            if half == "model":
                surrogate = surrogate + self._counted(node, weighted).sum()
            elif not (self._is_everywhere or is_identically_zero(node["score_parts"].entropy_term)):
                # log q where the draw carries its gradient; not where it does not, since the score
                # has mean zero.
                own = self.kl_weight * node["score_parts"].entropy_term
                surrogate = surrogate - self._counted(node, own).sum()
        many = (pair.particles or 1) // self.runs * self._draws
        surrogate, bound = surrogate / many, bound / many
        run = Run(pair, terms, self.depends, many, batch)
        for name, node in latents.items():
            if self._is_scored(node):
                surrogate = surrogate + (self.score or Reinforce()).surrogate(run, name)
        return surrogate, bound

    def _summed(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return surrogate and bound of a run over all states: the sum, which is both."""
        rows = _rows_of(pair, self.plate)
        latents = dict(_latents(pair))
        scored = [node for node in latents.values() if self._is_scored(node)]
        shares = _row_sum(pair, scored, rows, as_they_are=True).exp()
        terms, of_latents = torch.zeros(()), torch.zeros(())
        for half, name, node in _nodes(pair):
            value = _kept(node["log_prob"], node, rows) * (1.0 if half == "model" else -1.0)
            terms = terms + value
            of_latents = of_latents + value if name in latents else of_latents
        bound = (shares * terms).sum().detach()
        weighted = terms + (self.kl_weight - 1.0) * of_latents
        return (shares * weighted).sum() / self.particles, bound / self.particles

    @property
    def _draws(self) -> int:
        """How many of the runs of a draw are draws of the guide."""
        return self.runs if self.score is None else self.score.counted(self.runs)

    def _counted(self, node: Any, value: Tensor) -> Tensor:
        """Return what belongs to draws of the guide."""
        if self._draws == self.runs:
            return value
        axis = value.ndim + _dims(node)[PARTICLES]
        return value.unflatten(axis, (-1, self.runs)).narrow(axis + 1, 0, self._draws)

    def _along_the_path(self, model: Any, guide: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return surrogate and bound; log q is differentiated by the draws alone."""
        surrogates, bounds = [], []
        for fixed in self._fixed(model, guide, *batch):
            weighted, bound = torch.zeros(()), torch.zeros(())
            of_model = torch.zeros(())
            latents = dict(_latents(fixed.pair))
            for half, name, node in _nodes(fixed.pair):
                value = node["log_prob"].sum() * (1.0 if half == "model" else -1.0)
                bound = bound + value.detach()
                value = self.kl_weight * value if name in latents else value
                weighted = weighted + value
                of_model = of_model + value if half == "model" else of_model
            many = fixed.pair.particles or 1
            surrogates.append((fixed.through_draws(weighted) + of_model) / many)
            bounds.append(bound / many)
        return _mean(surrogates), _mean(bounds)


@dataclass(frozen=True, repr=False)
class IWAE(Bound):
    r"""The importance-weighted bound of K particles, for each row by itself.

    .. math::

        \mathcal{L}_K = \mathbb{E}\left[\log \frac{1}{K} \sum_{k=1}^K w_k\right], \qquad
        w_k = \frac{p(x, z_k)}{q(z_k \mid x)}

    The logarithm is taken of the weights of a row, and scaled to the data set after that: under
    minibatches it stays a bound. With global latents the weights are those of the whole data set.

    Arguments:
        particles: K.
        vectorized: Run all particles at once.
        score: None, or `Reinforce()`: the gradient at sites whose draws carry none. See `VIMCO`.
        path: Estimator for the other sites: None for the full gradient, or `DReG()`.

    Raises:
        ValueError: As `ELBO`; or if latents are global and rows are scaled by a minibatch.

    Source:
        Burda, Grosse & Salakhutdinov (2016). https://arxiv.org/abs/1509.00519

    Example:
        >>> import torch
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=7).detach()
        >>> _, bound = IWAE(5)(model, Exact(model), x)
        >>> torch.allclose(bound, model.log_evidence(x).sum(), atol=1e-4)
        True
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if isinstance(self.path, StickingTheLanding):
            raise ValueError(f"{name}: path=StickingTheLanding() is for ELBO; here it is DReG().")
        if self.score is not None and not type(self.score) is Reinforce:
            raise ValueError(
                f"{name}: score={self.score!r} does not go with it: the weights of all particles "
                "share a logarithm. Use VIMCO, whose baselines know that, or Reinforce()."
            )

    def _check(self, pair: Pair, scored: Mapping[str, Any], model: Any, guide: Any) -> None:
        super()._check(pair, scored, model, guide)
        row_weights(pair, self.plate)

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the bound of a batch."""
        ready = self._prepared(model, guide, *batch)
        if ready.path is not None:
            return ready._along_the_path(model, guide, *batch)
        weights, scores, scale = ready._weights(model, guide, *batch)
        bound = _log_mean(weights)
        surrogate = bound
        if scores is not None:
            surrogate = surrogate + (ready._signal(weights).detach() * scores).sum(0)
        return (scale * surrogate).sum(), (scale * bound.detach()).sum()

    def _signal(self, weights: Tensor) -> Tensor:
        """What the score of each particle is multiplied by, shape (K, N)."""
        return _log_mean(weights).expand_as(weights)

    def _weights(
        self, model: Any, guide: Any, *batch: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return log weights (K, N), log q of what is scored (K, N), and the scale of rows."""
        weights, scores = [], []
        scale = torch.ones(())
        for pair in self._pairs(model, guide, *batch):
            pair.model.compute_log_prob()
            pair.guide.compute_score_parts()
            one, scale = row_weights(pair, self.plate)
            weights.append(one)
            scored = [node for _, node in _latents(pair) if self._is_scored(node)]
            if scored:
                scores.append(_row_sum(pair, scored, _rows_of(pair, self.plate)))
        return torch.cat(weights), torch.cat(scores) if scores else None, scale

    def _along_the_path(self, model: Any, guide: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return surrogate and bound, doubly reparametrised."""
        fixed = list(self._fixed(model, guide, *batch))
        found = [row_weights(one.pair, self.plate) for one in fixed]
        scale = found[0][1]
        weights = torch.cat([one for one, _ in found])
        shares = torch.softmax(weights.detach(), 0)
        squared = (scale * shares.square() * weights).sum()
        surrogate = torch.zeros(())
        for one, share in zip(fixed, shares.split([len(w) for w, _ in found]), strict=True):
            nodes = [node for _, node in stochastic_nodes(one.pair.model)]
            of_model = _row_sum(one.pair, nodes, _rows_of(one.pair, self.plate))
            surrogate = surrogate + one.through_draws(squared) + (scale * share * of_model).sum()
        return surrogate, (scale * _log_mean(weights.detach())).sum()


@dataclass(frozen=True, repr=False)
class VIMCO(IWAE):
    r"""The importance-weighted bound, and for sites whose draws carry no gradient baselines of it.

    The baseline of a particle is the bound with its weight replaced by the geometric mean of the
    other ones. Sites whose draws carry a gradient have that of `IWAE`.

    Arguments:
        particles: K, at least 2.

    Source:
        Mnih & Rezende (2016). https://arxiv.org/abs/1602.06725
    """

    particles: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.particles < 2 or not self.vectorized or self.score or self.path:
            raise ValueError(
                "VIMCO: it compares particles: it takes at least 2, runs them at once, and has "
                f"estimators of its own; got particles={self.particles}, "
                f"vectorized={self.vectorized}, score={self.score}, path={self.path}."
            )

    def _signal(self, weights: Tensor) -> Tensor:
        """The bound less that without a particle, shape (K, N)."""
        count = len(weights)
        others = (weights.sum(0) - weights) / (count - 1)
        own = torch.eye(count, dtype=torch.bool, device=weights.device).unsqueeze(2)
        without = torch.where(own, others.unsqueeze(1), weights.unsqueeze(0))  # (K, K, N)
        return _log_mean(weights) - (torch.logsumexp(without, 1) - math.log(count))


@dataclass(frozen=True, repr=False)
class ReweightedWakeSleep(Bound):
    r"""Wake-sleep with importance weights: no gradient goes through a draw.

    The model ascends the importance-weighted bound. The guide is drawn to the posterior: by the
    weighted draws of the data ("wake"), by draws of the model ("sleep"), or by both. Its gradient
    is not that of the bound, which is what is reported. With one particle and "sleep" it is the
    wake-sleep algorithm.

    Arguments:
        particles: K.
        vectorized: Run all particles at once.
        guide: "wake", "sleep" or "both". The model must take `size=n` if it sleeps.

    Source:
        Bornschein & Bengio (2015), https://arxiv.org/abs/1406.2751; Hinton, Dayan, Frey & Neal
        (1995), https://doi.org/10.1126/science.7761831
    """

    particles: int = 5
    guide: Literal["wake", "sleep", "both"] = "wake"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide not in ("wake", "sleep", "both"):
            raise ValueError(
                f"ReweightedWakeSleep: guide must be 'wake', 'sleep' or 'both', got {self.guide!r}."
            )
        if self.score is not None or self.path is not None:
            raise ValueError(
                "ReweightedWakeSleep: it has estimators of its own; got "
                f"score={self.score}, path={self.path}."
            )
        if self.particles < 2 and self.guide != "sleep":
            raise ValueError(
                "ReweightedWakeSleep: the weight of a single particle is 1, from which the guide "
                f"learns nothing; use at least 2 particles, got {self.particles}, or guide='sleep'."
            )

    @property
    def bias(self) -> str | None:
        """How the mean of the gradient differs from that of the bound."""
        return "the guide's gradient is not that of the bound, but of another objective"

    def _check(self, pair: Pair, scored: Mapping[str, Any], model: Any, guide: Any) -> None:
        super()._check(pair, scored, model, guide)
        row_weights(pair, self.plate)  # refuses what has none
        if self.guide != "wake" and isinstance(guide, Refinable):
            raise ValueError(
                f"ReweightedWakeSleep: guide={self.guide!r} learns from rows that the model has drawn, "
                f"and {describe_program(guide)} has parameters of each row of the data. Use "
                "guide='wake', or a guide that reads rows, such as Amortized."
            )
        if self.guide != "wake" and not accepts_size(model):
            raise ValueError(
                f"ReweightedWakeSleep: guide={self.guide!r} learns from draws of the model, so it must "
                f"take `size=n`, and {describe_program(model)} does not. Use guide='wake', or give the "
                "model such an argument."
            )

    def prepare(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *batch: Tensor,
        plate: str = "data",
    ) -> Self:
        """Take every decision that needs a look at the programs: see `Bound.prepare`."""
        ready = super().prepare(model, guide, *batch, plate=plate)
        if self.guide != "wake":
            with evaluation_mode(model, guide), seeded(0):
                many = len(_dreams(model, len(batch[0])))
            if many != len(batch):
                raise ValueError(
                    f"ReweightedWakeSleep: guide={self.guide!r} gives the guide what model(size=n) "
                    f"returns, and that must be a tensor for each of its {len(batch)} arguments; "
                    f"{describe_program(model)} returns {many}. Use guide='wake'."
                )
        return ready

    def _is_scored(self, node: Any) -> bool:
        return False

    def _loses(self, node: Any) -> bool:
        return isinstance(base_distribution(node["fn"]), Delta)

    def _handler(self) -> Messenger:
        return Detached()

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the bound of a batch."""
        ready = self._prepared(model, guide, *batch)
        weights: list[Tensor] = []
        scores: list[Tensor] = []
        scale = torch.ones(())
        for pair in ready._pairs(model, guide, *batch):
            pair.model.compute_log_prob()
            pair.guide.compute_score_parts()
            one, scale = row_weights(pair, ready.plate)
            rows = _rows_of(pair, ready.plate)
            weights.append(one.detach())
            scores.append(_row_sum(pair, [n for h, _, n in _nodes(pair) if h == "model"], rows))
            if ready.guide != "sleep":
                own = [node for _, node in stochastic_nodes(pair.guide)]
                scores[-1] = scores[-1] + _row_sum(pair, own, rows)
        joined = torch.cat(weights)
        surrogate = (scale * torch.softmax(joined, 0) * torch.cat(scores)).sum()
        if ready.guide != "wake":
            surrogate = surrogate + _asleep(model, guide, *batch)
        return surrogate, (scale * _log_mean(joined)).sum()


def _dreams(model: Any, size: int) -> tuple[Tensor, ...]:
    """Return rows that the model draws."""
    with torch.no_grad():
        drawn = model(size=size)
    return drawn if isinstance(drawn, tuple) else (drawn,)


def _asleep(model: Any, guide: Any, *batch: Tensor) -> Tensor:
    """Return log q(z | x), summed, of latents and rows that the model has drawn."""
    with recorded(model) as told:
        dreams = _dreams(model, len(batch[0]))
    with recorded(guide) as guided:
        poutine.replay(guide, trace=told.trace)(*dreams)
    guided.trace.compute_log_prob()
    return sum((n["log_prob"].sum() for _, n in stochastic_nodes(guided.trace)), torch.zeros(()))


@dataclass(frozen=True)
class _Fixed:
    """A run whose draws are leaves, and the draws that they are the values of."""

    pair: Pair
    draws: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]

    def through_draws(self, value: Tensor) -> Tensor:
        """Return a scalar whose gradient is that of a value through the draws alone."""
        leaves = list(self.leaves.values())
        slopes = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        pairs = zip(slopes, self.draws.values(), strict=True)
        parts = [(slope * draw).sum() for slope, draw in pairs if slope is not None]
        return sum(parts, torch.zeros(()))


def _signature(scored: Mapping[str, Any], batch: Sequence[Tensor]) -> tuple[str, ...]:
    """Say in words what an estimator that learns is made for."""
    return (
        *(
            f"{name}: {tuple(node['fn'].event_shape)} {node['log_prob'].dtype} "
            f"{node['log_prob'].device}"
            for name, node in scored.items()
        ),
        *(f"argument {i}: {tuple(v.shape[1:])} {v.dtype}" for i, v in enumerate(batch)),
    )


def _same(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) and one == other


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values, torch.zeros(())) / len(values)


def _log_mean(weights: Tensor) -> Tensor:
    return torch.logsumexp(weights, 0) - math.log(len(weights))


def _nodes(pair: Pair) -> Iterator[tuple[str, str, Any]]:
    for half, trace in (("model", pair.model), ("guide", pair.guide)):
        for name, node in stochastic_nodes(trace):
            yield half, name, node


def _latents(pair: Pair) -> Iterator[tuple[str, Any]]:
    """What the guide draws."""
    return ((n, node) for n, node in stochastic_nodes(pair.guide) if not node["is_observed"])


def row_weights(pair: Pair, plate: str) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) - log q(z | x) of each row, shape (K, N), and the scale of each row.

    The terms are masked but not scaled. With sites outside the plate it is one number for all rows,
    shape (K, 1).

    Raises:
        ValueError: If rows are scaled and there are sites outside the plate, or sites of a row are
            scaled differently: a logarithm of weights has no such scale.
    """
    outside = [n for _, n, node in _nodes(pair) if plate not in _dims(node)]
    scales: dict[str, Any] = {name: node["scale"] for _, name, node in _nodes(pair)}
    first = next(iter(scales.values()))
    if outside and any(not _alike(scale, 1.0) for scale in scales.values()):
        raise ValueError(
            f"weights of draws: {sorted(set(outside))} are outside plate '{plate}', so a weight "
            "belongs to the whole data set, and cannot be taken of some rows. Use batch_size=N, all "
            "rows, or ELBO."
        )
    if other := [name for name, scale in scales.items() if not _alike(scale, first)]:
        raise ValueError(
            f"weights of draws: sites {other} are scaled otherwise than '{next(iter(scales))}' is. "
            "Scale all sites of a row alike, as `minibatch` does, or use ELBO."
        )
    parts = {half: [n for h, _, n in _nodes(pair) if h == half] for half in ("model", "guide")}
    p, q = (_row_sum(pair, nodes, _rows_of(pair, plate)) for nodes in parts.values())
    if not isinstance(first, Tensor):
        return p - q, p.new_tensor(float(first))
    node = next(node for _, _, node in _nodes(pair))
    rows = first.expand_as(node["log_prob"]).movedim(_dims(node)[plate], 0)
    return p - q, rows.flatten(1)[:, 0] if rows.ndim > 1 else rows


def _rows_of(pair: Pair, plate: str) -> str | None:
    """The plate over rows, if every site is in it: if weights are those of rows."""
    return plate if all(plate in _dims(node) for _, _, node in _nodes(pair)) else None


def _row_sum(
    pair: Pair, nodes: Iterable[Any], plate: str | None, *, as_they_are: bool = False
) -> Tensor:
    """Sum log densities, masked and not scaled, over all but particles and rows: (K, N), or (K, 1)."""
    total: Tensor | float = 0.0
    for node in nodes:
        mask = None if as_they_are else node["mask"]
        total = total + _kept(scale_and_mask(node["unscaled_log_prob"], 1.0, mask), node, plate)
    assert isinstance(total, Tensor)
    return total.expand(pair.particles or 1, -1)


def _kept(value: Tensor, node: Any, plate: str | None) -> Tensor:
    """Sum what a site has over all but particles and rows."""
    dims = _dims(node)
    return keep(value, dims.get(PARTICLES), dims[plate] if plate else None)


def _dims(node: Any) -> dict[str, int]:
    """Dimensions of the plates around a site, by name."""
    return {f.name: f.dim for f in node["cond_indep_stack"] if f.dim is not None}


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _is_special(fn: Any) -> bool:
    """Whether Pyro's KL leaves something out: the log_density of a Delta, or one of two masks."""
    while hasattr(fn, "base_dist") and not isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Delta | MaskedDistribution)


def _fault(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, dim: int
) -> Exception | None:
    """What the programs say under a leading dimension, if they say anything."""
    try:
        with torch.no_grad():
            run_pair(model, guide, *batch, particles=2, dim=dim)
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        return error
    return None


def analytic_divergences(pair: Pair) -> dict[str, Tensor]:
    """KL(q || p) at each site where it has a closed form and is a term of the bound.

    It is one if all latents that p may depend on were drawn before the site was: then it is the
    mean of log q - log p over the site's own draw, given theirs. Both must be scaled and masked
    alike.
    """
    q: dict[str, Any] = dict(stochastic_nodes(pair.guide))
    before: dict[str, set[str]] = {}
    drawn: set[str] = set()
    for name, node in q.items():
        before[name] = set(drawn)
        if not node["is_observed"]:
            drawn.add(name)
    divergences: dict[str, Tensor] = {}
    parents: set[str] = set()
    for name, node in stochastic_nodes(pair.model):
        if node["is_observed"]:
            continue
        if parents <= before[name] and _scaled_alike(q[name], node):
            mine, prior = q[name]["fn"], node["fn"]
            if _is_special(mine) or _is_special(prior):
                continue
            if mine.batch_shape != prior.batch_shape:  # a replayed site lacks outer plates
                prior = prior.expand(torch.broadcast_shapes(mine.batch_shape, prior.batch_shape))
            try:
                value = kl_divergence(mine, prior)
            except NotImplementedError:
                pass
            else:
                divergences[name] = scale_and_mask(value, node["scale"], node["mask"])
        parents.add(name)
    return divergences


def _scaled_alike(q: Any, p: Any) -> bool:
    for key in ("scale", "mask"):
        one, other = q[key], p[key]
        if one is other:
            continue
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or not torch.equal(one, other):
                return False
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return False
    return True

"""Gradient estimators: what stands in where the gradient of a bound must be estimated.

The gradient of an expectation under a guide is taken in one of two ways. Along the *path* of a draw,
where the draw is a differentiable function of the parameters and of noise; or by *score*, the
gradient of log q times what the draw cost, where it is not, as for discrete latents. Both come in
several forms, of the same mean and of different variance: an objective takes one of each, such as
`ELBO(score=DisARM())` or `IWAE(64, path=DReG())`.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_models.core.checks import check_count
from ppl_models.core.traces import PARTICLES, Pair, unchecked
from ppl_models.infer.dependencies import Dependencies
from ppl_models.parts.nn import mlp


@dataclass(frozen=True)
class Term:
    """One term of a bound, over the particles of a run.

    Attributes:
        name: Of its site, "model.x" or "guide.z".
        stack: Plates that it is in.
        value: What it adds to the bound, nats.
    """

    name: str
    stack: Sequence[Any]
    value: Tensor


@dataclass(frozen=True)
class Run:
    """One joint run of a guide and a model, as an estimator sees it.

    Attributes:
        pair: The traces.
        terms: Of the bound whose gradient is asked for.
        depends: Which of them depend on which latent; None if that is not known.
        particles: How many draws a mean is taken over.
        batch: The arguments of the programs.
    """

    pair: Pair
    terms: Sequence[Term]
    depends: Dependencies | None
    particles: int
    batch: Sequence[Tensor]

    def node(self, name: str) -> Any:
        """Return what the guide says of a site."""
        return self.pair.guide.nodes[name]

    def cost(self, name: str, *, narrow: bool = True, live: bool = False) -> Tensor:
        """Return what hangs on the draw at a latent, in the plates of its site.

        Arguments:
            name: Of the latent.
            narrow: Leave out the terms that do not depend on it.
            live: Whether gradients go through it.
        """
        known = self.depends.get(name) if narrow and self.depends is not None else None
        terms = [term for term in self.terms if known is None or term.name in known]
        node = self.node(name)
        values = ((t.stack, t.value if live else t.value.detach()) for t in terms)
        costs = MultiFrameTensor(*values)
        cost: Any = costs.sum_to(node["cond_indep_stack"])
        return cost.expand(node["fn"].batch_shape)

    def axis(self, name: str) -> int:
        """Dimension of the particles in the batch shape of a site, from the left."""
        node = self.node(name)
        dims = (frame.dim for frame in node["cond_indep_stack"] if frame.name == PARTICLES)
        return len(node["fn"].batch_shape) + next(dims)


class _Told:
    """Shows what was chosen, not what is so by default."""

    def __repr__(self) -> str:
        shown = (f for f in fields(cast(Any, self)) if f.repr)
        chosen = (
            (f.name, getattr(self, f.name)) for f in shown if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in chosen)})"


class Score(_Told, abc.ABC):
    """An estimator for sites whose draws carry no gradient.

    Attributes:
        least: Particles that it needs.
        vectorized: Whether they must run at once.
    """

    least: ClassVar[int] = 1
    vectorized: ClassVar[bool] = False
    everywhere: bool = False  # whether draws that could carry a gradient are treated alike

    @property
    def bias(self) -> str | None:
        """How the mean of the gradient differs from that of the bound; None if it does not."""
        return None

    def refuses(self, name: str, fn: Any) -> str | None:
        """Say why it does not fit a site; None if it does."""
        return None

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> Score:
        """Return one that is ready for the sites that need it."""
        return self

    def runs(self, nodes: Mapping[str, Any]) -> int:
        """Return how many runs of the programs one draw takes."""
        return 1

    def handler(self, runs: int) -> Messenger | None:
        """Return what the guide is run in."""
        return None

    def counted(self, runs: int) -> int:
        """Return how many of these runs, the first ones, are draws of the guide."""
        return runs

    @abc.abstractmethod
    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return a scalar whose gradient estimates that of the bound through the draw at a site."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained along with the guide."""
        return []

    def arguments(self) -> dict[str, Any]:
        """Return what it can be made from again, what it has learnt included."""
        found = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {n: v.state_dict() if isinstance(v, nn.Module) else v for n, v in found.items()}


@dataclass(frozen=True, repr=False)
class Reinforce(Score):
    r"""The score function, :math:`(f(z) - b) \nabla \log q(z)`, of the terms that hang on a draw.

    Arguments:
        rao_blackwell: Leave out the terms of sites that cannot depend on the draw. Their mean is zero,
            their variance not. Those of other rows are left out in any case.
        everywhere: Treat sites alike whose draws could carry a gradient, for comparison.

    Source:
        Williams (1992), https://doi.org/10.1007/BF00992696; Ranganath, Gerrish & Blei (2014),
        https://arxiv.org/abs/1401.0118
    """

    rao_blackwell: bool = True
    everywhere: bool = False

    def handler(self, runs: int) -> Messenger | None:
        """Return what keeps draws from carrying a gradient, if they are not to."""
        return Detached() if self.everywhere else None

    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return the score times what the draw cost, less a baseline."""
        node = run.node(name)
        score = node["score_parts"].score_function
        if self.everywhere:
            score = scale_and_mask(node["unscaled_log_prob"], 1.0, node["mask"])
        cost = run.cost(name, narrow=self.rao_blackwell)
        signal, loss = self.centred(run, name, cost)
        return ((signal.detach() * score).sum() - loss) / run.particles

    def centred(self, run: Run, name: str, cost: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the cost less a baseline that does not depend on the draw, and the loss of that."""
        return cost, 0.0


@dataclass(frozen=True, repr=False)
class LeaveOneOut(Reinforce):
    """The score function; the baseline of a particle is the mean of the others.

    Source:
        Kool, van Hoof & Welling (2019). https://openreview.net/forum?id=r1lgTGL5DE
    """

    least: ClassVar[int] = 2
    vectorized: ClassVar[bool] = True

    def centred(self, run: Run, name: str, cost: Tensor) -> tuple[Tensor, Tensor | float]:
        """Subtract the mean of the other particles."""
        others = (cost.sum(run.axis(name), keepdim=True) - cost) / (run.particles - 1)
        return cost - others, 0.0


@dataclass(frozen=True, repr=False)
class RunningAverage(Reinforce):
    """The score function; the baseline of a site is the mean of its costs in earlier steps.

    Arguments:
        decay: Of the running mean, at each step.
    """

    decay: float = 0.9
    averages: Mapping[str, Tensor] | None = field(
        default=None, repr=False
    )  # of each site: sum of weights, mean

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"RunningAverage: decay must be within (0, 1), got {self.decay}.")

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> RunningAverage:
        """Return one with an average for each site."""
        like = {name: node["log_prob"] for name, node in nodes.items()}
        averages = {name: value.new_zeros(2) for name, value in like.items()}
        return _replaced(self, averages=averages)

    def centred(self, run: Run, name: str, cost: Tensor) -> tuple[Tensor, Tensor | float]:
        """Subtract the average of earlier steps, and add this one to it."""
        assert self.averages is not None
        average = self.averages[name]
        before = average.clone()
        rows_scale = run.node(name)["scale"]  # of a minibatch, whose size may change
        now = torch.stack([torch.ones_like(before[0]), (cost.detach() / rows_scale).mean()])
        with torch.no_grad():
            average.mul_(self.decay).add_((1.0 - self.decay) * now)
        mean = before[1] / before[0].clamp(min=1e-6)
        return cost - rows_scale * torch.where(before[0] > 0.0, mean, torch.zeros_like(mean)), 0.0


@dataclass(frozen=True, repr=False)
class NVIL(Reinforce):
    r"""The score function; a network predicts the cost from the batch.

    The network is trained along, by least squares.

    Arguments:
        hidden: Units of each tanh layer of the network.
        decay: Of the running mean and variance.
        normalise: Divide what is left by the running standard deviation of the costs of a site, where
            that is above 1, as Mnih & Gregor do: another length of the step of the guide, for
            optimisers that do not choose it themselves, and a bias for what sites share.

    Source:
        Mnih & Gregor (2014). https://arxiv.org/abs/1402.0030
    """

    hidden: tuple[int, ...] = (100,)
    decay: float = 0.8
    normalise: bool = False
    networks: nn.ModuleDict | None = field(default=None, repr=False)
    # Of each site: sum of weights, mean, variance.
    moments: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"NVIL: decay must be within (0, 1), got {self.decay}.")
        _check_hidden("NVIL", self.hidden)
        object.__setattr__(self, "networks", _as_networks(self.networks, self.hidden))

    @property
    def bias(self) -> str | None:
        """That the guide's gradient is divided by something."""
        told = "the guide's gradient is divided by a running scale, for each site"
        return told if self.normalise else None

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> NVIL:
        """Return one with a network for each site."""
        inputs = sum(v.reshape(len(v), -1).shape[1] for v in batch if v.is_floating_point())
        if not inputs:
            raise ValueError(
                "NVIL: its network reads the floating arguments of the batch, and there is none. "
                "Use LeaveOneOut(), or RunningAverage()."
            )
        networks = nn.ModuleDict({_key(name): mlp(inputs, self.hidden, 1) for name in nodes})
        like = next(iter(nodes.values()))["log_prob"]
        networks.to(device=like.device, dtype=like.dtype)
        moments = {name: like.new_zeros(3) for name in nodes}
        return _replaced(self, networks=networks, moments=moments)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the networks."""
        return [] if self.networks is None else list(self.networks.parameters())

    def centred(self, run: Run, name: str, cost: Tensor) -> tuple[Tensor, Tensor | float]:
        """Subtract what the network predicts and the running mean; divide by the running scale."""
        assert self.networks is not None
        assert self.moments is not None
        weight, mean, variance = self.moments[name].clone().unbind()
        mean = mean / weight.clamp(min=1e-6)
        scale = torch.sqrt(variance / weight.clamp(min=1e-6)).clamp(min=1.0)
        rows = [v.reshape(len(v), -1) for v in run.batch if v.is_floating_point()]
        predicted = self.networks[_key(name)](torch.cat(rows, -1)).squeeze(-1)
        predicted = predicted if predicted.shape == cost.shape[-1:] else predicted.mean()
        rows_scale = run.node(name)["scale"]  # of a minibatch: all that is learnt is nats of a row
        signal = cost / rows_scale - mean - predicted
        with torch.no_grad():
            left = cost / rows_scale - mean
            now = torch.stack([torch.ones_like(mean), left.mean() + mean, left.square().mean()])
            self.moments[name].mul_(self.decay).add_((1.0 - self.decay) * now)
        loss = signal.square().sum()
        return rows_scale * (signal / scale if self.normalise else signal), loss


class Detached(Messenger):
    """Take the gradient off all draws."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["value"] = msg["value"].detach()


class _Coupled(Messenger):
    """Draw Bernoulli sites in several runs at once, of which run l + 1 differs at site l.

    Run 0 is the draw. Run l + 1 shares what is before site l, and goes on by itself after it.
    """

    relaxed: ClassVar[bool] = False

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs = runs
        self.before = 0  # Bernoulli sites drawn

    def __enter__(self) -> Any:
        self.before = 0
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        frame = next((f for f in msg["cond_indep_stack"] if f.name == PARTICLES), None)
        assert frame is not None
        fn = msg["fn"]
        axis = len(fn.batch_shape) + frame.dim
        logits = bernoulli_logits(fn)
        if logits is None:
            drawn = self.split(fn.rsample() if fn.has_rsample else fn.sample(), axis)
            parts = [drawn[0] if run > self.before else part for run, part in enumerate(drawn)]
        else:
            parts = self._draw(msg["name"], self.split(logits, axis))
            self.before += 1
            if self.relaxed:
                msg["fn"] = unchecked(fn)
                msg["infer"] = {**msg["infer"], "smooth": True}
        msg["value"] = torch.stack(parts, axis + 1).flatten(axis, axis + 1)
        msg["done"] = True

    def _draw(self, name: str, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return the values of all runs at a site, given their logits."""
        raise NotImplementedError

    def split(self, value: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Return the parts of each run."""
        draws = value.shape[axis] // self.runs
        return value.unflatten(axis, (draws, self.runs)).unbind(axis + 1)


class _Opposed(_Coupled):
    """Run l + 1 has 1 - u in place of the uniform u of site l: an antithetic draw."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        self.uniforms: dict[str, Tensor] = {}

    def _draw(self, name: str, logits: Sequence[Tensor]) -> list[Tensor]:
        first = torch.rand_like(logits[0])
        self.uniforms[name] = first
        u = [first, *(self._uniform(run, first) for run in range(1, self.runs))]
        return [(a < torch.sigmoid(b)).to(b.dtype) for a, b in zip(u, logits, strict=True)]

    def _uniform(self, run: int, first: Tensor) -> Tensor:
        if run == self.before + 1:
            return 1.0 - first
        # What nobody uses must not be drawn: a recording would leave it out.
        return first if run > self.before + 1 else torch.rand_like(first)


class _Relaxed(_Coupled):
    """Run l + 1 has a smooth version of the draw at site l, and at all sites after it."""

    relaxed = True

    def __init__(self, runs: int, temperature: float) -> None:
        super().__init__(runs)
        self.temperature = temperature
        self.logistic: dict[str, Tensor] = {}  # of each site: what is above 0 where the draw is 1,
        self.leaves: dict[
            str, Tensor
        ] = {}  # and its smooth version, from which gradients are asked
        self.slopes: dict[str, Tensor] = {}

    def _draw(self, name: str, logits: Sequence[Tensor]) -> list[Tensor]:
        u = torch.rand_like(logits[0]).clamp(min=torch.finfo(logits[0].dtype).tiny)
        noise = torch.log(u) - torch.log1p(-u)
        z = (logits[0] + noise).detach()
        hard = (z > 0.0).to(z.dtype)
        leaf = torch.sigmoid(z / self.temperature).requires_grad_()
        self.logistic[name], self.leaves[name] = z, leaf
        parts = [hard]
        for run in range(1, self.runs):
            if run > self.before + 1:
                parts.append(hard)
            elif run == self.before + 1:
                parts.append(leaf)
            else:  # the noise is shared: what hangs on earlier sites alone cancels
                parts.append(torch.sigmoid((logits[run] + noise) / self.temperature))
        return parts


class _OfBernoulli(Score):
    """What the estimators for Bernoulli latents share: a further run for each site."""

    vectorized: ClassVar[bool] = True

    def refuses(self, name: str, fn: Any) -> str | None:
        """Say why it does not fit a site: it takes Bernoulli latents only."""
        if bernoulli_logits(fn) is not None:
            return None
        return f"its distribution is {_kind(fn)}, and {type(self).__name__} is for Bernoulli sites"

    def runs(self, nodes: Mapping[str, Any]) -> int:
        """Return 1 more than there are sites: each has a run of its own."""
        return 1 + len(nodes)


class _Antithetic(_OfBernoulli):
    """What ARM and DisARM share: an antithetic partner for each draw, at each site."""

    def handler(self, runs: int) -> Messenger:
        """Return what couples the runs."""
        return _Opposed(runs)

    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return the logits of a site, each times the estimate of its gradient."""
        node, coupled = run.node(name), run.pair.handler
        assert isinstance(coupled, _Opposed)
        logits = bernoulli_logits(node["fn"])
        assert logits is not None
        place = list(coupled.uniforms).index(name) + 1
        axis, shape, events = run.axis(name), node["fn"].batch_shape, node["fn"].event_dim
        cost = run.cost(name).reshape(*shape, *(1,) * events)

        def pair(value: Tensor) -> tuple[Tensor, Tensor]:
            parts = coupled.split(value, axis)
            return parts[0], parts[place]

        slope = self.slope(
            pair(cost), pair(node["value"]), pair(logits)[0].detach(), coupled.uniforms[name]
        )
        if (mask := _mask(node)) is not None:
            slope = slope * pair(mask)[0]
        return (slope.detach() * pair(logits)[0]).sum() / (run.particles / coupled.runs)

    @abc.abstractmethod
    def slope(
        self, cost: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], logits: Tensor, u: Tensor
    ) -> Tensor:
        """Return the estimate of the gradient by each logit, from a draw and its partner."""


@dataclass(frozen=True, repr=False)
class ARM(_Antithetic):
    r"""Augment, reinforce, merge: :math:`(f(\tilde z) - f(z)) (u - 1/2)`, for Bernoulli latents.

    Source:
        Yin & Zhou (2019). https://arxiv.org/abs/1807.11143
    """

    def slope(
        self, cost: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], logits: Tensor, u: Tensor
    ) -> Tensor:
        """Return the estimate of the gradient by each logit."""
        return (cost[1] - cost[0]) * (u - 0.5)


@dataclass(frozen=True, repr=False)
class DisARM(_Antithetic):
    r"""ARM with its uniform integrated out, for Bernoulli latents.

    .. math::

        \tfrac12 (f(z) - f(\tilde z)) (z - \tilde z) \, \sigma(|\phi|)

    Source:
        Dong, Mnih & Tucker (2020), https://arxiv.org/abs/2006.10680; also Yin, Ho, Yan, Qian & Zhou
        (2020), as U2G, https://openreview.net/forum?id=H1lKNp4Fvr
    """

    def slope(
        self, cost: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], logits: Tensor, u: Tensor
    ) -> Tensor:
        """Return the estimate of the gradient by each logit."""
        return 0.5 * (cost[0] - cost[1]) * (z[0] - z[1]) * torch.sigmoid(logits.abs())


@dataclass(frozen=True, repr=False)
class REBAR(_OfBernoulli):
    r"""The score function; the baseline is the cost at a smooth version of the draw, for Bernoulli.

    .. math::

        (f(b) - \eta f(\sigma_\lambda(\tilde z))) \nabla \log q(b)
        + \eta \nabla f(\sigma_\lambda(z)) - \eta \nabla f(\sigma_\lambda(\tilde z))

    with :math:`b = [z > 0]`, :math:`z` logistic, and :math:`\tilde z` one more draw of z given b. What
    is subtracted is added again along the path, so the mean stays. z and its partner share their
    noise, so that they are equal and differ in their gradients only: one smooth run a site. The model
    is asked for log densities at values between 0 and 1, which that of a Bernoulli variable extends
    to. :math:`\eta`, of each site, is trained along to make the variance small.

    Arguments:
        temperature: :math:`\lambda`, of the smooth version; it stays as it is.

    Source:
        Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein (2017). https://arxiv.org/abs/1703.07370
    """

    temperature: float = 0.5
    factors: nn.ParameterDict | None = field(default=None, repr=False)  # of each site

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float) or not self.temperature > 0.0:
            name = type(self).__name__
            raise ValueError(f"{name}: temperature must be above 0, got {self.temperature!r}.")
        if isinstance(self.factors, Mapping):
            factors = {name: nn.Parameter(value) for name, value in self.factors.items()}
            object.__setattr__(self, "factors", nn.ParameterDict(factors))

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> REBAR:
        """Return one with a factor for each site."""
        ones = {_key(name): nn.Parameter(n["log_prob"].new_ones(())) for name, n in nodes.items()}
        return _replaced(self, factors=nn.ParameterDict(ones))

    def handler(self, runs: int) -> Messenger:
        """Return what makes the smooth runs."""
        return _Relaxed(runs, self.temperature)

    def counted(self, runs: int) -> int:
        """Return 1: smooth runs are no draws."""
        return 1

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors of the sites."""
        return [] if self.factors is None else list(self.factors.values())

    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return the logits of a site, each times the estimate of its gradient."""
        assert self.factors is not None
        node, handler = run.node(name), run.pair.handler
        assert isinstance(handler, _Relaxed)
        if not handler.slopes:
            handler.slopes = _slopes(run, handler)
        axis, shape = run.axis(name), node["fn"].batch_shape
        place = list(handler.leaves).index(name) + 1
        cost = run.cost(name).reshape(*shape, *(1,) * node["fn"].event_dim)
        costs = handler.split(cost, axis)
        whole = bernoulli_logits(node["fn"])
        assert whole is not None
        live = handler.split(whole, axis)[0]
        logits, z = live.detach(), handler.logistic[name]
        smooth = handler.leaves[name].detach()
        by_z = smooth * (1.0 - smooth) / self.temperature
        known = handler.slopes[name] * by_z
        baseline, slope = self.baseline(name, run, costs[place], known, smooth, by_z)
        b = (z > 0.0).to(z.dtype)
        score = b - torch.sigmoid(logits)
        # What a logit does to z, less what it does to its partner given b.
        moves = 1.0 + torch.expm1(-z.abs()) * torch.sigmoid(torch.where(z > 0.0, logits, -logits))
        estimate = (costs[0] - baseline) * score + slope * moves
        if (mask := _mask(node)) is not None:
            estimate = estimate * handler.split(mask, axis)[0]
        loss = (estimate / node["scale"]).square().sum()
        return (estimate.detach() * live).sum() / run.particles - loss

    def baseline(
        self, name: str, run: Run, cost: Tensor, slope: Tensor, smooth: Tensor, by_z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is taken off the cost of a site, and its gradient by z.

        Arguments:
            name: Of the site.
            run: What was run.
            cost: At the smooth draw.
            slope: Of that cost, by z.
            smooth: The smooth draw.
            by_z: Its derivative by z.
        """
        assert self.factors is not None
        factor = self.factors[_key(name)]
        return factor * cost, factor * slope


@dataclass(frozen=True, repr=False)
class RELAX(REBAR):
    r"""REBAR, and to its baseline a network of the smooth draw and of the batch is added.

    The network is trained along to make the variance small.

    Arguments:
        temperature: Of the smooth draw.
        hidden: Units of each tanh layer of the network.

    Source:
        Grathwohl, Choi, Wu, Roeder & Duvenaud (2018). https://arxiv.org/abs/1711.00123
    """

    hidden: tuple[int, ...] = (100,)
    networks: nn.ModuleDict | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_hidden("RELAX", self.hidden)
        object.__setattr__(self, "networks", _as_networks(self.networks, self.hidden))

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> RELAX:
        """Return one with a factor and a network for each site."""
        networks = nn.ModuleDict()
        for name, node in nodes.items():
            inputs = _per_row(node, batch)
            units = node["fn"].event_shape.numel() + sum(value.shape[1] for value in inputs)
            networks[_key(name)] = mlp(units, self.hidden, 1).to(node["log_prob"])
            with torch.no_grad():  # at first, REBAR
                for value in cast(Any, networks[_key(name)])[-1].parameters():
                    value.zero_()
        return _replaced(super().prepared(nodes, batch), networks=networks)

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors, and the parameters of the networks."""
        own = [] if self.networks is None else list(self.networks.parameters())
        return [*super().parameters(), *own]

    def baseline(
        self, name: str, run: Run, cost: Tensor, slope: Tensor, smooth: Tensor, by_z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is taken off the cost of a site, and its gradient by z."""
        assert self.networks is not None
        cost, slope = super().baseline(name, run, cost, slope, smooth, by_z)
        node = run.node(name)
        free = smooth.clone().requires_grad_()
        lead = smooth.shape[: smooth.ndim - node["fn"].event_dim]
        rows = [value.expand(*lead, -1) for value in _per_row(node, run.batch)]
        inputs = torch.cat([free.reshape(*lead, -1), *rows], -1)
        told = self.networks[_key(name)](inputs)
        scale = torch.as_tensor(node["scale"], device=told.device)
        told = told.squeeze(-1) * scale
        (by_smooth,) = torch.autograd.grad(told.sum(), free, create_graph=True)
        return cost + told.reshape(*lead, *(1,) * node["fn"].event_dim), slope + by_smooth * by_z


class _States(Messenger):
    """Give some sites all their joint states, one in each particle."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.states: list[Tensor] = []

    def __enter__(self) -> Any:
        self.states = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        fn = msg["fn"]
        own = _joint_states(fn)
        many = next(f.size for f in msg["cond_indep_stack"] if f.name == PARTICLES)
        axis = next(f.dim for f in msg["cond_indep_stack"] if f.name == PARTICLES)
        before = math.prod(len(states) for states in self.states)
        place = torch.arange(many, device=own.device) // before % len(own)
        value = own[place].reshape(many, *(1,) * (-axis - 1), *fn.event_shape)
        msg["value"] = value.expand(*fn.batch_shape, *fn.event_shape)
        msg["done"] = True
        self.states.append(own)


@dataclass(frozen=True, repr=False)
class Enumerate(Score):
    """The exact gradient: the sum over all joint states of the discrete latents of a row.

    What it takes doubles with each binary unit. Latents that are marked for enumeration and that the
    guide leaves out are summed by `pyro.infer.TraceEnum_ELBO()`, which `fit` takes as objective.

    Arguments:
        most: Joint states of a row, at most.
    """

    vectorized: ClassVar[bool] = True
    most: int = 4096
    names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_count("Enumerate", "most", self.most)

    def refuses(self, name: str, fn: Any) -> str | None:
        """Say why it does not fit a site: it takes finite supports."""
        if not _base(fn).has_enumerate_support:
            return f"its distribution is {_kind(fn)}, whose support is not finite"
        try:
            _number_of_states(fn)
        except NotImplementedError:  # such as binomials of different totals
            return f"its distribution is {_kind(fn)}, of elements with different supports"
        return None

    def refuses_all(self, nodes: Mapping[str, Any]) -> str | None:
        """Say why it does not fit sites together; None if it does."""
        sizes = {name: _number_of_states(node["fn"]) for name, node in nodes.items()}
        many = math.prod(sizes.values())
        if many <= self.most:
            return None
        return (
            f"sites {list(sizes)}: a row has {many:,} joint states of them, more than "
            f"most={self.most:,}"
        )

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> Enumerate:
        """Return one that knows the sites."""
        return _replaced(self, names=tuple(nodes))

    def runs(self, nodes: Mapping[str, Any]) -> int:
        """Return the number of joint states."""
        return math.prod(_number_of_states(node["fn"]) for node in nodes.values())

    def handler(self, runs: int) -> Messenger:
        """Return what goes through the states."""
        return _States(self.names)

    def surrogate(self, run: Run, name: str) -> Tensor:
        """Return nothing: the sum over states has its own gradient."""
        raise NotImplementedError


@dataclass(frozen=True)
class Path:
    """An estimator for sites whose draws carry a gradient."""


@dataclass(frozen=True)
class StickingTheLanding(Path):
    r"""The path derivative alone: log q is differentiated by its draw, not by its parameters.

    What is left out has mean zero. Where q is the posterior, no variance is left.

    Source:
        Roeder, Wu & Duvenaud (2017). https://arxiv.org/abs/1703.09194
    """


@dataclass(frozen=True)
class DReG(Path):
    """The doubly reparametrised gradient of an importance-weighted bound.

    The guide's gradient is that along the path, with squared weights; its signal-to-noise ratio
    rises with the number of particles, where the plain one's falls.

    Source:
        Tucker, Lawson, Gu & Maddison (2019). https://arxiv.org/abs/1810.04152
    """


def bernoulli_logits(fn: Any) -> Tensor | None:
    """Return the logits of a site of independent Bernoulli elements, expanded; None for others."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.ExpandedDistribution):
        inner = bernoulli_logits(fn.base_dist)
        return None if inner is None else inner.expand(fn.batch_shape)
    return fn.logits if isinstance(fn, torch.distributions.Bernoulli) else None


def _number_of_states(fn: Any) -> int:
    """Return how many values a draw can have; a plate has a draw in each place."""
    base = _base(fn)
    elements = fn.event_shape.numel() // base.event_shape.numel()
    return len(base.enumerate_support(expand=False)) ** elements


def _joint_states(fn: Any) -> Tensor:
    """Return all values of a draw, shape (states, *event)."""
    base = _base(fn)
    one = base.enumerate_support(expand=False)
    one = one.reshape(len(one), *base.event_shape)
    elements = fn.event_shape.numel() // base.event_shape.numel()
    codes = torch.arange(len(one) ** elements, device=one.device).unsqueeze(1)
    digits = codes // len(one) ** torch.arange(elements, device=one.device) % len(one)
    return one[digits].reshape(-1, *fn.event_shape)


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _slopes(run: Run, handler: _Relaxed) -> dict[str, Tensor]:
    """Return the gradient of the cost at each smooth draw by that draw."""
    total = torch.zeros(())
    for place, name in enumerate(handler.leaves, start=1):
        costs = handler.split(run.cost(name, live=True), run.axis(name))
        total = total + costs[place].sum()
    leaves = list(handler.leaves.values())
    slopes = torch.autograd.grad(total, leaves, retain_graph=True)
    return dict(zip(handler.leaves, slopes, strict=True))


def _per_row(node: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    """Return the floating arguments that have a row for each of a site's, as matrices."""
    frames = (f for f in node["cond_indep_stack"] if f.name != PARTICLES and f.dim == -1)
    rows = next((frame.size for frame in frames), None)
    return [v.reshape(len(v), -1) for v in batch if v.is_floating_point() and len(v) == rows]


def _check_hidden(name: str, hidden: Any) -> None:
    if not isinstance(hidden, Sequence) or any(type(n) is not int or n < 1 for n in hidden):
        raise ValueError(
            f"{name}: hidden must be positive numbers of units, such as (100,), got {hidden!r}."
        )


def _as_networks(networks: Any, hidden: Sequence[int]) -> Any:
    """Make networks of their parameters, "KEY.layer.weight" and so on; others are left."""
    if not isinstance(networks, Mapping):
        return networks
    made = nn.ModuleDict()
    for name, value in networks.items():
        key, _, first = name.partition(".")
        if first == "0.weight":
            made[key] = mlp(value.shape[1], hidden, 1).to(value)
    made.load_state_dict(networks)
    return made


def _mask(node: Any) -> Tensor | None:
    """Return what the draws of a site are multiplied by, for its batch and event; None for 1."""
    if node["mask"] is None or node["mask"] is True:
        return None
    shape, value = node["fn"].batch_shape, node["value"]
    mask = torch.as_tensor(node["mask"], device=value.device, dtype=value.dtype).expand(shape)
    return mask.reshape(*shape, *(1,) * node["fn"].event_dim)


def _kind(fn: Any) -> str:
    return type(_base(fn)).__name__


def _key(site: str) -> str:
    return "site_" + site.replace(".", "/")


def _replaced(made: Any, **fields: Any) -> Any:
    other = copy.copy(made)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


#: All estimators by score, in the order of their age.
SCORES: tuple[type[Score], ...] = (
    Reinforce, RunningAverage, NVIL, REBAR, RELAX, LeaveOneOut, ARM, DisARM, Enumerate,
)  # fmt: skip

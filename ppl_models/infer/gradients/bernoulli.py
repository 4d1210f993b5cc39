"""Estimators for Bernoulli latents: antithetic draws, and smooth ones."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_models.core.checks import checked_sizes
from ppl_models.core.traces import PARTICLES, unchecked
from ppl_models.infer.gradients.score import (
    Run,
    Score,
    as_networks,
    key_of,
    kind_of,
    replaced,
)
from ppl_models.parts.nn import mlp


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
        return (
            f"its distribution is {kind_of(fn)}, and {type(self).__name__} is for Bernoulli sites"
        )

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

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> from ppl_models.infer import ELBO, fit
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(3,))
        >>> fit(model, Amortized(model), model(size=20), objective=ELBO(score=DisARM()), steps=3).steps
        3
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
        ones = {key_of(name): nn.Parameter(n["log_prob"].new_ones(())) for name, n in nodes.items()}
        return replaced(self, factors=nn.ParameterDict(ones))

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
        factor = self.factors[key_of(name)]
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
        checked_sizes("RELAX", "hidden", self.hidden)
        object.__setattr__(self, "networks", as_networks(self.networks, self.hidden))

    def prepared(self, nodes: Mapping[str, Any], batch: Sequence[Tensor]) -> RELAX:
        """Return one with a factor and a network for each site."""
        networks = nn.ModuleDict()
        for name, node in nodes.items():
            inputs = _per_row(node, batch)
            units = node["fn"].event_shape.numel() + sum(value.shape[1] for value in inputs)
            networks[key_of(name)] = mlp(units, self.hidden, 1).to(node["log_prob"])
            with torch.no_grad():  # at first, REBAR
                for value in cast(Any, networks[key_of(name)])[-1].parameters():
                    value.zero_()
        return replaced(super().prepared(nodes, batch), networks=networks)

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
        told = self.networks[key_of(name)](inputs)
        scale = torch.as_tensor(node["scale"], device=told.device)
        told = told.squeeze(-1) * scale
        (by_smooth,) = torch.autograd.grad(told.sum(), free, create_graph=True)
        return cost + told.reshape(*lead, *(1,) * node["fn"].event_dim), slope + by_smooth * by_z


def bernoulli_logits(fn: Any) -> Tensor | None:
    """Return the logits of a site of independent Bernoulli elements, expanded; None for others."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.ExpandedDistribution):
        inner = bernoulli_logits(fn.base_dist)
        return None if inner is None else inner.expand(fn.batch_shape)
    return fn.logits if isinstance(fn, torch.distributions.Bernoulli) else None


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


def _mask(node: Any) -> Tensor | None:
    """Return what the draws of a site are multiplied by, for its batch and event; None for 1."""
    if node["mask"] is None or node["mask"] is True:
        return None
    shape, value = node["fn"].batch_shape, node["value"]
    mask = torch.as_tensor(node["mask"], device=value.device, dtype=value.dtype).expand(shape)
    return mask.reshape(*shape, *(1,) * node["fn"].event_dim)

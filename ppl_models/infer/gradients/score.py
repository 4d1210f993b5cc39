"""The score function, and baselines of its cost."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_models.core.checks import checked_sizes
from ppl_models.core.traces import PARTICLES, Pair
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
        return replaced(self, averages=averages)

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

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> from ppl_models.infer import ELBO, fit
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(3,))
        >>> nvil = ELBO(score=NVIL(hidden=(8,)))
        >>> learnt = fit(model, Amortized(model), model(size=20), objective=nvil, steps=3).objective
        >>> sum(parameter.numel() for parameter in learnt.parameters())  # of the network
        57
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
        checked_sizes("NVIL", "hidden", self.hidden)
        object.__setattr__(self, "networks", as_networks(self.networks, self.hidden))

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
        networks = nn.ModuleDict({key_of(name): mlp(inputs, self.hidden, 1) for name in nodes})
        like = next(iter(nodes.values()))["log_prob"]
        networks.to(device=like.device, dtype=like.dtype)
        moments = {name: like.new_zeros(3) for name in nodes}
        return replaced(self, networks=networks, moments=moments)

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
        predicted = self.networks[key_of(name)](torch.cat(rows, -1)).squeeze(-1)
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


def base_of(fn: Any) -> Any:
    """Return the distribution of a single element."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def as_networks(networks: Any, hidden: Sequence[int]) -> Any:
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


def kind_of(fn: Any) -> str:
    """Name a distribution."""
    return type(base_of(fn)).__name__


def key_of(site: str) -> str:
    """Return the name of what belongs to a site in a container of modules."""
    return "site_" + site.replace(".", "/")


def replaced(made: Any, **fields: Any) -> Any:
    """Return a copy with other values of some fields, which may be modules."""
    other = copy.copy(made)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other

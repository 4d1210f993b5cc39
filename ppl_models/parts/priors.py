"""Parameters as global latents: one mechanism for Bayesian networks and for any model."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call

from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.nn import Network

#: From the name and the value of a parameter to its prior, or to None to leave it a parameter. One
#: that depends on latents of its own has `latents(name, value)`, and takes their values after those.
Prior = Callable[..., Distribution | None]


@dataclass(frozen=True)
class normal:
    """Give every parameter an independent normal prior around zero.

    Arguments:
        scale: Its standard deviation.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"normal: scale must be > 0 and finite, got {self.scale}.")

    def __call__(self, _: str, value: Tensor) -> Distribution:
        """Return the prior of one parameter."""
        return dist.Normal(torch.zeros_like(value), self.scale).to_event(value.ndim)


@dataclass(frozen=True)
class scale_mixture:
    r"""Give every parameter a mixture of a wide and a narrow normal prior around zero.

    .. math::

        w \sim \pi \, \mathcal{N}(0, \sigma_1^2) + (1 - \pi) \, \mathcal{N}(0, \sigma_2^2)

    Arguments:
        weight: :math:`\pi`, of the wide one.
        wide: :math:`\sigma_1`.
        narrow: :math:`\sigma_2`, by default :math:`e^{-6}`, as in the paper.

    Source:
        Blundell, Cornebise, Kavukcuoglu & Wierstra (2015), equation 7.
        https://arxiv.org/abs/1505.05424
    """

    weight: float = 0.5
    wide: float = 1.0
    narrow: float = math.exp(-6.0)

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < 1.0 or not 0.0 < self.narrow < self.wide < math.inf:
            raise ValueError(
                "scale_mixture: weight must be between 0 and 1, and 0 < narrow < wide, got "
                f"weight={self.weight}, wide={self.wide}, narrow={self.narrow}."
            )

    def __call__(self, _: str, value: Tensor) -> Distribution:
        """Return the prior of one parameter."""
        weights = value.new_tensor([self.weight, 1.0 - self.weight]).expand(*value.shape, 2)
        scales = value.new_tensor([self.wide, self.narrow]).expand(*value.shape, 2)
        parts = dist.Normal(torch.zeros_like(scales), scales)
        return _RealMixture(dist.Categorical(weights), parts).to_event(value.ndim)


class _RealMixture(dist.MixtureSameFamily):
    """A mixture on the real line, whose support is known for what it is."""

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real


@dataclass(frozen=True)
class hierarchical:
    r"""Give the parameters of each layer a normal prior whose scale is a latent of its own.

    .. math::

        s_l \sim \mathrm{HalfNormal}(s), \qquad w_{l,i} \mid s_l \sim \mathcal{N}(0, s_l^2)

    A layer is what owns parameters; its latent is called ``<layer>.prior_scale``.

    Arguments:
        scale: :math:`s`, the scale of the half-normal prior of the scales.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"hierarchical: scale must be > 0 and finite, got {self.scale}.")

    def latents(self, name: str, value: Tensor) -> dict[str, Distribution]:
        """Return the priors of what the prior of one parameter depends on, by site."""
        layer = name.rpartition(".")[0]
        return {f"{layer}.prior_scale".lstrip("."): dist.HalfNormal(value.new_tensor(self.scale))}

    def __call__(self, _: str, value: Tensor, *latents: Tensor) -> Distribution:
        """Return the prior of one parameter, given those latents, or at their scale."""
        scale = latents[0] if latents else value.new_tensor(self.scale)
        scale = scale[(..., *(None,) * value.ndim)]
        return dist.Normal(torch.zeros_like(value), scale).to_event(value.ndim)


def bayesian(module: nn.Module, prior: Prior | Distribution, *, event_dim: int = 1) -> PyroModule:
    r"""Turn the parameters of a module, or of a whole model, into global latents.

    .. math::

        w \sim p(w), \qquad \text{then the module, with } w \text{ for its parameters}

    Sites: one for each parameter that gets a prior, named as in `module.named_parameters()`, and
    the sites of the module itself. They are outside every plate, so the guide of any model gets
    the full posterior of its parameters by the same call.

    Arguments:
        module: A model, or a network to be called inside one (outside its plates). It is copied,
            and left as it is.
        prior: A distribution that is expanded over each parameter, such as `Normal(0.0, 1.0)`, in
            the precision and on the device of the parameter; or a function of the name and
            the value of a parameter that returns a distribution over values of that shape, all of
            it event, or None to leave it a parameter. See `normal`, `scale_mixture` and
            `hierarchical` in `ppl_models.parts.priors`.
        event_dim: Dimensions of one row of a network's input.

    Raises:
        ValueError: If no parameter gets a prior, or a prior has the wrong shape.

    Example:
        >>> from ppl_models import PPCA
        >>> from ppl_models.core.sites import site_table
        >>> ppca = PPCA(data_dim=3, latent_dim=1)
        >>> model = bayesian(ppca, lambda name, w: normal()(name, w) if name == "loading" else None)
        >>> print(site_table(model, model(size=5)))
        site     role           plates  batch  event   support
        loading  global latent  -       ()     (3, 1)  real matrix
        z        local latent   data    (5,)   (1,)    real vector
        x        observed       data    (5,)   (3,)    real vector
    """
    return Bayesian(module, prior, event_dim=event_dim)


class Bayesian(NamedModule):
    """A module whose parameters are latents: see `bayesian`."""

    def __init__(
        self, module: nn.Module, prior: Prior | Distribution, *, event_dim: int = 1
    ) -> None:
        super().__init__()
        copied = copy.deepcopy(module)
        # Inside a plain module the copy keeps a Pyro context of its own, which stays inactive: the
        # sampled values that stand in for its parameters are never registered as parameters.
        inner = Plain(copied if isinstance(copied, PyroModule) else Network(copied, event_dim))
        prefix = "module." if isinstance(copied, PyroModule) else "module.net."
        self._prior = as_prior(prior)
        self._names: dict[str, str] = {}
        for name, parameter in copied.named_parameters():
            fn = self._prior(name, parameter.detach())
            if fn is None:
                continue
            if not isinstance(fn, Distribution):
                raise ValueError(
                    f"bayesian: the prior of '{name}' must be a distribution or None, got {fn!r}."
                )
            if fn.batch_shape or fn.event_shape != parameter.shape:
                raise ValueError(
                    f"bayesian: the prior of '{name}' must have event shape "
                    f"{tuple(parameter.shape)} and no batch shape, got event "
                    f"{tuple(fn.event_shape)} and batch {tuple(fn.batch_shape)}. "
                    "Use `.to_event(w.ndim)`."
                )
            self._names[name] = prefix + name
        if not self._names:
            raise ValueError(
                f"bayesian: no parameter of {type(module).__name__} got a prior; it has "
                f"{[name for name, _ in module.named_parameters()]}."
            )
        #: Of each latent, the parameters that it stands for: several where layers share one.
        self._aliases: dict[str, list[str]] = {name: [] for name in self._names}
        known = {id(value): name for name, value in copied.named_parameters()}
        values = dict(copied.named_parameters(remove_duplicate=False))
        for other, parameter in values.items():
            name = known[id(parameter)]
            if name in self._names:
                self._aliases[name].append(prefix + other)
        for name, others in self._aliases.items():
            value = values[name].detach().clone()
            for other in others:
                path, _, leaf = other.removeprefix(prefix).rpartition(".")
                owner = copied.get_submodule(path)
                delattr(owner, leaf)
                owner.register_buffer(leaf, value)
        self.inner = inner
        self.explicit = getattr(copied, "explicit", True)
        object.__setattr__(self, "__signature__", inspect.signature(copied.forward))

    def forward(self, *batch: Any, **options: Any) -> Any:
        """Sample the parameters, then run the module with them."""
        if any(frame.name == "data" for frame in get_plates()):
            raise ValueError(
                "bayesian: its parameters are shared by all rows, so it must be called outside "
                "`pyro.plate('data', ...)`. Move the call above the plate."
            )
        return self.run(self.draw(), *batch, **options)

    def draw(self, sample: Callable[[str, Distribution], Any] = pyro.sample) -> dict[str, Any]:
        """Sample the parameters, by site, or make something else of each site and its prior."""
        values = dict(self.inner.named_buffers())
        shared: dict[str, Tensor] = {}  # what several parameters depend on is drawn once
        drawn = {}
        for name, full in self._names.items():
            above = self._above(name, values[full])
            for site, fn in above.items():
                if site not in shared:
                    shared[site] = pyro.sample(site, fn)
            given = (shared[site] for site in above)
            drawn[name] = sample(name, self._prior(name, values[full], *given))
        return drawn

    def run(self, drawn: Mapping[str, Tensor], *batch: Any, **options: Any) -> Any:
        """Run the module with these values for its parameters, by site."""
        latent = {full: value for name, value in drawn.items() for full in self._aliases[name]}
        return functional_call(self.inner, latent, batch, options)

    def starts(self) -> dict[str, Tensor]:
        """Return the values that the parameters had in the module, by site: where to start from."""
        values = dict(self.inner.named_buffers())
        return {name: values[full].clone() for name, full in self._names.items()}

    def _above(self, name: str, value: Tensor) -> dict[str, Distribution]:
        latents = getattr(self._prior, "latents", None)
        return {} if latents is None else latents(name, value)


class Plain(nn.Module):
    """Hold a module, and call its `forward` directly.

    So a `PyroModule` keeps its name and a context of its own, which stays inactive, and it may have
    run before by itself, which Pyro forbids a submodule.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: Any, **options: Any) -> Any:
        return self.module.forward(*batch, **options)


def as_prior(prior: Any) -> Prior:
    """Return a function of name and value, given one or a distribution to be expanded over each."""
    if isinstance(prior, type) or not callable(prior):
        raise ValueError(
            "prior: it must be a distribution of Pyro, such as Normal(0.0, 1.0), or a function of "
            f"name and value, such as normal(1.0) in ppl_models.parts.priors, got {prior!r}."
        )
    if not isinstance(prior, Distribution):
        return prior  # pyright: ignore[reportReturnType]
    if prior.shape().numel() != 1 or prior.event_shape or prior.support.is_discrete:
        raise ValueError(
            "prior: a distribution must be of one real number, to be expanded over each parameter, "
            f"got {prior}. For another one for each, pass a function of name and value."
        )

    def expanded(_: str, value: Tensor) -> Distribution:
        # In the precision and on the device of the parameter, where the arguments are at hand.
        takes = inspect.signature(type(prior)).parameters
        names = [name for name in prior.arg_constraints if name in takes]
        moved = {name: getattr(prior, name).to(value) for name in names}
        own = type(prior)(**moved) if moved else prior
        return own.expand(value.shape).to_event(value.ndim)

    return expanded

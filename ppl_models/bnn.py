"""Bayesian neural networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppl_models.core.checks import checked_sizes
from ppl_models.core.module import NamedModule
from ppl_models.core.types import Distribution
from ppl_models.parts.likelihoods import Homoscedastic, Likelihood
from ppl_models.parts.nn import check_network, mlp
from ppl_models.parts.priors import Plain, Prior, as_prior, bayesian, normal


class BayesianNeuralNetwork(NamedModule):
    r"""A network whose weights are latents, for regression, classes and counts.

    .. math::

        w \sim p(w), \qquad y_n \mid x_n, w \sim p(y \mid f_w(x_n))

    A conditional model, ``model(x, y=None)``: it says nothing of ``x``, and without ``y`` it draws
    one.

    Sites: global latents, one for each parameter that gets a prior, named as in
    ``net.named_parameters()``, and those that the prior and the likelihood bring along
    (``<layer>.prior_scale``, ``noise_scale``); ``y`` observed, one number a row; plate ``data``.

    Arguments:
        data_dim: Features of one row of ``x``, or its shape, such as ``(1, 28, 28)``.
        hidden: Units of each tanh layer.
        likelihood: Distribution of ``y`` given the network's outputs: see
            `ppl_models.parts.likelihoods`. By default `Homoscedastic()`, a normal with a scale that
            is inferred. Or a function of your own, from outputs of shape ``(*batch, rows, M)`` to a
            distribution with batch shape ``(*batch, rows)``; an event makes ``y`` as wide. The tanh
            network puts out M = 1, or as many as its attribute ``size`` says.
        prior: Of the parameters: a distribution, or a function of name and value, which leaves
            those a parameter for which it returns None; see `ppl_models.bayesian`.
        net: Any network that maps ``(rows, *data_dim)`` to ``(rows, likelihood.size)``, in place of
            the tanh network; with a likelihood of your own, to as much as that takes. It is copied.

    Raises:
        ValueError: If a size is not positive, or the network has no parameters, has batch norm,
            names a parameter as the model names a site, or puts out another count.

    Source:
        Neal (1996), chapter 1. https://doi.org/10.1007/978-1-4612-0745-0
        Blundell, Cornebise, Kavukcuoglu & Wierstra (2015). https://arxiv.org/abs/1505.05424

    Example:
        >>> import torch
        >>> model = BayesianNeuralNetwork(data_dim=3, hidden=(8,))
        >>> model(torch.randn(5, 3)).shape
        torch.Size([5])
    """

    explicit = True  # p(y | x, w) has a density

    def __init__(
        self,
        data_dim: int | Sequence[int],
        *,
        hidden: Sequence[int] = (50,),
        likelihood: Likelihood | Callable[[Tensor], Distribution] | None = None,
        prior: Prior | Distribution | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        shape = checked_sizes(kind, "data_dim", data_dim, least=1, alone=True)
        units = checked_sizes(kind, "hidden", hidden)
        if net is None and len(shape) > 1:
            raise ValueError(
                f"{kind}: the tanh network takes one number for data_dim, got {data_dim}. Pass net= "
                "for others."
            )
        _check_likelihood(likelihood)
        self.data_shape = shape
        self.observation = Homoscedastic() if likelihood is None else likelihood
        outputs = getattr(self.observation, "size", 1)
        if net is None:
            net = mlp(math.prod(shape), units, outputs)
        _check_layers(net)
        if isinstance(self.observation, Likelihood):
            of = f"what {type(self.observation).__name__} takes"
            check_network("BayesianNeuralNetwork: net", net, shape, outputs, of)
        prior = normal() if prior is None else prior
        self.net = bayesian(net, prior, event_dim=len(shape))
        taken = {"y", "data", *getattr(self.observation, "latents", dict)()}
        if clash := sorted(taken & set(self.net.starts())):
            raise ValueError(
                f"BayesianNeuralNetwork: parameters {clash} of net have names that the model needs "
                "for itself. Rename them."
            )

    def forward(
        self, x: Float[Tensor, "N *event"], y: Tensor | None = None
    ) -> Float[Tensor, "*batch N *out"]:
        """Tell the story of `y` given `x`, or draw it."""
        if x.shape[1:] != self.data_shape:
            raise ValueError(
                "BayesianNeuralNetwork: x must have shape (rows, "
                f"{', '.join(map(str, self.data_shape))}), got {tuple(x.shape)}."
            )
        latents = {name: pyro.sample(name, fn) for name, fn in self.prior().items()}
        outputs = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", self.likelihood(outputs, **latents), obs=y)

    def prior(self) -> dict[str, Distribution]:
        """Return the priors of what the likelihood has to infer, by site; `net` has the others."""
        latents = getattr(self.observation, "latents", dict)()
        one = next(value for value in self.net.buffers() if value.is_floating_point()).new_zeros(())
        return {name: as_prior(fn)(name, one) for name, fn in latents.items()}

    def likelihood(self, outputs: Float[Tensor, "*batch M"], **latents: Tensor) -> Distribution:
        """Return p(y | x, w), given f_w(x) and the latents of the likelihood."""
        if isinstance(self.observation, Likelihood):
            return self.observation(outputs, 0, **latents)
        return self.observation(outputs)

    def check_data(self, x: Tensor, y: Tensor | None = None) -> None:
        """Refuse targets that the likelihood cannot learn from; `fit` and `sample` ask.

        Raises:
            ValueError: If a scale is to be inferred from targets that do not vary.
        """
        check = getattr(self.observation, "check", None)
        if check is not None and y is not None:
            check(y)


class Tasks(NamedModule):
    r"""Many data sets of one kind, and a network of its own for each.

    .. math::

        w_t \sim p(w), \qquad y_{tn} \mid x_{tn}, w_t \sim p(y \mid f_{w_t}(x_{tn}))

    A row of it is a task: a whole data set, with as many rows as the others. So weights are local
    latents, and a guide can learn from many tasks what they are in a new one: see
    `guides.DeepSet`.

    Sites: those of the network, each a local latent; ``y`` observed, event ``(N,)``; plate ``data``,
    over tasks.

    Arguments:
        single: The model of one task. What it does not infer is shared by all tasks.

    Raises:
        ValueError: If it is no `BayesianNeuralNetwork`.

    Example:
        >>> import torch
        >>> tasks = Tasks(BayesianNeuralNetwork(data_dim=3, hidden=(8,)))
        >>> tasks(torch.randn(4, 10, 3)).shape  # four tasks of ten rows
        torch.Size([4, 10])
    """

    explicit = True

    def __init__(self, single: BayesianNeuralNetwork) -> None:
        super().__init__()
        if not isinstance(single, BayesianNeuralNetwork):
            raise ValueError(
                "Tasks: single must be a BayesianNeuralNetwork, the model of one task, got "
                f"{type(single).__name__}."
            )
        self._held = Plain(single)

    @property
    def single(self) -> BayesianNeuralNetwork:
        """The model of one task."""
        return self._held.module  # pyright: ignore[reportReturnType]

    def forward(
        self, x: Float[Tensor, "T N *event"], y: Tensor | None = None
    ) -> Float[Tensor, "*batch T N *out"]:
        """Tell the story of each task's `y` given its `x`, or draw it."""
        if x.shape[2:] != self.single.data_shape:
            raise ValueError(
                f"Tasks: x must have shape (tasks, rows, {', '.join(map(str, self.single.data_shape))})"
                f", got {tuple(x.shape)}. For one task, x[None] and y[None]."
            )
        with pyro.plate("data", len(x)):
            latents = {name: _by_task(name, fn) for name, fn in self.single.prior().items()}
            outputs = self.single.net.run(self.single.net.draw(_by_task), x)
            likelihood: Any = self.single.likelihood(outputs, **latents)
            return pyro.sample("y", likelihood.to_event(1), obs=y)

    def check_data(self, x: Tensor, y: Tensor | None = None) -> None:
        """Refuse targets that the likelihood cannot learn from; `fit` and `sample` ask.

        Raises:
            ValueError: If a scale is to be inferred from targets that do not vary.
        """
        for i in range(len(x)):
            self.single.check_data(x[i], None if y is None else y[i])


def _by_task(site: str, prior: Distribution) -> Tensor:
    """Draw a value for each task, with a dimension for the rows of the task."""
    return pyro.sample(site, prior).unsqueeze(-1 - prior.event_dim)


def _check_likelihood(likelihood: Any) -> None:
    if likelihood is None:
        return
    if isinstance(likelihood, type | Distribution) or not callable(likelihood):
        raise ValueError(
            "BayesianNeuralNetwork: likelihood must be one of ppl_models.parts.likelihoods, such as "
            "Homoscedastic(0.1) or Classes(3), or a function from the outputs of the network to a "
            f"distribution, got {likelihood!r}."
        )


def _check_layers(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise ValueError(
            "BayesianNeuralNetwork: net must be an instance of torch.nn.Module, whose parameters are "
            f"to be inferred, got {net!r}."
        )
    if not any(True for _ in net.parameters()):
        raise ValueError(
            f"BayesianNeuralNetwork: net must have parameters to infer, but {type(net).__name__} has "
            "none."
        )
    named = [name for name, layer in net.named_modules() if isinstance(layer, _BatchNorm)]
    if named:
        raise ValueError(
            "BayesianNeuralNetwork: net must treat rows independently of each other given the "
            f"weights, but {named} is batch norm, which mixes the rows of a batch. Use "
            "nn.LayerNorm or nn.GroupNorm, or leave it out."
        )

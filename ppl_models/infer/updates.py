"""Optimiser updates as functions of tensors, to be compiled together with the gradient.

Each is the update that the torch optimiser of the same name makes, with the bias corrections and
the learning rate as tensors, so that nothing about a step is baked into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The tensors of each parameter that an optimiser keeps in its state, in the order of the update.
STATE = {
    "SGD": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "ClippedAdam": ("exp_avg", "exp_avg_sq"),
}

# What the update depends on besides; another value needs another graph.
OPTIONS = {
    "SGD": ("momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    "Adam": ("betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    "AdamW": ("betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    "ClippedAdam": ("betas", "eps", "weight_decay", "clip_norm", "centered_variance"),
}


def whole_step(
    forward: Callable[..., Sequence[Tensor]], job: dict[str, Any], *inputs: Tensor
) -> Tensor:
    """Evaluate a gradient and step, or leave the gradients in buffers; return the bound, float64.

    With an optimiser, the bound is NaN where the gradient is not finite: such a step is to be
    taken back.

    Arguments:
        forward: Returns the bound and the gradients.
        job: `arguments`, how many inputs are its own; `leaves`, the place of the leaf of each
            gradient among them; `kind`, a key of `STATE` or None; and of each group of the
            optimiser in `groups` its `options`, `members` (gradients) and `states` (how many
            tensors a member has).
        inputs: Its own, then without `kind` a buffer for each gradient, otherwise the learning
            rates (G,) and for each group the powers (2,) and the state of each member.
    """
    arguments, rest = inputs[: job["arguments"]], list(inputs[job["arguments"] :])
    bound, *gradients = forward(*arguments)
    if job["kind"] is None:
        for buffer, gradient in zip(rest, gradients, strict=True):
            buffer.copy_(gradient)
        return bound.double()
    rates = rest.pop(0)
    for number, group in enumerate(job["groups"]):
        powers = rest.pop(0)
        members = group["members"]
        update(
            job["kind"],
            group["options"],
            [arguments[job["leaves"][member]] for member in members],
            [gradients[member] for member in members],
            [[rest.pop(0) for _ in range(group["states"])] for _ in members],
            powers,
            rates[number],
        )
    # Squares overflow no later than the norm does; what is repeated for no reason goes on after it.
    squares = [(gradient * gradient).sum().double() for gradient in gradients]
    is_finite = torch.isfinite(sum(squares, torch.zeros_like(squares[0])))
    return torch.where(is_finite, bound.double(), float("nan"))


def update(
    kind: str,
    options: dict[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    powers: Tensor,
    lr: Tensor,
) -> None:
    r"""Take one step of an optimiser, in place.

    Arguments:
        kind: A key of `STATE`.
        options: Its values of `OPTIONS`.
        parameters: What to step.
        gradients: A gradient of each.
        states: The tensors named in `STATE` of each.
        powers: :math:`\beta_1^t` and :math:`\beta_2^t` after t steps, shape (2,), float64.
        lr: The learning rate, a scalar, float64.
    """
    if kind == "SGD":
        _sgd(options, parameters, gradients, states, lr)
        return
    beta1, beta2 = options["betas"]
    powers.copy_(torch.stack([powers[0] * beta1, powers[1] * beta2]))
    correction = 1 - powers
    step_size = lr / correction[0]
    root = correction[1].sqrt()
    one = _clipped_adam if kind == "ClippedAdam" else _adam
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        dtype = parameter.dtype
        scalars = (step_size.to(dtype), root.to(dtype), lr.to(dtype))
        one(options, parameter, gradient, state, scalars)


def _adam(
    options: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    state: Sequence[Tensor],
    scalars: tuple[Tensor, Tensor, Tensor],
) -> None:
    beta1, beta2 = options["betas"]
    step_size, root, lr = scalars
    mean, square = state
    decay = options["weight_decay"]
    gradient = -gradient if options["maximize"] else gradient
    start = parameter
    if decay and options["decoupled_weight_decay"]:
        start = parameter * (1 - lr * decay)
    elif decay:
        gradient = gradient + decay * parameter
    new_mean = mean + (gradient - mean) * (1 - beta1)
    new_square = beta2 * square + (1 - beta2) * gradient * gradient
    # `root` divides, as in torch: eps is added to the corrected scale.
    stepped = start - step_size * new_mean / (new_square.sqrt() / root + options["eps"])
    mean.copy_(new_mean)
    square.copy_(new_square)
    parameter.copy_(stepped)


def _clipped_adam(
    options: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    state: Sequence[Tensor],
    scalars: tuple[Tensor, Tensor, Tensor],
) -> None:
    beta1, beta2 = options["betas"]
    step_size, root, _ = scalars
    mean, square = state
    gradient = gradient.clamp(-options["clip_norm"], options["clip_norm"])
    if options["weight_decay"]:
        gradient = gradient + options["weight_decay"] * parameter
    new_mean = beta1 * mean + (1 - beta1) * gradient
    deviation = gradient - new_mean if options["centered_variance"] else gradient
    new_square = beta2 * square + (1 - beta2) * deviation * deviation
    # Pyro's: eps is added before the correction.
    stepped = parameter - step_size * root * new_mean / (new_square.sqrt() + options["eps"])
    mean.copy_(new_mean)
    square.copy_(new_square)
    parameter.copy_(stepped)


def _sgd(
    options: dict[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    lr: Tensor,
) -> None:
    momentum = options["momentum"]
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        if options["maximize"]:
            gradient = -gradient
        if options["weight_decay"]:
            gradient = gradient + options["weight_decay"] * parameter
        if momentum:
            (buffer,) = state
            new = momentum * buffer + (1 - options["dampening"]) * gradient
            gradient = gradient + momentum * new if options["nesterov"] else new
            buffer.copy_(new)
        parameter.copy_(parameter - lr.to(parameter.dtype) * gradient)


def options_of(optimizer: torch.optim.Optimizer) -> tuple[str, list[dict[str, Any]]] | str:
    """Describe an optimiser for `update`.

    Returns:
        Its kind and the options of each group, or the reason why it cannot be compiled.
    """
    made: Any = type(optimizer)
    kind = made.__name__
    known: dict[str, Callable[[], Any]] = {
        "SGD": lambda: torch.optim.SGD,
        "Adam": lambda: torch.optim.Adam,
        "AdamW": lambda: torch.optim.AdamW,
        "ClippedAdam": _pyro_clipped_adam,
    }
    if kind not in known or made is not known[kind]():
        return f"optimiser {kind} steps outside the graph; SGD, Adam, AdamW and ClippedAdam do not"
    groups = [{name: group[name] for name in OPTIONS[kind]} for group in optimizer.param_groups]
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        return f"{kind}(amsgrad=True) steps outside the graph"
    if kind == "SGD" and len({bool(group["momentum"]) for group in groups}) > 1:
        return "SGD with momentum in some groups only steps outside the graph"
    return kind, groups


def _pyro_clipped_adam() -> Any:
    from pyro.optim.clipped_adam import ClippedAdam

    return ClippedAdam

"""Networks that carry arbitrary leading dimensions, in their input and in their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ppl_models.core.checks import check_count, checked_sizes


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int | None = None,
    *,
    activation: Callable[[], nn.Module] = nn.Tanh,
    bias: bool = True,
) -> nn.Sequential:
    """Build a tanh network, as in the lecture: h = tanh(W x + b), and a linear layer on top.

    Arguments:
        inputs: Input features.
        hidden: Features of each hidden layer; an empty sequence leaves the linear layer only.
        outputs: Features of the linear layer on top, or None to end with the last hidden layer.
        activation: What is in place of tanh.
        bias: Whether there is a b.

    Raises:
        ValueError: If a number of features is no positive integer.

    Example:
        >>> mlp(4, (8,), 2)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    check_count("mlp", "inputs", inputs)
    if outputs is not None:
        check_count("mlp", "outputs", outputs)
    layers: list[nn.Module] = []
    for features in checked_sizes("mlp", "hidden", hidden):
        layers += [nn.Linear(inputs, features, bias=bias), activation()]
        inputs = features
    if outputs is not None:
        layers.append(nn.Linear(inputs, outputs, bias=bias))
    return nn.Sequential(*layers)


class Network(nn.Module):
    r"""Give any network over rows leading dimensions on the left.

    A layer such as `Conv2d` takes one batch dimension, and `functional.linear` takes a weight
    without any. Vectorised particles and chains put theirs on the left of the rows, and of the
    parameters when those are latent. The wrapped network always sees inputs of shape (rows, *event).

    Arguments:
        net: Maps (rows, *event) to (rows, ...).
        event_dim: Dimensions of one row of its input.

    Example:
        >>> Network(nn.Linear(3, 2))(torch.zeros(5, 4, 3)).shape
        torch.Size([5, 4, 2])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        self.net = net
        self.event_dim = event_dim
        named = [
            *net.named_parameters(remove_duplicate=False),
            *net.named_buffers(remove_duplicate=False),
        ]
        self._ndims = {name: tensor.ndim for name, tensor in named}

    def forward(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply the network to rows, (*batch, *event) to (*batch, ...)."""
        tensors = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        batched = {name: t for name, t in tensors.items() if t.ndim > self._ndims[name]}
        if not batched:
            return _over_rows(self.net, z, self.event_dim)
        # A latent parameter has shape (*outer, 1, ..., 1, *own): one network for each outer index,
        # and the ones stand for the plates that its rows are in.
        leads = [t.shape[: t.ndim - self._ndims[name]] for name, t in batched.items()]
        lead = torch.broadcast_shapes(*leads)
        inner = len(lead) - max((i + 1 for i, n in enumerate(lead) if n > 1), default=0)
        outer = lead[: len(lead) - inner]
        flat = {}
        for name, tensor in batched.items():
            own = tensor.shape[tensor.ndim - self._ndims[name] :]
            flat[name] = tensor.expand(*lead, *own).reshape(math.prod(outer), *own)
        events = self.event_dim
        z = z.reshape((1,) * (inner + events - z.ndim) + z.shape)  # an input may lack the plates
        z = z.expand(*outer, *z.shape[-inner - events :])
        rows = z.reshape(math.prod(outer), -1, *z.shape[z.ndim - events :])
        once = torch.vmap(
            lambda own, x: functional_call(self.net, own, (x,)),
            randomness="different",  # of layers such as dropout
        )
        out = once(flat, rows)
        return out.reshape(*z.shape[: z.ndim - events], *out.shape[2:])


def check_network(what: str, net: nn.Module, event: Sequence[int], outputs: int, of: str) -> None:
    """Run a user's network on two rows, and leave it as it was.

    Arguments:
        what: Who asks for it, and what it is called there.
        net: The network.
        event: Shape of one row of its input.
        outputs: Numbers that it must put out for a row.
        of: What these are, in words.

    Raises:
        ValueError: If it cannot be run, or puts out another count.
    """
    training = net.training
    like = next(net.parameters(), torch.empty(()))
    sizes = ", ".join(map(str, event))
    try:
        with torch.no_grad():
            out = net.eval()(like.new_zeros(2, *event))
    except Exception as error:
        raise ValueError(
            f"{what} must map (rows, {sizes}) to (rows, ...), but on shape (2, {sizes}) it said: "
            f"{error}"
        ) from error
    finally:
        net.train(training)
    if out.shape[0] != 2 or out.numel() != 2 * outputs:
        raise ValueError(
            f"{what} must put out {outputs} numbers a row ({of}), got shape {tuple(out.shape)} for "
            "2 rows."
        )


def _over_rows(net: nn.Module, z: Tensor, event_dim: int) -> Tensor:
    if z.ndim == event_dim + 1:
        return net(z)
    lead = z.ndim - event_dim
    out = net(z.reshape(-1, *z.shape[lead:]))
    return out.reshape(*z.shape[:lead], *out.shape[1:])

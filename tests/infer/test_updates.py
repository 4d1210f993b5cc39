"""Updates of optimisers, as functions of tensors, against the optimisers themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.testing import assert_close

from ppl_models.infer.block import Blocks
from ppl_models.infer.updates import STATE, options_of, update

OPTIMISERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD),
    "sgd with momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.2),
    "sgd, nesterov, decay": partial(torch.optim.SGD, momentum=0.8, nesterov=True, weight_decay=0.1),
    "sgd, uphill": partial(torch.optim.SGD, maximize=True),
    "adam": torch.optim.Adam,
    "adam, other betas": partial(torch.optim.Adam, betas=(0.5, 0.7), eps=1e-3),
    "adam with decay": partial(torch.optim.Adam, weight_decay=0.1),
    "adam, decoupled, uphill": partial(
        torch.optim.Adam, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.3),
    "clipped adam": partial(ClippedAdam, clip_norm=0.5),
    "clipped adam, centred, decay": partial(
        ClippedAdam, clip_norm=2.0, centered_variance=True, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_thirty_updates_are_those_of_the_optimiser(name: str) -> None:
    theirs = [torch.randn(3, 2), torch.randn(())]
    ours = [value.clone() for value in theirs]
    optimizer = OPTIMISERS[name](theirs, lr=0.1)
    told = options_of(optimizer)
    assert not isinstance(told, str)
    kind, (options,) = told
    momentum = options.get("momentum", 1.0)
    names = STATE[kind] if momentum else ()
    states: list[list[Tensor]] = [[torch.zeros_like(v) for _ in names] for v in ours]
    powers = torch.ones(2, dtype=torch.float64)
    for step in range(30):
        gradients = [torch.randn_like(value) * (1 + step % 3) for value in ours]
        lr = 0.1 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        for value, gradient in zip(theirs, gradients, strict=True):
            value.grad = gradient.clone()
        optimizer.step()
        if step == 0 and kind == "SGD" and names:
            # torch takes the first gradient as it is; a compiled step never is the first.
            for value, state, reference in zip(ours, states, theirs, strict=True):
                state[0].copy_(optimizer.state[reference]["momentum_buffer"])
                value.copy_(reference)
            continue
        update(kind, options, ours, gradients, states, powers, torch.tensor(lr))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for value, state in zip(theirs, states, strict=True):
        assert_close(state, [optimizer.state[value][n] for n in names], rtol=1e-12, atol=1e-12)


def test_hooks_of_an_optimiser_are_run() -> None:
    value = torch.nn.Parameter(torch.zeros(2))
    hooked = torch.optim.Adam([value])
    assert Blocks([value], hooked).reason is None
    hooked.register_step_post_hook(lambda *_: None)
    assert "hooks of Adam run outside" in str(Blocks([value], hooked).reason)


def test_what_steps_outside_the_graph_says_so() -> None:
    value = torch.nn.Parameter(torch.zeros(2))
    assert "RMSprop steps outside" in str(options_of(torch.optim.RMSprop([value])))
    assert "amsgrad" in str(options_of(torch.optim.Adam([value], amsgrad=True)))

    class Adam(torch.optim.Adam):  # a user's own, which may step otherwise
        pass

    assert "Adam steps outside" in str(options_of(Adam([value])))

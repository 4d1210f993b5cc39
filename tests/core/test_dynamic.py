"""Data drawn anew for each epoch: what a draw is, and that each epoch sees another one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_models import VAE
from ppl_models.core.batch import as_batch, redrawn
from ppl_models.core.dynamic import Dynamic
from ppl_models.evaluate import elbo
from ppl_models.infer import fit

SEEN: list[torch.Tensor] = []


class Story(pyro.nn.PyroModule):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x) -> None:
        if torch.is_grad_enabled():
            SEEN.append(x.clone())
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Bernoulli(logits=self.loc).expand([x.shape[1]]).to_event(1), obs=x
            )


def nothing(x) -> None:
    """There is nothing to infer."""


def epochs_seen(data, epochs: int, batch_size: int | None) -> list[torch.Tensor]:
    SEEN.clear()
    fit(Story(), nothing, data, epochs=epochs, batch_size=batch_size, lr=1e-9, seed=0)
    in_epoch = -(-len(data) // (batch_size or len(data)))
    steps = SEEN[-epochs * in_epoch :]  # those before are checks
    return [torch.cat(steps[i * in_epoch : (i + 1) * in_epoch]) for i in range(epochs)]


def test_a_draw_is_binary_and_has_the_probabilities_for_its_mean() -> None:
    p = torch.tensor([0.0, 0.2, 0.7, 1.0])
    x = Dynamic(p.expand(4000, 4)).draw(seed=0)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    error = (x.mean(0) - p).abs()
    assert bool((error <= 5 * (p * (1 - p) / 4000).sqrt()).all())
    assert torch.equal(x, Dynamic(p.expand(4000, 4)).draw(seed=0))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_each_epoch_sees_another_draw_and_a_tensor_stays(batch_size) -> None:
    p = torch.full((48, 5), 0.5)
    first, second = epochs_seen(Dynamic(p), 2, batch_size)
    assert first.shape == second.shape == (48, 5)
    # Sums over rows do not depend on the order that rows were seen in.
    assert not torch.equal(first.sum(0), second.sum(0))
    first, second = epochs_seen(Dynamic(p).draw(seed=0), 2, batch_size)
    assert torch.equal(first.sum(0), second.sum(0))


def test_a_fit_repeats_with_its_seed_and_draws_nothing_from_the_global_stream() -> None:
    data = Dynamic(torch.rand(20, 5))
    before = torch.get_rng_state()
    first, second = (torch.stack(epochs_seen(data, 3, 20)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


def test_elsewhere_it_is_one_draw_in_the_precision_of_the_model() -> None:
    data = Dynamic(torch.rand(6, 4))
    model = VAE(data_dim=4, latent_dim=1, hidden=()).float()
    (x,) = as_batch(data, model)
    assert x.dtype == torch.float32
    assert torch.equal(x, as_batch((data,), model)[0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))

    assert elbo(model, guide, data, seed=1).mean == elbo(model, guide, x, seed=1).mean


def test_a_part_of_it_is_drawn_anew_too() -> None:
    data = Dynamic(torch.linspace(0, 1, 12).reshape(4, 3))
    assert len(data) == 4
    assert torch.equal(data[1:3].probabilities, data.probabilities[1:3])
    assert repr(data) == "Dynamic(shape=(4, 3))"


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(bad) -> None:
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        Dynamic(torch.tensor([[0.5, bad]]))


def test_two_arguments_are_drawn_apart_and_one_given_twice_is_drawn_once() -> None:
    p = torch.full((200, 3), 0.5)
    one, other = Dynamic(p), Dynamic(p)
    x, y = as_batch((one, other))
    assert not torch.equal(x, y)
    x, y = as_batch((one, one))
    assert x is y
    assert len(redrawn((one, one), (x, y))) == 1
    assert len(redrawn((one, other), as_batch((one, other)))) == 2


def test_a_redraw_happens_once_an_epoch(monkeypatch) -> None:
    drawn = []
    draw = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: drawn.append(len(p)) or draw(p))
    fit(Story(), nothing, Dynamic(torch.rand(48, 5)), epochs=2, batch_size=16, seed=0)
    assert drawn.count(48) == 1 + 2  # the draw that is looked at, then one an epoch


def test_the_probabilities_are_never_written_to() -> None:
    p = torch.rand(20, 5)
    before = p.clone()
    fit(Story(), nothing, Dynamic(p), epochs=2, seed=0)
    assert torch.equal(p, before)

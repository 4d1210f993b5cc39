"""The variance of gradient estimates, beside moments in closed form."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides import Amortized
from ppl_models import PPCA, SigmoidBeliefNetwork
from ppl_models.evaluate import gradient_variance, gradients
from ppl_models.infer import ELBO
from ppl_models.infer.gradients import DisARM, LeaveOneOut, Reinforce, StickingTheLanding


def square(x: Tensor) -> None:
    """z ~ N(mu, 1), and a factor z^2 for each of the rows."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("cost", z.square() * x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(0.5)), 1.0))


@pytest.mark.parametrize("recorded", [False, True])
def test_moments_of_the_two_gradients_of_a_square(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mean over N rows of z^2: by score (mu^4 + 14 mu^2 + 15) / N, along the path 4 / N."""
    if not recorded:
        monkeypatch.setattr(gradients, "RECORDED", 10**9)
    objectives = {
        "score": ELBO(score=Reinforce(everywhere=True), kl_weight=0.0),
        "path": ELBO(kl_weight=0.0),
    }
    rows, mu = 5, 0.5
    found = gradient_variance(
        square, guide, torch.ones(rows), objectives=objectives, draws=4000, seed=1
    )
    for name, variance in (("score", mu**4 + 14 * mu**2 + 15), ("path", 4.0)):
        mean, error = found.mean[name]["guide.mu"], found.se[name]["guide.mu"]
        assert abs(mean - 2 * mu) < 4 * error
        assert found.variance[name]["guide.mu"].item() == pytest.approx(variance / rows, rel=0.12)
        assert error.item() == pytest.approx(
            (found.variance[name]["guide.mu"].item() / 4000) ** 0.5
        )
        signal = found.signal_to_noise(name, "guide")
        assert signal == pytest.approx(2 * mu / (variance / rows) ** 0.5, rel=0.2)
    assert found.seconds["score"] > 0


def belief_network() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(5, (3,))
    return model, Amortized(model, hidden=(4,)), model(size=6).detach()


def test_seeds_isolate_and_parameters_stay() -> None:
    model, guide, x = belief_network()
    before = {n: p.clone() for n, p in guide.named_parameters()}
    state = torch.random.get_rng_state()
    objectives = {"LOO": ELBO(2, score=LeaveOneOut()), "DisARM": ELBO(score=DisARM())}
    one, two = (
        gradient_variance(model, guide, x, objectives=objectives, draws=60) for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    names = {f"model.{n}" for n, _ in model.named_parameters()}
    names |= {f"guide.{n}" for n, _ in guide.named_parameters()}
    for name in objectives:
        assert set(one.mean[name]) == names
        assert all(torch.equal(v, two.variance[name][k]) for k, v in one.variance[name].items())
    assert all(torch.equal(before[n], p) for n, p in guide.named_parameters())
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert one.total("DisARM", "guide") > 0


def test_it_prints_a_table_and_draws_a_picture() -> None:
    model, guide, x = belief_network()
    found = gradient_variance(model, guide, x, objectives={"plain": ELBO()}, draws=10)
    lines = str(found).splitlines()
    assert lines[0].split() == (
        [
            "objective",
            "bound",
            "guide",
            "variance",
            "signal/noise",
            "model",
            "variance",
            "signal/noise",
            "ms",
        ]
    )
    assert lines[1].startswith("plain")
    assert "10 estimates" in lines[2]
    (ax,) = found.plot().axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == list(found.variance["plain"])


def test_what_does_not_fit_is_refused() -> None:
    model = PPCA(5, 2)
    guide = Amortized(model, hidden=())
    x = model(size=6).detach()
    with pytest.raises(ValueError, match="nothing to do"):
        gradient_variance(model, guide, x, objectives={"a": ELBO(score=DisARM())}, draws=5)
    with pytest.raises(ValueError, match="at least one objective and 2 draws"):
        gradient_variance(model, guide, x, objectives={}, draws=5)
    with pytest.raises(ValueError, match="at least one objective and 2 draws"):
        gradient_variance(model, guide, x, objectives={"a": ELBO()}, draws=1)
    path = {"a": ELBO(path=StickingTheLanding())}
    assert gradient_variance(model, guide, x, objectives=path, draws=3).draws == 3

"""Ensembles of points."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Ensemble, Local
from ppl_models import PPCA, BayesianNeuralNetwork, SigmoidBeliefNetwork
from ppl_models.evaluate import compare, elbo, predict
from ppl_models.infer import ELBO, ReweightedWakeSleep, fit
from ppl_models.parts.likelihoods import Classes, Homoscedastic
from ppl_models.parts.priors import normal

NOISE = 0.4
PRIOR = 1.5


def data(rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 3, generator=generator)
    slope = torch.tensor([1.0, 2.0, 3.0])
    return x, x @ slope + NOISE * torch.randn(rows, generator=generator)


def linear() -> BayesianNeuralNetwork:
    return BayesianNeuralNetwork(
        3,
        net=nn.Linear(3, 1, bias=False),
        likelihood=Homoscedastic(NOISE),
        prior=normal(PRIOR),
    )


def annealed(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=600)


@pytest.mark.parametrize("particles", [1, 4, 7])
def test_every_member_finds_the_mode_of_conjugate_regression(particles: int) -> None:
    x, y = data()
    a, b = x.numpy(), y.numpy()
    precision = a.T @ a / NOISE**2 + np.eye(3) / PRIOR**2
    mode = np.linalg.solve(precision, a.T @ b / NOISE**2)
    model = linear()
    guide = Ensemble(model, members=4, example=(x, y))
    start = guide.members()["weight"]
    assert float((start[:, None] - start).abs().sum((-1, -2)).fill_diagonal_(1.0).min()) > 0.1
    result = fit(
        model, guide, (x, y), objective=ELBO(particles), steps=600, lr=0.2, schedule=annealed,
        seed=0, progress=False,
    )  # fmt: skip
    assert "traced graph" in result.compiled
    found = guide.members()["weight"][:, 0].numpy()
    assert np.abs(found - mode).max() < (1e-2 if particles == 1 else 1e-6)
    # And what is reported is the log joint density there, which is above the evidence.
    peak = scipy.stats.norm(0.0, PRIOR).logpdf(mode).sum()
    peak += scipy.stats.norm(a @ mode, NOISE).logpdf(b).sum()
    told = elbo(model, guide, x, y, particles=4, seed=0).mean * len(y)
    assert told == pytest.approx(peak, abs=1e-2 if particles == 1 else 1e-8)


def test_predictions_are_the_mixture_of_the_members() -> None:
    x, y = data(rows=8)
    model = BayesianNeuralNetwork(3, hidden=(5,))
    guide = Ensemble(model, members=6, example=(x, y))
    values = {name: value.numpy() for name, value in guide.members().items()}
    hidden = np.tanh(
        np.einsum("nf,khf->knh", x.numpy(), values["0.weight"]) + values["0.bias"][:, None]
    )
    loc = np.einsum("knh,kh->kn", hidden, values["2.weight"][:, 0]) + values["2.bias"]
    scale = values["noise_scale"][:, None]
    found = predict(model, guide, x, y, draws=1, seed=0)
    assert found.draws == 6
    assert_close(found.mean.numpy(), loc.mean(0))
    assert_close(found.epistemic.numpy(), loc.std(0))
    assert_close(found.aleatoric.numpy(), np.sqrt((scale**2).mean(0)) * np.ones(8))
    assert found.log_density is not None
    assert found.log_density.rows is not None
    want = np.log(scipy.stats.norm(loc, scale).pdf(y.numpy()).mean(0))
    assert_close(found.log_density.rows.numpy(), want)
    assert found.log_density.se == 0.0


def test_a_draw_is_one_member_at_all_sites_and_particles_take_turns() -> None:
    x, y = data(rows=8)
    model = BayesianNeuralNetwork(3, hidden=(5,))
    guide = Ensemble(model, members=4, example=(x, y))
    members = guide.members()

    def which(drawn: dict[str, Tensor]) -> set[int]:
        """Return the members whose values these are, one site after the other."""
        found = []
        for name, value in drawn.items():
            away = (members[name] - value).abs().reshape(4, -1).sum(1)
            found.append({int(k) for k in (away == 0).nonzero()})
        assert all(len(one) == 1 for one in found)
        return set.union(*found)

    torch.manual_seed(0)
    seen = [which(guide(x, y)) for _ in range(40)]
    assert all(len(one) == 1 for one in seen)
    assert set.union(*seen) == {0, 1, 2, 3}
    with pyro.plate("particles", 8, dim=-2), poutine.trace() as tracer:
        guide(x, y)
    nodes: Any = tracer.trace.nodes
    drawn = [which({name: nodes[name]["value"][s, 0] for name in members}) for s in range(8)]
    assert all(len(one) == 1 for one in drawn)
    assert drawn[:4] == drawn[4:]
    assert set.union(*drawn) == {0, 1, 2, 3}


def test_globals_in_plates_and_on_bounded_supports_are_the_log_joint() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-2):
            rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(4)))
        with pyro.plate("data", len(x), dim=-1):
            loc = rate.sum(-2, keepdim=True) + mix[..., 0]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(5)
    guide = Ensemble(model, members=2, example=(x,))
    rate, mix = (guide.members()[name].numpy() for name in ("rate", "mix"))
    assert rate.shape == (2, 3, 1)
    assert mix.shape == (2, 4)
    want = scipy.stats.gamma(2.0, scale=1 / 3.0).logpdf(rate).sum((1, 2))
    want += np.array([scipy.stats.dirichlet(np.ones(4)).logpdf(m) for m in mix])
    loc = rate.sum(1) + mix[:, :1]
    want += scipy.stats.norm(loc, 1.0).logpdf(x.numpy()).sum(1)
    _, bound = ELBO(2)(model, guide, x)
    assert bound.item() == pytest.approx(want.mean(), rel=1e-9)
    guide.start_at([{"rate": torch.full((3, 1), 0.5)}, {"rate": torch.full((3, 1), 2.0)}])
    assert_close(guide.members()["rate"], torch.tensor([[[0.5]] * 3, [[2.0]] * 3]))
    assert_close(guide.members()["mix"].numpy(), mix)


def test_members_start_at_networks_of_their_own() -> None:
    x, y = data(rows=8)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(3)]
    model = BayesianNeuralNetwork(3, net=nets[0], likelihood=Homoscedastic(0.3))
    guide = Ensemble(model, members=3, example=(x, y))
    guide.start_at([dict(net.named_parameters()) for net in nets])
    found = predict(model, guide, x)
    assert_close(found.mean, torch.stack([net(x)[:, 0] for net in nets]).double().mean(0).detach())
    guide.start_around(model.net.starts(), scale=1e-4)
    assert_close(predict(model, guide, x).mean, nets[0](x)[:, 0].detach(), atol=1e-2, rtol=0.0)
    with pytest.raises(ValueError, match="takes the values of 3 members, got 1"):
        guide.start_at([{}])
    with pytest.raises(
        ValueError, match=r"'2.bias' must have shape \(1,\), got \(2,\) for member 0"
    ):
        guide.start_at([{"2.bias": torch.zeros(2)}] * 3)
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        guide.start_around({}, scale=0.0)
    with pytest.raises(ValueError, match="takes a dict with a tensor for each site.*got Tensor"):
        guide.start_around(cast(Any, torch.zeros(3)))


def test_classes_are_predicted_by_the_mean_of_probabilities() -> None:
    x = torch.randn(6, 2)
    model = BayesianNeuralNetwork(2, hidden=(), likelihood=Classes(3))
    guide = Ensemble(model, members=3, example=(x, model(x)))
    values = guide.members()
    logits = torch.einsum("nf,kcf->knc", x, values["0.weight"]) + values["0.bias"][:, None]
    assert_close(predict(model, guide, x).mean, logits.softmax(-1).mean(0))


def test_a_scorecard_says_that_it_is_no_bound() -> None:
    x, y = data(rows=8)
    guides = {
        "points": lambda model: Ensemble(model, example=(x, y)),
        "normal": lambda model: Local(model, example=(x, y)),
    }
    card = compare(linear(), guides, (x, y), (x, y), steps=2, seed=0, progress=False)
    assert "ELBO of points is no bound: points have no density." in str(card)


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be global and continuous, but 'z'.*each row has"):
        Ensemble(PPCA(data_dim=3, latent_dim=1))
    with pytest.raises(ValueError, match="must be global and continuous, but 'h2'"):
        Ensemble(SigmoidBeliefNetwork(4, (2, 2)))
    x, y = data(rows=8)
    model = linear()
    with pytest.raises(ValueError, match="members must be an integer >= 1, got 0"):
        Ensemble(model, members=0, example=(x, y))
    guide = Ensemble(model, example=(x, y))
    with pytest.raises(ValueError, match=r"'weight' is a point \(Delta\)"):
        fit(model, guide, (x, y), objective=ReweightedWakeSleep(3), steps=1, progress=False)

    def discrete(x: Tensor) -> None:
        flag = pyro.sample("flag", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(flag, 1.0), obs=x)

    with pytest.raises(ValueError, match="'flag' is not: its support, boolean, is discrete"):
        Ensemble(discrete, example=(x[:, 0],))

"""Gibbs with gradients, against sums over all states of the binary latents."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from guides import Amortized
from ppl_models import SigmoidBeliefNetwork, bayesian
from ppl_models.infer import NUTS, GibbsWithGradients, Posterior, sample
from ppl_models.infer.mcmc.gibbs import State, flip
from ppl_models.infer.mcmc.hashing import streams

WIDE = 4.5  # standard errors: of some tens of numbers


def network() -> tuple[SigmoidBeliefNetwork, Tensor]:
    torch.manual_seed(1)
    model = SigmoidBeliefNetwork(5, (3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, model(size=4).detach()


def states(units: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)


def exact_means(model: SigmoidBeliefNetwork, x: Tensor) -> Tensor:
    """Posterior means of all units, shape (rows, units)."""
    both = states(sum(model.latent_dims))
    h1, h2 = both.split(model.latent_dims, 1)
    prior = model.prior().log_prob(h2) + model.conditional(1, h2).log_prob(h1)
    joint = prior.unsqueeze(1) + model.likelihood(h1.unsqueeze(1)).log_prob(x)
    return torch.softmax(joint.detach().double(), 0).T @ both


def units_of(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found["h1"], found["h2"]], -1).double()


def test_units_of_each_row_have_their_posterior_means() -> None:
    model, x = network()
    found = sample(
        model, x, sampler=GibbsWithGradients(), rows=True, chains=32, draws=400, warmup=50,
        seed=0, progress=False,
    )  # fmt: skip
    assert found["h1"].shape == (32, 400, 4, 3)
    gap = (units_of(found.mean()) - exact_means(model, x)) / units_of(found.mcse())
    assert gap.abs().max() < WIDE
    assert set(torch.cat([found["h1"].unique(), found["h2"].unique()]).tolist()) == {0.0, 1.0}
    assert not found.stuck.any()
    assert units_of(found.rhat()).max() < 1.01
    assert found.energy is None
    assert found.step_size is None
    assert "divergences" in str(found)


def test_all_rows_are_one_target_too() -> None:
    model, x = network()
    found = sample(
        model, x, sampler=GibbsWithGradients(), chains=32, draws=400, warmup=50, seed=0,
        progress=False,
    )  # fmt: skip
    gap = (units_of(found.mean()) - exact_means(model, x)) / units_of(found.mcse())
    assert gap.abs().max() < WIDE


def test_a_million_chains_that_are_there_stay_there() -> None:
    """Flips leave a distribution over eight states as it is, whatever the gradient claims."""
    torch.manual_seed(0)
    table = torch.randn(8, dtype=torch.float64)
    weights = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    slopes = torch.randn(3, 8, dtype=torch.float64)

    def log_density(w: Tensor) -> tuple[Tensor, Tensor]:
        code = (weights @ w).long()
        return table[code], slopes[:, code]

    chains = 1_000_000
    truth = torch.softmax(table, 0)
    start = torch.multinomial(truth, chains, replacement=True)
    w = states(3)[start].T.contiguous()
    zero = torch.zeros(chains, dtype=torch.float64)
    state, stream = State(w, *log_density(w), zero, zero), streams(1, torch.arange(chains))
    binary = torch.ones(3, 1, dtype=torch.bool)
    for _ in range(2):
        state, stream = flip(state, stream, log_density, binary)
    share = torch.bincount((weights @ state.w).long(), minlength=8) / chains
    error = torch.sqrt(truth * (1 - truth) / chains)
    assert ((share - truth) / error).abs().max() < WIDE
    assert (state.w != w).any(0).double().mean() > 0.1


OBSERVED = torch.tensor([0.1, 2.2, 2.0, -0.3, 0.2, 1.9], dtype=torch.float64)


def mixture(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        high = pyro.sample("high", dist.Bernoulli(torch.full((), 0.4, dtype=y.dtype)))
        pyro.sample("y", dist.Normal(loc + 2 * high, 0.7), obs=y)


def exact_mixture() -> tuple[float, float, Tensor]:
    """Mean and deviation of loc, and means of the units, on a grid."""
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64).unsqueeze(1)
    one, zero = (
        math.log(share) + dist.Normal(grid + shift, 0.7).log_prob(OBSERVED)
        for share, shift in ((0.4, 2.0), (0.6, 0.0))
    )
    both = torch.logaddexp(one, zero)
    weight = torch.softmax(both.sum(1) + dist.Normal(0.0, 1.0).log_prob(grid.squeeze(1)), 0)
    mean = (weight @ grid).item()
    deviation = math.sqrt((weight @ grid.square()).item() - mean**2)
    return mean, deviation, weight @ (one - both).exp()


@pytest.mark.parametrize("chains", [8, 32])
def test_continuous_latents_are_moved_by_nuts_given_the_binary_ones(chains: int) -> None:
    mean, deviation, units = exact_mixture()
    found = sample(
        mixture, OBSERVED, sampler=GibbsWithGradients(), chains=chains, draws=3200 // chains,
        warmup=150, seed=0, progress=False,
    )  # fmt: skip
    assert abs(found["loc"].mean().item() - mean) < WIDE * found.mcse()["loc"].item()
    assert found["loc"].std().item() == pytest.approx(deviation, rel=0.05)
    gap = (found["high"].double().mean((0, 1)) - units) / found.mcse()["high"]
    assert gap.abs().max() < WIDE
    assert found.step_size is not None
    assert found.step_size.shape == (chains,)
    assert found.accept.mean() == pytest.approx(0.8, abs=0.15)
    assert "one by one" not in found.compiled


class Summed(nn.Module):
    """A network whose units are summed out."""

    def __init__(self, network: SigmoidBeliefNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> None:
        pyro.factor("x", self.network.log_evidence(x).sum())


def evidences(found: Posterior, x: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Of weights that were drawn: mean of log p(x | weights) of each chain, and its deviation."""
    network = SigmoidBeliefNetwork(3, (2,)).to(x.dtype).requires_grad_(False)
    whole = torch.empty(found.chains, found.draws)
    for place in itertools.product(range(found.chains), range(found.draws)):
        for name, parameter in network.named_parameters():
            parameter.copy_(found[prefix + name][place])
        whole[place] = network.log_evidence(x).sum()
    return whole.mean(1), whole.std(1)


def test_weights_and_units_together_have_the_posterior_of_the_weights_alone() -> None:
    x = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    prior = dist.Normal(0.0, 1.0)
    settings: dict[str, Any] = {
        "chains": 16, "draws": 150, "warmup": 100, "seed": 0, "progress": False,
    }  # fmt: skip
    together = sample(
        bayesian(SigmoidBeliefNetwork(3, (2,)), prior),
        x,
        sampler=GibbsWithGradients(flips=6),
        **settings,
    )
    alone = sample(bayesian(Summed(SigmoidBeliefNetwork(3, (2,))), prior), x, **settings)
    one, other = evidences(together, x), evidences(alone, x, "network.")
    error = ((one[0].var() + other[0].var()) / len(one[0])).sqrt()
    assert abs(one[0].mean() - other[0].mean()) < WIDE * error
    assert error < 0.06
    assert one[1].mean().item() == pytest.approx(other[1].mean().item(), rel=0.1)


def same(one: Posterior, other: Posterior) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_draws_and_compiled_ones_are_right() -> None:
    model, x = network()

    def run(**options: Any) -> Posterior:
        return sample(
            model, x, sampler=GibbsWithGradients(), rows=True, draws=30, warmup=10, seed=3,
            progress=False, **options,
        )  # fmt: skip

    first = run(chains=4, compile=False)
    same(first, run(chains=4, compile=False))
    same(first, run(chains=4, compile="now"))
    assert torch.equal(first["h1"], run(chains=6, compile=False)["h1"][:4])


def test_chains_start_at_a_guide() -> None:
    model, x = network()
    found = sample(
        model, x, sampler=GibbsWithGradients(flips=1), rows=True, chains=2, draws=5, warmup=0,
        init=Amortized(model, hidden=(3,)), seed=0, progress=False,
    )  # fmt: skip
    assert found["h2"].shape == (2, 5, 4, 2)


def _root(b: Tensor) -> Any:
    return dist.Normal(2.0 * b**0.5, 1.0)  # at 0 its gradient is infinite, or no number


def _steep(b: Tensor) -> Any:
    return dist.Normal(0.0, 0.2 + 9.0 * b)  # at 0 the gradient promises what no flip holds


def _index(b: Tensor) -> Any:
    return dist.Normal(torch.tensor([0.0, 3.0])[b.long()], 1.0)  # no gradient, and no other values


@pytest.mark.parametrize("likelihood", [_root, _steep, _index])
def test_draws_are_right_whatever_the_gradient_is_worth(likelihood: Any) -> None:
    y = torch.tensor([1.0, 3.0, 0.0, 9.0])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Bernoulli(0.2))
            pyro.sample("y", likelihood(b), obs=y)

    one, zero = (likelihood(torch.full((4,), b)).log_prob(y) for b in (1.0, 0.0))
    exact = torch.sigmoid(one - zero + math.log(0.2 / 0.8))
    found = sample(
        model, y, sampler=GibbsWithGradients(), chains=8, draws=500, warmup=20, seed=0,
        progress=False,
    )["b"].double().mean((0, 1))  # fmt: skip
    error = (exact * (1.0 - exact) / 1000).sqrt() + 1e-3  # of 4000 draws, an effective quarter
    assert ((found - exact).abs() < 4.0 * error).all()


def test_what_does_not_fit_is_refused() -> None:
    def categories(y: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k.to(y.dtype), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'k' is discrete.*Mark it to be summed out"):
        sample(categories, torch.zeros(1), sampler=GibbsWithGradients())
    model, x = network()
    with pytest.raises(ValueError, match=r"NUTS needs continuous.*GibbsWithGradients"):
        sample(model, x)
    with pytest.raises(ValueError, match=r"has none.*'z'.*NUTS"):
        sample(lambda: pyro.sample("z", dist.Normal(0, 1)), sampler=GibbsWithGradients())
    with pytest.raises(ValueError, match="flips must be an integer >= 1, got 0"):
        GibbsWithGradients(flips=0)
    wrong: Any = NUTS
    with pytest.raises(ValueError, match="nuts must be an instance"):
        GibbsWithGradients(nuts=wrong)
    with pytest.raises(ValueError, match=r"GibbsWithGradients\(\), got 'gibbs'"):
        sample(model, x, sampler="gibbs")  # type: ignore[arg-type]

"""Many tasks, and a guide that reads each as a set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from guides import DeepSet, families
from ppl_models import PPCA, BayesianNeuralNetwork, Tasks
from ppl_models.core.sites import site_table
from ppl_models.evaluate import predict
from ppl_models.infer import fit, sample
from ppl_models.parts.likelihoods import Classes, Counts, Gaussian, Homoscedastic
from ppl_models.parts.priors import hierarchical, normal

NOISE = 0.5


def images() -> BayesianNeuralNetwork:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return BayesianNeuralNetwork((1, 3, 3), net=net, likelihood=Classes(3))


SINGLES: dict[str, Any] = {
    "inferred scales": lambda: BayesianNeuralNetwork(3, hidden=(4,), prior=hierarchical()),
    "a scale for each row": lambda: BayesianNeuralNetwork(3, hidden=(4,), likelihood=Gaussian()),
    "counts": lambda: BayesianNeuralNetwork(3, hidden=(4,), likelihood=Counts()),
    "images in classes": images,
}


def drawn(single: BayesianNeuralNetwork, count: int = 5, rows: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(count, rows, *single.data_shape)
    with torch.no_grad():
        return x, Tasks(single)(x)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("case", SINGLES)
def test_the_density_is_the_sum_of_those_of_the_single_networks(case: str, count: int) -> None:
    single = SINGLES[case]()
    x, y = drawn(single, count)
    tasks = Tasks(single)
    table = site_table(tasks, x, y)
    assert not table.globals
    assert table.row_wise
    trace: Any = poutine.trace(tasks).get_trace(x, y)
    together = 0.0
    for name in table.latents:
        assert trace.nodes[name.name]["value"].shape[0] == count
    for t in range(count):
        values = {site.name: trace.nodes[site.name]["value"][t] for site in table.latents}
        one: Any = poutine.trace(poutine.condition(single, data=values)).get_trace(x[t], y[t])
        together = together + one.log_prob_sum()
    assert_close(trace.log_prob_sum(), together)


@pytest.mark.parametrize("case", SINGLES)
def test_the_order_of_rows_does_not_matter_and_their_number_does(case: str) -> None:
    single = SINGLES[case]()
    x, y = drawn(single)
    guide = DeepSet(Tasks(single), hidden=(8,), example=(x, y))
    order = torch.stack([torch.randperm(6) for _ in range(5)])
    task = torch.arange(5)[:, None]
    for site in guide.local_sites():
        numbers = guide.parameters_of(site, x, y)
        assert_close(
            guide.parameters_of(site, x[task, order], y[task, order]), numbers, rtol=0, atol=1e-13
        )
        paired = guide.parameters_of(
            site, x[task, order], y
        )  # other data: x of one row, y of another
        twice = guide.parameters_of(site, torch.cat([x, x], 1), torch.cat([y, y], 1))
        assert bool((paired != numbers).all())
        assert bool((twice != numbers).all())
    # All else is a mean: where the number is not looked at, each row twice makes no difference.
    reader: Any = guide.encoder
    with torch.no_grad():
        reader.all[0].weight[:, -1] = 0.0
    for site in guide.local_sites():
        twice = guide.parameters_of(site, torch.cat([x, x], 1), torch.cat([y, y], 1))
        assert_close(twice, guide.parameters_of(site, x, y))


@pytest.mark.parametrize("family", [None, families.FullNormal(), "flow"])
def test_the_guide_of_one_task_is_q_of_that_task(family: Any) -> None:
    single = SINGLES["inferred scales"]()
    x, y = drawn(single)
    if family == "flow":
        family = families.Flow(context=3, transforms=1, hidden_features=(4,), inverse=False)
    guide = DeepSet(Tasks(single), hidden=(8,), example=(x, y), family=family)
    with torch.no_grad():  # a flow starts where its context does not matter
        for value in guide.conditionals.parameters():
            value.add_(0.1 * torch.randn_like(value))
    for rows in (6, 3):
        one = guide.given(x[2, :rows], y[2, :rows])
        for site in guide.local_sites():
            q, of_one = guide.q(site, x[:, :rows], y[:, :rows]), one.q(site)
            values = q.sample()
            assert_close(of_one.log_prob(values[2]), q.log_prob(values)[2])
            of_another = q.log_prob(values)[1]
            assert abs((of_one.log_prob(values[1]) - of_another).item()) > 1e-9


def test_what_it_says_of_one_task_predicts_starts_a_chain_and_learns_on() -> None:
    single = SINGLES["inferred scales"]()
    x, y = drawn(single)
    guide = DeepSet(Tasks(single), hidden=(8,), example=(x, y))
    one = guide.given(x[0], y[0])
    before = [p.detach().clone() for p in guide.parameters()]
    assert predict(single, one, x[1], y[1], draws=5, seed=0).mean.shape == (6,)
    sample(single, x[0], y[0], init=one, chains=1, draws=4, warmup=1, seed=0, progress=False)
    start = [p.detach().clone() for p in one.parameters()]
    fit(single, one, (x[0], y[0]), steps=2, seed=0, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(start, one.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_trained_on_many_tasks_it_knows_the_exact_posterior_of_new_ones() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    single = BayesianNeuralNetwork(
        2, net=nn.Linear(2, 1, bias=False), likelihood=Homoscedastic(NOISE), prior=normal(1.0)
    )
    tasks = Tasks(single)
    x = torch.randn(2000, 8, 2)
    y = tasks(x)
    guide = DeepSet(tasks, hidden=(40, 40), example=(x, y))
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=1500)
    result = fit(
        tasks, guide, (x, y), steps=1500, batch_size=100, lr=0.01, schedule=schedule, seed=0,
        progress=False,
    )  # fmt: skip
    assert "traced graph" in result.compiled
    x = torch.randn(500, 8, 2)
    y = tasks(x)
    precision = x.mT @ x / NOISE**2 + torch.eye(2)
    exact = torch.linalg.solve(precision, x.mT @ y[..., None] / NOISE**2)
    with torch.no_grad():
        q: Any = guide.q("weight", x, y)
    new = torch.randn(500, 50, 2)
    found, want = new @ q.base_dist.loc.mT, new @ exact
    # The prior predicts 0 everywhere. Seen: 0.98, and scales within 2 % in the mean.
    assert 1.0 - ((found - want).square().sum() / want.square().sum()).item() > 0.95
    # The best independent normals have the inverse roots of the diagonal of the precision.
    ratio = q.base_dist.scale[:, 0] * precision.diagonal(dim1=-2, dim2=-1).sqrt()
    assert abs(ratio.log().mean().item()) < 0.1
    got = predict(single, guide.given(x[0], y[0]), new[0], draws=4000, seed=0).mean
    error = (new[0].square() @ q.base_dist.scale[0, 0].square()).sqrt() / 4000**0.5
    assert bool(((got - found[0, :, 0]).abs() < 5 * error).all())


@pytest.mark.parametrize("likelihood", [Classes(3), Counts()])
@pytest.mark.parametrize("example", [torch.int64, torch.float64])
def test_codes_and_counts_are_read_alike_whatever_their_type(
    likelihood: Any, example: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 6, 3), torch.randint(3, (4, 6))
    tasks = Tasks(BayesianNeuralNetwork(3, hidden=(4,), likelihood=likelihood))
    guide = DeepSet(tasks, hidden=(4,), example=(x, y.to(example)))
    want = guide.q("0.bias", x, y).mean
    for dtype in (torch.int32, torch.uint8, torch.float64):
        assert_close(guide.q("0.bias", x, y.to(dtype)).mean, want)
        fit(tasks, guide, (x, y.to(dtype)), steps=1, lr=1e-9, progress=False)
    # Codes have no order: of two that follow each other the features differ as of any.
    inputs: Any = guide.encoder
    assert inputs.each[0].in_features == (6 if isinstance(likelihood, Classes) else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nuts_takes_task_by_task(dtype: torch.dtype) -> None:
    single = BayesianNeuralNetwork(3, hidden=(), likelihood=Homoscedastic(NOISE))
    x, y = drawn(single, count=3, rows=8)
    single = single.to(dtype)
    chains = sample(
        Tasks(single), x.to(dtype), y.to(dtype), rows=True, chains=2, draws=200, warmup=100, seed=0,
        progress=False,
    )  # fmt: skip
    for task in range(3):
        one = torch.cat([x[task].double(), torch.ones(8, 1).double()], -1)
        precision = torch.eye(4).double() + one.mT @ one / NOISE**2
        want = torch.linalg.solve(precision, one.mT @ y[task].double() / NOISE**2)
        got = torch.cat([chains["0.weight"][:, :, task, 0], chains["0.bias"][:, :, task]], -1)
        error = torch.linalg.inv(precision).diagonal().sqrt() / 100**0.5
        assert bool(((got.double().mean((0, 1)) - want).abs() < 5 * error).all())


def test_what_does_not_fit_is_refused() -> None:
    single = BayesianNeuralNetwork(3, hidden=(4,))
    x, y = drawn(single)
    with pytest.raises(ValueError, match="single must be a BayesianNeuralNetwork.*got PPCA"):
        Tasks(PPCA(3, 1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must have shape \(tasks, rows, 3\), got \(6, 3\)"):
        Tasks(single)(x[0])
    with pytest.raises(ValueError, match=r"model must be Tasks\(...\).*got BayesianNeuralNetwork"):
        DeepSet(single, example=(x, y))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="hidden must be positive integers.*one or more"):
        DeepSet(Tasks(single), hidden=(), example=(x, y))
    with pytest.raises(ValueError, match="Pass one: example="):
        DeepSet(Tasks(single))
    guide = DeepSet(Tasks(single), hidden=(4,), example=(x, y))
    with pytest.raises(ValueError, match=r"both x and y, but got x alone.*guide\.given\(x, y\)"):
        predict(Tasks(single), guide, x)
    with pytest.raises(ValueError, match="same number of rows, got x: 6, y: 5"):
        guide.given(x[0], y[0, :5])
    with pytest.raises(ValueError, match=r"Tasks: x must have shape"):
        fit(Tasks(single), guide, (x[0], y[0]), steps=1, progress=False)
    y[2] = 1.0
    with pytest.raises(ValueError, match="all 6 rows are the same, 1.0"):
        fit(Tasks(single), guide, (x, y), steps=1, progress=False)

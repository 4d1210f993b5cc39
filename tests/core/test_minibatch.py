"""Bounds, gradients and scales under minibatches: the parts average to the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import MCMC, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.testing import assert_close

from guides import Amortized, Exact, Local
from ppl_models import PPCA, bayesian, minibatch
from ppl_models.core.minibatch import current_minibatch
from ppl_models.infer import ELBO
from ppl_models.infer.mcmc.posterior import Posterior

ROWS = 7


def replayed(fn: Any, noise: Tensor) -> Any:
    """The draw of a normal with this noise: the density and the gradient of it, without chance."""
    value = fn.loc + fn.scale * noise
    return dist.Delta(value, log_density=fn.log_prob(value))


def rows_of(x: Tensor) -> Tensor:
    current = current_minibatch()
    return torch.arange(len(x)) if current is None else current.index


class Story:
    """A model and a guide whose draws are fixed, with the parameters of both."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = torch.randn(ROWS, *shape)
        self.slope = torch.tensor(0.7, requires_grad=True)
        self.loc = torch.randn(ROWS, requires_grad=True)
        self.log_scale = torch.randn(ROWS, requires_grad=True)
        self.w_loc = torch.randn(3, requires_grad=True)
        self.noise = torch.randn(ROWS)
        self.w_noise = torch.randn(3)
        self.parameters = [self.slope, self.loc, self.log_scale, self.w_loc]

    def q(self, x: Tensor) -> Any:
        index = rows_of(x)
        return replayed(
            dist.Normal(self.loc[index], self.log_scale[index].exp()), self.noise[index]
        )

    def w(self) -> Any:
        return replayed(dist.Normal(self.w_loc, 0.3), self.w_noise)


class GlobalAndLocal(Story):
    def __init__(self) -> None:
        super().__init__(())

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, self.slope.exp()).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w[0], 1.0))
            pyro.sample("x", dist.Normal(self.slope * z + w[1], w[2].exp()), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", self.w().to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


class RowsOnTheLeft(Story):
    """Plate data at -2, features at -1; a latent in each, and one in neither."""

    def __init__(self) -> None:
        super().__init__((3,))

    def model(self, x: Tensor) -> None:
        features = pyro.plate("features", 3, dim=-1)
        with features:
            w = pyro.sample("w", dist.Normal(0.0, self.slope.exp()))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with features:
                pyro.sample("x", dist.Normal(self.slope * z + w, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("features", 3, dim=-1):
            pyro.sample("w", self.w())
        with pyro.plate("data", len(x), dim=-2):
            index = rows_of(x)
            fn = dist.Normal(self.loc[index, None], self.log_scale[index, None].exp())
            pyro.sample("z", replayed(fn, self.noise[index, None]))


class RowsOnTheRight(Story):
    """Plate data at -1, groups at -2."""

    def __init__(self) -> None:
        super().__init__((3,))

    def model(self, x: Tensor) -> None:
        groups = pyro.plate("groups", 3, dim=-2)
        with groups:
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), self.slope.exp()))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with groups:
                pyro.sample("x", dist.Normal(self.slope * z + w, 0.5), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-2):
            fn = dist.Normal(self.w_loc[:, None], 0.3)
            pyro.sample("w", replayed(fn, self.w_noise[:, None]))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.q(x))


class Sequential(Story):
    """A Python loop over rows."""

    def __init__(self) -> None:
        super().__init__(())

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, self.slope.exp()).expand([3]).to_event(1))
        for n in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{n}", dist.Normal(w[0], 1.0))
            pyro.sample(f"x_{n}", dist.Normal(self.slope * z + w[1], w[2].exp()), obs=x[n])

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", self.w().to_event(1))
        index = rows_of(x)
        for n in pyro.plate("data", len(x)):
            row = index[n]
            fn = dist.Normal(self.loc[row], self.log_scale[row].exp())
            pyro.sample(f"z_{n}", replayed(fn, self.noise[row]))


class Enumerated(Story):
    """A mixture: each row's component is summed out."""

    def __init__(self) -> None:
        super().__init__(())

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, self.slope.exp()).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample(
                "k",
                dist.Categorical(logits=torch.stack([self.slope, -self.slope, w[0]])),
                infer={"enumerate": "parallel"},
            )
            pyro.sample("x", dist.Normal(w[k] + self.slope * z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", self.w().to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


def pyro_bound(elbo: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def objective(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        surrogate = -torch.as_tensor(elbo.differentiable_loss(model, guide, x))
        return surrogate, surrogate.detach()

    return objective


OBJECTIVES = {
    "ELBO": ELBO(),
    "ELBO-analytic": ELBO(analytic_kl=True),
    "Trace_ELBO": pyro_bound(Trace_ELBO()),
}
CASES = [
    (story, objective)
    for story in (GlobalAndLocal, RowsOnTheLeft, RowsOnTheRight, Sequential)
    for objective in OBJECTIVES.values()
] + [(Enumerated, pyro_bound(TraceEnum_ELBO(max_plate_nesting=1)))]


def value_and_gradient(objective: Any, story: Story, x: Tensor) -> list[Tensor]:
    surrogate, bound = objective(story.model, story.guide, x)
    gradients = torch.autograd.grad(surrogate, story.parameters, allow_unused=True)
    return [bound, *(torch.zeros(()) if g is None else g for g in gradients)]


def average_over_parts(
    objective: Any, story: Story, parts: list[Tensor], **options: Any
) -> list[Tensor]:
    totals: list[Tensor] = []
    for index in parts:
        with minibatch(index, ROWS, **options):
            got = value_and_gradient(objective, story, story.x[index])
        share = [len(index) / ROWS * value for value in got]
        totals = [a + b for a, b in zip(totals, share, strict=True)] if totals else share
    return totals


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(("story", "objective"), CASES)
def test_the_minibatches_of_a_partition_average_to_the_whole(
    story: Any, objective: Any, rows: int
) -> None:
    pair = story()
    whole = value_and_gradient(objective, pair, pair.x)
    parts = list(torch.randperm(ROWS).split(rows))
    assert_close(average_over_parts(objective, pair, parts), whole)
    assert all(value.abs().sum() > 0 for value in whole)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(ROWS)), cuts=st.sets(st.integers(1, ROWS - 1)))
def test_uneven_partitions_average_to_the_whole(order: list[int], cuts: set[int]) -> None:
    pair = GlobalAndLocal()
    edges = [0, *sorted(cuts), ROWS]
    parts = [torch.tensor(order[a:b]) for a, b in pairwise(edges)]
    whole = value_and_gradient(ELBO(), pair, pair.x)
    assert_close(average_over_parts(ELBO(), pair, parts), whole)


def test_the_whole_is_the_formula() -> None:
    """The other side of the identity, once, without any handler or Pyro."""
    pair = RowsOnTheLeft()
    z = (pair.loc + pair.log_scale.exp() * pair.noise)[:, None]
    w = pair.w_loc + 0.3 * pair.w_noise
    normal = torch.distributions.Normal
    per_row = (
        normal(0.0, 1.0).log_prob(z)[:, 0]
        - normal(pair.loc, pair.log_scale.exp()).log_prob(z[:, 0])
        + normal(pair.slope * z + w, 0.5).log_prob(pair.x).sum(-1)
    )
    shared = normal(0.0, pair.slope.exp()).log_prob(w) - normal(pair.w_loc, 0.3).log_prob(w)
    index = torch.tensor([4, 0, 2])
    with minibatch(index, ROWS):
        got = value_and_gradient(ELBO(), pair, pair.x[index])
    want = shared.sum() + ROWS / 3 * per_row[index].sum()
    assert_close(got, [want.detach(), *torch.autograd.grad(want, pair.parameters)])


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_score_function_gradients_average_to_the_whole(rows: int) -> None:
    """Discrete choices held fixed: the score function is scaled once, not twice and not never."""
    x = torch.randn(ROWS)
    logits = torch.randn(ROWS, requires_grad=True)
    slope = torch.tensor(0.4, requires_grad=True)
    choices = torch.bernoulli(torch.full((ROWS,), 0.5))

    class Fixed(dist.Bernoulli):
        drawn = choices

        def sample(self, *_: Any) -> Tensor:
            return type(self).drawn

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(slope * b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        index = rows_of(x)
        Fixed.drawn = choices[index]
        with pyro.plate("data", len(x)):
            pyro.sample("b", Fixed(logits=logits[index]))

    def gradients(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(ELBO()(model, guide, x)[0], [logits, slope]))

    totals = [torch.zeros(ROWS), torch.zeros(())]
    for index in torch.randperm(ROWS).split(rows):
        with minibatch(index, ROWS):
            for total, part in zip(totals, gradients(x[index]), strict=True):
                total += len(index) / ROWS * part
    assert_close(totals, gradients(x))
    q = torch.distributions.Bernoulli(logits=logits)
    cost = (
        torch.distributions.Bernoulli(0.3).log_prob(choices)
        + torch.distributions.Normal(slope * choices, 1.0).log_prob(x)
        - q.log_prob(choices)
    ).detach()
    (score,) = torch.autograd.grad((cost * q.log_prob(choices)).sum(), logits)
    assert_close(totals[0], score)


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_pyro_objectives_see_the_same_scales(objective: Any) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    guide = Amortized(model, hidden=(3,))
    x = model(size=9).detach()
    analytic = isinstance(objective, TraceMeanField_ELBO)
    with minibatch(torch.tensor([8, 1]), 9):
        torch.manual_seed(3)
        loss = objective.differentiable_loss(model, guide, x[[8, 1]])
        torch.manual_seed(3)
        surrogate, bound = ELBO(analytic_kl=analytic)(model, guide, x[[8, 1]])
    assert_close(bound, -loss.detach())
    parameters = [*model.parameters(), *guide.parameters()]
    assert_close(
        torch.autograd.grad(surrogate, parameters, allow_unused=True),
        torch.autograd.grad(-loss, parameters, allow_unused=True),
    )


@pytest.mark.parametrize("rows", [1, 4, 10])
def test_the_exact_guide_meets_the_evidence_in_every_minibatch(rows: int) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    x = model(size=10).detach()
    evidence, guide = model.log_evidence(x), Exact(model)
    for index in torch.randperm(10).split(rows):
        with minibatch(index, 10):
            _, bound = ELBO(particles=3)(model, guide, x[index])
        assert_close(bound, 10 * evidence[index].mean())


def test_vectorised_particles_keep_the_scale_of_rows() -> None:
    pair = RowsOnTheLeft()
    index = torch.tensor([6, 2, 3])
    with minibatch(index, ROWS):
        one = value_and_gradient(ELBO(), pair, pair.x[index])
        for objective in (ELBO(particles=4), ELBO(particles=4, vectorized=False)):
            assert_close(value_and_gradient(objective, pair, pair.x[index]), one)


def scales(model: Any, *batch: Any) -> dict[str, Any]:
    trace = poutine.trace(model).get_trace(*batch)
    return {k: n["scale"] for k, n in trace.nodes.items() if n["type"] == "sample"}


def test_only_sites_inside_the_plate_are_scaled() -> None:
    pair = GlobalAndLocal()
    with minibatch(torch.tensor([0, 3]), ROWS), torch.no_grad():
        got = scales(pair.model, pair.x[:2])
    assert got == {"w": 1.0, "data": 1.0, "z": 3.5, "x": 3.5}


def test_a_plate_that_subsamples_by_itself_is_left_alone() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as chosen:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[chosen])

    with minibatch(torch.arange(6), 60):
        assert scales(model, torch.zeros(6))["x"] == 3.0  # 6 / 2, Pyro's own


def test_another_plate_is_named_by_an_argument() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0), obs=x)
        with pyro.plate("people", len(x)):
            pyro.sample("b", dist.Normal(0.0, 1.0), obs=x)

    with minibatch(torch.arange(2), 10, plate="people"):
        got = scales(model, torch.zeros(2))
    assert (got["a"], got["b"]) == (1.0, 5.0)


def test_two_plates_can_each_have_a_handler() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 2, dim=-1), pyro.plate("people", 3, dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with minibatch(torch.arange(2), 10), minibatch(torch.arange(3), 12, plate="people"):
        assert scales(model, torch.zeros(3, 2))["x"] == 5.0 * 4.0


@pytest.mark.parametrize("story", [GlobalAndLocal, RowsOnTheLeft, RowsOnTheRight, Sequential])
def test_one_scale_a_row_is_a_weighted_sum_of_rows(story: Any) -> None:
    """Linear in the scales: the value at a vector of them is the sum over its unit vectors."""
    pair = story()
    everything = torch.arange(ROWS)
    weights = torch.rand(ROWS) * 3

    def at(scale: Tensor) -> list[Tensor]:
        with minibatch(everything, ROWS, scale=scale):
            return value_and_gradient(ELBO(), pair, pair.x)

    shared = at(torch.zeros(ROWS))
    units = [at(row) for row in torch.eye(ROWS)]
    want = [
        base + sum(w * (unit[i] - base) for w, unit in zip(weights, units, strict=True))
        for i, base in enumerate(shared)
    ]
    assert_close(at(weights), want)
    assert_close(at(torch.ones(ROWS)), value_and_gradient(ELBO(), pair, pair.x))
    for n in (0, 4):  # and each unit is the row that it names
        alone = average_over_parts(ELBO(), pair, [torch.tensor([n])], scale=1.0)
        share = [ROWS * value for value in alone]
        assert_close(units[n], share)


def test_one_number_scales_all_rows() -> None:
    pair = GlobalAndLocal()
    with minibatch(torch.arange(2), ROWS, scale=0.25), torch.no_grad():
        assert scales(pair.model, pair.x[:2])["x"] == 0.25
    with minibatch(torch.arange(2), ROWS, scale=torch.tensor(0.25)), torch.no_grad():
        assert scales(pair.model, pair.x[:2])["x"] == 0.25


def test_a_sequential_plate_may_be_looped_over_twice_with_one_scale_a_row() -> None:
    def model(x: Tensor) -> None:
        rows = pyro.plate("data", len(x))
        z = [pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0)) for n in rows]
        for n in rows:
            pyro.sample(f"x_{n}", dist.Normal(z[n], 1.0), obs=x[n])

    with minibatch(torch.arange(2), 5, scale=torch.tensor([2.0, 3.0])):
        got = scales(model, torch.zeros(2))
    assert [got[name].item() for name in ("z_0", "z_1", "x_0", "x_1")] == [2.0, 3.0, 2.0, 3.0]


def conjugate(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_the_decorator_scales_the_potential_that_hmc_sees(rows: int) -> None:
    x = torch.randn(20)
    index = torch.randperm(20)[:rows]
    decorated = minibatch(index, 20)(conjugate)
    _, potential, _, _ = initialize_model(decorated, (x[index],))
    for w in torch.randn(4):
        want = -0.5 * w**2 - 20 / rows * 0.5 * ((x[index] - w) ** 2).sum()
        want = want - (1 + 20) / 2 * math.log(2 * math.pi)
        assert_close(potential({"w": w}), -want)


def test_the_decorator_works_inside_mcmc_run() -> None:
    x = torch.randn(20) + 1.0
    index = torch.tensor([3, 11])
    kernel = PyroNUTS(minibatch(index, 20)(conjugate))
    mcmc = MCMC(kernel, num_samples=600, warmup_steps=200, disable_progbar=True)
    mcmc.run(x[index])
    posterior = Posterior({"w": mcmc.get_samples(group_by_chain=True)["w"]})
    centred = (posterior["w"] - 20 * x[index].mean() / 21) ** 2
    assert (posterior.mean()["w"] - 20 * x[index].mean() / 21).abs() < 5 * posterior.mcse()["w"]
    spread = Posterior({"v": centred})
    assert (spread.mean()["v"] - 1 / 21).abs() < 5 * spread.mcse()["v"]


def test_mcmc_run_hides_a_handler_from_outside_and_that_is_said() -> None:
    mcmc = MCMC(PyroNUTS(conjugate), num_samples=4, warmup_steps=4, disable_progbar=True)
    with (
        pytest.raises(ValueError, match="no site was inside plate 'data'"),
        minibatch(torch.arange(2), 20),
    ):
        mcmc.run(torch.zeros(2))


def test_a_decorated_model_can_be_called_again() -> None:
    decorated = minibatch(torch.arange(2), 6)(conjugate)
    assert scales(decorated, torch.zeros(2)) == scales(decorated, torch.zeros(2))
    assert scales(decorated, torch.zeros(2))["x"] == 3.0


def test_parameters_as_latents_are_not_scaled() -> None:
    model = bayesian(PPCA(data_dim=3, latent_dim=1), dist.Normal(0.0, 1.0))
    x = model(size=4).detach()
    with minibatch(torch.arange(4), 12), torch.no_grad():
        got = scales(model, x)
    assert {name: got[name] for name in ("loading", "z", "x")} == {
        "loading": 1.0,
        "z": 3.0,
        "x": 3.0,
    }


def test_a_guide_reads_its_rows_from_the_handler() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    x = model(size=5).detach()
    guide = Local(model, rows=5)
    with torch.no_grad():
        for parameter in guide.row_parameters.values():
            parameter.copy_(torch.randn_like(parameter))
    whole = guide.q("z", x).mean
    index = torch.tensor([4, 1])
    with minibatch(index, 5) as handler:
        assert current_minibatch() is handler
        assert current_minibatch("people") is None
        assert_close(guide.q("z", x[index]).mean, whole[index])
        guide(x[index])
    assert current_minibatch() is None


def test_a_handler_that_met_no_plate_says_so_on_exit() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1), obs=x)

    handler = minibatch(torch.arange(2), 6)
    with pytest.raises(ValueError, match=r"no site was inside plate 'data'.*plate="), handler:
        model(torch.zeros(2))
    with handler:  # met it
        conjugate(torch.zeros(2))
    with pytest.raises(ValueError, match="no site"), handler:  # and forgot it again
        model(torch.zeros(2))


def test_an_error_of_the_model_is_not_replaced() -> None:
    with pytest.raises(ZeroDivisionError), minibatch(torch.arange(2), 6):
        raise ZeroDivisionError


def test_nested_handlers_of_one_plate_are_refused() -> None:
    index = torch.arange(2)
    with (
        pytest.raises(ValueError, match=r"'data' is scaled twice at site 'x'"),
        minibatch(index, 6),
        minibatch(index, 6),
    ):
        conjugate(torch.zeros(2))
    with pytest.raises(ValueError, match="scaled twice"), minibatch(index, 6):
        minibatch(index, 6)(conjugate)(torch.zeros(2))


def test_a_plate_of_another_length_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="plate 'data' has 3 rows at site 'x', but the minibatch"),
        minibatch(torch.arange(2), 6),
    ):
        conjugate(torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], 5), {}, "index must be a tensor.*got list"),
        ((torch.zeros(2, 2, dtype=torch.long), 5), {}, r"shape \(B,\).*got \(2, 2\)"),
        ((torch.tensor(3), 5), {}, r"got \(\)"),
        ((torch.zeros(0, dtype=torch.long), 5), {}, r"B >= 1, got \(0,\)"),
        (
            (torch.zeros(2, dtype=torch.float32), 5),
            {},
            "index must hold integers, got torch.float32",
        ),
        ((torch.ones(2, dtype=torch.bool), 5), {}, "index must hold integers, got torch.bool"),
        ((torch.arange(2), 0), {}, "size must be an integer >= 1, got 0"),
        ((torch.arange(2), 5.0), {}, "size must be an integer >= 1, got 5.0"),
        ((torch.arange(2), True), {}, "size must be an integer >= 1, got True"),
        ((torch.arange(2), 5), {"scale": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
        ((torch.arange(2), 5), {"scale": torch.ones(2, 1)}, r"shape \(2,\), got \(2, 1\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minibatch(*arguments, **options)

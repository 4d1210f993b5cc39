"""Gradient estimators: means and variances that are known exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from guides import Amortized, Exact, Local, families
from ppl_models import PPCA, VAE, SigmoidBeliefNetwork, minibatch
from ppl_models.evaluate import gradient_variance
from ppl_models.infer import ELBO, IWAE, VIMCO, ReweightedWakeSleep, fit
from ppl_models.infer.dependencies import dependencies
from ppl_models.infer.gradients import (
    ARM,
    NVIL,
    REBAR,
    RELAX,
    DisARM,
    DReG,
    Enumerate,
    LeaveOneOut,
    Reinforce,
    RunningAverage,
    StickingTheLanding,
)


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


# One unit, whose moments are in closed form: every row is a replicate with a logit of its own.

ROWS = 400_000
TABLE = {
    (0.5, 0.45): (2.5e-2, {"Reinforce": 1.59e-2, "LeaveOneOut": 6.25e-4, "ARM": 2.08e-4, "DisARM": 0.0}),
    (0.5, 0.499): (5.0e-4, {"Reinforce": 1.56e-2, "LeaveOneOut": 2.50e-7, "ARM": 8.33e-8, "DisARM": 0.0}),
    (0.3, 0.499): (4.2e-4, {"Reinforce": 1.32e-2, "LeaveOneOut": 2.44e-7, "ARM": 1.36e-7, "DisARM": 1.18e-7}),
    (0.1, 0.45): (9.0e-3, {"Reinforce": 7.70e-3, "LeaveOneOut": 3.69e-4, "ARM": 3.26e-4, "DisARM": 3.24e-4}),
}  # fmt: skip
ESTIMATORS: dict[str, Callable[[], ELBO]] = {
    "Reinforce": lambda: ELBO(score=Reinforce(), kl_weight=0.0),
    "LeaveOneOut": lambda: ELBO(2, score=LeaveOneOut(), kl_weight=0.0),
    "ARM": lambda: ELBO(score=ARM(), kl_weight=0.0),
    "DisARM": lambda: ELBO(score=DisARM(), kl_weight=0.0),
}


def replicates(
    objective: Any, family: Callable[[Tensor], Any], cost: Callable[[Tensor], Tensor], start: float
) -> Tensor:
    """Gradients of E[cost(z)], one for each row, by a parameter of its own."""
    free = torch.full((ROWS,), start, requires_grad=True)

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", family(torch.zeros(())))
            pyro.factor("cost", cost(z))

    def guide() -> None:
        with pyro.plate("data", ROWS):
            pyro.sample("z", family(free))

    surrogate, _ = objective(model, guide)
    return torch.autograd.grad(surrogate, free)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("theta", "target"), TABLE)
def test_one_bernoulli_unit(name: str, theta: float, target: float) -> None:
    true, variances = TABLE[theta, target]
    found = replicates(
        ESTIMATORS[name](),
        lambda logit: dist.Bernoulli(logits=logit),
        lambda b: (b - target) ** 2,
        math.log(theta / (1 - theta)),
    )
    assert abs(true - theta * (1 - theta) * (1 - 2 * target)) < 1e-12
    error = found.std().item() / ROWS**0.5
    assert abs(found.mean().item() - true) <= 4 * error + 1e-15
    assert found.var().item() == pytest.approx(variances[name], rel=0.05, abs=1e-20)


@pytest.mark.parametrize("mu", [0.0, 1.5])
def test_the_two_gradients_of_a_square(mu: float) -> None:
    """E[x^2], x ~ N(mu, 1): by score the variance is mu^4 + 14 mu^2 + 15, along the path it is 4."""
    score, path = (
        replicates(objective, lambda loc: dist.Normal(loc, 1.0), torch.square, mu)
        for objective in (
            ELBO(score=Reinforce(everywhere=True), kl_weight=0.0),
            ELBO(kl_weight=0.0),
        )
    )
    for found, variance in ((score, mu**4 + 14 * mu**2 + 15), (path, 4.0)):
        assert abs(found.mean().item() - 2 * mu) < 4 * (variance / ROWS) ** 0.5
        assert found.var().item() == pytest.approx(variance, rel=0.05)


# A small belief network: bounds and gradients by summing over all states of its latents.


def belief_network() -> tuple[SigmoidBeliefNetwork, Amortized, Tensor]:
    torch.manual_seed(1)
    model = SigmoidBeliefNetwork(data_dim=4, latent_dims=(6, 4))
    guide = Amortized(model, hidden=(5,), bottom_up=True)
    with torch.no_grad():
        for value in (*model.parameters(), *guide.parameters()):
            value.add_(0.5 * torch.randn_like(value))
    return model, guide, model(size=2).detach()


def states_of(model: SigmoidBeliefNetwork) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=sum(model.latent_dims))))


def log_weights(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, h) - log q(h | x) and log q of all states, shape (states, rows)."""
    both = states_of(model).unsqueeze(1)
    h1, h2 = (h.expand(-1, len(x), -1) for h in both.split(model.latent_dims, -1))
    q = guide.q("h1", x).log_prob(h1) + guide.q("h2", x, h1=h1).log_prob(h2)
    p = model.prior().log_prob(h2) + model.conditional(1, h2).log_prob(h1)
    return p + model.likelihood(h1).log_prob(x) - q, q


def named(model: nn.Module, guide: nn.Module) -> dict[str, Tensor]:
    halves = {"model": model, "guide": guide}
    return {f"{h}.{n}": p for h, half in halves.items() for n, p in half.named_parameters()}


def z_scores(
    objective: Any, model: Any, guide: Any, x: Tensor, exact: tuple[Tensor, dict[str, Tensor]],
    *, copies: int = 300, repeats: int = 40,
) -> dict[str, float]:  # fmt: skip
    """How far means of estimates are from the truth, in standard errors: the worst element of each.

    Copies of the rows are so many draws at once.
    """
    many = x.repeat(copies, 1)
    ready = objective.prepare(model, guide, many)
    with torch.no_grad():
        for value in ready.parameters():  # whatever they are, the mean is the same
            value.add_(0.3 * torch.randn_like(value))
    parameters = named(model, guide)
    bounds, found = [], []
    for _ in range(repeats):
        surrogate, bound = ready(model, guide, many)
        bounds.append(bound.detach() / copies)
        slopes = torch.autograd.grad(surrogate, list(parameters.values()), allow_unused=True)
        found.append(
            [torch.zeros_like(p) if s is None else s / copies
             for s, p in zip(slopes, parameters.values(), strict=True)]
        )  # fmt: skip

    def z(values: list[Tensor], true: Tensor) -> float:
        stacked = torch.stack(values)
        error = stacked.std(0) / repeats**0.5
        return ((stacked.mean(0) - true).abs() / error.clamp(min=1e-12)).max().item()

    scores = {
        name: z([each[i] for each in found], exact[1][name]) for i, name in enumerate(parameters)
    }
    return scores | {"bound": z(bounds, exact[0])}


def exact_elbo(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights, q = log_weights(model, guide, x)
    bound = (q.exp() * weights).sum()
    parameters = named(model, guide)
    slopes = torch.autograd.grad(bound, list(parameters.values()))
    return bound.detach(), dict(zip(parameters, slopes, strict=True))


UNBIASED = {
    "default": ELBO(),
    "all terms": ELBO(score=Reinforce(rao_blackwell=False)),
    "running average": ELBO(score=RunningAverage()),
    "NVIL": ELBO(score=NVIL(hidden=(5,))),
    "leave one out": ELBO(3, score=LeaveOneOut()),
    "ARM": ELBO(score=ARM()),
    "DisARM": ELBO(score=DisARM()),
    "DisARM of two": ELBO(2, score=DisARM()),
    "REBAR": ELBO(score=REBAR()),
    "REBAR of two": ELBO(2, score=REBAR(temperature=0.2), analytic_kl=True),
    "RELAX": ELBO(score=RELAX(hidden=(5,))),
}
# The worst of about 200 elements, each with 39 degrees of freedom: above 5.2 once in 1000 runs.
WIDE = 5.2


@pytest.mark.parametrize("name", UNBIASED)
def test_gradients_of_a_belief_network_have_the_exact_mean(name: str) -> None:
    model, guide, x = belief_network()
    found = z_scores(UNBIASED[name], model, guide, x, exact_elbo(model, guide, x))
    assert max(found.values()) < WIDE, found


def test_the_sum_over_all_states_is_exact() -> None:
    model, guide, x = belief_network()
    bound, slopes = exact_elbo(model, guide, x)
    ready = ELBO(score=Enumerate()).prepare(model, guide, x)
    surrogate, found = ready(model, guide, x)
    assert abs(found - bound) < 1e-12
    parameters = named(model, guide)
    ours = torch.autograd.grad(surrogate, list(parameters.values()))
    for slope, name in zip(ours, parameters, strict=True):
        assert (slope - slopes[name]).abs().max() < 1e-12, name


def mixed(x: Tensor) -> None:
    """A category and a unit, a mask over some rows, and a continuous latent in between."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=torch.tensor([0.3, -0.2, 0.1])))
        a = pyro.sample("a", dist.Normal(k.to(x.dtype), 1.0))
        with pyro.poutine.mask(mask=x > 0.0):
            b = pyro.sample("b", dist.Bernoulli(logits=a))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def mixed_guide(free: Tensor) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = torch.stack([free[0] * x, free[1] + 0 * x, 0 * x], -1)
            k = pyro.sample("k", dist.Categorical(logits=logits))
            a = pyro.sample("a", dist.Normal(free[2] * x + k.to(x.dtype), free[3].exp()))
            with pyro.poutine.mask(mask=x > 0.0):
                pyro.sample("b", dist.Bernoulli(logits=free[4] * a + free[5]))

    return guide


def test_categories_and_continuous_latents_between_states_that_are_summed() -> None:
    """Enumeration of two sites, one of them masked in some rows, agrees with scores in the mean."""
    free = torch.tensor([0.3, -0.5, 0.4, -0.3, 0.6, 0.2], requires_grad=True)
    guide, x = mixed_guide(free), torch.tensor([0.7, -0.4]).repeat(2000)

    def slopes(objective: Any, repeats: int) -> tuple[Tensor, Tensor]:
        ready = objective.prepare(mixed, guide, x)
        found = torch.stack(
            [torch.autograd.grad(ready(mixed, guide, x)[0], free)[0] for _ in range(repeats)]
        )
        return found.mean(0), found.std(0) / repeats**0.5

    (one, error), (other, other_error) = (
        slopes(ELBO(score=Enumerate()), 20),
        slopes(ELBO(2, score=LeaveOneOut()), 60),
    )
    assert ((one - other).abs() / torch.sqrt(error**2 + other_error**2)).max() < WIDE


def test_sums_that_cannot_be_taken_are_refused() -> None:
    model, guide, x = belief_network()
    with pytest.raises(ValueError, match=r"'h1', 'h2'.*1,024 joint states.*most=1,000.*DisARM"):
        ELBO(score=Enumerate(most=1000)).prepare(model, guide, x)

    def pixels(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def tossed(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))

    with pytest.raises(ValueError, match=r"'b'.*this is in \['pixels'\].*TraceEnum_ELBO"):
        ELBO(score=Enumerate()).prepare(pixels, tossed, torch.zeros(2, 3))

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def counted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(torch.tensor(1.5)))

    with pytest.raises(ValueError, match=r"Enumerate.*'k'.*Poisson.*not finite.*Reinforce"):
        ELBO(score=Enumerate()).prepare(counts, counted, torch.zeros(2))


@pytest.mark.parametrize("family", [families.StraightThrough(), families.Concrete()], ids=str)
def test_smooth_draws_are_biased_and_say_so(family: families.Family) -> None:
    model, _, x = belief_network()
    torch.manual_seed(3)
    guide = Amortized(model, hidden=(5,), bottom_up=True, family=family)
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.5 * torch.randn_like(value))
    plain = Amortized(model, hidden=(5,), bottom_up=True)
    plain.load_state_dict(guide.state_dict())
    exact = exact_elbo(model, plain, x)
    found = z_scores(ELBO(), model, guide, x, exact)
    assert max(v for k, v in found.items() if k.startswith("guide")) > 10
    honest = type(family) is families.StraightThrough
    rest = max(v for k, v in found.items() if not k.startswith("guide"))
    assert (rest < WIDE) if honest else (rest > WIDE), found
    told = gradient_variance(model, guide, x, objectives={"ELBO": ELBO()}, draws=3)
    assert "Biased: ELBO: the guide's draws at ['h1', 'h2']" in str(told)
    guide.eval()
    assert set(guide.q("h1", x)().unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="carry their gradients"):
        ELBO(score=DisARM()).prepare(model, guide, x)


def test_normalised_costs_change_the_length_of_the_guide_step_only() -> None:
    """NVIL divides by a running scale above 1: a bias that it says it has."""
    model, guide, x = belief_network()
    exact = exact_elbo(model, guide, x)
    found = z_scores(ELBO(score=NVIL(hidden=(5,), normalise=True)), model, guide, x, exact)
    assert max(v for k, v in found.items() if not k.startswith("guide")) < WIDE
    assert max(v for k, v in found.items() if k.startswith("guide")) > 10


def exact_iwae(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The bound of two particles: over all pairs of states."""
    weights, q = log_weights(model, guide, x)
    pairs = torch.logaddexp(weights.unsqueeze(0), weights.unsqueeze(1)) - math.log(2)
    bound = ((q.unsqueeze(0) + q.unsqueeze(1)).exp() * pairs).sum()
    parameters = named(model, guide)
    slopes = torch.autograd.grad(bound, list(parameters.values()))
    return bound.detach(), dict(zip(parameters, slopes, strict=True))


@pytest.mark.parametrize("objective", [IWAE(2), VIMCO(2)], ids=["IWAE", "VIMCO"])
def test_importance_weighted_gradients_have_the_exact_mean(objective: Any) -> None:
    model, guide, x = belief_network()
    found = z_scores(objective, model, guide, x[:1], exact_iwae(model, guide, x[:1]))
    assert max(found.values()) < WIDE, found


def test_baselines_lower_the_variance_in_the_known_order() -> None:
    """REINFORCE > less the terms that do not hang on a draw > leave-one-out > DisARM."""
    model, guide, x = belief_network()

    def variance(objective: Any) -> float:
        ready = objective.prepare(model, guide, x)
        free = list(guide.parameters())
        draws = [
            torch.cat([g.flatten() for g in torch.autograd.grad(ready(model, guide, x)[0], free)])
            for _ in range(200)
        ]
        return torch.stack(draws).var(0).sum().item()

    found = [variance(o) for o in (
        ELBO(2, score=Reinforce(rao_blackwell=False)), ELBO(2), ELBO(2, score=LeaveOneOut()),
        ELBO(score=DisARM()),
    )]  # fmt: skip
    assert found == sorted(found, reverse=True), found
    assert found[0] > 3 * found[2]


def test_terms_that_hang_on_a_draw() -> None:
    model, guide, x = belief_network()
    found = dependencies(model, guide, x)
    assert found == {
        "h1": {"guide.h1", "guide.h2", "model.h2", "model.h1", "model.x"},
        "h2": {"guide.h2", "model.h2", "model.h1"},
    }


def _written(b: Tensor) -> Tensor:
    loc = torch.zeros((*b.shape, 1))
    loc[..., 0] = 2.0 * b
    return loc.squeeze(-1)


#: By which a draw gets into a likelihood where no operation on tensors shows it.
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda b: torch.tensor(2.0 if b > 0 else 0.0),
    "number": lambda b: torch.tensor(2.0 * b.item()),
    "array": lambda b: torch.as_tensor(2.0 * b.detach().numpy()),
    "written": _written,
    "added": lambda b: torch.zeros_like(b.detach()).mul_(0.0) + torch.zeros(b.shape).add_(2.0 * b),
}


@pytest.mark.parametrize("way", WAYS)
def test_draws_that_cannot_be_followed_hang_together_with_all(way: str) -> None:
    """The guide draws 1 so rarely that a look at a few draws would not show it."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("c", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(WAYS[way](b), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Bernoulli(logits=logit))
        pyro.sample("c", dist.Bernoulli(0.5))

    logit = torch.tensor(-4.0, requires_grad=True)
    x = torch.tensor([0.7, 1.4])
    assert dependencies(model, guide, x) is None
    costs = [math.log(0.5) + dist.Normal(2.0 * b, 1.0).log_prob(x).sum() for b in (0.0, 1.0)]
    q = torch.sigmoid(logit)
    bound = (1 - q) * (costs[0] - torch.log1p(-q)) + q * (costs[1] - torch.log(q))
    (exact,) = torch.autograd.grad(bound, logit)
    ready = ELBO(score=Reinforce()).prepare(model, guide, x)
    found = torch.stack(
        [torch.autograd.grad(ready(model, guide, x)[0], logit)[0] for _ in range(1500)]
    )
    assert abs(found.mean() - exact) < 4.5 * found.std() / len(found) ** 0.5


# Paths.


def linear_gaussian(rows: int, size: int = 2) -> tuple[PPCA, Tensor]:
    torch.manual_seed(2)
    model = PPCA(data_dim=5, latent_dim=size)
    return model, model(size=rows).detach()


def test_sticking_the_landing_leaves_no_variance_at_the_posterior() -> None:
    model, x = linear_gaussian(3)
    exact: Any = model.posterior(x)
    mean, covariance = exact.mean.detach(), exact.covariance_matrix.detach()
    move = torch.zeros(2, requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean + move, covariance))

    def slopes(objective: ELBO) -> Tensor:
        ready = objective.prepare(model, guide, x)
        found = [torch.autograd.grad(ready(model, guide, x)[0], move)[0] for _ in range(20)]
        return torch.stack(found)

    assert slopes(ELBO(path=StickingTheLanding())).abs().max() < 1e-10
    assert slopes(ELBO()).std() > 0.1


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        (ELBO(), ELBO(path=StickingTheLanding())),
        (ELBO(), ELBO(score=Reinforce(everywhere=True))),
        (ELBO(2), ELBO(2, vectorized=False, path=StickingTheLanding())),
        (IWAE(3), IWAE(3, path=DReG())),
        (IWAE(3), IWAE(3, vectorized=False, path=DReG())),
        (IWAE(3), IWAE(3, vectorized=False)),
        (IWAE(3), IWAE(3, score=Reinforce(everywhere=True))),
    ],
    ids=str,
)
def test_estimators_of_one_gradient_have_one_mean(plain: Any, other: Any) -> None:
    """Two latents, the second given the first: paths go through both."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, scale.exp()))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a + b.square(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(free[0] * x, free[1].exp()))
            pyro.sample("b", dist.Normal(free[2] * a + free[3], free[4].exp()))

    scale = torch.tensor(0.1, requires_grad=True)
    free = torch.tensor([0.3, -0.2, 0.4, 0.2, -0.4], requires_grad=True)
    x = torch.tensor([0.7, -0.4]).repeat(500)

    def slopes(objective: Any) -> Tensor:
        ready = objective.prepare(model, guide, x)
        found = [torch.autograd.grad(ready(model, guide, x)[0], [scale, free]) for _ in range(60)]
        return torch.stack([torch.cat([g.flatten() for g in each]) for each in found])

    one, two = slopes(plain), slopes(other)
    error = ((one.var(0) + two.var(0)) / len(one)).sqrt()
    assert ((one.mean(0) - two.mean(0)).abs() < 4.5 * error).all()


#: Prior, likelihood, data, the posterior, and its family: the bound is log p(x) - KL(q || p(z | x)).
CONJUGATE: dict[str, tuple[Any, Any, list[int], Any, families.Family]] = {
    "gamma": (
        dist.Gamma(2.0, 1.0), dist.Poisson, [3, 1, 4, 0, 2], dist.Gamma(12.0, 6.0), families.Gamma(),
    ),
    "beta": (
        dist.Beta(2.0, 3.0), dist.Bernoulli, [1, 1, 0, 1, 1, 1], dist.Beta(7.0, 4.0), families.Beta(),
    ),
    "dirichlet": (
        dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])), dist.Categorical, [0, 2, 2, 1, 2, 2, 1],
        dist.Dirichlet(torch.tensor([2.0, 4.0, 7.0])), families.Dirichlet(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONJUGATE)
def test_implicit_gradients_have_the_mean_of_the_closed_form(case: str) -> None:
    prior, likelihood, data, posterior, family = CONJUGATE[case]
    x = torch.tensor(data, dtype=torch.float64)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(z), obs=x)

    guide = Local(model, rows=None, example=(x,), family=family)
    divergence = torch.distributions.kl_divergence(guide.q("z"), posterior)
    exact = torch.autograd.grad(-divergence / len(x), list(guide.parameters()))
    objectives = {"path": ELBO(), "score": ELBO(score=Reinforce(everywhere=True))}
    found = gradient_variance(model, guide, x, objectives=objectives, draws=3000, seed=0)
    for name in objectives:
        for mean, se, value in zip(
            found.mean[name].values(), found.se[name].values(), exact, strict=True
        ):
            assert ((mean - value).abs() < 4.0 * se).all()
    assert found.total("path", "guide") < 0.2 * found.total("score", "guide")


def test_signal_to_noise_of_importance_weighted_gradients() -> None:
    """By K: the plain one of the guide falls as K^-1/2, the others rise as K^1/2."""
    rows = 10_000
    x = torch.full((rows,), 1.3)
    theta, phi = (torch.zeros(rows, requires_grad=True) for _ in range(2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.2 + phi, 0.8))

    def signals(objective: IWAE) -> list[float]:
        ready = objective.prepare(model, guide, x)
        found = torch.autograd.grad(ready(model, guide, x)[0], [theta, phi])
        return [(g.mean().abs() / g.std()).item() for g in found]

    low, high = 4, 64
    plain, dreg = (
        [
            math.log(b / a) / math.log(high / low)
            for a, b in zip(
                signals(IWAE(low, path=path)), signals(IWAE(high, path=path)), strict=True
            )
        ]
        for path in (None, DReG())
    )
    assert plain[0] == pytest.approx(0.5, abs=0.1)
    assert plain[1] == pytest.approx(-0.5, abs=0.25)
    assert dreg[0] == pytest.approx(0.5, abs=0.1)
    assert dreg[1] == pytest.approx(0.5, abs=0.1)


# Bounds.


@pytest.mark.parametrize("objective", [IWAE(7), VIMCO(7), ReweightedWakeSleep(7)], ids=str)
def test_importance_weights_are_those_of_rows_under_minibatches(objective: Any) -> None:
    model, x = linear_gaussian(200)
    guide = Exact(model)
    evidence = model.log_evidence(x).detach()
    index = torch.arange(20) * 10
    for rows in (torch.arange(200), index):
        with minibatch(rows, 200):
            _, bound = objective(model, guide, x[rows])
        assert bound.item() == pytest.approx(200 / len(rows) * evidence[rows].sum().item())


@pytest.mark.parametrize("batch", [200, 20])
@pytest.mark.parametrize("make", [IWAE, VIMCO])
def test_bounds_rise_to_the_evidence_and_stay_below_it(make: Any, batch: int) -> None:
    model, x = linear_gaussian(200)
    guide = Amortized(model, hidden=())
    evidence = model.log_evidence(x).sum().item()
    means, errors = [], []
    for particles in (2, 10, 100):
        ready, bounds = make(particles).prepare(model, guide, x), []
        for _ in range(20):
            for rows in torch.arange(200).view(-1, batch):
                with minibatch(rows, 200), torch.no_grad():
                    bounds.append(ready(model, guide, x[rows])[1])
        values = torch.stack(bounds).view(20, -1).mean(1)
        means.append(values.mean().item())
        errors.append(values.std().item() / 20**0.5)
    assert all(m < evidence + 4 * e for m, e in zip(means, errors, strict=True))
    assert means == sorted(means)


def test_a_weight_of_the_divergence_is_not_in_the_bound() -> None:
    model, x = linear_gaussian(5)
    guide = Amortized(model, hidden=(), example=x)
    torch.manual_seed(0)
    plain, bound = ELBO()(model, guide, x)
    torch.manual_seed(0)
    half, same = ELBO(kl_weight=0.5)(model, guide, x)
    assert same == bound
    assert plain.item() != half.item()
    torch.manual_seed(0)
    by_tensor, _ = ELBO(kl_weight=torch.tensor(0.5))(model, guide, x)
    assert by_tensor == half


@pytest.mark.parametrize("way", ["wake", "sleep"])
def test_the_guide_of_wake_sleep_finds_the_posterior(way: Any) -> None:
    """Its fixed point is the posterior: the bound becomes the evidence."""
    model, x = linear_gaussian(100)
    guide = Amortized(model, hidden=(), family=families.FullNormal())
    objective = ReweightedWakeSleep(10, guide=way)
    fit(model, guide, x, objective=objective, steps=1000, lr=0.02, fixed_model=True, seed=0)
    with torch.no_grad():
        gap = model.log_evidence(x).mean() - ELBO(100)(model, guide, x)[1] / len(x)
    assert gap < 0.02


# What does not fit.


def bernoulli_pair() -> tuple[Any, Any, Tensor]:
    model = SigmoidBeliefNetwork(data_dim=4, latent_dims=(3,))
    return model, Amortized(model, hidden=(5,)), model(size=6).detach()


def vae_pair() -> tuple[Any, Any, Tensor]:
    model = VAE(data_dim=4, latent_dim=2, hidden=(3,))
    return model, Amortized(model, hidden=(5,)), model(size=6).detach()


@pytest.mark.parametrize(
    ("objective", "pair", "words"),
    [
        (ELBO(score=DisARM()), vae_pair, ("nothing to do", "'z'", "everywhere=True")),
        (ELBO(path=StickingTheLanding()), bernoulli_pair, ("'h1'", "LeaveOneOut")),
        (IWAE(3, path=DReG()), bernoulli_pair, ("'h1'", "LeaveOneOut")),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    objective: Any, pair: Any, words: tuple[str, ...]
) -> None:
    model, guide, x = pair()
    before = [p.clone() for p in guide.parameters()]
    with pytest.raises(ValueError, match="score=|path=") as caught:
        fit(model, guide, x, objective=objective, steps=3)
    assert all(word in str(caught.value) for word in words), caught.value
    assert all(map(torch.equal, before, guide.parameters()))


def test_an_estimator_of_bernoulli_sites_is_refused_for_a_poisson_one() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    with pytest.raises(ValueError, match="'n'.*Poisson.*Reinforce, RunningAverage, NVIL, LeaveOne"):
        fit(model, guide, torch.zeros(5), objective=ELBO(score=DisARM()), steps=3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ELBO(score=LeaveOneOut()), "at least 2 particles, got 1"),
        (lambda: ELBO(3, score=LeaveOneOut(), vectorized=False), "at once"),
        (lambda: VIMCO(1), "at least 2"),
        (lambda: ELBO(path=DReG()), "for IWAE"),
        (lambda: IWAE(3, path=StickingTheLanding()), "for ELBO"),
        (lambda: IWAE(3, score=DisARM()), "VIMCO"),
        (lambda: ELBO(score=cast(Any, DisARM)), "estimators of"),
        (lambda: ELBO(kl_weight=-1.0), "kl_weight"),
        (lambda: ReweightedWakeSleep(1), "at least 2 particles"),
        (lambda: ReweightedWakeSleep(guide=cast(Any, "dream")), "'dream'"),
        (lambda: RunningAverage(decay=1.0), "decay"),
    ],
)
def test_choices_that_do_not_go_together(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_importance_weights_of_global_latents_need_all_rows() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        free = pyro.param("free", torch.zeros(2))
        pyro.sample("w", dist.Normal(free[0], free[1].exp()))

    x = torch.ones(50)
    assert fit(model, guide, x, objective=IWAE(5), steps=3, batch_size=50, seed=0).steps == 3
    with pytest.raises(ValueError, match="'w'.*all rows"):
        fit(model, guide, x, objective=IWAE(5), steps=3, batch_size=10, seed=0)


# In training.


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(score=RunningAverage()),
        ELBO(score=NVIL(hidden=(5,))),
        ELBO(3, score=LeaveOneOut()),
        ELBO(score=DisARM()),
        VIMCO(4),
        ReweightedWakeSleep(3, guide="both"),
    ],
    ids=str,
)
def test_estimators_run_as_recorded_graphs(objective: Any) -> None:
    x = (torch.rand(60, 8) < 0.4).double()
    found = []
    for compile in (False, True):
        torch.manual_seed(1)
        model = SigmoidBeliefNetwork(8, (4, 3))
        guide = Amortized(model, hidden=(6,), bottom_up=True)
        result = fit(
            model, guide, x, objective=objective, steps=260, batch_size=20, seed=0, lr=0.01,
            compile=compile,
        )  # fmt: skip
        found.append(result)
    assert found[1].compiled.startswith("traced graph")
    assert torch.allclose(found[0].bounds, found[1].bounds, rtol=1e-9)
    assert found[0].bounds[-20:].mean() > found[0].bounds[:20].mean()
    assert repr(objective) == found[0].settings["objective"]


def test_networks_of_baselines_are_trained_along() -> None:
    model, guide, x = bernoulli_pair()
    ready = ELBO(score=NVIL(hidden=(5,))).prepare(model, guide, x)
    mine = ready.parameters()
    assert len(mine) == 4
    surrogate, _ = ready(model, guide, x)
    slopes = torch.autograd.grad(surrogate, mine)
    assert all(slope.abs().sum() > 0 for slope in slopes)


def test_paths_through_a_guide_made_of_the_model_are_refused() -> None:
    model, x = linear_gaussian(3)
    for objective in (ELBO(path=StickingTheLanding()), IWAE(2, path=DReG())):
        with pytest.raises(ValueError, match=r"guide does not depend on the model.*'loading'"):
            objective.prepare(model, Exact(model), x)


def test_what_an_estimator_has_learnt_goes_on() -> None:
    model, guide, x = belief_network()
    found = fit(model, guide, x, objective=ELBO(score=REBAR()), steps=20, lr=0.1, progress=False)
    learnt = found.objective
    factors = [value.item() for value in learnt.parameters()]
    assert all(value != 1.0 for value in factors)
    again = learnt.prepare(model, guide, x)
    assert [value.item() for value in again.parameters()] == factors
    fresh = ELBO(score=REBAR()).prepare(model, guide, x)
    assert [value.item() for value in fresh.parameters()] == [1.0, 1.0]
    other, guided = SigmoidBeliefNetwork(4, (3,)), None
    guided = Amortized(other, hidden=(3,))
    assert [value.item() for value in learnt.prepare(other, guided, x).parameters()] == [1.0]


def test_dreams_need_a_model_that_draws_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(ValueError, match=r"must take `size=n`.*guide='wake'"):
        ReweightedWakeSleep(guide="sleep").prepare(model, guide, torch.zeros(2))

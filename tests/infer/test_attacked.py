"""What users tried on objectives and estimators, and what happened then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides import Amortized, Local, families
from ppl_models import SigmoidBeliefNetwork, minibatch
from ppl_models.evaluate import gradient_variance
from ppl_models.infer import ELBO, IWAE, VIMCO, Fit, ReweightedWakeSleep, fit
from ppl_models.infer.estimators import estimators_for
from ppl_models.infer.gradients import (
    NVIL,
    REBAR,
    RELAX,
    DisARM,
    Enumerate,
    LeaveOneOut,
    Reinforce,
    RunningAverage,
)
from ppl_models.runs import load_run, save_run


def network(rows: int = 50) -> tuple[SigmoidBeliefNetwork, Tensor]:
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(6, (3, 2))
    return model, model(size=rows).detach()


@pytest.mark.parametrize("score", [RunningAverage(), NVIL(hidden=(4,))], ids=str)
def test_a_smaller_last_batch_does_not_spoil_a_baseline(score: Any) -> None:
    """A batch of one row of 101 counts 101-fold: what is learnt must be nats of a row."""
    model, x = network(101)
    guide = Amortized(model, hidden=(4,))
    ready = ELBO(score=score).prepare(model, guide, x)
    parameters = list(guide.parameters())

    def slope(objective: Any, rows: Tensor) -> Tensor:
        with minibatch(rows, 101):
            surrogate, _ = objective(model, guide, x[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, parameters)])

    def variance(objective: Any) -> float:
        found = []
        for _ in range(60):
            with torch.enable_grad():
                slope(objective, torch.tensor([100]))
            found.append(slope(objective, torch.arange(100)))
        return torch.stack(found).var(0).sum().item()

    assert variance(ready) < variance(ELBO(score=Reinforce()).prepare(model, guide, x))


OBJECTIVES = [
    ELBO(),
    ELBO(score=NVIL(hidden=(4,))),
    ELBO(score=RELAX(hidden=(4,))),
    ELBO(score=REBAR()),
    ELBO(score=RunningAverage(decay=0.8)),
    ELBO(4, score=LeaveOneOut()),
    ELBO(score=Enumerate(), kl_weight=torch.tensor(0.5)),
    VIMCO(3),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_what_an_estimator_has_learnt_is_in_the_saved_run(objective: Any, tmp_path: Any) -> None:
    model, x = network()
    result = fit(
        model, Amortized(model), x, objective=objective, steps=30, batch_size=20, seed=0
    )  # fmt: skip
    run = load_run(save_run(tmp_path, result))
    assert repr(run.fit.objective) == repr(objective)

    def further(of: Fit) -> Tensor:
        options: dict[str, Any] = {"steps": 4, "batch_size": 20, "seed": 1, "progress": False}
        return fit(of.model, of.guide, x, objective=of.objective, **options).bounds

    assert torch.equal(further(result), further(run.fit))
    for one, other in zip(
        result.objective.parameters(), run.fit.objective.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_what_is_not_the_librarys_own_is_not_in_the_saved_run(tmp_path: Any) -> None:
    model, x = network()
    result = fit(model, Amortized(model), x, objective=pyro.infer.Trace_ELBO(), steps=3)
    assert load_run(save_run(tmp_path, result)).fit.objective is None


def test_a_look_at_gradients_changes_nothing() -> None:
    model, x = network()
    guide = Amortized(model)
    result = fit(
        model, guide, x, objective=ELBO(score=NVIL(hidden=(4,))), steps=20, batch_size=10, seed=0
    )
    before = copy.deepcopy(result.objective.score.moments)
    totals = [
        gradient_variance(
            model, guide, x[:10], objectives={"it": result.objective}, draws=20, seed=0
        ).total("it", "guide")
        for _ in range(2)
    ]
    assert totals[0] == totals[1]
    assert all(torch.equal(before[name], v) for name, v in result.objective.score.moments.items())


@pytest.mark.parametrize("score", [NVIL(hidden=(4,)), RELAX(hidden=(4,))], ids=str)
def test_estimators_begin_anew_for_a_model_of_other_shapes(score: Any) -> None:
    model, x = network()
    learnt = fit(model, Amortized(model), x, objective=ELBO(score=score), steps=3, seed=0).objective
    other = SigmoidBeliefNetwork(8, (5, 2))
    rows = other(size=20).detach()
    assert fit(other, Amortized(other), rows, objective=learnt, steps=3, seed=0).steps == 3


def test_sums_over_states_add_scaled_terms() -> None:
    """A likelihood that counts twice: the exact gradient is that of the scaled sum."""
    x = torch.tensor([0.4, -1.2, 2.0])
    logit = torch.tensor(0.3, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            with pyro.poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logit))

    q = dist.Bernoulli(logits=logit)
    terms = [
        dist.Bernoulli(0.4).log_prob(b) + 2.0 * dist.Normal(b, 1.0).log_prob(x) - q.log_prob(b)
        for b in torch.tensor([0.0, 1.0])
    ]
    exact = ((1 - q.probs) * terms[0] + q.probs * terms[1]).sum()
    surrogate, bound = ELBO(score=Enumerate())(model, guide, x)
    assert bound.item() == pytest.approx(exact.item())
    assert torch.autograd.grad(surrogate, logit)[0].item() == pytest.approx(
        torch.autograd.grad(exact, logit)[0].item()
    )
    for objective in (IWAE(3), VIMCO(3), ReweightedWakeSleep(3)):
        with pytest.raises(ValueError, match="scaled otherwise"):
            objective.prepare(model, guide, x)


def switch(x: Tensor) -> None:
    """No plate at all."""
    z = pyro.sample("z", dist.Bernoulli(0.4))
    loc = z.unsqueeze(-1).expand(*z.shape, x.shape[-1])
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("particles", [1, 2])
def test_relax_of_a_latent_without_plates(rows: int, particles: int) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))

    pyro.clear_param_store()
    result = fit(
        switch, guide, torch.ones(rows), objective=ELBO(particles, score=RELAX()), steps=3,
        batch_size=rows,
    )  # fmt: skip
    assert torch.isfinite(result.bounds).all()


def test_a_mask_of_bools_and_a_sum_over_states_are_compiled() -> None:
    torch.manual_seed(0)
    x, mask = torch.bernoulli(torch.full((60, 5), 0.4)), torch.rand(60, 5) > 0.3

    def model(x: Tensor, mask: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.ones(3, 5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).mask(mask).to_event(1), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        free = pyro.param("free", lambda: torch.zeros(5, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ free).to_event(1))

    def trained(compile: Any) -> Fit:
        pyro.clear_param_store()
        return fit(
            model, guide, (x, mask), objective=ELBO(score=Enumerate()), steps=25, batch_size=20,
            seed=2, compile=compile, progress=False,
        )  # fmt: skip

    compiled = trained("now")
    assert compiled.compiled.startswith("compiled from step 2")
    torch.testing.assert_close(compiled.bounds, trained(False).bounds, rtol=1e-5, atol=1e-5)


# What is refused.


def toss(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def point(x: Tensor) -> None:
    pyro.sample("w", dist.Delta(pyro.param("w_at", torch.tensor(0.3))))


def line(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize(
    "objective", [ELBO(score=Reinforce(everywhere=True)), ReweightedWakeSleep(2)]
)
def test_points_need_their_path(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"'w' is a point.*Use ELBO\(\)"):
        objective.prepare(line, point, torch.ones(3))


def test_dreams_are_no_rows_of_the_data() -> None:
    model, x = network()
    with pytest.raises(ValueError, match=r"Local.*parameters of each row.*'wake'"):
        ReweightedWakeSleep(3, guide="sleep").prepare(model, Local(model, rows=len(x)), x)


def test_dreams_are_all_that_the_guide_takes() -> None:
    def model(x: Tensor | None = None, c: Tensor | None = None, *, size: int = 0) -> Any:
        with pyro.plate("data", size if x is None else len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
            return pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.sigmoid(x + c)))

    with pytest.raises(ValueError, match=r"each of its 2 arguments; .* returns 1"):
        ReweightedWakeSleep(2, guide="sleep").prepare(model, guide, torch.ones(3), torch.ones(3))


def test_estimators_are_named_that_fit_all_sites() -> None:
    def model(x: Tensor) -> None:
        n = pyro.sample("n", dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(b + n.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("n", dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), 0.4).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))

    with pytest.raises(ValueError, match=r"'n'.*that do: Reinforce.*LeaveOneOut\.$"):
        ELBO(score=DisARM()).prepare(model, guide, torch.ones(3))
    found = estimators_for(model, guide, torch.ones(3))
    assert "different supports" in found.others["enumerate"]
    assert "leave-one-out" in found.objectives
    assert (
        "carries no gradient"
        in estimators_for(model, guide, torch.ones(3), names=["path"]).others["path"]
    )


def test_a_straight_through_guide_is_not_biased_by_score() -> None:
    model, x = network()
    guide = Amortized(model, family=families.StraightThrough())
    found = gradient_variance(
        model, guide, x[:10], draws=3,
        objectives={"path": ELBO(), "score": ELBO(score=Reinforce(everywhere=True))},
    )  # fmt: skip
    assert set(found.biases) == {"path"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NVIL(hidden=(-1,)), "hidden must be"),
        (lambda: NVIL(hidden=cast(Any, 5)), "hidden must be"),
        (lambda: RELAX(hidden=(0,)), "hidden must be"),
        (lambda: REBAR(temperature=cast(Any, "a")), "temperature must be"),
        (lambda: Enumerate(most=cast(Any, float("nan"))), "most must be"),
        (lambda: ELBO(kl_weight=cast(Any, "a")), "kl_weight must be"),
        (lambda: ELBO(kl_weight=torch.tensor(-1.0)), "kl_weight must be"),
        (lambda: ELBO(kl_weight=torch.ones(20)), "kl_weight must be"),
        (lambda: ELBO(kl_weight=float("inf")), "kl_weight must be"),
    ],
)
def test_numbers_that_mean_nothing(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("wrong", [DisARM(), ELBO, pyro.infer.Trace_ELBO(), 3], ids=range(4))
def test_gradients_are_those_of_objectives(wrong: Any) -> None:
    model, x = network()
    with pytest.raises(ValueError, match="an objective of"):
        gradient_variance(model, Amortized(model), x, objectives={"it": wrong}, draws=3)

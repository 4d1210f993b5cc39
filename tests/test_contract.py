"""Every promise that a model and its guide make, run over every pair of the registry."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI, Predictive, Trace_ELBO
from pyro.infer import NUTS as PyroNUTS
from pyro.nn import PyroModule
from torch import Tensor
from torch.testing import assert_close

import ppl_models
from guides import Local, for_model
from guides.registry import PAIRS, Pair
from ppl_models import minibatch
from ppl_models.core.sites import accepts_size, site_table, stochastic_nodes, table_of
from ppl_models.core.traces import log_weights, run_pair, vectorizes
from ppl_models.evaluate import compare, elbo, log_evidence
from ppl_models.infer import ELBO, fit, sample

ROWS = 10

every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


def build(pair: Pair, rows: int = ROWS, seed: int = 1) -> tuple[Any, Any, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model = pair.model().to(torch.get_default_dtype())
    return model, pair.guide(model, rows), pair.batch(model, rows)


def parameters(*programs: Any) -> list[Tensor]:
    return [p.detach().clone() for program in programs for p in program.parameters()]


def test_every_public_model_has_a_pair() -> None:
    public = {
        value
        for name in ppl_models.__all__
        if isinstance(value := getattr(ppl_models, name), type) and issubclass(value, PyroModule)
    }
    assert public
    assert public <= {type(pair.model()) for pair in PAIRS}


def test_pairs_have_names_of_their_own() -> None:
    names = [pair.name for pair in PAIRS]
    assert len(set(names)) == len(names)


@every_pair
def test_the_guide_samples_the_latents_of_the_model_and_nothing_else(pair: Pair) -> None:
    model, guide, batch = build(pair)
    latents = {site.name: site for site in site_table(model, *batch).latents}
    sampled = table_of(poutine.trace(guide).get_trace(*batch))
    assert {site.name for site in sampled} == set(latents)
    for site in sampled:
        want = latents[site.name]
        assert site.value.shape == want.value.shape
        assert site.batch_shape == want.batch_shape
        assert site.data_dim == want.data_dim
        assert bool(want.support.check(site.value).all())


@every_pair
def test_what_a_model_draws_it_can_be_conditioned_on(pair: Pair) -> None:
    model, _, batch = build(pair)
    table = site_table(model, *batch)
    assert all(len(value) == ROWS for value in batch)
    for site in table.observed:
        assert site.value.shape == site.fn.shape()
        assert bool(site.support.check(site.value).all())
    assert table.latents
    if accepts_size(model):
        again = model(size=3)
        assert again.shape == (3, *batch[0].shape[1:])
    else:  # a conditional model draws its last argument, given the others
        again = model(*batch[:-1])
        assert again.shape == batch[-1].shape


@every_pair
def test_a_model_needs_either_data_or_a_size(pair: Pair) -> None:
    model, _, batch = build(pair)
    if not accepts_size(model):  # it says nothing of its covariates, so it needs them
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            model()
        return
    with pytest.raises(ValueError, match=r"either data.*got neither"):
        model()
    with pytest.raises(ValueError, match=r"either data.*got both"):
        model(*batch, size=3)
    with pytest.raises(ValueError, match="at least one row"):
        model(size=0)


@every_pair
def test_a_finite_gradient_reaches_every_parameter(pair: Pair) -> None:
    model, guide, batch = build(pair)
    surrogate, _ = ELBO()(model, guide, *batch)
    surrogate.backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    for name, parameter in named:
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool((parameter.grad != 0).any()), name


@every_pair
def test_the_bound_is_at_most_the_evidence(pair: Pair) -> None:
    model, guide, batch = build(pair)
    bound = elbo(model, guide, *batch, particles=400, seed=0)
    assert math.isfinite(bound.mean)
    if pair.evidence is None:
        return
    assert bound.rows is not None
    assert bound.rows_se is not None
    truth = pair.evidence(model, batch).detach()
    assert bool((bound.rows <= truth + 5 * bound.rows_se + 1e-9).all())


@every_pair
def test_importance_sampling_agrees_with_the_evidence_or_is_refused(pair: Pair) -> None:
    model, guide, batch = build(pair)
    if not pair.row_wise:
        with pytest.raises(ValueError, match="log_evidence scores rows one by one"):
            log_evidence(model, guide, *batch, particles=10)
        return
    if isinstance(guide, Local):  # untrained, it is too far from the posterior
        guide = guide.refine(*batch, steps=300, seed=0)
    estimate = log_evidence(model, guide, *batch, particles=4000, seed=0)
    bound = elbo(model, guide, *batch, particles=400, seed=0)
    assert estimate.mean >= bound.mean - 5 * math.hypot(bound.se, estimate.se)
    small = estimate.rows_se < 0.05  # where the first order of the error holds
    if pair.evidence is not None:
        truth = pair.evidence(model, batch).detach()
        gap = (estimate.rows - truth).abs()
        assert bool(small.any())
        assert bool((gap <= 5 * estimate.rows_se + 1e-9)[small].all())


@every_pair
@pytest.mark.parametrize("size", [1, 4, 5])
def test_minibatches_average_to_the_whole(pair: Pair, size: int) -> None:
    model, guide, batch = build(pair)
    pair_of_traces = run_pair(model, guide, *batch)
    rows, whole = log_weights(pair_of_traces)
    assert rows is not None
    total = rows.sum() + whole.sum()
    table = site_table(model, *batch)
    average = torch.zeros(())
    for index in torch.arange(ROWS).split(size):
        part = tuple(value[index] for value in batch)
        trace = poutine.Trace()
        for name, node in stochastic_nodes(pair_of_traces.guide):
            value, site = node["value"], table[name]
            if site.data_dim is not None:
                value = value.index_select(site.data_dim - len(site.event_shape), index)
            trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
        with minibatch(index, ROWS):
            replayed = run_pair(model, poutine.replay(guide, trace=trace), *part)
            local, shared = log_weights(replayed)
        assert local is not None
        average = average + (local.sum() + shared.sum()) * len(index) / ROWS
    assert_close(average, total)


@every_pair
def test_a_state_dict_restores_the_pair(pair: Pair) -> None:
    model, guide, batch = build(pair, seed=1)
    other, other_guide, _ = build(pair, seed=2)
    before = elbo(other, other_guide, *batch, particles=2, seed=0)
    other.load_state_dict(model.state_dict())
    other_guide.load_state_dict(guide.state_dict())
    after = elbo(other, other_guide, *batch, particles=2, seed=0)
    truth = elbo(model, guide, *batch, particles=2, seed=0)
    assert after.mean == truth.mean
    assert after.mean != before.mean


@every_pair
def test_all_parameters_exist_at_construction_and_none_is_the_models(pair: Pair) -> None:
    model, guide, batch = build(pair)
    before = {name for name, _ in guide.named_parameters()}
    guide(*batch)
    assert {name for name, _ in guide.named_parameters()} == before
    of_model = {id(parameter) for parameter in model.parameters()}
    assert not of_model & {id(parameter) for parameter in guide.parameters()}


@every_pair
def test_q_is_the_distribution_that_the_guide_samples_from(pair: Pair) -> None:
    _, guide, batch = build(pair)
    trace = poutine.trace(guide).get_trace(*batch)
    trace.compute_log_prob()
    draws: dict[str, Tensor] = {}
    for name, node in stochastic_nodes(trace):
        assert_close(guide.q(name, *batch, **draws).log_prob(node["value"]), node["log_prob"])
        draws[name] = node["value"]


@every_pair
def test_a_seed_reproduces_training_and_leaves_the_random_state_alone(pair: Pair) -> None:
    results = []
    for _ in range(2):
        model, guide, batch = build(pair)
        state = torch.get_rng_state()
        result = fit(model, guide, batch, steps=4, batch_size=4, lr=0.01, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((result.bounds, parameters(model, guide)))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_trains_in_single_and_in_double_precision(pair: Pair, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    model = pair.model().to(dtype)
    guide = pair.guide(model, ROWS)
    batch = pair.batch(model, ROWS)
    assert all(value.dtype == dtype for value in batch if value.is_floating_point())
    assert all(parameter.dtype == dtype for parameter in guide.parameters())
    before = parameters(model, guide)
    result = fit(model, guide, batch, steps=3, batch_size=4, lr=0.01, seed=0)
    assert bool(torch.isfinite(result.bounds).all())
    after = parameters(model, guide)
    assert all(parameter.dtype == dtype for parameter in after)
    assert any(not torch.equal(b, a) for b, a in zip(before, after, strict=True))


@every_pair
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_trains_and_is_scored_on_a_gpu(pair: Pair) -> None:
    model, guide, batch = build(pair)
    fit(model, guide, batch, steps=3, batch_size=4, seed=0, device="cuda")
    assert all(parameter.is_cuda for parameter in [*model.parameters(), *guide.parameters()])
    assert math.isfinite(elbo(model, guide, *batch, particles=5, seed=0).mean)
    made_there = pair.guide(model, ROWS)
    assert all(parameter.is_cuda for parameter in made_there.parameters())
    few = tuple(value[:2] for value in batch)
    if pair.sampled:
        posterior = sample(model, *few, chains=1, draws=4, warmup=2, rows=pair.row_wise, seed=0)
        assert all(value.is_cuda for value in posterior.values())
        assert not posterior.summary().empty
    if pair.row_wise:
        assert math.isfinite(log_evidence(model, made_there, *batch, particles=5, seed=0).mean)
    factory = {"guide": lambda own: pair.guide(own, ROWS)}
    card = compare(pair.model(), factory, batch, batch, steps=2, draws=4, warmup=2, device="cuda")
    assert math.isfinite(card["guide"].elbo.mean)


@every_pair
def test_vanilla_svi_steps_and_its_bound_agrees_with_ours(pair: Pair) -> None:
    model, guide, batch = build(pair)
    torch.manual_seed(5)
    _, bound = ELBO()(model, guide, *batch)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    torch.manual_seed(5)
    loss = svi.step(*batch)
    assert_close(torch.as_tensor(-loss), bound.detach())


@every_pair
def test_two_instances_trained_in_turn_by_vanilla_svi_both_learn(pair: Pair) -> None:
    moved = []
    for seed in (1, 2):
        model, guide, batch = build(pair, seed=seed)
        before = parameters(model, guide)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        start = elbo(model, guide, *batch, particles=100, seed=0).mean
        for _ in range(60):
            svi.step(*batch)
        end = elbo(model, guide, *batch, particles=100, seed=0).mean
        assert end > start
        after = parameters(model, guide)
        moved.append([not torch.equal(b, a) for b, a in zip(before, after, strict=True)])
    assert all(all(flags) for flags in moved)


@every_pair
def test_it_carries_vectorised_particles(pair: Pair) -> None:
    model, guide, batch = build(pair)
    assert vectorizes(model, guide, *batch, dim=-2)
    torch.manual_seed(5)
    _, bound = ELBO(particles=3).prepare(model, guide, *batch)(model, guide, *batch)
    pyros = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(5)
    _, again = ELBO(particles=3, plate_dims=1)(model, guide, *batch)
    torch.manual_seed(5)
    assert_close(torch.as_tensor(-pyros.loss(model, guide, *batch)), again.detach())
    assert math.isfinite(bound.item())


@every_pair
def test_predictive_and_render_model_run(pair: Pair) -> None:
    model, guide, batch = build(pair)
    drawn = Predictive(model, guide=guide, num_samples=3)(*batch)
    for site in site_table(model, *batch).latents:
        assert drawn[site.name].shape[0] == 3
    graph = pyro.render_model(model, model_args=batch)
    assert all(site.name in graph.source for site in site_table(model, *batch))


@every_pair
def test_nuts_samples_it(pair: Pair) -> None:
    model, _, batch = build(pair)
    few = tuple(value[:2] for value in batch)
    if not pair.sampled:
        with pytest.raises(ValueError, match="continuous"):
            sample(model, *few, chains=1, draws=4, warmup=2)
        return
    posterior = sample(model, *few, chains=1, draws=4, warmup=2, rows=pair.row_wise, seed=0)
    table = site_table(model, *few)
    assert set(posterior) == {site.name for site in table.latents}
    for site in table.latents:
        assert posterior[site.name].shape == (1, 4, *site.value.shape)
    mcmc = MCMC(PyroNUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run(*few)
    assert set(mcmc.get_samples()) == set(posterior)


@every_pair
def test_library_calls_leave_the_parameter_store_and_frozen_parameters_alone(pair: Pair) -> None:
    model, guide, batch = build(pair)
    mine = pyro.param("mine", torch.ones(2))
    frozen = next(iter(model.parameters()), None)
    if frozen is not None:
        frozen.requires_grad_(False)
        before = frozen.detach().clone()
    trainable = list(guide.parameters()) or [p for p in model.parameters() if p.requires_grad]
    if trainable:
        fit(model, guide, batch, steps=2, lr=0.1, seed=0)
    elbo(model, guide, *batch, particles=2)
    assert set(pyro.get_param_store().keys()) == {"mine"}
    assert torch.equal(pyro.param("mine"), mine)
    if frozen is not None:
        assert not frozen.requires_grad
        assert torch.equal(frozen, before)


@every_pair
def test_the_guide_is_among_those_that_fit(pair: Pair) -> None:
    model, guide, batch = build(pair)
    choices = for_model(model, example=batch)
    assert any(name.startswith(type(guide).__name__) for name in choices.fitting)


def test_nuts_and_the_exact_posterior_have_the_same_moments() -> None:
    pair = next(pair for pair in PAIRS if pair.name == "ppca-exact")
    model, guide, batch = build(pair, rows=3)
    posterior = sample(model, *batch, chains=2, draws=500, warmup=200, rows=True, seed=0)
    with torch.no_grad():
        exact = guide.q("z", *batch)
    error = (posterior.mean()["z"] - exact.mean) / posterior.mcse()["z"]
    assert float(error.abs().max()) < 5
    draws = posterior.chains * posterior.draws
    ratio = posterior.scale()["z"] / exact.stddev
    # The scale of n independent normal draws has relative error 1 / sqrt(2 n).
    effective = float(min(value.min() for value in posterior.ess().values()))
    assert float((ratio - 1).abs().max()) < 5 / math.sqrt(2 * min(effective, draws))

"""Sigmoid belief networks against sums over all states of their latents, written out again."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from scipy.stats import bernoulli, chi2
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Local
from ppl_models import SigmoidBeliefNetwork
from ppl_models.core.traces import vectorizes
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.infer import ELBO, VIMCO, fit, sample
from ppl_models.infer.gradients import DisARM, Enumerate

LAYOUTS = [((4,), ()), ((3, 2), ()), ((3, 2, 4), ()), ((3, 2), (3,)), ((2, 3), (4, 3))]

every_layout = pytest.mark.parametrize(("latent_dims", "hidden"), LAYOUTS, ids=str)


def network(
    latent_dims: tuple[int, ...] = (3, 2), hidden: tuple[int, ...] = (), data_dim: int = 4
) -> SigmoidBeliefNetwork:
    """Return one whose parameters are away from their start, where every unit matters."""
    torch.manual_seed(1)
    model = SigmoidBeliefNetwork(data_dim, latent_dims, hidden=hidden)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def all_states(units: int) -> np.ndarray:
    return np.array(list(itertools.product([0.0, 1.0], repeat=units)))


def probabilities(model: SigmoidBeliefNetwork, level: int, above: np.ndarray) -> np.ndarray:
    """Means of a layer given the one above it, by the weights of its linear layers."""
    linear = [layer for layer in model.layers[level].modules() if isinstance(layer, nn.Linear)]
    for layer in linear:
        inputs = above if layer is linear[0] else np.tanh(above)
        above = inputs @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return expit(above)


def log_joint(model: SigmoidBeliefNetwork, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log p(x, h) of all joint states h = (h1, ..., hL), shape (states, rows), and the states."""
    states = all_states(sum(model.latent_dims))
    layers = np.split(states, np.cumsum(model.latent_dims)[:-1], axis=1)
    top = expit(model.top_logits.detach().numpy())
    total = bernoulli(top).logpmf(layers[-1]).sum(-1)
    for level in range(1, len(layers)):
        means = probabilities(model, level, layers[level])
        total = total + bernoulli(means).logpmf(layers[level - 1]).sum(-1)
    means = probabilities(model, 0, layers[0])
    return total[:, None] + bernoulli(means[:, None]).logpmf(x).sum(-1), states


@every_layout
def test_the_evidence_is_the_sum_over_all_joint_states(latent_dims: Any, hidden: Any) -> None:
    model = network(latent_dims, hidden)
    x = all_states(4)
    joint, states = log_joint(model, x)
    assert len(states) == 2 ** sum(latent_dims)
    found = model.log_evidence(torch.tensor(x)).detach()
    assert_close(found, torch.tensor(logsumexp(joint, axis=0)))


@every_layout
def test_the_evidence_sums_to_one_over_all_rows(latent_dims: Any, hidden: Any) -> None:
    found = network(latent_dims, hidden).log_evidence(torch.tensor(all_states(4)))
    assert_close(found.exp().sum().item(), 1.0)


def test_the_evidence_of_many_rows_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    x = model(size=50).detach()
    want = model.log_evidence(x)
    monkeypatch.setattr("ppl_models.sbn.STATES", 2**6)  # so that they are taken in parts
    assert_close(model.log_evidence(x), want)


def test_the_gradient_of_the_evidence_is_that_of_the_sum() -> None:
    model = network((2, 2), (3,))
    x = model(size=3).detach()
    assert torch.autograd.gradcheck(lambda *_: model.log_evidence(x), tuple(model.parameters()))


@every_layout
def test_draws_are_as_frequent_as_the_evidence_says(latent_dims: Any, hidden: Any) -> None:
    model, rows = network(latent_dims, hidden), 40_000
    torch.manual_seed(2)
    codes = model(size=rows).detach() @ torch.tensor([8.0, 4.0, 2.0, 1.0])
    seen = torch.bincount(codes.long(), minlength=16).numpy()
    expected = rows * model.log_evidence(torch.tensor(all_states(4))).detach().exp().numpy()
    rare = expected < 5  # too few for a chi-square: they are counted as one
    seen, expected = (
        np.append(counts[~rare], counts[rare].sum()) if rare.any() else counts
        for counts in (seen, expected)
    )
    assert len(seen) > 8
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert chi2(len(seen) - 1).sf(statistic) > 1e-5


def test_the_story_has_the_density_of_its_formula() -> None:
    model = network((3, 2, 1), (3,))
    x = all_states(4)
    joint, states = log_joint(model, x)
    h1, h2, h3 = torch.tensor(states).split((3, 2, 1), -1)
    found = (
        model.prior().log_prob(h3)
        + model.conditional(2, h3).log_prob(h2)
        + model.conditional(1, h2).log_prob(h1)
    ).unsqueeze(1) + model.likelihood(h1.unsqueeze(1)).log_prob(torch.tensor(x))
    assert_close(found.detach(), torch.tensor(joint))


@every_layout
def test_leading_dimensions_change_no_density(latent_dims: Any, hidden: Any) -> None:
    model = network(latent_dims, hidden)
    guide = Amortized(model, hidden=(5,), bottom_up=True)
    x = model(size=6).detach()
    for level, (below, above) in enumerate(itertools.pairwise((4, *latent_dims))):
        h = torch.randint(2, (5, 3, 6, above)).double()
        values = torch.randint(2, (5, 3, 6, below)).double()
        found = model.conditional(level, h).log_prob(values)
        assert found.shape == (5, 3, 6)
        alone = model.conditional(level, h[4, 1, 2:3]).log_prob(values[4, 1, 2:3])
        assert_close(found[4, 1, 2:3], alone)
    assert vectorizes(model, guide, x, dim=-2)


@pytest.mark.parametrize("latent_dims", [(21,), (11, 10), (2, 15, 6)])
def test_too_many_states_are_refused(latent_dims: tuple[int, ...]) -> None:
    model = SigmoidBeliefNetwork(3, latent_dims)
    said = r"layers of \(.*\) units have too many states.*Use evaluate\.log_evidence"
    with pytest.raises(ValueError, match=said):
        model.log_evidence(torch.zeros(2, 3))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data_dim": 0},
        {"latent_dims": ()},
        {"latent_dims": (3, 0)},
        {"latent_dims": (-1,)},
        {"hidden": (0,)},
    ],
    ids=str,
)
def test_dimensions_must_be_positive(sizes: dict[str, Any]) -> None:
    (name, got), arguments = next(iter(sizes.items())), {"data_dim": 4, "latent_dims": (3,)}
    said = rf"SigmoidBeliefNetwork: {name} must be .*integer.*got {re.escape(str(got))}\."
    with pytest.raises(ValueError, match=said):
        SigmoidBeliefNetwork(**(arguments | sizes))


def bars() -> Tensor:
    """Rows of 3 x 3 pixels: each line and each column is there, or not, by itself."""
    torch.manual_seed(3)
    lines, columns = torch.rand(2, 300, 3) < 0.3
    return (lines.unsqueeze(2) | columns.unsqueeze(1)).flatten(1).double()


@pytest.mark.parametrize("objective", [ELBO(score=DisARM()), VIMCO(4)], ids=str)
def test_training_raises_bound_and_evidence(objective: Any) -> None:
    torch.manual_seed(0)
    x, model = bars(), SigmoidBeliefNetwork(9, (6, 3))
    guide = Amortized(model, hidden=(16,), bottom_up=True)
    exact = [model.log_evidence(x).mean().item()]
    bounds = [elbo(model, guide, x, particles=50, seed=0)]
    fit(model, guide, x, objective=objective, steps=600, batch_size=100, lr=0.02, seed=0)
    exact.append(model.log_evidence(x).mean().item())
    bounds.append(elbo(model, guide, x, particles=50, seed=0))
    for truth, bound in zip(exact, bounds, strict=True):
        assert bound.mean < truth + 5 * bound.se
    independent = bernoulli(x.mean(0).numpy()).entropy().sum()  # what no latent at all would reach
    assert bounds[0].mean < bounds[1].mean - 1.0
    assert exact[1] > -independent + 0.5


@every_layout
def test_importance_sampling_finds_the_exact_evidence(latent_dims: Any, hidden: Any) -> None:
    model = network(latent_dims, hidden)
    guide = Amortized(model, hidden=(5,), bottom_up=True)
    x = torch.tensor(all_states(4))
    truth = model.log_evidence(x).detach()
    estimate = log_evidence(model, guide, x, particles=20_000, seed=0)
    assert bool(((estimate.rows - truth).abs() < 5 * estimate.rows_se).all())
    assert float(estimate.rows_se.max()) < 0.05  # or the line above says little


def test_the_bound_misses_the_evidence_by_the_divergence_from_the_posterior() -> None:
    model = network((3, 2))
    guide = Amortized(model, hidden=(5,), bottom_up=True)
    x = torch.tensor(all_states(4))
    joint, states = log_joint(model, x.numpy())
    h1, h2 = (h.unsqueeze(1).expand(-1, 16, -1) for h in torch.tensor(states).split((3, 2), -1))
    with torch.no_grad():
        log_q = guide.q("h1", x).log_prob(h1) + guide.q("h2", x, h1=h1).log_prob(h2)
    assert_close(log_q.exp().sum(0), torch.ones(16))
    posterior = torch.tensor(joint - logsumexp(joint, axis=0))
    divergence = (log_q.exp() * (log_q - posterior)).sum(0)
    bound = elbo(model, guide, x, particles=4000, seed=0)
    missed = model.log_evidence(x).detach() - bound.rows
    assert bool(((missed - divergence).abs() < 5 * bound.rows_se).all())


def test_a_guide_draws_bottom_up_and_conditions_on_what_it_has_drawn() -> None:
    model = network((3, 2, 4))
    x = model(size=6).detach()
    up = Amortized(model, hidden=(5,), bottom_up=True)
    down = Amortized(model, hidden=(5,))
    assert list(up(x)) == up.local_sites() == ["h1", "h2", "h3"]
    assert list(down(x)) == down.local_sites() == ["h3", "h2", "h1"]
    sizes = {"h1": 3, "h2": 2, "h3": 4}
    for guide in (up, down):
        order = guide.local_sites()
        zeros = {name: torch.zeros(6, sizes[name]) for name in order}
        for place, name in enumerate(order):
            given = {other: zeros[other] for other in order[:place]}
            before = guide.q(name, x, **given).base_dist.logits
            assert before.shape == (6, sizes[name])
            for other in given:
                after = guide.q(name, x, **given | {other: torch.ones(6, sizes[other])})
                assert bool((after.base_dist.logits != before).all()), (name, other)
            # Nothing is asked of the sites that come after, and nothing they say matters.
            later = {other: 1.0 - zeros[other] for other in order[place:]}
            assert_close(guide.q(name, x, **given, **later).base_dist.logits, before)


def test_a_mean_field_guide_draws_bottom_up_from_the_row_alone() -> None:
    model = network((3, 2))
    x = model(size=6).detach()
    guide = Amortized(model, hidden=(5,), bottom_up=True, mean_field=True)
    assert list(guide(x)) == ["h1", "h2"]
    one, other = (guide.q("h2", x, h1=h * torch.ones(6, 3)) for h in (0.0, 1.0))
    assert_close(one.base_dist.logits, other.base_dist.logits)


def test_free_parameters_are_refined_to_where_exact_gradients_lead() -> None:
    model = network((4, 4), data_dim=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # units that matter: plain scores end 2 nats lower
    x = model(size=30).detach()
    start = Local(model, rows=30)
    best = start.refine(x, seed=0, objective=ELBO(score=Enumerate()))
    found, limit = (
        elbo(model, guide, x, particles=2000, seed=0) for guide in (start.refine(x, seed=0), best)
    )
    assert limit.mean < model.log_evidence(x).mean().item()
    assert abs(found.mean - limit.mean) < 0.06


def test_nuts_says_that_it_cannot_sample_binary_units() -> None:
    model = network()
    with pytest.raises(ValueError, match="continuous"):
        sample(model, model(size=2), chains=1, draws=4, warmup=2)


def test_latents_are_fair_coins_at_the_start_of_the_top_layer() -> None:
    model = SigmoidBeliefNetwork(4, (3, 5))
    value = model.prior().log_prob(torch.zeros(5)).item()
    assert value == pytest.approx(-5 * math.log(2))

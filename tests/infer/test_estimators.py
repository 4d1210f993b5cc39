"""Estimators by name: which fit, and what they bring along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guides import Amortized, Exact, families
from ppl_models import PPCA, VAE, SigmoidBeliefNetwork
from ppl_models.evaluate import gradient_variance
from ppl_models.infer.estimators import BY_PATH, BY_SCORE, ESTIMATORS, estimators_for, tuned


def belief_network(rows: int = 12) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(data_dim=6, latent_dims=(3, 2))
    return model, Amortized(model, hidden=(4,), bottom_up=True), model(size=rows).detach()


def test_those_for_scores_fit_binary_latents_and_agree_with_the_sum_over_states() -> None:
    """But for the two that ascend another bound, or none."""
    model, guide, x = belief_network()
    found = estimators_for(model, guide, x)
    assert list(found.objectives) == list(BY_SCORE)
    assert not found.others
    moments = gradient_variance(model, guide, x, objectives=found.objectives, draws=400, seed=1)
    exact = moments.mean["enumerate"]
    for name in set(BY_SCORE) - {"enumerate", "vimco", "reweighted-wake-sleep"}:
        for key, mean in moments.mean[name].items():
            off = (mean - exact[key]).abs() / moments.se[name][key].clamp(min=1e-9)
            assert off.max() < 5, (name, key)


def test_those_along_the_path_fit_continuous_latents_where_they_can() -> None:
    torch.manual_seed(0)
    model = VAE(data_dim=6, latent_dim=2, hidden=(4,))
    x = model(size=8).detach()
    assert list(estimators_for(model, Amortized(model), x).objectives) == list(BY_PATH)
    flow = families.Flow(transforms=1, hidden_features=(4,))
    found = estimators_for(model, Amortized(model, family=flow), x)
    assert found.others == {"analytic-kl": "ELBO: KL(q || p) has no closed form at any latent."}
    assert list(found.objectives) == [name for name in BY_PATH if name != "analytic-kl"]


def test_a_relaxed_family_has_draws_with_gradients() -> None:
    model, _, x = belief_network()
    guide = Amortized(model, hidden=(4,), family=families.StraightThrough())
    assert "path" in estimators_for(model, guide, x).objectives


def test_the_reasons_are_those_of_the_objectives() -> None:
    torch.manual_seed(0)
    model = PPCA(data_dim=5, latent_dim=2)
    guide, x = Exact(model), model(size=4).detach()
    state = torch.get_rng_state()
    found = estimators_for(model, guide, x, names=["disarm", "path"])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="has nothing to do") as raised:
        ESTIMATORS["disarm"].prepare(model, guide, x)
    assert found.others == {"disarm": str(raised.value)}
    assert list(found.objectives) == ["path"]
    with pytest.raises(ValueError, match="Did you mean 'disarm'"):
        estimators_for(model, guide, x, names=["disarn"])


@pytest.mark.parametrize(("name", "share"), [("nvil", 0.7), ("rebar", 1.02), ("relax", 0.95)])
def test_tuning_takes_variance_off_and_leaves_the_pair_alone(name: str, share: float) -> None:
    """The factors of REBAR start close to the best here: it has nothing to gain."""
    model, guide, x = belief_network(60)
    with torch.no_grad():  # weights of a trained network: a row's cost is far from that of another
        model.layers[0].net[0].weight.mul_(8.0)
    before = [v.clone() for v in [*model.parameters(), *guide.parameters()]]
    plain = tuned(ESTIMATORS[name], model, guide, x, rows=20, steps=0, seed=0)
    ready = tuned(ESTIMATORS[name], model, guide, x, rows=20, steps=200, seed=0)
    again = tuned(ESTIMATORS[name], model, guide, x, rows=20, steps=200, seed=0)
    for one, other in zip(ready.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    for one, other in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert torch.equal(one, other)
        assert other.grad is None
    both = {"plain": plain, "ready": ready}
    moments = gradient_variance(model, guide, x[:20], objectives=both, draws=400, seed=1)
    assert not moments.biases
    assert moments.total("ready", "guide") < share * moments.total("plain", "guide")


def test_a_bias_is_told_of_what_was_tuned_too() -> None:
    model, guide, x = belief_network()
    ready = tuned(ESTIMATORS["reweighted-wake-sleep"], model, guide, x, rows=4, seed=0)
    found = gradient_variance(model, guide, x, objectives={"it": ready}, draws=2, seed=0)
    assert found.biases == {"it": ESTIMATORS["reweighted-wake-sleep"].bias}


def test_tuned_refuses_what_makes_no_steps() -> None:
    model, guide, x = belief_network()
    for options in ({"rows": 0}, {"rows": 4, "steps": -1}):
        with pytest.raises(ValueError, match="must be an integer >="):
            tuned(ESTIMATORS["nvil"], model, guide, x, **options)

"""The scorecard: the same start for all, the right figures, and a reference that agrees."""

from __future__ import annotations

import math
import os
import re
import signal
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import Amortized, Exact, Local
from ppl_models import PPCA, VAE
from ppl_models.core.random import stream
from ppl_models.evaluate import active_units, compare, elbo, log_evidence, score
from ppl_models.infer import NUTS, fit

QUICK = {"reference": None, "particles": 50, "progress": False}


def setting(rows=40, latent_dim=2) -> Any:
    model = PPCA(data_dim=5, latent_dim=latent_dim, noise_scale=0.7)
    x = model(size=rows).detach()
    return model, x[: rows - 10], x[rows - 10 :]


def stretched(scale, shift) -> Any:
    """Make a guide: the exact posterior, its scale multiplied and its mean moved."""

    def make(model):
        def guide(x):
            exact = model.posterior(x)
            loc = exact.loc + (exact.scale_tril @ torch.full((model.latent_dim,), float(shift)))
            with pyro.plate("data", len(x)):
                normal = dist.MultivariateNormal(loc, scale_tril=scale * exact.scale_tril)
                pyro.sample("z", normal)

        return guide

    return make


def copied(module) -> Any:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second) -> Any:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def timeless(card) -> Any:
    return card.to_pandas().drop(columns=["train_seconds", "test_seconds"])


def test_every_guide_starts_from_the_same_model_which_is_left_as_it_was() -> None:
    model, x, test = setting()
    before, names, state = copied(model), set(pyro.get_param_store()), torch.get_rng_state()
    met = []

    def factory(own):
        assert own is not model
        met.append(copied(own))
        return Amortized(own, hidden=(4,))

    guides = {"a": factory, "b": factory, "c": factory}
    card = compare(model, guides, x, test, steps=5, lr=0.1, **QUICK)
    assert all(same(start, before) for start in met)
    assert same(copied(model), before)
    assert set(pyro.get_param_store()) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = [copied(entry.model) for entry in card]
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    assert not same(trained[0], before)
    figures = timeless(card)
    pd.testing.assert_series_equal(figures.loc["a"], figures.loc["b"], check_names=False)
    pd.testing.assert_series_equal(figures.loc["a"], figures.loc["c"], check_names=False)


def test_a_guide_that_is_made_already_is_trained_as_a_copy_with_its_model() -> None:
    model, x, test = setting()
    guide = Amortized(model, hidden=(4,))
    exact = Exact(model)
    before = copied(model), copied(guide)
    guides = {"made": guide, "factory": lambda m: Amortized(m, hidden=(4,)), "exact": exact}
    card = compare(model, guides, x, test, steps=20, lr=0.1, **QUICK)
    assert same(copied(model), before[0])
    assert same(copied(guide), before[1])
    for entry in card:
        assert entry.model is not model
        assert not same(copied(entry.model), before[0])
        assert entry.elbo.mean == pytest.approx(
            elbo(entry.model, entry.guide, test, particles=entry.elbo.particles, seed=0).mean
        )
    # Exact knows a model: after the training it must be the trained one.
    assert abs(card["exact"].gap) < 1e-9


def test_a_training_that_fails_leaves_the_model_as_it_was() -> None:
    model, x, test = setting()
    before = copied(model)

    def stop(step, bound):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        compare(
            model, {"made": Amortized(model)}, x, test, steps=3, lr=0.1, callbacks=[stop], **QUICK
        )
    assert same(copied(model), before)


def test_a_model_that_is_a_function_starts_anew_for_every_guide() -> None:
    decoder = nn.Linear(1, 1)

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = decoder(z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = torch.randn(30) * 2 + 1
    before, met = copied(decoder), []

    def factory(own):
        met.append(copied(decoder))
        return Amortized(own, hidden=(4,), example=(x[:2],))

    for _ in range(2):  # the second time, the parameters are in the store already
        card = compare(model, {"a": factory, "b": factory}, x, x[:9], steps=20, lr=0.1, **QUICK)
        figures = timeless(card)
        pd.testing.assert_series_equal(figures.loc["a"], figures.loc["b"], check_names=False)
        assert same(copied(decoder), before)
        assert all(same(start, before) for start in met)
        model(x)
    assert pyro.param("scale").item() == pytest.approx(1.0)
    # Trained it was: at the start the bound was lower.
    start = elbo(model, factory(model), x[:9], particles=50, seed=0)
    assert card["a"].elbo.mean > start.mean + 5 * math.hypot(start.se, card["a"].elbo.se)


def test_the_gap_is_zero_at_the_exact_posterior_and_the_evidence_less_the_elbo() -> None:
    model, x, test = setting()
    guides = {"exact": Exact, "wide": stretched(1.5, 0.0)}
    card = compare(model, guides, x, test, steps=5, lr=0.01, **QUICK | {"particles": 2000})
    exact, wide = card
    assert abs(exact.gap) < 1e-9
    assert exact.elbo.mean == pytest.approx(exact.model.log_evidence(test).mean().item())
    assert wide.gap == pytest.approx(wide.evidence.mean - wide.elbo.mean)
    assert wide.gap_se == pytest.approx(math.hypot(wide.evidence.se, wide.elbo.se))
    theory = 2 * (1.5**2 - 1 - math.log(1.5**2)) / 2  # KL(N(0, s^2 I), N(0, I))
    assert abs(wide.gap - theory) < 5 * wide.gap_se
    assert wide.evidence.particles == 2000
    assert wide.elbo.particles == 200
    truth = log_evidence(wide.model, wide.guide, test, particles=2000, seed=stream(0, 1))
    assert wide.evidence.mean == pytest.approx(truth.mean)
    assert card["exact"] is exact
    with pytest.raises(KeyError, match=r"no entry 'none'; there are \['exact', 'wide'\]"):
        card["none"]


def test_a_guide_with_parameters_for_each_row_is_refined_on_the_test_rows() -> None:
    model, x, test = setting(latent_dim=1)
    guides = {"local": lambda m: Local(m, rows=len(x)), "amortized": Amortized}
    card = compare(model, guides, x, test, steps=5, **QUICK)
    local, amortized = card
    assert local.refined
    assert not amortized.refined
    assert local.guide.rows == len(x) != len(test)
    # One latent: its posterior is in the family, so refinement closes nearly all of the gap.
    assert local.gap < amortized.gap / 10
    assert abs(local.gap) < 0.02 + 5 * local.gap_se
    assert any("local was refined on the test rows" in note for note in card.notes)
    assert local.parameters == 2 * len(x)
    assert amortized.parameters == (5 * 200 + 200) + (200 * 2 + 2)


def hierarchy(x) -> Any:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def shared(x) -> Any:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def discrete(x) -> Any:
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(kind, 1.0), obs=x)


@pytest.mark.parametrize("model", [hierarchy, shared, discrete])
def test_functions_with_global_or_discrete_latents_are_scored_without_the_sampler(model) -> None:
    x = torch.randn(12)
    guides = {"local": lambda m: Local(m, rows=12, example=(x[:2],))}
    card = compare(model, guides, x, x[:5], steps=3, particles=50, progress=False)
    (entry,) = card
    assert math.isfinite(entry.elbo.mean)
    assert entry.reference is None
    assert any("NUTS was not run" in note for note in card.notes)
    figures = card.to_pandas().loc["local"]
    assert math.isnan(figures["mean_error"])
    if model is discrete:
        assert math.isfinite(entry.gap)
    else:
        assert entry.evidence is entry.gap is entry.gap_se is None
        assert math.isnan(figures["gap"])
        assert entry.active == ((0, 0) if model is shared else entry.active)
    assert entry.refined == (model is not shared)


def test_a_model_without_data_is_compared_too() -> None:
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=torch.tensor(0.8))

    def make(model):
        def guide():
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("w", dist.Normal(loc, 0.5**0.5))

        return guide

    card = compare(model, {"a": make}, (), (), steps=3, **QUICK)
    assert math.isfinite(card["a"].elbo.mean)


def test_no_word_of_the_sampler_where_none_was_asked_for() -> None:
    model, x, test = setting()
    card = compare(model, {"a": Exact}, x, test, steps=1, **QUICK)
    assert "NUTS" not in " ".join(card.notes)
    assert card["a"].reference is None


def test_nuts_agrees_with_the_exact_posterior_and_measures_what_another_guide_misses() -> None:
    model, x, test = setting(latent_dim=1)
    guides = {"exact": Exact, "off": stretched(0.5, 1.0)}
    card = compare(
        model,
        guides,
        x,
        test,
        steps=1,
        lr=1e-9,
        particles=20,
        reference_rows=6,
        chains=2,
        draws=150,
        warmup=100,
        progress=False,
    )
    exact, off = card["exact"].reference, card["off"].reference
    assert exact.posterior["z"].shape == (2, 150, 6, 1)
    # Of 6 independent errors with variance noise^2: mean square below 1 + 5 sqrt(2 / 6).
    assert exact.mean_error < exact.noise * math.sqrt(1 + 5 * math.sqrt(2 / 6))
    posterior = model.posterior(test[:6])
    loc, scale = posterior.mean.detach(), posterior.stddev.detach()
    for reference, factor, shift in ((exact, 1.0, 0.0), (off, 0.5, 1.0)):
        draws = reference.posterior["z"].flatten(0, 1)
        size = reference.posterior.ess()["z"].min().item()
        # The same comparison by closed form; 500 draws of the guide are its only noise.
        errors = (loc + shift * scale - draws.mean(0)) / draws.std(0)
        expected = errors.square().mean().sqrt().item()
        assert abs(reference.mean_error - expected) < 5 * factor / math.sqrt(500)
        # A log of a scale has error 1 / sqrt(2 n); that of a square mixes more slowly (half).
        se = math.sqrt((1 / size + 1 / 1000) / 6)
        assert abs(math.log(reference.scale_ratio / factor)) < 5 * se
        noise = (factor**2 / 500 + reference.posterior.mcse()["z"].square() / scale**2).mean()
        assert reference.noise == pytest.approx(noise.sqrt().item(), rel=0.3)
    assert off.mean_error > 5 * off.noise
    notes = [note for note in card.notes if note.startswith("NUTS for")]
    assert len(notes) == 2
    assert "6 rows, 2 chains of 150" in notes[0]
    assert str(card).splitlines()[1].split()[-2:] == [
        f"{exact.mean_error:.2f}",
        f"{exact.scale_ratio:.2f}",
    ]


def test_the_note_counts_the_rows_that_there_are() -> None:
    model, x, test = setting(latent_dim=1)
    card = compare(
        model,
        {"a": Exact},
        x,
        test[:2],
        steps=1,
        particles=20,
        chains=1,
        draws=10,
        warmup=10,
        reference=NUTS(max_depth=3),
        progress=False,
    )
    assert any(note.startswith("NUTS for a: 2 rows, 1 chains of 10") for note in card.notes)


def test_the_seed_reproduces_the_whole_scorecard() -> None:
    model, x, test = setting()
    guides = {
        "amortized": lambda m: Amortized(m, hidden=(4,)),
        "local": lambda m: Local(m, rows=30),
    }
    options = {"steps": 5, "batch_size": 8, **QUICK}
    first, second, other = (compare(model, guides, x, test, seed=s, **options) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(timeless(first), timeless(second), check_exact=True)
    assert (timeless(first)["elbo"] != timeless(other)["elbo"]).all()
    assert first.notes == second.notes
    assert first.settings == second.settings
    assert first.settings["seed"] == 1
    assert first.settings["batch size"] == 8


def test_the_table_lines_up_and_says_what_was_the_same() -> None:
    model, x, test = setting()
    guides = {"exact": Exact, "a guide with a long name": stretched(1.5, 0.5)}
    card = compare(model, guides, x, test, steps=2, **QUICK)
    lines = str(card).splitlines()
    table = lines[:3]
    assert len({len(line) for line in table}) == 1  # the last column is to the right
    assert {len(re.split(r" {2,}", line)) for line in table} == {10}
    for entry, line in zip(card, table[1:], strict=True):
        name, bound, evidence, gap, *_ = re.split(r" {2,}", line)
        assert name == entry.name
        assert bound == f"{entry.elbo.mean:.3f} +- {entry.elbo.se:.3f}"
        assert evidence == f"{entry.evidence.mean:.3f} +- {entry.evidence.se:.3f}"
        assert gap == f"{entry.gap:.3f} +- {entry.gap_se:.3f}"
    assert all(line.startswith("  ") for line in lines[3:])
    assert "30 training and 10 test rows" in str(card)
    assert "steps 2" in str(card)


def test_the_figures_go_to_pandas_and_to_a_page(tmp_path) -> None:
    model, x, test = setting()
    card = compare(model, {"exact": Exact, "<b>": Amortized}, x, test, steps=2, **QUICK)
    frame = card.to_pandas()
    assert list(frame.index) == ["exact", "<b>"]
    assert list(frame.columns) == [
        "elbo",
        "elbo_se",
        "log_evidence",
        "log_evidence_se",
        "log_evidence_bias",
        "gap",
        "gap_se",
        "active_units",
        "units",
        "train_seconds",
        "test_seconds",
        "parameters",
        "mean_error",
        "mean_error_noise",
        "scale_ratio",
    ]
    entry = card["<b>"]
    assert frame.loc["<b>", "elbo"] == entry.elbo.mean
    assert frame.loc["<b>", "gap"] == entry.gap
    assert frame.loc["<b>", "log_evidence_bias"] == entry.evidence.bias
    assert frame.loc["<b>", "units"] == 2
    path = tmp_path / "card.html"
    card.to_html(path)
    page = path.read_text(encoding="utf-8")
    for value in frame.loc["<b>", ["elbo", "gap", "log_evidence"]]:
        assert f"<td>{value:.3f}</td>" in page
    assert "30 training and 10 test rows" in page
    assert "<b>" not in page  # names are escaped


def test_few_particles_that_carry_the_weight_are_noted() -> None:
    model, x, _ = setting()
    test = model(size=200)
    card = compare(model, {"off": stretched(1.0, 3.0)}, x, test, steps=1, **QUICK)
    assert -card["off"].evidence.bias > 0.05
    assert any("log p(x) under off is low by at least" in note for note in card.notes)
    fine = compare(model, {"exact": Exact}, x, test, steps=1, **QUICK)
    assert not any("is low by at least" in note for note in fine.notes)


def units(x) -> Any:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        one = pyro.sample("one", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(z.sum(-1) + one + kind, 1.0), obs=x)


def units_guide(x) -> Any:
    with pyro.plate("data", len(x)):
        # Means that vary by 1, by a variance of 0.0099 (dead) and by 0.0101.
        loc = torch.stack([x, 0.0995 * x, 0.1005 * x], -1)
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("one", dist.Normal(torch.ones(len(x)), 1.0))  # dead
        side = (x > 0).double()
        probs = torch.stack([0.2 + 0.6 * side, 0.7 - 0.6 * side, torch.full_like(side, 0.1)], -1)
        pyro.sample("kind", dist.Categorical(probs))


def test_units_whose_mean_hardly_varies_are_not_active() -> None:
    x = torch.randn(50)
    x = (x - x.mean()) / x.std()
    # z: two of three; one: none of one; kind: two of three probabilities.
    assert active_units(units, units_guide, x) == (4, 7)


def test_no_unit_is_active_on_a_single_row() -> None:
    assert active_units(units, units_guide, torch.zeros(1)) == (0, 7)


@pytest.mark.parametrize("first", [True, False])
def test_units_are_counted_by_row_wherever_the_plate_over_rows_is(first) -> None:
    dims = (-2, -1) if first else (-1, -2)

    def model(x):
        with pyro.plate("data", len(x), dim=dims[0]), pyro.plate("part", 4, dim=dims[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if first else x.mT)

    def guide(x):
        # Parts differ, rows do not: but for the last part.
        loc = torch.arange(4.0).expand(len(x), 4) + x * torch.tensor([0.0, 0.0, 0.0, 1.0])
        with pyro.plate("data", len(x), dim=dims[0]), pyro.plate("part", 4, dim=dims[1]):
            pyro.sample("z", dist.Normal(loc if first else loc.mT, 1.0))

    assert active_units(model, guide, torch.randn(30, 4)) == (1, 4)


def test_a_comparison_of_nothing_is_refused() -> None:
    model, x, test = setting()
    with pytest.raises(ValueError, match="compare: guides must name at least one guide"):
        compare(model, {}, x, test)
    for name, least in (("particles", 2), ("reference_rows", 1)):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= {least}, got 0"):
            compare(model, {"a": Exact}, x, test, **{name: 0})


def test_ctrl_c_ends_a_comparison_with_the_guides_that_are_done() -> None:
    model = PPCA(5, 2)
    x = model(size=30).detach()

    def interrupting(program):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        return Amortized(program)

    handler = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        made = {"one": Exact, "two": interrupting, "three": Exact}
        card = compare(model, made, x, x, steps=3000, reference=None, particles=2)
        assert [entry.name for entry in card] == ["one"]
        assert card.notes[-1] == "Interrupted: two, three would have followed."
        with pytest.raises(KeyboardInterrupt):
            compare(model, {"two": interrupting}, x, x, steps=100_000, reference=None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.signal(signal.SIGINT, before)


def test_steps_that_differ_are_not_called_the_same() -> None:
    model = PPCA(5, 2)
    x = model(size=30).detach()
    stops = iter([False, True, False, False, False])
    made = {"one": Exact, "two": Exact}
    options = {"steps": 3, "callbacks": [lambda step, bound: next(stops)]}
    card = compare(model, made, x, x, reference=None, particles=2, **options)
    assert "steps" not in card.settings
    assert "Not the same: steps, one 2, two 3." in card.notes


def test_a_torch_dataset_is_read_once() -> None:
    class Rows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.read = 0

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index):
            if index >= len(self):
                raise IndexError
            self.read += 1
            return torch.randn(5)

    model, rows = PPCA(5, 2), Rows()
    fit(model, Exact(model), rows, steps=1, seed=0)
    assert rows.read == 20
    compare(model, {"one": Exact, "two": Exact}, rows, torch.randn(9, 5), steps=1, reference=None)
    assert rows.read == 40


def test_score_is_the_row_of_compare() -> None:
    model = VAE(6, 2, hidden=(4,))
    x = model(size=40).detach()
    options = {"particles": 10, "seed": 3, "reference": None}
    card = compare(model, {"a": Amortized}, x[:30], x[30:], steps=3, **options)
    alone = score(card["a"].fit, x[30:], name="a", **options)
    ours, theirs = (c.to_pandas().drop(columns=["test_seconds"]) for c in (alone, card))
    pd.testing.assert_frame_equal(ours, theirs)
    assert alone.settings == card.settings


def test_score_refuses_what_it_cannot_use() -> None:
    model = PPCA(5, 2)
    result = fit(model, Exact(model), model(size=30), steps=1)
    with pytest.raises(ValueError, match="score: particles must be an integer >= 2, got 1"):
        score(result, model(size=5), particles=1)


def test_score_finds_rows_by_the_plate_of_the_fit() -> None:
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(12)
    guide = Amortized(model, example=x, plate="rows")
    result = fit(model, guide, x, steps=2, plate="rows", seed=0)
    card = score(result, x, particles=4, reference=None)
    assert card.entries[0].elbo.rows is not None
    assert card.entries[0].active[1] == 1

"""Faults that a reader or a user once found, each with the number or the message that shows it."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Exact, Local, families
from ppl_models import PPCA, VAE, bayesian, minibatch
from ppl_models.core.sites import site_table
from ppl_models.evaluate import active_units, compare, elbo, log_evidence
from ppl_models.infer import ELBO, NUTS, fit, sample


def rate(x: Tensor) -> None:
    r = pyro.sample("r", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(r, 1.0), obs=x)


def test_analytic_kl_keeps_the_jacobian_of_a_delta() -> None:
    x = torch.randn(5) + 2
    guide = AutoDiagonalNormal(rate)
    guide(x)
    means = [
        torch.stack([ELBO(analytic_kl=analytic)(rate, guide, x)[1] for _ in range(3000)])
        for analytic in (False, True)
    ]
    gap = means[0].mean() - means[1].mean()
    se = math.hypot(*(float(m.std()) / math.sqrt(len(m)) for m in means))
    assert abs(float(gap)) < 5 * se


def test_analytic_kl_leaves_masked_distributions_to_sampling() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(x > 0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    x = torch.randn(8)
    torch.manual_seed(1)
    _, sampled = ELBO()(model, guide, x)
    torch.manual_seed(1)
    _, analytic = ELBO(analytic_kl=True)(model, guide, x)
    assert_close(analytic, sampled)


def test_a_guide_of_another_shape_or_without_the_plate_is_refused() -> None:
    model = PPCA(5, 2)
    x = model(size=20).detach()
    with pytest.raises(
        ValueError, match=r"site 'z' must have event shape \(2,\).*got event \(1,\)"
    ):
        log_evidence(model, Amortized(PPCA(5, 1)), x)

    def no_plate(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'z' must be in the plates \['data'\].*it is in \[\]"):
        fit(model, no_plate, x, steps=1)
    for function in (elbo, log_evidence):
        with pytest.raises(ValueError, match="must be in the plates"):
            function(model, no_plate, x)


def test_a_guide_that_observes_what_the_model_observes_is_refused() -> None:
    model = PPCA(5, 2)
    x = model(size=20).detach()
    with pytest.raises(ValueError, match=r"samples \['x'\], which the model observes"):
        elbo(model, model, x)


def test_exact_sees_masks_and_scales_of_the_model() -> None:
    keep = torch.zeros(50, dtype=torch.bool)
    keep[:3] = True

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=keep[: len(x)]):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    x = torch.randn(50)
    guide = Exact(model, example=x)
    w = torch.linspace(-2, 2, 5)
    want = dist.Normal(x[:3].sum() / 4, 0.5).log_prob(w)
    q = guide.q("w", x)
    assert_close(torch.stack([q.log_prob(v) for v in w]), want)
    bounds = torch.stack([ELBO()(model, guide, x)[1] for _ in range(4)])
    assert_close(bounds, bounds[:1].expand(4))


def test_renyi_under_minibatches_is_refused_because_it_is_no_bound() -> None:
    model = PPCA(5, 2)
    x = model(size=40).detach()
    guide = Amortized(model)
    with pytest.raises(ValueError, match="RenyiELBO scales inside its logarithm.*no bound"):
        fit(model, guide, x, batch_size=10, objective=RenyiELBO(num_particles=2), steps=1)
    fit(model, guide, x, batch_size=40, objective=RenyiELBO(num_particles=2), steps=1)


def test_compare_refuses_a_guide_of_another_model_and_what_is_no_guide() -> None:
    model = PPCA(5, 2)
    x = model(size=20).detach()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guides\['a'\] made a guide for another model"):
        compare(model, {"a": lambda _: Local(model, rows=20)}, x, x, steps=1)
    with pytest.raises(ValueError, match=r"guides\['a'\] must be a factory.*`lambda model: guide`"):
        compare(model, {"a": guide}, x, x, steps=1)
    card = compare(model, {"a": lambda _: guide}, x, x, steps=1, reference=None)
    assert card["a"].parameters == 0


def test_refining_a_start_keeps_the_start() -> None:
    model = VAE(6, 2, hidden=(8,))
    x = model(size=5).detach()
    start = Amortized(model, hidden=(8,)).local(x)
    refined = start.refine(x, steps=1, lr=1e-6)
    assert_close(refined.q("z", x).mean, start.q("z", x).mean, atol=1e-5, rtol=0)


def test_a_unit_that_is_noise_only_is_not_active() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.5))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0).to_event(0))

    class NoMean(dist.LogNormal):
        @property
        def mean(self) -> Tensor:
            raise NotImplementedError

    def noisy(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", NoMean(torch.zeros(len(x)), 0.3))

    x = torch.randn(2000)
    assert active_units(model, guide, x, seed=0) == (0, 1)
    # Means of 50 draws vary by 0.1 / 50 over rows; a tenth of the threshold would be found.
    assert active_units(model, noisy, x, seed=0) == (0, 1)


class Shaky(nn.Module):
    """A network with batch norm and dropout: running it in training mode changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 6)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


def test_looking_at_a_model_with_batch_norm_and_dropout_leaves_it_alone() -> None:
    model = VAE(6, 2, decoder=Shaky())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.bernoulli(torch.full((20, 6), 0.5))
    guide = Amortized(model, hidden=(4,))
    site_table(model, x)
    with pytest.raises(ValueError, match="NaN"):
        fit(model, guide, torch.full_like(x, torch.nan), steps=1)
    with pytest.raises(ValueError, match="support"):
        fit(model, guide, x / 2, steps=1)
    ELBO(particles=2).prepare(model, guide, x)
    elbo(model, guide, x, particles=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    fit(model, guide, x, steps=3, batch_size=10, objective=ELBO(particles=2))
    assert int(model.decoder.net.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_learns_beside_its_original_in_vanilla_svi(copied: object) -> None:
    one = PPCA(5, 2)
    other = copied(one)
    x = one(size=20).detach()
    for model in (one, other):
        before = model.loading.detach().clone()
        svi = SVI(model, Exact(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(x)
        assert not torch.equal(model.loading, before)


def test_fit_and_sample_work_under_no_grad_and_in_another_default_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model = PPCA(4, 2)
    guide = Amortized(model)
    x = model(size=10).detach()
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        fit(model, guide, x, steps=2)
        posterior = sample(model, x[:2], chains=1, draws=4, warmup=2)
    assert posterior["z"].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float64


def test_a_support_of_each_row_is_checked_and_refused_by_families_only() -> None:
    def counts(total: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(total, logits=z), obs=x)

    total = torch.randint(1, 9, (300,)).double()
    x = dist.Binomial(total, 0.5 * torch.ones(300)).sample()
    guide = Amortized(counts, example=(total[:2], x[:2]), hidden=(4,))
    fit(counts, guide, (total, x), steps=2, batch_size=100)
    with pytest.raises(ValueError, match="outside it"):
        fit(counts, guide, (total, total + 1), steps=2, batch_size=100)

    def bounded(top: Tensor) -> None:
        with pyro.plate("data", len(top)):
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=top)

    def nested(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(1.0, 2.0))
            z = pyro.sample("z", dist.Uniform(0.0, a))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for model in (bounded, nested):
        with pytest.raises(ValueError, match="'z' has a support whose bounds depend on"):
            Amortized(model, example=torch.rand(6) + 1)


def test_constant_bounds_in_a_plate_are_those_of_one_value() -> None:
    bounds = torch.tensor([1.0, 2.0, 3.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Uniform(-1.0, 2.0))
            z = pyro.sample("z", dist.Uniform(torch.zeros(3), bounds).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.randn(200) + 3
    guide = Amortized(model, example=x[:2], hidden=(4,))
    draws = guide(x)
    assert bool(((draws["z"] > 0) & (draws["z"] < bounds)).all())
    assert bool(((draws["u"] > -1) & (draws["u"] < 2)).all())
    assert math.isfinite(elbo(model, guide, x, particles=5).mean)


def test_a_prior_takes_the_precision_of_the_parameter_whatever_its_class() -> None:
    for prior in (dist.HalfNormal(torch.tensor(1.0).float()), dist.LogNormal(0.0, 1.0)):
        model = bayesian(PPCA(4, 2), prior).double()
        assert all(site.value.dtype == torch.float64 for site in site_table(model, model(size=2)))
    assert model.explicit


def test_numpy_arrays_of_any_layout_are_data() -> None:
    model = PPCA(3, 1)
    guide = Amortized(model)
    x = np.random.default_rng(0).normal(size=(10, 3))
    frozen = x.copy()
    frozen.setflags(write=False)
    want = elbo(model, guide, x, particles=2, seed=0).mean
    for same in (np.asfortranarray(x), x.astype(">f8"), frozen, x[::-1][::-1], x.tolist()):
        assert elbo(model, guide, same, particles=2, seed=0).mean == want


def test_masked_observations_may_be_anything() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen > 0):
                pyro.sample("x", dist.Bernoulli(logits=z, validate_args=False), obs=x)

    x = torch.tensor([0.0, 1.0, -1.0, 1.0])
    seen = (x >= 0).double()
    guide = Amortized(model, example=(x, seen), hidden=(4,))
    fit(model, guide, (x, seen), steps=2)
    with pytest.raises(ValueError, match="outside it"):
        fit(model, guide, (x, torch.ones(4)), steps=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guide": Amortized}, "guide must be a Pyro guide.*the class Amortized"),
        ({"guide": None}, "guide must be a Pyro guide.*None"),
        ({"objective": "elbo"}, "objective must be a callable.*'elbo'"),
        ({"optimizer": torch.optim.LBFGS}, "without a closure, got LBFGS"),
        ({"optimizer": pyro.optim.Adam}, "optimizer must make a torch"),
        ({"device": "mps"}, "'mps' cannot be used here"),
        ({"seed": 2**64}, "seed must be"),
    ],
)
def test_ordinary_mistakes_have_one_clear_error(change: dict, said: str) -> None:
    model = PPCA(4, 2)
    x = model(size=10).detach()
    guide = change.pop("guide", Amortized(model))
    with pytest.raises(ValueError, match=rf"(?s){said}") as error:
        fit(model, guide, x, steps=1, **change)
    assert "Trace Shapes" not in str(error.value)


def test_the_error_of_a_wrong_number_of_rows_is_one_sentence() -> None:
    model = PPCA(4, 2)
    x = model(size=10).detach()
    with pytest.raises(ValueError, match="rows must be 10") as error:
        elbo(model, Local(model, rows=4), x)
    assert "Trace Shapes" not in str(error.value)
    with pytest.raises(ValueError, match="sampler must be an instance such as NUTS"):
        sample(model, x, sampler=NUTS)


def test_an_index_that_names_no_row_is_refused() -> None:
    for index in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match="index must name rows 0 to 9"):
            minibatch(torch.tensor(index), 10)


def test_latents_may_be_called_as_the_arguments_of_q_are() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            site = pyro.sample("site", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(site, 1.0), obs=x)
            pyro.sample("batch", dist.Normal(site, 1.0))

    x = torch.randn(4)
    assert set(Amortized(model, example=x, hidden=(2,))(x)) == {"site", "batch"}


def test_a_schedule_may_follow_the_bound() -> None:
    model = PPCA(4, 2)
    x = model(size=10).detach()

    def schedule(optimizer: torch.optim.Optimizer) -> object:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    fit(model, Amortized(model), x, steps=5, schedule=schedule, seed=0)


def test_families_know_what_they_want() -> None:
    assert all(family.wants for family in families.ALL)

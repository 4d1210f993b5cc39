"""The generic guides on models of every layout: nested plates, globals, discrete latents."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Amortized, Exact, Local, families, for_model
from ppl_models import PPCA, VAE, SigmoidBeliefNetwork, minibatch
from ppl_models.core.sites import site_table
from ppl_models.core.traces import vectorizes
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.infer import ELBO, fit


def mixed(x: Tensor, y: Tensor) -> None:
    """One global latent and three local ones, one of them discrete."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.Normal(k - 1.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(w + z, s), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def data_left(x: Tensor) -> None:
    """Rows at dimension -2, words at -1."""
    with pyro.plate("words", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def data_right(x: Tensor) -> None:
    """Rows at dimension -1, times at -2; one latent is in both plates, one in rows only."""
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)))
        with pyro.plate("times", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)


BATCHES = {
    mixed: (torch.randn(8), torch.randn(8)),
    data_left: (torch.randn(8, 3),),
    data_right: (torch.randn(8, 3),),
}
BATCHES = {model: tuple(value.double() for value in batch) for model, batch in BATCHES.items()}
every_layout = pytest.mark.parametrize("model", BATCHES, ids=lambda model: model.__name__)


def guides_for(model: object) -> list:
    batch = BATCHES[model]
    return [
        Amortized(model, example=batch, hidden=(4,)),
        Amortized(model, example=batch, hidden=(4,), mean_field=True),
        Local(model, rows=8, example=batch),
    ]


@every_layout
def test_draws_have_the_shapes_that_the_model_gives_them(model: object) -> None:
    batch = BATCHES[model]
    table = site_table(model, *batch)
    for guide in guides_for(model):
        for site in table.latents:
            assert guide(*batch)[site.name].shape == site.value.shape


@every_layout
def test_particles_are_carried_through_every_layout(model: object) -> None:
    batch = BATCHES[model]
    dims = site_table(model, *batch).plate_dims
    for guide in guides_for(model):
        assert vectorizes(model, guide, *batch, dim=-1 - dims)


@every_layout
def test_a_row_depends_on_its_own_data_and_draws_only(model: object) -> None:
    # Permuting the rows permutes the distributions: nothing is mixed up between plates.
    batch = BATCHES[model]
    order = torch.randperm(8)
    guide = Amortized(model, example=batch, hidden=(4,))
    table = site_table(model, *batch)
    trace = poutine.trace(guide).get_trace(*batch)
    moved = poutine.Trace()
    for site in table.latents:
        value = trace.nodes[site.name]["value"]
        if site.data_dim is not None:
            value = value.index_select(site.data_dim - len(site.event_shape), order)
        moved.add_node(
            site.name, name=site.name, type="sample", value=value, is_observed=False, infer={}
        )
    again = poutine.trace(poutine.replay(guide, trace=moved)).get_trace(*(v[order] for v in batch))
    trace.compute_log_prob()
    again.compute_log_prob()
    for site in table.latents:
        before = trace.nodes[site.name]["log_prob"]
        if site.data_dim is not None:
            before = before.index_select(site.data_dim, order)
        assert_close(again.nodes[site.name]["log_prob"], before)


def test_a_later_latent_depends_on_an_earlier_one_unless_mean_field() -> None:
    x, y = BATCHES[mixed]
    for mean_field in (False, True):
        guide = Amortized(mixed, example=(x, y), hidden=(4,), mean_field=mean_field)
        zeros, twos = torch.zeros(8, dtype=torch.long), torch.full((8,), 2)
        one, other = (guide.q("z", x, y, w=torch.zeros(()), k=k).mean for k in (zeros, twos))
        assert torch.equal(one, other) == mean_field


def test_amortized_learns_a_model_with_a_global_and_three_local_latents() -> None:
    size = 60
    k = dist.Categorical(torch.tensor([0.2, 0.5, 0.3])).sample((size,))
    z = torch.randn(size) + k - 1.0
    x, y = 1.5 + z + torch.randn(size), z + torch.randn(size)
    guide = Amortized(mixed, example=(x, y), hidden=(16,))
    before = elbo(mixed, guide, x, y, particles=50, seed=0)
    fit(mixed, guide, (x, y), steps=600, batch_size=20, lr=0.02, seed=0)
    after = elbo(mixed, guide, x, y, particles=50, seed=0)
    assert after.rows is None
    assert after.mean > before.mean + 5 * math.hypot(before.se, after.se)
    # The evidence, with w, k and z integrated by quadrature and sums over a grid.
    truth = _evidence_of_mixed(x, y) / size
    assert after.mean <= truth + 5 * after.se
    assert truth - after.mean < 0.3


def _evidence_of_mixed(x: Tensor, y: Tensor) -> float:
    w = torch.linspace(-5, 5, 401)
    z = torch.linspace(-7, 7, 401)
    nodes, weights = map(torch.as_tensor, hermegauss(9))
    s = (0.3 * nodes).exp()
    prior = sum(
        p * dist.Normal(k - 1.0, 1.0).log_prob(z).exp() for k, p in enumerate((0.2, 0.5, 0.3))
    )
    total = dist.Normal(0.0, 1.0).log_prob(w)
    for one, two in zip(x, y, strict=True):
        noise = sum(
            c * dist.Normal(w[:, None] + z, v).log_prob(one).exp()
            for v, c in zip(s, weights / weights.sum(), strict=True)
        )
        inner = prior * dist.Normal(z, 1.0).log_prob(two).exp() * noise
        total = total + torch.trapezoid(inner, z).log()
    return float(torch.logsumexp(total, 0) + math.log(10 / 400))


def test_the_encoder_sees_floating_arguments_only_and_may_be_the_users() -> None:
    def model(x: Tensor, group: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + group, 1.0), obs=x)

    x, group = torch.randn(6), torch.arange(6)
    guide = Amortized(model, example=(x[:2], group[:2]), hidden=(4,))
    one, other = (guide.q("z", x, g).mean for g in (group, group + 5))
    assert torch.equal(one, other)

    class Encoder(nn.Module):
        def forward(self, x: Tensor, group: Tensor) -> Tensor:
            return torch.stack([x, group.to(x)], -1)

    guide = Amortized(model, example=(x[:2], group[:2]), encoder=Encoder())
    one, other = (guide.q("z", x, g).mean for g in (group, group + 5))
    assert not torch.equal(one, other)


def test_amortized_refuses_what_it_cannot_read() -> None:
    def codes(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    with pytest.raises(ValueError, match="reads the floating arguments.*int64"):
        Amortized(codes, example=(torch.arange(4),))
    with pytest.raises(ValueError, match=r"encoder must put out features of shape \(2, H\)"):
        Amortized(VAE((1, 4, 4), 2), encoder=nn.Conv2d(1, 2, 2))
    with pytest.raises(ValueError, match="encoder fails on rows"):
        Amortized(VAE(4, 2), encoder=nn.Linear(5, 2))
    with pytest.raises(ValueError, match="takes no `size=`.*example"):
        Amortized(mixed)
    with pytest.raises(ValueError, match=r"family names \['y'\].*latents"):
        Amortized(VAE(4, 2), family={"y": families.Normal()})
    with pytest.raises(ValueError, match="family must be a `families.Family`"):
        Amortized(VAE(4, 2), family="flow")


def test_a_sequential_or_self_subsampled_plate_is_refused() -> None:
    def sequential(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ValueError, match="'z_0' is in a sequential plate"):
        Amortized(sequential, example=(torch.randn(3),))
    with pytest.raises(ValueError, match="'data' subsamples by itself"):
        Local(subsampled, rows=3, example=(torch.randn(3),))


def test_local_finds_its_rows_by_the_index_of_the_minibatch() -> None:
    model = PPCA(5, 2)
    guide = Local(model, rows=10)
    x = model(size=10).detach()
    with torch.no_grad():
        guide.row_parameters["site_z"].normal_()
    index = torch.tensor([7, 2, 2])
    with minibatch(index, 10), pyro.plate("data", 3):
        part = guide.q("z", x[index])
        pyro.sample("z", part)
    assert_close(part.mean, guide.q("z", x).mean[index])


def test_local_updates_only_the_rows_of_the_minibatch() -> None:
    model = PPCA(5, 2)
    guide = Local(model, rows=10)
    x = model(size=10).detach()
    index = torch.tensor([3, 8])
    with minibatch(index, 10):
        surrogate, _ = ELBO()(model, guide, x[index])
    surrogate.backward()
    touched = guide.row_parameters["site_z"].grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [3, 8]


def test_local_refuses_another_number_of_rows() -> None:
    model = PPCA(5, 2)
    guide = Local(model, rows=10)
    x = model(size=12).detach()
    with pytest.raises(ValueError, match=r"rows must be 12.*got rows=10.*refine"):
        guide(x)
    with pytest.raises(ValueError, match="rows must be 12, the rows of the data set, got rows=10"):
        fit(model, guide, x, steps=1, batch_size=5)
    with pytest.raises(ValueError, match="rows must be the number of rows.*got None"):
        Local(model)
    with pytest.raises(ValueError, match="got 0"):
        Local(model, rows=0)


def test_refine_reaches_the_best_diagonal_normal_and_leaves_the_model_alone() -> None:
    model = PPCA(5, 2)
    guide = Local(model, rows=10)
    x = model(size=4).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = guide.row_parameters["site_z"].detach().clone()
    new = guide.refine(x, steps=800, seed=0, objective=ELBO(particles=32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(guide.row_parameters["site_z"], table)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # KL(q || p) for a diagonal q is least at p's mean and at 1 / diag(precision of p).
    posterior, q = model.posterior(x), new.q("z", x)
    assert_close(q.mean.detach(), posterior.mean.detach(), atol=0.03, rtol=0)
    best = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    assert_close(q.stddev.detach(), best.detach(), atol=0, rtol=0.05)


def test_local_started_at_an_amortized_guide_is_that_guide() -> None:
    model = VAE(6, 2, hidden=(8,))
    x = model(size=5).detach()
    for family in (families.Normal(), families.FullNormal(), families.Flow(hidden_features=(8,))):
        guide = Amortized(model, hidden=(8,), family=family)
        local = guide.local(x)
        z = guide.q("z", x).sample()
        assert_close(local.q("z", x).log_prob(z), guide.q("z", x).log_prob(z))
        shared = [p for p in local.parameters() if p.requires_grad]
        assert [p.shape[0] for p in shared] == [5]


def test_refining_a_local_start_closes_the_amortization_gap() -> None:
    model = PPCA(5, 2)
    x = model(size=6).detach()
    guide = Amortized(model, hidden=(4,), family=families.FullNormal())
    refined = guide.local(x).refine(x, steps=800, seed=0)
    start = elbo(model, guide, x, particles=200, seed=0)
    end = elbo(model, refined, x, particles=200, seed=0)
    truth = model.log_evidence(x).mean().item()
    assert truth - end.mean < 0.05 < truth - start.mean


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def two_level(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(1.0, 1.0))
        b = pyro.sample(
            "b", dist.Normal(a.unsqueeze(-1) * torch.tensor([1.0, 2.0]), 0.5).to_event(1)
        )
        pyro.sample("x", dist.Normal(b.sum(-1), 0.7), obs=x)


def test_exact_regression_is_the_conjugate_posterior() -> None:
    x, y = torch.randn(20, 2), torch.randn(20)
    guide = Exact(regression, example=(x, y))
    design = torch.cat([x, torch.ones(20, 1)], 1)
    prior = torch.diag(torch.tensor([1 / 4, 1 / 4, 1.0]))
    precision = prior + design.mT @ design / 0.25
    shift = prior @ torch.tensor([0.0, 0.0, 1.0]) + design.mT @ y / 0.25
    mean = torch.linalg.solve(precision, shift)
    covariance = torch.linalg.inv(precision)
    w = guide.q("w", x, y)
    assert_close(w.mean, mean[:2])
    assert_close(w.covariance_matrix, covariance[:2, :2])
    value = torch.randn(2)
    b = guide.q("b", x, y, w=value)
    gain = covariance[2, :2] @ torch.linalg.inv(covariance[:2, :2])
    scale = (covariance[2, 2] - gain @ covariance[:2, 2]).sqrt()
    want = dist.Normal(mean[2] + gain @ (value - mean[:2]), scale)
    points = torch.linspace(-3, 3, 7)
    assert_close(torch.stack([b.log_prob(p) for p in points]), want.log_prob(points))


@pytest.mark.parametrize("model", [regression, two_level])
def test_at_the_exact_posterior_the_bound_does_not_vary(model: object) -> None:
    x, y = torch.randn(20, 2), torch.randn(20)
    batch = (x, y) if model is regression else (y,)
    guide = Exact(model, example=batch)
    bounds = torch.stack([ELBO()(model, guide, *batch)[1] for _ in range(5)])
    assert_close(bounds, bounds[:1].expand(5))
    if model is two_level:
        scale = math.sqrt(9 * 1.0 + 2 * 0.25 + 0.49)
        assert_close(bounds[0], dist.Normal(3.0, scale).log_prob(y).sum())


def test_completing_the_square_agrees_with_the_models_own_posterior() -> None:
    model = PPCA(5, 2)
    x = model(size=6).detach()

    def same(x: Tensor) -> Tensor:
        return model(x)

    own, squared = Exact(model).q("z", x), Exact(same, example=x).q("z", x)
    assert_close(squared.mean, own.mean)
    assert_close(squared.covariance_matrix, own.covariance_matrix)


def test_an_exact_guide_gives_the_model_the_gradient_of_the_evidence() -> None:
    model = PPCA(5, 2)
    x = model(size=6).detach()
    for guide in (Exact(model), Exact(lambda x: model(x), example=x)):
        surrogate, _ = ELBO()(model, guide, x)
        got = torch.autograd.grad(surrogate, list(model.parameters()))
        want = torch.autograd.grad(model.log_evidence(x).sum(), list(model.parameters()))
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)


def test_exact_says_why_a_model_is_not_for_it() -> None:
    x = torch.randn(6)

    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    with pytest.raises(ValueError, match="not quadratic in \\['z'\\]"):
        Exact(VAE(4, 2))
    with pytest.raises(ValueError, match="'s' of positive has support positive"):
        Exact(positive, example=x)
    with pytest.raises(ValueError, match=r"\['w'\] are shared by all rows and .* are not"):
        Exact(mixed, example=BATCHES[mixed])
    batch = (torch.randn(20, 2), torch.randn(20))
    guide = Exact(regression, example=batch)
    index = torch.arange(5)
    with pytest.raises(ValueError, match="not a minibatch"), minibatch(index, 20):
        ELBO()(regression, guide, batch[0][:5], batch[1][:5])


def test_for_model_is_true_to_its_word() -> None:
    for model, example in [(PPCA(4, 2), None), (VAE(4, 2), None), (mixed, BATCHES[mixed])]:
        choices = for_model(model, example=example)
        for choice in choices:
            assert choice.why
        by_site = {(c.site, c.name): c.fits for c in choices if c.site}
        for (site, name), fits in by_site.items():
            family = getattr(families, name)()
            options = {"example": example, "hidden": (2,), "family": {site: family}}
            if fits:
                Amortized(model, **options)
            else:
                with pytest.raises(ValueError, match="cannot serve site"):
                    Amortized(model, **options)


def test_for_model_lists_guides_and_their_reasons() -> None:
    text = str(for_model(VAE(4, 2)))
    assert "not quadratic" in text
    assert "families for 'z', real vector" in text
    assert "Gamma (positive values)" in text
    lines = text.splitlines()
    assert lines[0].split() == ["guide", "fits", "why"]
    assert for_model(PPCA(4, 2)).fitting[-1] == "Exact(model)"


def test_for_model_says_once_what_holds_for_several_sites() -> None:
    model = SigmoidBeliefNetwork(4, (3, 2))
    text = str(for_model(model))
    assert text.count("these fit") == 1
    assert "families for 'h2', boolean vector; 'h1', boolean vector\n" in text


def test_row_wise_evidence_works_for_every_family_on_every_local_layout() -> None:
    batch = BATCHES[data_right]
    guide = Amortized(data_right, example=batch, hidden=(4,))
    estimate = log_evidence(data_right, guide, *batch, particles=2000, seed=0)
    # Given c, the three times are independent: p(x | c) = prod N(x; c, 2).
    (x,) = batch
    parts = [
        math.log(p) + dist.Normal(float(c), math.sqrt(2.0)).log_prob(x).sum(1)
        for c, p in ((0, 0.6), (1, 0.4))
    ]
    truth = torch.logsumexp(torch.stack(parts), 0)
    assert bool(((estimate.rows - truth).abs() < 5 * estimate.rows_se).all())


def test_local_serves_models_without_data_and_models_of_integers() -> None:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0])

    def schools() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 4):
            effect = pyro.sample("effect", dist.Normal(mean, 3.0))
            pyro.sample("y", dist.Normal(effect, 10.0), obs=y)

    guide = Local(schools, example=())
    fit(schools, guide, steps=1500, lr=0.02, seed=0, objective=ELBO(particles=8))
    # Conjugate: y = mean + N(0, 109), so the mean's posterior is that of four such draws.
    precision = 1 / 25 + 4 / 109
    assert abs(guide.q("mean").mean.item() - y.sum().item() / 109 / precision) < 0.5

    def codes(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Categorical(0.1 + 0.7 * torch.eye(3)[k]), obs=x)

    x = torch.tensor([0, 1, 2, 2])
    local = Local(codes, rows=4, example=x)
    fit(codes, local, x, steps=600, lr=0.05, seed=0, objective=ELBO(particles=20))
    exact = torch.tensor([0.1, 0.1, 0.1]) + 0.7 * torch.eye(3)[x]  # uniform prior, symmetric
    assert_close(local.q("k", x).probs.detach(), exact, atol=0.1, rtol=0)


def test_names_of_latents_may_hold_dots_and_method_names() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("layer.weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            for name in ("values", "net.z"):
                pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(4)
    for guide in (Amortized(model, example=x), Local(model, rows=4, example=x)):
        assert set(guide(x)) == {"layer.weight", "values", "net.z"}


def test_all_pairs_of_registry_names_are_found_or_refused_with_the_nearest() -> None:
    from guides.registry import GUIDES, MODELS, build, lookup
    from ppl_models.data import load

    data = load("digits", binarize="threshold")
    for name, guide in itertools.product(MODELS, GUIDES):
        model = build(name, data).double()
        refused = None
        if guide == "exact" and name.startswith(("vae", "dlgm")):
            refused = "is not quadratic in"
        elif guide == "exact" and name in ("sbn", "def"):
            refused = "needs a real one"
        elif guide == "ladder" and name != "dlgm":
            refused = "must be a DeepLatentGaussian"
        elif name == "sbn" and guide in ("flow", "full", "low-rank"):
            refused = "is discrete"
        if refused is not None:
            with pytest.raises(ValueError, match=refused):
                lookup("guide", guide, GUIDES)(model, 5, (8,))
        else:
            lookup("guide", guide, GUIDES)(model, 5, (8,))
    with pytest.raises(ValueError, match="no guide 'flows'. Did you mean 'flow'"):
        lookup("guide", "flows", GUIDES)

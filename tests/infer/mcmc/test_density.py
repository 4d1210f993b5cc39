"""The log density on the unconstrained space, against formulas, Pyro and loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from ppl_models import PPCA, VAE, BayesianNeuralNetwork
from ppl_models.core.sites import site_table
from ppl_models.infer import backend, capture
from ppl_models.infer.mcmc import density as module
from ppl_models.infer.mcmc.density import Density, density_of
from ppl_models.parts.likelihoods import Homoscedastic

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def build(model: Callable[..., Any], *batch: Tensor, rows: bool = False, **options: Any) -> Density:
    table = site_table(model, *batch)
    return density_of(model, batch, table, rows=rows, plate="data", **options)


def slopes(density: Density, u: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences, one coordinate at a time."""
    moves = torch.eye(density.dim, dtype=u.dtype) * step
    return torch.stack([(density(u + e[:, None])[0] - density(u - e[:, None])[0]) / (2 * step)
                        for e in moves])  # fmt: skip


def many_supports(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))
    wide = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    cuts = dist.TransformedDistribution(wide, dist.transforms.OrderedTransform())
    order = pyro.sample("order", cuts)
    rate = pyro.sample("rate", dist.Beta(2.0, 3.0))
    half = pyro.sample("half", dist.Pareto(1.5, 3.0))
    with pyro.plate("data", len(x)):
        scale_tril = (scale + half) * corr
        pyro.sample("x", dist.MultivariateNormal(loc + rate * order * share, scale_tril=scale_tril),
                    obs=x)  # fmt: skip


def test_it_is_minus_the_potential_of_pyro() -> None:
    x = torch.randn(5, 3)
    density = build(many_supports, x)
    assert density.reason is None
    _, potential, _, _ = initialize_model(many_supports, (x,))
    u = torch.randn(density.dim, 4)
    logp, grad = density(u)
    for c in range(4):
        parts, start = {}, 0
        column = u[:, c].clone().requires_grad_()
        for name, shape in (("loc", ()), ("scale", ()), ("share", (2,)), ("corr", (3,)),
                            ("order", (3,)), ("rate", ()), ("half", ())):  # fmt: skip
            stop = start + math.prod(shape)
            parts[name], start = column[start:stop].reshape(shape), stop
        assert start == density.dim
        want: Any = -potential(parts)
        assert_close(logp[c], want.detach(), **EXACT)
        assert_close(grad[:, c], torch.autograd.grad(want, column)[0], **EXACT)


def test_each_support_has_its_jacobian_by_hand() -> None:
    def model() -> None:
        pyro.sample("a", dist.Gamma(2.0, 3.0))
        pyro.sample("b", dist.Uniform(-1.0, 3.0))
        pyro.sample("c", dist.Pareto(1.5, 3.0))

    density = build(model)
    u = torch.randn(3, 6)
    a, s, c = u[0].exp(), torch.sigmoid(u[1]), 1.5 + u[2].exp()
    want = torch.tensor(scipy.stats.gamma.logpdf(a, 2.0, scale=1 / 3.0)) + u[0]
    want += math.log(1 / 4) + (4 * s * (1 - s)).log()
    want += torch.tensor(scipy.stats.pareto.logpdf(c, 3.0, scale=1.5)) + u[2]
    assert_close(density(u)[0], want, **EXACT)
    values = density.constrain(u.T)
    assert_close(values["b"], 4 * s - 1, **EXACT)
    assert_close(values["c"], c, **EXACT)


def stick(x: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, 1 - a).mask(False))


def test_a_support_that_depends_on_another_latent_moves_with_it() -> None:
    """Flat b in (0, 1 - a): log p = log |da/du| + log |db/dv|, and b has no density of its own."""
    density = build(stick)
    u = torch.randn(2, 5)
    a, s = torch.sigmoid(u)
    want = (a * (1 - a)).log() + ((1 - a) * s * (1 - s)).log()
    logp, grad = density(u)
    assert_close(logp, want, **EXACT)
    assert_close(grad, torch.stack([1 - 2 * a - a, 1 - 2 * s]), **EXACT)
    values = density.constrain(u.T)
    assert_close(values["b"], (1 - a) * s, **EXACT)
    assert_close(density.unconstrain(values), u.T, **EXACT)


def test_an_empty_support_is_not_a_number_for_its_chain_only() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 0.01))
        pyro.sample("b", dist.Uniform(0.0, 1 - a).mask(False))

    logp, _ = build(model)(torch.tensor([[0.5, 2.0, -1.0], [0.1, 0.1, 0.1]]))
    assert logp.isfinite().tolist() == [True, False, True]


def test_the_gradient_is_that_of_the_value() -> None:
    for model, batch in ((many_supports, (torch.randn(5, 3),)), (stick, ()), (mixture, (X,))):
        density = build(model, *batch)
        u = torch.randn(density.dim, 3)
        assert_close(density(u)[1], slopes(density, u), rtol=1e-5, atol=1e-5)


def test_flat_priors_scales_and_factors_count_as_they_should() -> None:
    keep = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0).mask(False))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0).mask(False))
        with poutine.scale(scale=3.0):
            t = pyro.sample("t", dist.Exponential(2.0))
        pyro.factor("f", -m.abs() * t)
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0), poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(m, s), obs=x)

    x = torch.randn(3)
    u = torch.randn(3, 5)
    m, s, t = u[0], u[1].exp(), u[2].exp()
    want = u[1] + u[2] + 3 * (math.log(2.0) - 2 * t) - m.abs() * t
    want = want + 2 * sum(torch.distributions.Normal(m, s).log_prob(x[i]) for i in (0, 2))
    assert_close(build(model, x)(u)[0], want, **EXACT)


def test_nested_plates_and_missing_values_keep_their_shapes() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("features", 2, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Gamma(2.0, 1.0))
                pyro.sample("x", dist.Normal(w * z, 1.0), obs=x.T, obs_mask=seen.T)

    x, seen = torch.randn(3, 2), torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()
    density = build(model, x, seen)
    u = torch.randn(density.dim, 4)
    values = density.constrain(u.T)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "w": (4, 2, 1),
        "z": (4, 2, 3),
        "x_unobserved": (4, 2, 3),
    }
    normal, w, z = torch.distributions.Normal, values["w"], values["z"]
    want = normal(0.0, 1.0).log_prob(w).sum((1, 2)) + z.log().sum((1, 2))
    want = want + torch.distributions.Gamma(2.0, 1.0).log_prob(z).sum((1, 2))
    both = torch.where(seen.T, x.T, values["x_unobserved"])
    want = want + normal(w * z, 1.0).log_prob(both).sum((1, 2))
    # Places of values that were seen have no say in the model: they are kept near 0.
    want = want - 0.5 * (seen.T * values["x_unobserved"].square()).sum((1, 2))
    assert_close(density(u)[0], want, **EXACT)
    assert_close(density.unconstrain(values), u.T, **EXACT)


X = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def mixture(x: Tensor) -> None:
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("classes", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[c], 0.7), obs=x)


def test_an_enumerated_mixture_is_a_log_sum() -> None:
    density = build(mixture, X)
    assert density.reason is None
    u = torch.randn(density.dim, 4)
    values = density.constrain(u.T)
    share, locs = values["share"], values["locs"]
    normal = torch.distributions.Normal
    terms = share.log()[:, None] + normal(locs[:, None], 0.7).log_prob(X[:, None])
    want = terms.logsumexp(-1).sum(-1) + normal(0.0, 2.0).log_prob(locs).sum(-1) + math.log(2.0)
    transform = torch.distributions.biject_to(constraints.simplex)
    want = want + transform.log_abs_det_jacobian(u[:2].T, share)
    assert_close(density(u)[0], want, **EXACT)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_a_hidden_markov_model_is_the_forward_algorithm(how: str) -> None:
    x = torch.randn(6)
    shift = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        state: Any = 0
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"s{t}", dist.Categorical(shift[state]), infer={"enumerate": how})
            pyro.sample(f"x{t}", dist.Normal(locs[state], 1.0), obs=x[t])

    density = build(model, x)
    assert density.reason is None
    u = torch.randn(2, 3)
    logp, _ = density(u)
    normal = torch.distributions.Normal
    for c in range(3):
        ahead = shift[0].log() + normal(u[:, c], 1.0).log_prob(x[0])
        for t in range(1, 6):
            ahead = (ahead[:, None] + shift.log()).logsumexp(0)
            ahead = ahead + normal(u[:, c], 1.0).log_prob(x[t])
        assert_close(
            logp[c], ahead.logsumexp(0) + normal(0.0, 2.0).log_prob(u[:, c]).sum(), **EXACT
        )


def test_the_gradient_of_an_enumerated_site_is_exact_where_all_terms_are_small() -> None:
    """Pyro bounds the gradient of log(total) once the total is below machine precision."""

    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        one = pyro.sample("one", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.factor("first", -60 * m * one)
        pyro.factor("second", -60 * m * (1 - one))
        two = pyro.sample("two", dist.Bernoulli(one * 0.0), infer={"enumerate": "parallel"})
        pyro.factor("third", two * m)

    logp, grad = build(model)(torch.ones(1, 1))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(1.0))
    assert_close(logp, (normal - 60.0)[None], rtol=1e-9, atol=0.0)
    assert_close(grad, torch.tensor([[-61.0]]), rtol=1e-9, atol=0.0)


def test_a_discrete_hmm_of_pyro_is_vectorised_too() -> None:
    def model(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        chain = dist.DiscreteHMM(torch.zeros(2), torch.eye(2), dist.Normal(locs, 1.0))
        pyro.sample("x", chain, obs=x)

    x = torch.randn(5)
    density = build(model, x)
    assert density.reason is None
    u = torch.randn(2, 3)
    _, potential, _, _ = initialize_model(model, (x,))
    for c in range(3):
        assert_close(density(u)[0][c], -potential({"locs": u[:, c]}), **EXACT)
    assert_close(density(u)[1], slopes(density, u), rtol=1e-5, atol=1e-5)


def test_a_latent_below_an_enumerated_site_is_one_latent() -> None:
    def model() -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal(4 * c, 1.0))

    density = build(model)
    u = torch.randn(1, 4)
    normal = torch.distributions.Normal
    pair = torch.stack([math.log(0.7) + normal(0.0, 1.0).log_prob(u[0]),
                        math.log(0.3) + normal(4.0, 1.0).log_prob(u[0])])  # fmt: skip
    assert_close(density(u)[0], pair.logsumexp(0), **EXACT)


def rows_of(x: Tensor, y: Tensor) -> None:
    """Two local latents, one of a simplex and one summed out, and a covariate."""
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.Exponential(y.abs()))
        c = pyro.sample("c", dist.Categorical(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(x.new_tensor([-1.0, 0.0, 1.0])[c], scale), obs=x)


def test_rows_are_targets_of_their_own() -> None:
    x, y = torch.randn(4), torch.rand(4) + 0.5
    density = build(rows_of, x, y, rows=True)
    assert (density.dim, density.targets, density.reason) == (3, 4, None)
    u = torch.randn(3, 2 * 4)
    logp, grad = density(u)
    for t in range(8):
        n = t % 4
        alone = build(rows_of, x[n : n + 1], y[n : n + 1])
        want = alone(u[:, t : t + 1])
        assert_close(logp[t], want[0][0], **EXACT)
        assert_close(grad[:, t], want[1][:, 0], **EXACT)
    # The rows of a chain together are the joint density, whose latents lie site by site.
    joint = build(rows_of, x, y)
    values = density.constrain(u.reshape(3, 2, 4).permute(1, 2, 0))
    assert values["share"].shape == (2, 4, 3)
    assert_close(joint(joint.unconstrain(values).T)[0], logp.reshape(2, 4).sum(1), **EXACT)
    assert_close(density.unconstrain(values), u.reshape(3, 2, 4).permute(1, 2, 0), **EXACT)


def test_rows_are_put_where_their_plate_is() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("features", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    density = build(model, torch.randn(5, 2), rows=True)
    values = density.constrain(torch.arange(2.0 * 5 * 6).reshape(2, 5, 6))
    assert values["z"].shape == (2, 5, 2, 3)
    assert values["z"][1, 2, 1, 0] == (1 * 5 + 2) * 6 + 3
    assert density.constrain(torch.zeros(5, 6))["z"].shape == (5, 2, 3)
    assert density.constrain(torch.zeros(2, 3, 5, 6))["z"].shape == (2, 3, 5, 2, 3)


def test_values_do_not_depend_on_the_size_of_a_chunk(monkeypatch: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            pyro.sample("part", dist.Uniform(0.0, x * share[..., 0]))

    density = build(model, torch.rand(5) + 0.5, rows=True)
    u = torch.randn(7, 5, 3)
    want = density.constrain(u)
    monkeypatch.setattr(module, "CHUNK", 12)  # numbers: two rows of one chain
    got = density.constrain(u)
    for name, value in want.items():
        assert_close(got[name], value)
    assert_close(density.unconstrain(want), u)


@pytest.mark.parametrize("rows", [False, True])
def test_chains_at_once_are_a_loop_over_chains(rows: bool) -> None:
    model = PPCA(data_dim=4, latent_dim=2)
    density = build(model, model(size=3).detach(), rows=rows)
    assert density.reason is None
    u = torch.randn(density.dim, 2 * density.targets)
    logp, grad = density(u)
    density.reason = "asked for"
    looped = density(u)
    assert_close(logp, looped[0], **EXACT)
    assert_close(grad, looped[1], **EXACT)
    assert not logp.requires_grad


def in_place(x: Tensor) -> None:
    z = torch.zeros(3)
    for i in range(3):
        z[i] = pyro.sample(f"z{i}", dist.Normal(z.sum(), 1.0))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x[0])


def forked(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if z > 0 else -3 * z, 1.0), obs=x[0])


def lifted(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z * (1.0 if z.item() > 0 else -3.0), 1.0), obs=x[0])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (in_place, ("in place", "z[i] = pyro.sample")),
        (forked, ("path then depends on values", "if z > 0")),
        (lifted, ("Python number out of a tensor", "z.item()")),
    ],
)
def test_what_cannot_be_vectorised_is_looped_over_and_says_why(model: Any, words: Any) -> None:
    x = torch.tensor([0.3])
    density = build(model, x)
    assert density.reason is not None
    for word in (*words, "test_density.py"):
        assert word in density.reason
    u = torch.randn(density.dim, 4)
    logp, grad = density(u)
    normal = torch.distributions.Normal
    if model is in_place:
        ends = u.cumsum(0)
        starts = torch.cat([torch.zeros(1, 4), ends[:-1]])
        want = normal(starts, 1.0).log_prob(u).sum(0) + normal(ends[-1], 1.0).log_prob(x)
    else:
        loc = torch.where(u[0] > 0, u[0], -3 * u[0])
        want = normal(0.0, 1.0).log_prob(u[0]) + normal(loc, 1.0).log_prob(x)
    assert_close(logp, want, **EXACT)
    assert_close(grad, slopes(density, u), rtol=1e-5, atol=1e-5)
    assert_close(density.unconstrain(density.constrain(u.T)), u.T, **EXACT)


@pytest.mark.parametrize(
    ("model", "batch", "rows"),
    [
        (many_supports, (torch.randn(5, 3, dtype=torch.float64),), False),
        (mixture, (X,), False),
        (stick, (), False),
        (rows_of, (X, X.abs() + 0.1), True),
        (in_place, (X,), False),
    ],
)
def test_a_recording_is_the_density_at_any_point(model: Any, batch: Any, rows: bool) -> None:
    density = build(model, *batch, rows=rows)
    u = torch.randn(density.dim, 2 * density.targets)
    with capture.recordable():
        graph = backend.trace(lambda u: density(u), u)
    elsewhere = torch.randn(density.dim, 2 * density.targets)
    for got, want in zip(graph(elsewhere), density(elsewhere), strict=True):
        assert torch.equal(got, want)


def covariance(x: Tensor) -> None:
    r = pyro.sample("r", dist.Normal(0.0, 0.1))
    matrix = torch.eye(2) + r * (1 - torch.eye(2))
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=matrix), obs=x[0])


def test_a_matrix_without_a_factor_is_not_a_number_for_its_chain_only() -> None:
    x = torch.randn(1, 2)
    density = build(covariance, x)
    u = torch.tensor([[0.5, 1.5, -0.2, float("inf")]])
    logp, _ = density(u)
    fine = [True, False, True, False]
    assert logp.isfinite().tolist() == fine
    want = [scipy.stats.multivariate_normal.logpdf(x[0], cov=[[1, r], [r, 1]]) for r in (0.5, -0.2)]
    prior = scipy.stats.norm.logpdf([0.5, -0.2], 0.0, 0.1)
    assert_close(logp[[0, 2]], torch.tensor(want + prior), **EXACT)
    with capture.recordable():
        graph = backend.trace(lambda u: density(u), u[:, :1].expand(1, 4).clone())
    assert graph(u)[0].isfinite().tolist() == fine
    density.reason = "asked for"
    assert density(u)[0].isfinite().tolist() == fine


@pytest.mark.parametrize("function", ["cholesky", "inv", "solve", "eigvalsh"])
def test_what_else_raises_is_not_a_number_for_its_chain_only(function: str) -> None:
    def model() -> None:
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        matrix = torch.stack([torch.stack([r, r * 0]), torch.stack([r * 0, r])])
        if function == "cholesky":
            found = torch.linalg.cholesky(matrix).sum()
        elif function == "inv":
            found = torch.linalg.inv(matrix).sum()
        elif function == "solve":
            found = torch.linalg.solve(matrix, torch.ones(2)).sum()
        else:
            found = torch.linalg.eigvalsh(matrix / r).sum()
        pyro.factor("f", -found)

    logp, _ = build(model)(torch.tensor([[1.0, 0.0, 2.0]]))
    assert logp.isfinite().tolist() == [True, False, True]


def linear(x: Tensor, layer: nn.Module) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=x)


def test_it_is_in_double_precision_where_the_model_takes_it() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(5, 3)

    def regression(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 0.25).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.25), obs=x[:, 0])

    density = build(regression, x)
    assert density.double
    assert density.dtype == torch.float64
    u = torch.randn(3, 2, dtype=torch.float64)
    logp, grad = density(u)
    assert logp.dtype == grad.dtype == torch.float64
    want = scipy.stats.norm.logpdf(u, 0.0, 0.25).sum(0)
    want = want + scipy.stats.norm.logpdf(x[:, :1], x.double() @ u, 0.25).sum(0)
    assert_close(logp, torch.as_tensor(want), rtol=1e-9, atol=1e-7)  # log 0.25 is of torch's float
    assert density.constrain(u.T)["w"].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32

    layer = nn.Linear(2, 3)
    density = build(lambda x: linear(x, layer), x, rows=True)
    assert not density.double
    assert density.reason is None
    u = torch.randn(2, 10, dtype=torch.float64)
    logp, grad = density(u)
    assert logp.dtype == grad.dtype == torch.float64
    layer.double()
    torch.set_default_dtype(torch.float64)
    want = build(lambda x: linear(x, layer), x.double(), rows=True)(u)
    assert_close(logp, want[0], rtol=1e-5, atol=1e-5)
    assert_close(grad, want[1], rtol=1e-5, atol=1e-4)


def test_what_a_model_makes_is_in_double_precision_in_a_recording_too() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        matrix = scale * torch.eye(3) + torch.full((3, 3), 0.1)
        pyro.factor("f", -(torch.linalg.cholesky(matrix) @ torch.ones(3)).sum())

    torch.set_default_dtype(torch.float32)
    density = build(model)
    assert density.double
    u = torch.randn(1, 4, dtype=torch.float64)
    with capture.recordable():
        graph = backend.trace(lambda u: density(u), u)
    want = density(u)
    torch.set_default_dtype(torch.float64)
    assert_close(want[0], build(model)(u)[0], rtol=1e-7, atol=1e-7)
    assert torch.equal(graph(u)[0], want[0])


def test_single_precision_is_the_models_own() -> None:
    model = VAE(data_dim=6, latent_dim=2, hidden=(4,)).float()
    x = torch.rand(3, 6, dtype=torch.float32).round()
    density = build(model, x, rows=True, double=False)
    assert density.dtype == torch.float32
    logp, grad = density(torch.randn(2, 6, dtype=torch.float32))
    assert logp.dtype == grad.dtype == torch.float32


def test_what_has_no_density_on_numbers_is_refused() -> None:
    def sphere() -> None:
        pyro.sample("z", dist.ProjectedNormal(torch.ones(3)))

    with pytest.raises(ValueError, match=r"'z' has support '.*', to which no bijection"):
        build(sphere)

    def growing() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(1 + int(a > -0.2)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'b' has shape \(\d,\) here and \(\d,\)"):
        build(growing)

    def sometimes() -> None:
        if pyro.sample("a", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))
        else:
            pyro.sample("c", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"for some values of the"):
        build(sometimes)

    def depends() -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Uniform(0.0, 1 + c))

    with pytest.raises(ValueError, match="a support not on an enumerated site"):
        build(depends)


def test_noise_inside_a_model_is_refused() -> None:
    x = torch.randn(10)

    def noisy(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w + torch.randn(()), 1.0), obs=x[0])

    with pytest.raises(ValueError, match="at random outside its latents: site 'x' differs"):
        build(noisy, x)

    def subsampled(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[index])

    with pytest.raises(ValueError, match="plate 'data', which draws a part of its rows"):
        build(subsampled, x)

    def harmless(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("again", w + torch.randn(()))

    u = torch.randn(1, 3)
    assert_close(build(harmless, x)(u)[0], torch.distributions.Normal(0.0, 1.0).log_prob(u[0]))


def test_what_it_is_called_with_is_checked() -> None:
    density = build(rows_of, torch.randn(4), torch.rand(4), rows=True)
    with pytest.raises(ValueError, match=r"dim 3 and targets 4, got \(3, 6\)"):
        density(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"dim 3, targets 4, got \(4, 2\)"):
        density.constrain(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="'scale' is missing"):
        density.unconstrain({"share": torch.full((4, 3), 1 / 3)})
    with pytest.raises(ValueError, match=r"'scale' must have shape \(\*lead, 4\)"):
        density.unconstrain({"share": torch.full((4, 3), 1 / 3), "scale": torch.ones(5)})
    with pytest.raises(ValueError, match=r"'scale' must lie inside its support, positive|non-neg"):
        density.unconstrain({"share": torch.full((4, 3), 1 / 3), "scale": -torch.ones(4)})

    def looped(x: Tensor) -> None:
        for n in pyro.plate("data", len(x)):
            pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z0' is outside it or in a loop"):
        build(looped, torch.randn(3), rows=True)


def test_a_layer_with_a_batching_rule_for_gradients_alone_is_served() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.read(x)[0][:, -1])

    torch.manual_seed(0)
    model = BayesianNeuralNetwork((4, 2), net=Reader(), likelihood=Homoscedastic(0.5))
    batch = torch.randn(5, 4, 2), torch.randn(5)
    density = build(model, *batch)
    values = {name: torch.randn(3, *value.shape) for name, value in model.net.starts().items()}
    u = density.unconstrain(values)
    again = density.constrain(u)
    for name, value in values.items():
        torch.testing.assert_close(again[name], value)
    one = {name: value[1] for name, value in values.items()}
    trace = poutine.trace(poutine.condition(model, data=one)).get_trace(*batch)
    torch.testing.assert_close(density(u.T)[0][1], trace.log_prob_sum().to(u))

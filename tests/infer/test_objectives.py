"""The ELBO: its value, its gradient, and the choices in how both are estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.testing import assert_close

from guides import Amortized, Exact
from ppl_models import PPCA, VAE
from ppl_models.core.traces import log_weights, run_pair
from ppl_models.infer import ELBO
from ppl_models.parts.likelihoods import Gaussian


def estimates(
    draw: Callable[[], tuple[Tensor, Tensor]], parameters: list[Tensor], draws: int
) -> tuple[Tensor, Tensor]:
    """Bounds, shape (draws,), and gradients, shape (draws, P)."""
    bounds, gradients = [], []
    for _ in range(draws):
        surrogate, bound = draw()
        bounds.append(bound)
        found = torch.autograd.grad(surrogate, parameters)
        gradients.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(bounds), torch.stack(gradients)


def within_errors(sample: Tensor, want: Tensor) -> None:
    """The mean of a sample is `want`, to 5 of its own standard errors."""
    error = sample.std(0) / len(sample) ** 0.5
    assert (error > 0).all()
    assert ((sample.mean(0) - want).abs() < 5 * error).all()


def same_mean(a: Tensor, b: Tensor) -> None:
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error).all()


class Normals:
    """x ~ N(z, 1) in each row, z ~ N(w, 1), w ~ N(0, 1); the guide is mean-field and off."""

    def __init__(self) -> None:
        self.x = torch.randn(4) + 1.0
        self.loc = torch.randn(4, requires_grad=True)
        self.log_scale = (0.3 * torch.randn(4)).requires_grad_()
        self.w_loc = torch.tensor(0.3, requires_grad=True)
        self.prior_scale = torch.tensor(1.3, requires_grad=True)
        self.parameters = [self.loc, self.log_scale, self.w_loc, self.prior_scale]

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, self.prior_scale))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.w_loc, 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))

    def bound(self) -> Tensor:
        """The bound in closed form."""
        scale, variance = self.prior_scale, self.log_scale.exp() ** 2
        two_pi = torch.tensor(2 * torch.pi).log()
        likelihood = -0.5 * (two_pi + (self.x - self.loc) ** 2 + variance)
        gap = (self.loc - self.w_loc) ** 2 + variance + 0.36
        prior = -0.5 * (two_pi + gap)
        entropy = 0.5 * (1 + two_pi) + self.log_scale
        shared = -0.5 * (two_pi + (self.w_loc**2 + 0.36) / scale**2) - scale.log()
        shared = shared + 0.5 * (1 + two_pi) + torch.tensor(0.6).log()
        return (likelihood + prior + entropy).sum() + shared

    def __call__(self, elbo: ELBO) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: elbo(self.model, self.guide, self.x)


@pytest.mark.parametrize(
    "elbo",
    [
        ELBO(),
        ELBO(analytic_kl=True),
        ELBO(particles=5),
        ELBO(particles=5, analytic_kl=True),
        ELBO(particles=3, vectorized=False),
        ELBO(particles=3, vectorized=False, analytic_kl=True),
    ],
)
def test_value_and_gradient_have_the_mean_of_the_closed_form(elbo: ELBO) -> None:
    pair = Normals()
    want = pair.bound()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(want, pair.parameters)])
    bounds, gradients = estimates(pair(elbo), pair.parameters, 200)
    within_errors(bounds, want.detach())
    noisy = gradients.var(0) > 1e-20
    within_errors(gradients[:, noisy], gradient[noisy])
    assert_close(gradients[0, ~noisy], gradient[~noisy])


def test_analytic_and_sampled_divergences_agree_and_the_analytic_one_varies_less() -> None:
    pair = Normals()
    sampled = estimates(pair(ELBO()), pair.parameters, 300)
    analytic = estimates(pair(ELBO(analytic_kl=True)), pair.parameters, 300)
    for a, b in zip(sampled, analytic, strict=True):
        same_mean(a, b)
        assert b.var(0).sum() < 0.7 * a.var(0).sum()


def test_particles_reduce_the_variance_by_their_number() -> None:
    pair = Normals()
    one = estimates(pair(ELBO()), pair.parameters, 800)[0]
    for vectorized in (True, False):
        many = estimates(pair(ELBO(particles=8, vectorized=vectorized)), pair.parameters, 150)[0]
        # The ratio of variances: relative error of each is sqrt((kurtosis - 1) / n).
        error = (
            sum(((((s - s.mean()) / s.std()) ** 4).mean() - 1) / len(s) for s in (one, many)) ** 0.5
        )
        assert abs((8 * many.var() / one.var()).log()) < 5 * error


def test_vectorised_particles_are_the_mean_of_single_ones_on_the_same_draws() -> None:
    pair = Normals()
    noise = torch.randn(6, 5)

    def guide(x: Tensor) -> None:
        z_scale = pair.log_scale.exp()
        particles = sum(f.name == "particles" for f in poutine.runtime.get_plates())
        e = noise if particles else noise[guide.particle]  # pyright: ignore
        w = pair.w_loc + 0.6 * e[..., :1]
        w = w if particles else w[0]
        pyro.sample("w", dist.Delta(w, log_density=dist.Normal(pair.w_loc, 0.6).log_prob(w)))
        with pyro.plate("data", len(x)):
            fn = dist.Normal(pair.loc, z_scale)
            z = pair.loc + z_scale * e[..., 1:]
            pyro.sample("z", dist.Delta(z, log_density=fn.log_prob(z)))

    singles = []
    for particle in range(6):
        guide.particle = particle  # pyright: ignore
        surrogate, bound = ELBO()(pair.model, guide, pair.x)
        singles.append([bound, *torch.autograd.grad(surrogate, pair.parameters)])
    surrogate, bound = ELBO(particles=6, plate_dims=1)(pair.model, guide, pair.x)
    got = [bound, *torch.autograd.grad(surrogate, pair.parameters)]
    want = [torch.stack(column).mean(0) for column in zip(*singles, strict=True)]
    assert_close(got, want)


def test_the_bound_is_the_evidence_at_the_exact_posterior_and_so_is_the_gradient() -> None:
    model = PPCA(data_dim=5, latent_dim=2)
    x = model(size=7).detach()
    parameters = list(model.parameters())
    evidence = model.log_evidence(x).sum()
    want = torch.autograd.grad(evidence, parameters)
    for elbo in (ELBO(), ELBO(particles=3)):
        surrogate, bound = elbo(model, Exact(model), x)
        assert_close(bound, evidence.detach())
        assert_close(torch.autograd.grad(surrogate, parameters), want)


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("kind", ["vae", "ppca"])
def test_pyro_gives_the_same_value_and_gradient_from_the_same_seed(
    kind: str, analytic: bool
) -> None:
    model = (
        PPCA(data_dim=4, latent_dim=2)
        if kind == "ppca"
        else VAE(data_dim=4, latent_dim=2, hidden=(5,), likelihood=Gaussian(0.1))
    )
    guide = Amortized(model, hidden=(5,))
    x = model(size=6).detach()
    parameters = [*model.parameters(), *guide.parameters()]
    pyro_elbo = TraceMeanField_ELBO() if analytic else Trace_ELBO()
    torch.manual_seed(1)
    loss = pyro_elbo.differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    surrogate, bound = ELBO(analytic_kl=analytic)(model, guide, x)
    assert_close(bound, -loss.detach())
    assert_close(torch.autograd.grad(surrogate, parameters), torch.autograd.grad(-loss, parameters))


def test_a_pathwise_gradient_of_a_square_is_unbiased_with_variance_four() -> None:
    """E[x^2] for x ~ N(mu, 1): one sample, d/dmu = 2 x, variance 4."""
    mu = torch.tensor(0.7, requires_grad=True)
    gradients = square_gradients(dist.Normal(mu, 1.0), mu)
    within_errors(gradients, torch.tensor(1.4))
    within_errors((gradients - 1.4) ** 2, torch.tensor(4.0))


def test_a_score_function_gradient_of_a_square_is_unbiased_with_the_known_variance() -> None:
    """The same by score function: variance mu^4 + 14 mu^2 + 15."""
    mu = torch.tensor(0.7, requires_grad=True)

    class NoPath(dist.Normal):
        has_rsample = False

    gradients = square_gradients(NoPath(mu, 1.0), mu)
    within_errors(gradients, torch.tensor(1.4))
    within_errors((gradients - 1.4) ** 2, torch.tensor(0.7**4 + 14 * 0.7**2 + 15))


def square_gradients(fn: Any, mu: Tensor) -> Tensor:
    """Gradients of E[z^2] - KL(q || p), where p is q with its parameters held: KL adds nothing."""
    held = dist.Normal(mu.detach(), 1.0)

    def model() -> None:
        z = pyro.sample("z", held)
        pyro.factor("square", z**2)

    def guide() -> None:
        pyro.sample("z", fn)

    _, gradients = estimates(lambda: ELBO(analytic_kl=True)(model, guide), [mu], 1500)
    return gradients[:, 0]


class Mixed:
    """A global normal, then in each row a Bernoulli and a normal that depends on it."""

    def __init__(self) -> None:
        self.x = torch.randn(3)
        self.logits = torch.randn(3, requires_grad=True)
        self.loc = torch.randn(2, requires_grad=True)
        self.w_loc = torch.tensor(0.2, requires_grad=True)
        self.slope = torch.tensor(0.8, requires_grad=True)
        self.parameters = [self.logits, self.loc, self.w_loc, self.slope]

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(self.slope * b, 1.0))
            pyro.sample("x", dist.Normal(z + w, 0.7), obs=x)

    def guide(self, x: Tensor, enumerate_b: bool = False) -> None:
        infer = {"enumerate": "parallel"} if enumerate_b else {}
        pyro.sample("w", dist.Normal(self.w_loc, 0.5))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=self.logits), infer=infer)
            pyro.sample("z", dist.Normal(self.loc[b.long()], 0.4))

    def bound(self) -> Tensor:
        """The bound in closed form, by enumeration of b."""
        normal, two_pi = torch.distributions.Normal, torch.tensor(2 * torch.pi)
        q = torch.distributions.Bernoulli(logits=self.logits)
        total = -torch.distributions.kl_divergence(normal(self.w_loc, 0.5), normal(0.0, 1.0))
        for b in (0.0, 1.0):
            value = torch.full((3,), b)
            z = normal(self.loc[int(b)], 0.4)
            kl = torch.distributions.kl_divergence(z, normal(self.slope * b, 1.0))
            square = (self.x - self.loc[int(b)] - self.w_loc) ** 2 + 0.4**2 + 0.5**2
            likelihood = -0.5 * (square / 0.49 + (two_pi * 0.49).log())
            discrete = torch.distributions.Bernoulli(0.3).log_prob(value) - q.log_prob(value)
            total = total + (q.log_prob(value).exp() * (discrete + likelihood - kl)).sum()
        return total


@pytest.mark.parametrize("options", [{}, {"analytic_kl": True}, {"vectorized": False}])
def test_discrete_and_reparametrised_sites_together_have_the_gradient_of_the_enumeration(
    options: dict[str, Any],
) -> None:
    pair = Mixed()
    want = pair.bound()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(want, pair.parameters)])
    particles = 2 if "vectorized" in options else 50
    elbo = ELBO(particles=particles, **options)
    bounds, gradients = estimates(
        lambda: elbo(pair.model, pair.guide, pair.x), pair.parameters, 150
    )
    within_errors(bounds, want.detach())
    within_errors(gradients, gradient)


def test_pyros_enumeration_agrees_in_the_mean() -> None:
    pair = Mixed()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def enumerated() -> tuple[Tensor, Tensor]:
        loss = elbo.differentiable_loss(
            pair.model, lambda x: pair.guide(x, enumerate_b=True), pair.x
        )
        return -torch.as_tensor(loss), -torch.as_tensor(loss).detach()

    ours = ELBO(particles=50)
    exact = estimates(enumerated, pair.parameters, 150)
    sampled = estimates(lambda: ours(pair.model, pair.guide, pair.x), pair.parameters, 150)
    for a, b in zip(exact, sampled, strict=True):
        same_mean(a, b)


def test_the_score_of_a_row_pays_for_its_own_row_only() -> None:
    """Rows do not add their costs to the noise of each other's gradients."""
    pair = Mixed()
    alone = pair.x[:1]
    torch.manual_seed(0)

    def row_noise(rows: int) -> Tensor:
        x = torch.cat([alone, torch.full((rows - 1,), 30.0)])  # others are far off: huge costs
        logits = torch.zeros(rows, requires_grad=True)

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("b", dist.Bernoulli(logits=logits))

        _, gradients = estimates(lambda: ELBO()(model, guide, x), [logits], 200)
        return gradients[:, 0].unique()

    # Two outcomes of b give two gradients, whatever other rows drew.
    assert_close(row_noise(3), row_noise(1))
    assert len(row_noise(3)) == 2


def test_an_analytic_divergence_is_skipped_where_the_order_of_the_guide_makes_it_wrong() -> None:
    """p(z2 | z1), but the guide draws z2 first and then z1 given z2."""
    shift = torch.tensor(0.9, requires_grad=True)

    def model() -> None:
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.5))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=torch.tensor(1.5))

    def backward() -> None:
        z2 = pyro.sample("z2", dist.Normal(shift, 0.8))
        pyro.sample("z1", dist.Normal(0.8 * z2, 0.3))

    def independent() -> None:
        pyro.sample("z1", dist.Normal(shift, 0.8))
        pyro.sample("z2", dist.Normal(0.3 * shift, 0.3))

    for guide in (backward, independent):
        sampled = estimates(lambda g=guide: ELBO()(model, g), [shift], 500)
        analytic = estimates(lambda g=guide: ELBO(analytic_kl=True)(model, g), [shift], 500)
        for a, b in zip(sampled, analytic, strict=True):
            same_mean(a, b)


def test_an_analytic_divergence_needs_model_and_guide_scaled_and_masked_alike() -> None:
    q, p = dist.Normal(torch.tensor(0.9), 0.5), dist.Normal(0.0, 1.0)
    mask = torch.tensor([True, False, True])

    def masked(fn: Any) -> Callable[[], None]:
        def program() -> None:
            handlers = poutine.mask(mask=mask.clone()), poutine.scale(scale=torch.tensor(0.5))
            with pyro.plate("data", 3), handlers[0], handlers[1]:
                pyro.sample("z", fn)

        return program

    def plain() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", q)

    closed = ELBO(analytic_kl=True)(masked(p), masked(q))[1]
    assert_close(closed, -0.5 * 2 * torch.distributions.kl_divergence(q, p))
    torch.manual_seed(2)
    sampled = ELBO()(masked(p), plain)[1]
    torch.manual_seed(2)
    assert_close(ELBO(analytic_kl=True)(masked(p), plain)[1], sampled)


def test_a_sampled_term_stands_in_where_there_is_no_closed_form() -> None:
    loc = torch.tensor(0.4, requires_grad=True)

    def model() -> None:
        z = pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(loc, 1.0))

    torch.manual_seed(2)
    sampled = ELBO()(model, guide)
    torch.manual_seed(2)
    assert_close(ELBO(analytic_kl=True)(model, guide), sampled)


def mixes_particles(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = torch.mv(torch.ones(len(x), 2), w)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def its_guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_a_model_that_cannot_carry_particles_is_refused_at_once_and_works_one_by_one() -> None:
    x = torch.randn(4)
    with pytest.raises(ValueError, match=r"ELBO: 3 particles.*ELBO\(particles=3, vectorized=False"):
        ELBO(particles=3).prepare(mixes_particles, its_guide, x)
    elbo = ELBO(particles=3, vectorized=False).prepare(mixes_particles, its_guide, x)
    torch.manual_seed(4)
    _, bound = elbo(mixes_particles, its_guide, x)
    torch.manual_seed(4)
    singles = [ELBO()(mixes_particles, its_guide, x)[1] for _ in range(3)]
    assert_close(bound, torch.stack(singles).mean())


def test_preparation_finds_the_plates_and_changes_no_value() -> None:
    pair = Normals()
    elbo = ELBO(particles=3)
    prepared = elbo.prepare(pair.model, pair.guide, pair.x)
    assert prepared == ELBO(particles=3, plate_dims=1)
    torch.manual_seed(0)
    bound = prepared(pair.model, pair.guide, pair.x)[1]
    torch.manual_seed(0)
    pair_of_traces = run_pair(pair.model, pair.guide, pair.x, particles=3, dim=-2)
    rows, whole = log_weights(pair_of_traces)
    assert rows is not None
    assert_close(bound, (rows.sum(-1) + whole).mean())


def test_the_bound_carries_no_gradient_and_the_surrogate_does() -> None:
    pair = Normals()
    surrogate, bound = ELBO()(pair.model, pair.guide, pair.x)
    assert surrogate.requires_grad
    assert not bound.requires_grad
    assert surrogate.shape == bound.shape == ()
    assert_close(surrogate.detach(), bound)  # without score-function terms they are one number


@pytest.mark.parametrize("particles", [0, -1, 1.5, True])
def test_a_wrong_number_of_particles_is_refused(particles: Any) -> None:
    with pytest.raises(ValueError, match="ELBO: particles must be an integer >= 1, got"):
        ELBO(particles=particles)


def test_a_guide_that_does_not_fit_the_model_is_refused() -> None:
    pair = Normals()
    with pytest.raises(ValueError, match=r"\['z'\] missing"):
        ELBO()(pair.model, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)), pair.x)

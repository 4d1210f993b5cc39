"""SGHMC, against the exact stationary moments of the chains that it runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from guides import Local
from ppl_models import BayesianNeuralNetwork
from ppl_models.core.sites import site_table
from ppl_models.evaluate import predict
from ppl_models.infer import SGHMC, Posterior, fit, sample
from ppl_models.infer.mcmc.density import Density, density_of
from ppl_models.infer.mcmc.hashing import streams
from ppl_models.infer.mcmc.sghmc import Chains, Settings, State, minibatches, move

WIDE = 4.5  # standard errors: of some tens of numbers
NOISE = 0.7  # scale of the targets
STEP, FRICTION = 0.5, 0.4  # steps so long that their bias is a tenth


def data(size: int = 30) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(size, 2, dtype=torch.float64) + torch.tensor([0.0, 0.3])
    return x, x @ torch.tensor([1.0, -0.5], dtype=x.dtype) + NOISE * torch.randn(size).double()


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), NOISE), obs=y)


def looking(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same to a program that looks at values, and so cannot run under vmap."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    loc = (x * w.unsqueeze(-2)).sum(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(loc if float(x[0, 0]) < 99 else -loc, NOISE), obs=y)


def exact(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and precision."""
    precision = np.eye(2) + (x.T @ x / NOISE**2).numpy()
    return np.linalg.solve(precision, (x.T @ y / NOISE**2).numpy()), precision


def stationary(
    x: Tensor, y: Tensor, scale: np.ndarray, batch_size: int | None, step: float, friction: float
) -> np.ndarray:
    r"""Covariance of a chain on the regression: position and velocity, (4, 4).

    With a minibatch the step is affine, z' = F z + c + noise, and F and c are random but independent
    of z; both deviate from their means by a mean over rows drawn with replacement. As z has mean
    zero, S = E[F S F'] + E[c c'] + Q holds exactly: a linear equation in S.
    """
    mean, precision = exact(x, y)
    eta = np.diag((step * scale) ** 2)
    eye, none = np.eye(2), np.zeros((2, 2))
    both = np.vstack([eye, eye])  # what moves the velocity moves the position as well
    mean_f = np.block([[eye, (1 - friction) * eye], [none, (1 - friction) * eye]])
    mean_f = mean_f - both @ eta @ precision @ np.hstack([eye, none])
    q = both @ (2.0 * friction * eta) @ both.T
    if batch_size is None:
        return solve_discrete_lyapunov(mean_f, q)
    rows, targets = x.numpy(), y.numpy()
    curvature = rows[:, :, None] * rows[:, None, :] / NOISE**2
    slope = rows * (targets - rows @ mean)[:, None] / NOISE**2
    curvature, slope = curvature - curvature.mean(0), slope - slope.mean(0)
    many = len(rows) ** 2 / batch_size
    f = np.stack([-both @ eta @ one @ np.hstack([eye, none]) for one in curvature])
    c = np.stack([both @ eta @ one for one in slope])
    q = q + many * np.einsum("ni,nj->ij", c, c) / len(rows)
    spread = many * sum(np.kron(one, one) for one in f) / len(rows)
    matrix = np.eye(16) - np.kron(mean_f, mean_f) - spread
    return np.linalg.solve(matrix, q.flatten()).reshape(4, 4)


def settings(scale: np.ndarray, chains: int, step: float = STEP, friction: float = FRICTION) -> Any:
    numbers = (torch.tensor(value, dtype=torch.float64) for value in (step, friction, 1.0))
    return Settings(torch.tensor(scale).unsqueeze(1).expand(-1, chains), *numbers)


def check_covariance(states: Tensor, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Compare independent states, shape (chains, dim), with their mean and covariance."""
    found = states.numpy() - mean
    error = np.sqrt(np.diag(covariance) / len(found))
    assert (np.abs(found.mean(0)) < WIDE * error).all()
    products = found[:, :, None] * found[:, None, :]
    error = products.std(0) / math.sqrt(len(found))
    assert (np.abs(products.mean(0) - covariance) < WIDE * error).all()


SCALE = np.array([0.15, 0.08])


def gaussian(precision: np.ndarray, mean: np.ndarray) -> Any:
    matrix, centre = torch.tensor(precision), torch.tensor(mean).unsqueeze(1)

    def density(u: Tensor) -> tuple[Tensor, Tensor]:
        g = -matrix @ (u - centre)
        return 0.5 * (g * (u - centre)).sum(0), g

    return density


def test_with_all_rows_the_chains_have_the_moments_of_the_linear_system() -> None:
    x, y = data()
    mean, precision = exact(x, y)
    chains, density = 40_000, gaussian(precision, mean)
    u = torch.tensor(mean).unsqueeze(1).expand(-1, chains)
    state = State(u, torch.zeros_like(u), torch.zeros(chains, dtype=torch.float64))
    stream = streams(1, torch.arange(chains))
    for _ in range(100):
        state, stream = move(state, stream, settings(SCALE, chains), density)
    truth = stationary(x, y, SCALE, None, STEP, FRICTION)
    # Long steps show: what is compared below is not the posterior's own covariance.
    assert (np.diag(truth)[:2] * np.diag(precision) > 1.02).all()
    check_covariance(torch.cat([state.u, state.v]).T, np.concatenate([mean, [0, 0]]), truth)


def test_one_coordinate_has_the_bias_that_the_docstring_states() -> None:
    chains, one = 100_000, np.ones(1)
    density = gaussian(np.eye(1), np.zeros(1))
    zero = torch.zeros(1, chains, dtype=torch.float64)
    state, stream = State(zero, zero, zero[0]), streams(2, torch.arange(chains))
    step, friction = 0.9, 0.5
    for _ in range(60):
        state, stream = move(state, stream, settings(one, chains, step, friction), density)
    variance = 1.0 / (1.0 - step**2 / (4.0 - 2.0 * friction))
    assert state.u.var().item() == pytest.approx(
        variance, abs=WIDE * variance * (2 / chains) ** 0.5
    )


def test_velocities_are_drawn_anew_when_asked_to() -> None:
    """The moments of a period are those of its steps, one after the other."""
    x, y = data()
    mean, precision = exact(x, y)
    chains, density, resample = 40_000, gaussian(precision, mean), 3
    u = torch.tensor(mean).unsqueeze(1).expand(-1, chains)
    state = State(u, torch.zeros_like(u), torch.zeros(chains, dtype=torch.float64))
    stream = streams(3, torch.arange(chains))
    friction = 0.05
    eta, eye, none = np.diag((STEP * SCALE) ** 2), np.eye(2), np.zeros((2, 2))
    keeps = np.block([[eye, none], [none, none]])
    moves = np.block([[eye, (1 - friction) * eye], [none, (1 - friction) * eye]])
    both = np.vstack([eye, eye])
    moves = moves - both @ eta @ precision @ np.hstack([eye, none])
    truth = np.zeros((4, 4))
    for step in range(300):
        state, stream = move(
            state, stream, settings(SCALE, chains, friction=friction), density, resample=resample
        )
        if step % resample == 0:
            truth = keeps @ truth @ keeps + np.block([[none, none], [none, eta]])
        truth = moves @ truth @ moves.T + both @ (2 * friction * eta) @ both.T
    check_covariance(torch.cat([state.u, state.v]).T, np.concatenate([mean, [0, 0]]), truth)
    without = stationary(x, y, SCALE, None, STEP, friction)
    assert np.abs(truth[2:, 2:] / without[2:, 2:] - 1.0).max() > 0.1


def on_minibatches(model: Any, batch_size: int, size: int = 30) -> tuple[Density, Any]:
    batch = data(size)
    part = tuple(value[:batch_size] for value in batch)
    table = site_table(model, *part)
    return density_of(model, part, table, rows=False, plate="data", whole=batch), batch


@pytest.mark.parametrize(("size", "batch_size"), [(30, 15), (6, 2)])
def test_with_minibatches_the_chains_have_the_exact_moments_too(size: int, batch_size: int) -> None:
    density, (x, y) = on_minibatches(regression, batch_size, size)
    mean, _ = exact(x, y)
    chains, scale = 10_000, SCALE * (30 / size) ** 0.5
    u = torch.tensor(mean).unsqueeze(1).expand(-1, chains).contiguous()
    state = State(u, torch.zeros_like(u), torch.zeros(chains, dtype=torch.float64))
    stream = streams(4, torch.arange(chains))
    for _ in range(60):
        state, stream = move(
            state, stream, settings(scale, chains), density, rows=(batch_size, size)
        )
    truth = stationary(x, y, scale, batch_size, STEP, FRICTION)
    without = stationary(x, y, scale, None, STEP, FRICTION)
    assert (np.diag(truth) > 1.1 * np.diag(without)).all()  # the noise of minibatches shows
    check_covariance(torch.cat([state.u, state.v]).T, np.concatenate([mean, [0, 0]]), truth)


@pytest.mark.parametrize("model", [regression, looking])
def test_the_gradient_is_the_full_one_in_the_mean_over_all_minibatches(model: Any) -> None:
    density, batch = on_minibatches(model, 2, size=4)
    assert (density.reason is None) is (model is regression)
    full = density_of(model, batch, site_table(model, *batch), rows=False, plate="data")
    index = torch.tensor(list(itertools.product(range(4), repeat=2))).T
    u = torch.tensor([[0.3], [-0.8]], dtype=torch.float64)
    logp, gradient = density(u.expand(2, 16), index)
    whole, whole_gradient = full(u)
    torch.testing.assert_close(logp.mean(), whole[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient.mean(1, keepdim=True), whole_gradient, rtol=1e-12, atol=0)
    prior = dist.Normal(0.0, 1.0).log_prob(u).sum()
    rows = dist.Normal(batch[0] @ u.squeeze(1), NOISE).log_prob(batch[1])
    torch.testing.assert_close(logp, prior + 2.0 * rows[index].sum(0))


def test_minibatches_are_uniform_and_each_chain_has_its_own() -> None:
    stream = streams(0, torch.arange(5000))
    drawn = minibatches(stream, 12, 7)
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7
    share, many = 1 / 7, drawn.numel()
    error = math.sqrt(many * share * (1 - share))
    assert ((counts - many * share).abs() < WIDE * error).all()
    later = minibatches(stream._replace(tick=stream.tick + 1), 12, 7)
    agree = torch.stack([(drawn == later).double(), (drawn == drawn.roll(1, 1)).double()])
    assert ((agree.mean((1, 2)) - share).abs() < WIDE * error / many).all()


def test_sample_finds_the_posterior_but_for_the_bias_that_is_derived() -> None:
    x, y = data(60)
    mean, precision = exact(x, y)
    sampler = SGHMC(batch_size=20, step_size=0.25, friction=0.5, thin=12)
    found = sample(
        regression, x, y, sampler=sampler, chains=32, draws=120, warmup=20, seed=0, progress=False
    )
    assert found["w"].shape == (32, 120, 2)
    assert found.compiled.startswith("traced graph")
    error = found.mcse()["w"].numpy()
    assert (np.abs(found.mean()["w"].numpy() - mean) < WIDE * error).all()
    covariance = stationary(x, y, np.full(2, 60**-0.5), 20, 0.25, 0.5)[:2, :2]
    scale, error = found.scale()["w"].numpy(), found.mcse("sd")["w"].numpy()
    assert (np.abs(scale - np.sqrt(np.diag(covariance))) < WIDE * error).all()
    assert (error < 0.03 * scale).all()
    # And that is near the posterior's: by the share of noise, and of the curvature of the steps.
    posterior = np.linalg.inv(precision)
    inflation = np.diag(covariance) / np.diag(posterior) - 1.0
    curved = 0.25**2 / 60 * np.linalg.eigvalsh(precision).max() / (4.0 - 2.0 * 0.5)
    assert found.gradient_noise is not None
    assert (inflation > 0.0).all()
    assert (inflation < 1.3 * (curved + found.gradient_noise)).all()
    assert found.rhat()["w"].max() < 1.02
    assert found.divergences.sum() == 0
    assert found.step_size is not None
    assert found.step_size.tolist() == [0.25] * 32
    assert "accept" not in str(found)
    assert found.accept.isnan().all()


def test_the_noise_of_minibatches_is_measured() -> None:
    density, (x, y) = on_minibatches(regression, 6)
    mean, _ = exact(x, y)
    chains = Chains(
        density,
        torch.tensor(mean).unsqueeze(1).expand(-1, 400).contiguous(),
        sampler=SGHMC(batch_size=6, step_size=0.2, friction=0.3),
        size=30,
        seed=0,
        ids=torch.arange(400),
        slots=1,
    )
    slope = x.numpy() * (y.numpy() - x.numpy() @ mean)[:, None] / NOISE**2
    variance = 30**2 / 6 * slope.var(0).max()
    assert chains.noise() == pytest.approx(0.2**2 / 30 * variance / (2 * 0.3), rel=0.05)


def same(one: Posterior, other: Posterior) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_draws_and_compiled_ones_are_right() -> None:
    x, y = data()

    def run(seed: int = 3, **options: Any) -> Posterior:
        sampler = SGHMC(batch_size=8, resample=7, thin=2)
        return sample(
            regression, x, y, sampler=sampler, draws=12, warmup=4, seed=seed, progress=False,
            **options,
        )  # fmt: skip

    first = run(chains=4, compile=False)
    same(first, run(chains=4, compile=False))
    compiled = run(chains=4, compile="now")
    torch.testing.assert_close(compiled["w"], first["w"], rtol=1e-9, atol=1e-9)
    more = run(chains=6, compile=False)["w"][:4]
    torch.testing.assert_close(more, first["w"], rtol=1e-9, atol=1e-9)
    assert not torch.equal(run(4, chains=4, compile=False)["w"], first["w"])
    assert len(first["w"].flatten(0, 1)[:, 0].unique()) == 48


def test_the_plate_over_rows_may_have_another_name() -> None:
    x, y = data()

    def renamed(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("patients", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), NOISE), obs=y)

    one, other = (
        sample(
            model, x, y, sampler=SGHMC(batch_size=5), chains=2, draws=4, warmup=2, seed=0,
            plate=plate, progress=False,
        )
        for model, plate in ((regression, "data"), (renamed, "patients"))
    )  # fmt: skip
    same(one, other)


def test_chains_start_at_a_guide_and_keep_its_scales() -> None:
    x, y = data()
    loc, scale = torch.tensor([5.0, -7.0]), torch.tensor([2.0, 0.002])

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    def run(step_size: float) -> Tensor:
        sampler = SGHMC(batch_size=5, step_size=step_size, friction=1.0, thin=1)
        return sample(
            regression, x, y, sampler=sampler, chains=200, draws=4, warmup=0, init=guide, seed=0,
            progress=False,
        )["w"].double()  # fmt: skip

    still = (run(1e-12)[:, 0] - loc) / scale
    assert (still.mean(0).abs() < WIDE / 200**0.5).all()
    assert ((still.std(0) - 1.0).abs() < WIDE / 400**0.5).all()
    # A step's noise has scale sqrt(2 friction) step_size times the guide's.
    moved = run(1e-6).diff(dim=1).flatten(0, 1).std(0) / scale / 1e-6
    torch.testing.assert_close(moved, torch.full_like(moved, 2**0.5), rtol=0.25, atol=0.0)


def test_networks_are_sampled_from_a_fitted_guide_and_predict() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 60).unsqueeze(1)
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(60)
    model = BayesianNeuralNetwork(data_dim=1, hidden=(6,))
    guide = Local(model, example=(x, y))
    guide.start_around(model.net.starts())
    fit(model, guide, (x, y), steps=600, lr=0.02, seed=0, progress=False)
    found = sample(
        model, x, y, sampler=SGHMC(batch_size=20), init=guide, chains=4, draws=60, warmup=60, seed=0,
        progress=False,
    )  # fmt: skip
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias", "noise_scale"}
    predicted = predict(model, found, x, y)
    assert (predicted.mean - y).square().mean().sqrt() < 0.5 * y.std()
    assert torch.isfinite(predicted.epistemic).all()
    assert found.divergences.sum() == 0


def test_chains_that_leave_the_finite_numbers_are_told() -> None:
    x, y = data()
    with pytest.warns(RuntimeWarning, match=r"of 2 chains of SGHMC 0, 1 .*Halve step_size"):
        found = sample(
            regression, x, y, sampler=SGHMC(batch_size=5, step_size=20.0), chains=2, draws=40,
            warmup=10, seed=0, progress=False,
        )  # fmt: skip
    assert found.divergences.tolist() == [40, 40]
    assert "Halve step_size" in str(found)
    assert "target_accept" not in str(found)


def test_loud_minibatches_are_told() -> None:
    x, y = data()
    found = sample(
        regression, x, y, sampler=SGHMC(batch_size=1, step_size=0.3), chains=2, draws=10, warmup=1,
        seed=0, progress=False,
    )  # fmt: skip
    assert found.gradient_noise is not None
    assert found.gradient_noise > 0.5
    assert "batch_size or friction larger" in str(found)


def test_a_default_step_is_shortened_where_minibatches_are_loud() -> None:
    x, y = data(200)

    def sharp(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.3 * NOISE), obs=y)

    def run(step_size: float | None) -> Posterior:
        return sample(
            sharp, x, y, sampler=SGHMC(batch_size=20, step_size=step_size), chains=8, draws=40,
            warmup=40, seed=0, progress=False,
        )  # fmt: skip

    begins = SGHMC(batch_size=20).step(200)
    kept, found = run(begins), run(None)
    assert kept.gradient_noise is not None
    assert kept.gradient_noise > 0.5
    assert found.gradient_noise is not None
    assert 0.02 < found.gradient_noise < 0.06
    assert found.step_size is not None
    torch.testing.assert_close(
        found.step_size.mean(),
        torch.tensor(begins * (0.05 / kept.gradient_noise) ** 0.5),
        rtol=0.2,
        atol=0.0,
    )


def test_a_default_step_keeps_minibatches_quiet() -> None:
    assert SGHMC(batch_size=10, friction=0.1).step(1000) == pytest.approx((0.01 * 0.01) ** 0.5)
    assert SGHMC(batch_size=10).step(10) == 0.2
    assert SGHMC(batch_size=10, step_size=3).step(1000) == 3


def refused(model: Any, *batch: Tensor, match: str, sampler: SGHMC, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        sample(model, *batch, sampler=sampler, **options)


def test_what_does_not_fit_is_refused() -> None:
    x, y = data()
    sampler = SGHMC(batch_size=5)
    refused(regression, x, y, match="at most the number of rows, 30, got 31", sampler=SGHMC(31))
    refused(regression, x, y, match="rows=True.*does not apply", sampler=sampler, rows=True)
    refused(lambda: pyro.sample("z", dist.Normal(0, 1)), match="was given no data", sampler=sampler)

    def discrete(y: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k.to(y.dtype), 1.0), obs=y)

    refused(discrete, y, match="SGHMC needs continuous latents, but site 'k'", sampler=sampler)

    def local(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    refused(local, y, match=r"\['z'\] of local are inside plate 'data'", sampler=sampler)

    def summed(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(w * k, 1.0), obs=y)

    refused(summed, y, match=r"marks \['k'\] for enumeration", sampler=sampler)

    def unplated(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0).expand(y.shape).to_event(1), obs=y)

    refused(unplated, y, match="no site of unplated is inside plate 'data'", sampler=sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"thin": 0}, "thin must be an integer >= 1"),
        ({"resample": 0}, "resample must be an integer >= 1"),
        ({"step_size": 0.0}, "step_size must be a number, positive and finite, got 0.0"),
        ({"step_size": math.inf}, "step_size must be a number"),
        ({"step_size": math.nan}, "step_size must be a number"),
        ({"friction": 1.5}, r"friction must be a number, in \(0, 1\], got 1.5"),
        ({"friction": True}, "friction must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGHMC(**{"batch_size": 5, **options})

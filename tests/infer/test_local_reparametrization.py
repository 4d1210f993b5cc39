"""Local reparametrisation: the same bound, with less noise in its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from guides import Ensemble, Local, families
from ppl_models import PPCA, BayesianNeuralNetwork, bayesian, minibatch
from ppl_models.core.sites import site_table
from ppl_models.core.traces import log_weights, replayed_pair, vectorizes
from ppl_models.evaluate import elbo
from ppl_models.infer import ELBO, fit, local_reparametrization
from ppl_models.parts.likelihoods import Classes, Homoscedastic
from ppl_models.parts.priors import hierarchical, normal, scale_mixture

NOISE = 0.4
PRIOR = 1.5


def data(rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 3, generator=generator)
    slope = torch.tensor([1.0, 2.0, 3.0])
    return x, x @ slope + NOISE * torch.randn(rows, generator=generator)


def images(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 1, 3, 3, generator=generator)
    return x, torch.randint(3, (rows,), generator=generator)


def convolutional(net: nn.Module | None = None) -> BayesianNeuralNetwork:
    net = net or nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return BayesianNeuralNetwork((1, 3, 3), net=net, likelihood=Classes(3))


def linear(layer: nn.Module | None = None) -> BayesianNeuralNetwork:
    layer = layer or nn.Linear(3, 1)
    return BayesianNeuralNetwork(3, net=layer, likelihood=Homoscedastic(NOISE), prior=normal(PRIOR))


def guided(model: Any, batch: tuple[Tensor, ...], **options: Any) -> Local:
    """Make a guide somewhere, with a scale of its own for each weight."""
    torch.manual_seed(3)
    guide = Local(model, example=batch, **options)
    guide.start_around(model.net.starts(), scale=0.3)
    with torch.no_grad():
        for value in guide.global_parameters.values():
            value.add_(0.2 * torch.randn_like(value))
    return guide


def moments(guide: Local, site: str) -> tuple[Tensor, Tensor]:
    q: Any = guide.q(site)
    return q.base_dist.loc.detach(), q.base_dist.scale.detach()


def divergence(loc: Tensor, scale: Tensor, prior: Tensor | float) -> Tensor:
    """KL of independent normals from others around 0, written out."""
    prior = torch.as_tensor(prior, dtype=loc.dtype)
    terms = (prior / scale).log() + (scale**2 + loc**2) / (2 * prior**2) - 0.5
    return terms.sum()


def total(model: Any, guide: Any, batch: tuple[Tensor, ...], values: dict[str, Tensor]) -> Tensor:
    rows, whole = log_weights(replayed_pair(model, guide, *batch, values=values))
    return whole.sum() + (0.0 if rows is None else rows.sum())


def draws(guide: Any, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    trace = poutine.trace(guide).get_trace(*batch)
    return {n: trace.nodes[n]["value"] for n in trace.stochastic_nodes if n != "data"}


@pytest.mark.parametrize("part", [None, [3, 5, 11]], ids=["all rows", "minibatch"])
def test_on_a_linear_model_the_bound_is_the_closed_form(part: list[int] | None) -> None:
    x, y = data()
    model = linear()
    guide = guided(model, (x, y))
    one, other = local_reparametrization(model, guide)
    (w, s), (b, t) = moments(guide, "weight"), moments(guide, "bias")
    rows = torch.arange(30) if part is None else torch.tensor(part)
    x, y = x[rows], y[rows]
    away = (y - x @ w[0] - b) ** 2 + x**2 @ s[0] ** 2 + t**2
    terms = -0.5 * math.log(2 * math.pi * NOISE**2) - away / (2 * NOISE**2)
    want = terms.sum() * 30 / len(rows) - divergence(w, s, PRIOR) - divergence(b, t, PRIOR)
    # A row's term is a parabola in its noise: the mean over -1 and 1 is that over all normal draws.
    found = []
    for noise in (-1.0, 1.0):
        values = {"noise": torch.full((len(rows), 1), noise), "kl": torch.zeros(0)}
        if part is None:
            found.append(total(one, other, (x, y), values))
        else:
            with minibatch(rows, size=30):
                found.append(total(one, other, (x, y), values))
    assert_close(torch.stack(found).mean().detach(), want)


CASES: dict[str, Any] = {
    "normal": lambda: (
        BayesianNeuralNetwork(3, hidden=(6,), prior=normal(0.7), likelihood=Homoscedastic(0.5)),
        data(),
    ),
    "hierarchical": lambda: (BayesianNeuralNetwork(3, hidden=(6,), prior=hierarchical()), data()),
    "convolutional": lambda: (convolutional(), images()),
    "without a bias": lambda: (
        convolutional(
            nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False))
        ),
        images(),
    ),
    "one of two layers": lambda: (
        BayesianNeuralNetwork(
            3,
            hidden=(6,),
            likelihood=Homoscedastic(0.5),
            prior=lambda name, w: (scale_mixture() if name == "2.bias" else normal())(name, w),
        ),
        data(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_the_plain_one_in_the_mean(case: str) -> None:
    model, batch = CASES[case]()
    guide = guided(model, batch)
    pair = local_reparametrization(model, guide)
    plain = elbo(model, guide, *batch, particles=4000, seed=0)
    local = elbo(*pair, *batch, particles=4000, seed=1)
    assert abs(plain.mean - local.mean) < 4 * math.hypot(plain.se, local.se)
    assert vectorizes(*pair, *batch, dim=-2)


@pytest.mark.parametrize("case", CASES)
def test_its_gradient_varies_less(case: str) -> None:
    model, batch = CASES[case]()
    guide = guided(model, batch)
    parameters = list(guide.parameters())

    def spread(*pair: Any) -> float:
        torch.manual_seed(0)
        found = []
        for _ in range(100):
            surrogate, _ = ELBO()(*pair, *batch)
            slopes = torch.autograd.grad(surrogate, parameters)
            found.append(torch.cat([slope.flatten() for slope in slopes]))
        return torch.stack(found).var(0).sum().item()

    ratio = spread(*local_reparametrization(model, guide)) / spread(model, guide)
    assert ratio < 0.8, ratio


def test_divergences_are_the_closed_form_given_the_scales_of_the_prior() -> None:
    x, y = data()
    model = BayesianNeuralNetwork(3, hidden=(6,), prior=hierarchical())
    guide = guided(model, (x, y))
    one, other = local_reparametrization(model, guide)
    values = draws(other, (x, y))
    trace: Any = replayed_pair(one, other, x, y, values=values).model
    trace.compute_log_prob()
    for layer in ("0", "2"):
        scale = values[f"{layer}.prior_scale"]
        leaves = [moments(guide, f"{layer}.{leaf}") for leaf in ("weight", "bias")]
        want = -sum(divergence(*leaf, scale) for leaf in leaves)
        assert_close(trace.nodes[f"{layer}.kl"]["log_prob"], want)
    names = {site.name for site in site_table(one, x, y).latents}
    assert names == {"noise_scale"} | {
        f"{layer}.{leaf}" for layer in "02" for leaf in ("prior_scale", "kl", "noise")
    }


class Patches(nn.Module):
    """The patches that a convolution by 2 x 2 sees, (rows, places, pixels)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.unfold(x, 2).mT


class Back(nn.Module):
    """Channels first again."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mT.reshape(len(h), -1)


def test_a_convolution_is_a_linear_layer_on_patches() -> None:
    x, y = images()
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3))
    flat = nn.Sequential(Patches(), nn.Linear(4, 2), Back(), nn.Tanh(), nn.Linear(8, 3))
    found = []
    for net, shift in ((conv, 0), (flat, 1)):
        model = convolutional(net)
        guide = guided(model, (x, y))
        torch.manual_seed(5)
        with torch.no_grad():
            for value in guide.global_parameters.values():
                value.copy_(0.5 * torch.randn(value.shape) - 1.0)
        one, other = local_reparametrization(model, guide)
        torch.manual_seed(6)
        values = draws(other, (x, y))
        assert values[f"{shift}.noise"].shape == (6, 2, 5)
        assert values[f"{3 + shift}.noise"].shape == (6, 3)
        found.append(total(one, other, (x, y), values))
    assert_close(found[0], found[1])


@pytest.mark.parametrize("size", [2, 3], ids=["several places", "one place"])
def test_outputs_of_a_convolution_have_the_moments_of_drawn_weights(size: int) -> None:
    x, _ = images(2)
    places = (4 - size) ** 2
    model = BayesianNeuralNetwork(
        (1, 3, 3),
        net=nn.Sequential(nn.Conv2d(1, 2, size), nn.Flatten()),
        likelihood=lambda h: dist.Normal(h, 1.0).to_event(1),
    )
    batch = (x, torch.zeros(2, 2 * places))
    guide = guided(model, batch)
    one, other = local_reparametrization(model, guide)
    (w, s), (b, t) = moments(guide, "0.weight"), moments(guide, "0.bias")
    patches = nn.functional.unfold(x, size).mT
    want = torch.einsum("npd,cd->ncp", patches, w.flatten(1)) + b[:, None]
    many = 20_000
    with pyro.plate("particles", many, dim=-2), poutine.trace() as drawn:
        other(*batch)
        noise = drawn.trace.nodes["0.noise"]["value"]
    with pyro.plate("particles", many, dim=-2), poutine.trace() as told:
        poutine.condition(one, data={"0.noise": noise, "0.kl": torch.zeros(0)})(*batch)
    node: Any = told.trace.nodes["y"]
    h = node["fn"].base_dist.loc.reshape(many, 2, 2, places).detach()
    error = h.std(0) / many**0.5
    assert bool(((h.mean(0) - want).abs() < 5 * error).all())
    away = h - want
    covariance = torch.einsum("npd,cd,nqd->ncpq", patches, s.flatten(1) ** 2, patches)
    covariance = covariance + t[:, None, None] ** 2
    products = away[..., :, None] * away[..., None, :]
    error = products.std(0) / many**0.5
    assert bool(((products.mean(0) - covariance).abs() < 5 * error).all())
    across = (away[:, 0] * away[:, 1]).mean(0) / (away[:, 0] * away[:, 1]).std(0) * many**0.5
    assert bool((across.abs() < 5).all())  # rows are independent of each other


def test_it_trains_the_guide_to_the_best_mean_field_posterior() -> None:
    x, y = data()
    model = linear(nn.Linear(3, 1, bias=False))
    guide = Local(model, example=(x, y))
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=800)
    result = fit(
        *local_reparametrization(model, guide), (x, y), objective=ELBO(8), steps=800, lr=0.1,
        schedule=schedule, seed=0, progress=False,
    )  # fmt: skip
    assert result.compiled.startswith("traced graph"), result.compiled
    a, b = x.numpy(), y.numpy()
    precision = a.T @ a / NOISE**2 + np.eye(3) / PRIOR**2
    mean = np.linalg.solve(precision, a.T @ b / NOISE**2)
    loc, scale = moments(guide, "weight")
    assert np.abs(loc[0].numpy() - mean).max() < 0.01
    assert np.abs(scale[0].numpy() * np.sqrt(np.diag(precision)) - 1).max() < 0.05


@pytest.mark.parametrize("case", ["normal", "hierarchical", "convolutional"])
def test_it_runs_in_the_compiled_step_and_in_vanilla_pyro(case: str) -> None:
    model, batch = CASES[case]()
    pair = local_reparametrization(model, guided(model, batch))
    options = {"steps": 300, "batch_size": 3, "lr": 0.01, "seed": 0, "progress": False}
    result = fit(*pair, batch, objective=ELBO(2), **options)
    assert "traced graph" in result.compiled, result.compiled
    torch.manual_seed(5)
    _, bound = ELBO()(*pair, *batch)
    svi = SVI(*pair, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    torch.manual_seed(5)
    assert_close(torch.as_tensor(-svi.step(*batch)), bound)


def test_what_is_trained_is_what_was_given() -> None:
    x, y = data()
    last = lambda name, value: normal()(name, value) if name.startswith("2") else None
    model = BayesianNeuralNetwork(3, hidden=(4,), likelihood=Homoscedastic(0.3), prior=last)
    guide = guided(model, (x, y))
    fit(
        model, guide, (x, y), steps=1, lr=0.1, seed=0, progress=False
    )  # both have run by themselves
    guide(x, y)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    state = torch.get_rng_state()
    pair = local_reparametrization(model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    fit(*pair, (x, y), steps=3, lr=0.1, seed=0, progress=False)
    after = [*model.parameters(), *guide.parameters()]
    assert len(after) == 4
    assert not any(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    elbo(model, guide, x, y, particles=2)


def test_the_weight_of_divergences_in_warm_up_is_that_of_the_closed_form() -> None:
    x, y = data()
    model = linear()
    guide = guided(model, (x, y))
    pair = local_reparametrization(model, guide)
    found = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        found.append(ELBO(kl_weight=weight)(*pair, x, y))
    want = divergence(*moments(guide, "weight"), PRIOR) + divergence(*moments(guide, "bias"), PRIOR)
    assert_close((found[0][0] - found[1][0]).detach(), want)
    assert_close(found[0][1], found[1][1])


def test_rows_of_zeros_have_a_gradient() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4)
    model = linear(nn.Linear(3, 1, bias=False))
    guide = guided(model, (x, y))
    surrogate, _ = ELBO()(*local_reparametrization(model, guide), x, y)
    surrogate.backward()
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())  # pyright: ignore


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))[:, :1]


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 1)).reshape(len(x), -1)[:, :1]


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) @ self.layer.weight)[:, :1]


def test_what_does_not_fit_is_refused() -> None:
    x, y = data()
    model = BayesianNeuralNetwork(3, hidden=(4,))
    for guide in (
        guided(model, (x, y), family=families.LowRankNormal(rank=1)),
        Ensemble(model, example=(x, y)),
    ):
        with pytest.raises(
            ValueError, match=r"'0': the guide of '0.weight' is no independent norm"
        ):
            local_reparametrization(model, guide)
    for net, prior, said in (
        (None, scale_mixture(), r"'0': the prior of '0.weight' is no independent normal"),
        (Twice(), normal(), "'layer': it runs 2 times for a row, not once"),
        (Mixing(), normal(), "'layer': what it is given has no row for each row of the data"),
        (
            Reading(),
            normal(),
            r"without weights of the layers \['layer'\] .*calling the layers alone",
        ),
    ):
        other = BayesianNeuralNetwork(3, net=net, prior=prior)
        with pytest.raises(ValueError, match=said):
            local_reparametrization(other, Local(other, example=(x, y)))
    only_bias = lambda name, value: normal()(name, value) if name == "2.bias" else None
    other = BayesianNeuralNetwork(3, hidden=(4,), prior=only_bias)
    with pytest.raises(
        ValueError, match=r"'0': its weight and bias is trained.*'2': its weight is"
    ):
        local_reparametrization(other, Local(other, example=(x, y)))
    with pytest.raises(ValueError, match=r"guide must have a method q\(site\)"):
        local_reparametrization(model, pyro.infer.autoguide.AutoNormal(model))
    for none in (PPCA(3, 1), bayesian(PPCA(3, 1), dist.Normal(0.0, 1.0))):
        with pytest.raises(ValueError, match="must have one network of bayesian"):
            local_reparametrization(none, Local(model, example=(x, y)))


def test_layers_that_share_weights_draw_them_and_the_others_their_outputs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20)
    model = BayesianNeuralNetwork(3, net=Tied(), likelihood=Homoscedastic(0.5))
    guide = Local(model, example=(x, y))
    guide.start_around(model.net.starts(), scale=0.3)
    pair = local_reparametrization(model, guide)
    trace = poutine.trace(pair[0]).get_trace(x, y)
    assert {"first.weight", "last.noise"} <= set(trace.nodes)
    assert not {"last.weight", "first.noise", "second.noise"} & set(trace.nodes)
    plain, found = (elbo(*two, (x, y), particles=4000, seed=0) for two in ((model, guide), pair))
    assert abs(plain.mean - found.mean) < 4 * (plain.se**2 + found.se**2) ** 0.5

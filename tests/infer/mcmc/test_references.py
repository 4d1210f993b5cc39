"""The reference posteriors are the ones that the references are of: importance sampling says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.testing import assert_close

from . import references

needs_data = pytest.mark.skipif(
    not references.folder().is_dir(), reason="PPL_MODELS_DATA has no folder posteriordb"
)


class Density:
    """The log-density of a model on the unconstrained space, one vector for all latents."""

    def __init__(self, model: Callable[..., None], arguments: tuple[Tensor, ...]) -> None:
        self.run = lambda: model(*arguments)
        nodes: Any = poutine.trace(self.run).get_trace().nodes
        self.transforms, self.shapes = {}, {}
        for name, node in nodes.items():
            if node["type"] == "sample" and not node["is_observed"]:
                self.transforms[name] = transform = biject_to(node["fn"].support)
                self.shapes[name] = transform.inv(node["value"]).shape
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def sites(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the value of each site, and the log-Jacobian."""
        values, jacobian = {}, torch.zeros(())
        parts = u.split([shape.numel() for shape in self.shapes.values()])
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            free = part.reshape(shape)
            transform = self.transforms[name]
            values[name] = transform(free)
            jacobian = jacobian + transform.log_abs_det_jacobian(free, values[name]).sum()
        return values, jacobian

    def __call__(self, u: Tensor) -> Tensor:
        values, jacobian = self.sites(u)
        with poutine.trace() as record, poutine.condition(data=values):
            self.run()
        return record.trace.log_prob_sum() + jacobian


def mode_of(density: Density) -> tuple[Tensor, Tensor]:
    """Climb to the mode by Newton's method: its place, and the covariance of its curvature."""
    gradient, hessian = torch.func.grad(density), torch.func.jacrev(torch.func.grad(density))
    u = torch.zeros(density.size)
    here = density(u)
    for _ in range(200):
        values, vectors = torch.linalg.eigh(-hessian(u))
        slope = vectors.mT @ gradient(u)
        # Upwards along each axis, whatever the curvature's sign.
        move = vectors @ (slope / values.abs().clamp(min=1e-6))
        length = 1.0
        while length > 1e-8 and not (there := density(u + length * move)) >= here:
            length /= 2
        if length * move.norm() < 1e-9 or length <= 1e-8:
            break
        u, here = u + length * move, there
    return u, torch.linalg.inv(-hessian(u))


def weigh(density: Density, centre: Tensor, covariance: Tensor, draws: int) -> tuple[Tensor, ...]:
    """Draw from a Student distribution of 6 degrees of freedom: the draws and their weights."""
    chi = torch.distributions.Chi2(6.0).sample((draws,)) / 6.0
    white = torch.randn(draws, density.size) / chi.sqrt()[:, None]
    u = centre + white @ torch.linalg.cholesky(covariance).mT
    log_q = -(6.0 + density.size) / 2 * torch.log1p(white.square().sum(-1) / 6.0)
    log_p = torch.vmap(density, chunk_size=2000)(u)
    assert torch.isfinite(log_p).all()
    return u, torch.softmax(log_p - log_q, 0)


@needs_data
@pytest.mark.parametrize("name", references.NAMES)
def test_importance_sampling_finds_the_moments_of_the_reference(name: str) -> None:
    known = references.reference(name)
    density = Density(known.model, known.arguments)
    with pyro.validation_enabled(False):
        centre, covariance = mode_of(density)
        slope = torch.func.grad(density)(centre) * covariance.diagonal().sqrt()
        assert slope.abs().max() < 1e-4
        for _ in range(3):  # the next proposal has the moments that this one finds
            u, weights = weigh(density, centre, 1.3 * covariance, 10_000)
            centre = weights @ u
            covariance = (weights * (u - centre).mT) @ (u - centre)
        u, weights = weigh(density, centre, covariance, 40_000)
        values, _ = torch.vmap(density.sites)(u)
    assert (
        1 / weights.square().sum() > 300
    )  # effective draws: 550 for the Gaussian process, else > 4000
    reported = known.transform(values)
    assert reported.shape == (40_000, len(known.moments.names))
    mean = weights @ reported
    squares = (reported - mean).square()
    deviation = (weights @ squares).sqrt()
    theirs = known.moments.sd / known.moments.ess.sqrt()
    error = (weights.square() @ squares + theirs.square()).sqrt()
    assert ((mean - known.moments.mean).abs() < 5 * error).all()
    error = (weights.square() @ (squares - deviation.square()).square()).sqrt() / (2 * deviation)
    assert ((deviation - known.moments.sd).abs() < 5 * (error + theirs)).all()


@needs_data
@pytest.mark.parametrize("name", references.NAMES)
def test_leading_dimensions_of_chains_go_through(name: str) -> None:
    known = references.reference(name)
    density = Density(known.model, known.arguments)
    u = 0.1 * torch.randn(3, density.size)
    with pyro.validation_enabled(False):
        want, slopes = torch.vmap(torch.func.grad_and_value(density))(u)[::-1]
        values, jacobians = torch.vmap(density.sites)(u)
    assert torch.isfinite(want).all()
    assert torch.isfinite(slopes).all()
    with poutine.trace() as record, pyro.plate("chains", 3), poutine.condition(data=values):
        known.model(*known.arguments)
    record.trace.compute_log_prob()
    terms: Any = [n["log_prob"] for n in record.trace.nodes.values() if "log_prob" in n]
    got = sum(torch.as_tensor(term).expand(3) for term in terms if torch.is_tensor(term))
    assert_close(got + jacobians, want)


def test_the_recurrence_and_the_log_product_are_those_of_a_loop() -> None:
    news, decay = torch.rand(2, 13), torch.rand(2, 1)
    h = [news[:, 0]]
    for t in range(1, 13):
        h.append(news[:, t] + decay[:, 0] * h[-1])
    assert_close(references.recurrence(news, decay), torch.stack(h, -1))
    factors = torch.randn(2, 7, 3, 3)
    product = factors[:, 0].exp()
    for t in range(1, 7):
        product = product @ factors[:, t].exp()
    assert_close(references.log_product(factors), product.log())

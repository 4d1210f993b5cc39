"""The exact posterior of linear-Gaussian models."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ReshapeTransform

from ppl_models.core.batch import as_batch
from ppl_models.core.minibatch import current_minibatch
from ppl_models.core.module import NamedModule
from ppl_models.core.random import seeded
from ppl_models.core.sites import (
    base_support,
    describe,
    describe_program,
    example_batch,
    site_table,
    stochastic_nodes,
)
from ppl_models.core.store import own_parameters, scratch_store
from ppl_models.core.types import Distribution


class Exact(NamedModule):
    r"""The posterior itself, of a model that is linear and Gaussian given its parameters.

    If the model has a method `posterior`, that is the guide. Otherwise the square is completed:
    where :math:`\log p(x, z)` is quadratic in all latents :math:`z`, with gradient :math:`g` at 0
    and Hessian :math:`-\Lambda`, the posterior is :math:`\mathcal{N}(\Lambda^{-1} g,
    \Lambda^{-1})`. It has no parameters of its own, so the ELBO is the evidence for every draw.

    Arguments:
        model: A Pyro model whose latents are real and either all inside the plate over rows or all
            outside every plate, such as Bayesian linear regression with known noise.
        example: A batch of two or more rows to trace the model with; required unless the model can
            draw one with `model(size=2)`.
        plate: Name of the plate over rows.

    Raises:
        ValueError: If the model is not of that kind: the message says which site is not.

    Source:
        Bishop (2006), Pattern Recognition and Machine Learning, section 2.3.3.

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> Exact(model).q("z", model(size=4)).event_shape
        torch.Size([2])
    """

    def __init__(
        self, model: Callable[..., Any], *, example: Any = None, plate: str = "data"
    ) -> None:
        super().__init__()
        batch = as_batch(example_batch(model, example), model)
        table = site_table(model, *batch, plate=plate)
        table.check_plates()
        name = describe_program(model)
        if not table.latents:
            raise ValueError(f"Exact: {name} has no latent.")
        if table.locals and table.globals:
            raise ValueError(
                f"Exact: {[s.name for s in table.globals]} are shared by all rows and "
                f"{[s.name for s in table.locals]} are not; their joint posterior is not computed. "
                "All latents must be inside, or all outside, the plate over rows."
            )
        for site in table.latents:
            if base_support(site.support)[0] is not constraints.real:
                raise ValueError(
                    f"Exact: site '{site.name}' of {name} has support {describe(site.support)}; "
                    "a normal posterior needs a real one."
                )
            if len(site.plates) > site.local or (site.local and site.data_dim != -1):
                raise ValueError(
                    f"Exact: site '{site.name}' of {name} is in the plates "
                    f"{[frame.name for frame in site.plates]}; only the plate over rows is allowed."
                )
        self._model = [model]  # in a list: the model is not a submodule of its guide
        self._local = bool(table.locals)
        self._shapes = {site.name: site.event_shape for site in table.latents}
        self._plate = plate
        self._by_model = hasattr(model, "posterior") and len(self._shapes) == 1
        if not self._by_model:
            self._check_quadratic(name, *batch)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """Sample every latent from the posterior; returns the draws by site."""
        moments = self._moments(*batch)
        draws: dict[str, Tensor] = {}
        with pyro.plate(self._plate, len(batch[0]), dim=-1) if self._local else nullcontext():
            for site in self._shapes:
                draws[site] = pyro.sample(site, self._conditional(site, moments, draws))
        return draws

    def q(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Distribution:
        """Return the posterior of a latent, given the batch and the latents before it."""
        return self._conditional(site, self._moments(*batch), earlier)

    def _conditional(
        self, site: str, moments: Distribution | tuple[Tensor, Tensor], earlier: dict[str, Tensor]
    ) -> Distribution:
        if not isinstance(moments, tuple):
            return moments
        loc, factor = moments
        start = 0
        given: list[Tensor] = []
        for name, shape in self._shapes.items():
            if name == site:
                break
            given.append(earlier[name].flatten(-len(shape)) if shape else earlier[name][..., None])
            start += math.prod(shape)
        stop = start + math.prod(self._shapes[site])
        own = loc[..., start:stop]
        if given:  # z = loc + L e: the draws before fix the first elements of e
            gap = (torch.cat(given, -1) - loc[..., :start]).unsqueeze(-1)
            noise = torch.linalg.solve_triangular(factor[..., :start, :start], gap, upper=False)
            own = own + (factor[..., start:stop, :start] @ noise).squeeze(-1)
        fn = dist.MultivariateNormal(own, scale_tril=factor[..., start:stop, start:stop])
        shape = self._shapes[site]
        if len(shape) == 1:
            return fn
        return dist.TransformedDistribution(
            fn, [ReshapeTransform(torch.Size((stop - start,)), shape)]
        )

    def _moments(self, *batch: Tensor) -> Distribution | tuple[Tensor, Tensor]:
        """Return the model's own posterior, or mean and Cholesky factor of the covariance."""
        if self._by_model:
            return self._model[0].posterior(*batch)  # pyright: ignore[reportFunctionMemberAccess]
        if not self._local and current_minibatch(self._plate) is not None:
            raise ValueError(
                f"Exact: {list(self._shapes)} are shared by all rows, so their posterior needs all "
                "of them, not a minibatch. Use batch_size=len(x)."
            )
        gradient, hessian = self._expansion(torch.zeros_like, *batch)
        factor, failed = torch.linalg.cholesky_ex(-hessian)
        if failed.any():
            raise ValueError(
                "Exact: the posterior is improper: the log joint is not strictly concave in "
                f"{list(self._shapes)}."
            )
        loc = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        return loc, torch.linalg.cholesky(torch.cholesky_inverse(factor))

    def _expansion(
        self, start: Callable[[Tensor], Tensor], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the log joint, row by row, at a point."""
        size = sum(math.prod(shape) for shape in self._shapes.values())
        rows = len(batch[0]) if self._local else 1
        like = next((v for v in batch if v.is_floating_point()), torch.empty(()))
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            point = start(like.new_empty(rows, size)).requires_grad_()
            total = self._log_joint(point, *batch)
            (gradient,) = torch.autograd.grad(total, point, create_graph=True)
            columns = [
                torch.autograd.grad(
                    gradient[:, k].sum(), point, create_graph=create, retain_graph=True
                )[0]
                if gradient.requires_grad
                else torch.zeros_like(point)
                for k in range(size)
            ]
        hessian = torch.stack(columns, -1)
        if not create:
            gradient, hessian = gradient.detach(), hessian.detach()
        return (gradient, hessian) if self._local else (gradient[0], hessian[0])

    def _log_joint(self, point: Tensor, *batch: Tensor) -> Tensor:
        values, start = {}, 0
        for name, shape in self._shapes.items():
            part = point[:, start : start + math.prod(shape)]
            values[name] = part.reshape((len(point), *shape) if self._local else shape)
            start += math.prod(shape)
        # Hidden from whatever runs this guide, minibatches included: it is arithmetic here.
        with poutine.block():
            trace = poutine.trace(poutine.condition(self._model[0], data=values)).get_trace(*batch)
        trace.compute_log_prob()
        terms = [node["log_prob"].sum() for _, node in stochastic_nodes(trace)]
        return torch.stack(terms).sum()

    def _check_quadratic(self, name: str, *batch: Tensor) -> None:
        model = self._model[0]
        with scratch_store(), own_parameters(model), seeded(0), torch.no_grad():
            gradient, hessian = self._expansion(torch.zeros_like, *batch)
            steps: list[Tensor] = []
            beyond, _ = self._expansion(
                lambda v: steps.append(torch.randn_like(v)) or steps[0], *batch
            )
            step = steps[0].detach() if self._local else steps[0][0].detach()
            expected = gradient + (hessian @ step.unsqueeze(-1)).squeeze(-1)
        if not torch.allclose(beyond, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"Exact: the log joint of {name} is not quadratic in {list(self._shapes)}, so its "
                "posterior is not normal. Use Amortized or Local."
            )

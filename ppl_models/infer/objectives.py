"""Objectives: what `fit` ascends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import MultiFrameTensor
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.sites import stochastic_nodes
from ppl_models.core.traces import Pair, joint_table, run_pair, vectorizes


@dataclass(frozen=True)
class ELBO:
    r"""The evidence lower bound.

    .. math::

        \mathcal{L} = \mathbb{E}_{q(z \mid x)}\left[\log p(x, z) - \log q(z \mid x)\right]
        \le \log p(x)

    Its gradient is taken by reparametrisation at every site that can be, and by score function,
    with the terms of a row as the cost of that row's choice, at every site that cannot.

    Arguments:
        particles: Draws from the guide in each evaluation.
        analytic_kl: Use the closed form of KL(q || p) at each site that has one, in place of a
            sampled one: the same mean, usually with less variance.
        vectorized: Run all particles at once, in a plate to the left of all others. False runs
            them one by one, for models that were not written for leading dimensions.
        plate_dims: Dimensions that the plates of model and guide use; found by a trace if None.

    Returns (when called):
        The surrogate, whose gradient estimates that of the bound, and the bound: scalars in nats,
        in total over the data set.

    Raises:
        ValueError: If `particles` is less than 1, or the guide does not fit the model.

    Source:
        Kingma & Welling (2014), https://arxiv.org/abs/1312.6114; Ranganath, Gerrish & Blei (2014),
        https://arxiv.org/abs/1401.0118

    Example:
        >>> import torch
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=7).detach()
        >>> _, bound = ELBO()(model, Exact(model), x)  # exact, whatever is drawn
        >>> torch.allclose(bound, model.log_evidence(x).sum(), atol=1e-4)
        True
    """

    particles: int = 1
    analytic_kl: bool = False
    vectorized: bool = True
    plate_dims: int | None = None

    def __post_init__(self) -> None:
        check_count("ELBO", "particles", self.particles)

    def prepare(self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor) -> ELBO:
        """Take, once and before the first step, every decision that needs a look at the programs.

        Raises:
            ValueError: If particles are vectorised and the programs do not carry them.
        """
        with evaluation_mode(model, guide):
            _, dims = joint_table(model, guide, *batch)
        if self.particles > 1 and self.vectorized:
            with torch.no_grad():
                carried = vectorizes(model, guide, *batch, dim=-1 - dims)
            if not carried:
                raise ValueError(
                    f"ELBO: {self.particles} particles are to run at once, but this model or guide "
                    "computes something else under a leading dimension. Write `z @ w` and the like "
                    "so that dimensions on the left are carried along, or use "
                    f"ELBO(particles={self.particles}, vectorized=False)."
                ) from _fault(model, guide, *batch, dim=-1 - dims)
        return replace(self, plate_dims=dims)

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the bound of a batch."""
        surrogate: Tensor | float = 0.0
        bound: Tensor | float = 0.0
        for pair in self._pairs(model, guide, *batch):
            one_surrogate, one_bound = _estimate(pair, analytic_kl=self.analytic_kl)
            surrogate = surrogate + one_surrogate / self.particles
            bound = bound + one_bound / self.particles
        return torch.as_tensor(surrogate), torch.as_tensor(bound)

    def _pairs(
        self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor
    ) -> Iterator[Pair]:
        if self.particles == 1 or not self.vectorized:
            for _ in range(self.particles):
                yield run_pair(model, guide, *batch)
            return
        dims = self.plate_dims
        if dims is None:
            _, dims = joint_table(model, guide, *batch)
        yield run_pair(model, guide, *batch, particles=self.particles, dim=-1 - dims)


def _is_special(fn: Any) -> bool:
    """Whether Pyro's KL leaves something out: the log_density of a Delta, or one of two masks."""
    while hasattr(fn, "base_dist") and not isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Delta | MaskedDistribution)


def _fault(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, dim: int
) -> Exception | None:
    """What the programs say under a leading dimension, if they say anything."""
    try:
        with torch.no_grad():
            run_pair(model, guide, *batch, particles=2, dim=dim)
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        return error
    return None


def _estimate(pair: Pair, *, analytic_kl: bool) -> tuple[Tensor | float, Tensor | float]:
    """Return surrogate and bound, summed over the particles of one run."""
    pair.model.compute_log_prob()
    pair.guide.compute_score_parts()
    divergences = _analytic_divergences(pair) if analytic_kl else {}
    surrogate: Tensor | float = 0.0
    costs: list[tuple[Any, Tensor]] = []
    for name, node in stochastic_nodes(pair.model):
        term = -divergences[name] if name in divergences else node["log_prob"]
        surrogate = surrogate + term.sum()
        costs.append((node["cond_indep_stack"], term.detach()))
    for name, node in stochastic_nodes(pair.guide):
        if name not in divergences:
            costs.append((node["cond_indep_stack"], -node["log_prob"].detach()))
            # log q where the draw carries its gradient; identically 0 where it does not, since
            # the score has mean zero.
            entropy = node["score_parts"].entropy_term
            if not is_identically_zero(entropy):
                surrogate = surrogate - entropy.sum()
    bound = sum((cost.sum() for _, cost in costs), start=torch.zeros(()))
    learning_signal = None
    for _, node in stochastic_nodes(pair.guide):
        score = node["score_parts"].score_function
        if is_identically_zero(score):
            continue
        # Rao-Blackwellised over plates: only terms that share the site's rows, or all rows.
        if learning_signal is None:
            learning_signal = MultiFrameTensor(*costs)
        signal = learning_signal.sum_to(node["cond_indep_stack"])
        surrogate = surrogate + (signal * score).sum()
    return surrogate, bound


def _analytic_divergences(pair: Pair) -> dict[str, Tensor]:
    """KL(q || p) at each site where it has a closed form and is a term of the bound.

    It is one if all latents that p may depend on were drawn before the site was: then it is the
    mean of log q - log p over the site's own draw, given theirs. Both must be scaled and masked
    alike.
    """
    q: dict[str, Any] = dict(stochastic_nodes(pair.guide))
    before: dict[str, set[str]] = {}
    drawn: set[str] = set()
    for name, node in q.items():
        before[name] = set(drawn)
        if not node["is_observed"]:
            drawn.add(name)
    divergences: dict[str, Tensor] = {}
    parents: set[str] = set()
    for name, node in stochastic_nodes(pair.model):
        if node["is_observed"]:
            continue
        if parents <= before[name] and _scaled_alike(q[name], node):
            mine, prior = q[name]["fn"], node["fn"]
            if _is_special(mine) or _is_special(prior):
                continue
            if mine.batch_shape != prior.batch_shape:  # a replayed site lacks outer plates
                prior = prior.expand(torch.broadcast_shapes(mine.batch_shape, prior.batch_shape))
            try:
                value = kl_divergence(mine, prior)
            except NotImplementedError:
                pass
            else:
                divergences[name] = scale_and_mask(value, node["scale"], node["mask"])
        parents.add(name)
    return divergences


def _scaled_alike(q: Any, p: Any) -> bool:
    for key in ("scale", "mask"):
        one, other = q[key], p[key]
        if one is other:
            continue
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or not torch.equal(one, other):
                return False
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return False
    return True

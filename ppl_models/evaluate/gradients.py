"""How noisy gradient estimators are."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor, nn

from ppl_models.core.batch import as_batch, check_model, check_programs
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded
from ppl_models.core.sites import base_distribution, recorded, stochastic_nodes
from ppl_models.core.store import own_parameters, unchanged_on_error
from ppl_models.core.table import text_table
from ppl_models.core.traces import check_sites, run_pair
from ppl_models.core.types import Batch
from ppl_models.infer.capture import Untraceable, capture
from ppl_models.infer.gradients import Score
from ppl_models.infer.objectives import Bound

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.figure import Figure

    from ppl_models.core.picture import Canvas

RECORDED = 50  # estimates, from which on recording one pays

By = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class GradientVariance:
    """Moments of gradient estimates, by objective and parameter: `found.variance["DisARM"]["guide.w"]`.

    Gradients are those of the bound in nats per row. Parameters are called `model.<name>` and
    `guide.<name>`; tensors have their shapes, in float64.

    Attributes:
        mean: Of the estimates.
        variance: Of a single estimate.
        se: Standard error of `mean`.
        bounds: Mean and standard error of the bound of each objective, nats per row.
        seconds: Of one estimate.
        draws: How many there were.
        biases: Of the objectives whose gradients have another mean than that of the bound: how.
    """

    mean: By
    variance: By
    se: By
    bounds: Mapping[str, tuple[float, float]]
    seconds: Mapping[str, float]
    draws: int
    biases: Mapping[str, str] = field(default_factory=dict)

    def total(self, name: str, half: str) -> float:
        """Return the variance of all parameters of the "model" or of the "guide" together."""
        parts = (v for key, v in self.variance[name].items() if key.startswith(f"{half}."))
        return sum(part.sum().item() for part in parts)

    def signal_to_noise(self, name: str, half: str) -> float:
        """Return the length of the mean gradient over the root of the summed variance.

        The noise that is left in the squared mean is taken off.
        """
        keys = [key for key in self.mean[name] if key.startswith(f"{half}.")]
        square = sum(
            (self.mean[name][k].square() - self.se[name][k].square()).sum().item() for k in keys
        )
        noise = self.total(name, half)
        if noise == 0.0:
            return math.inf if square > 0.0 else math.nan
        return math.sqrt(max(0.0, square) / noise)

    def __str__(self) -> str:
        lines = []
        for name, (bound, error) in self.bounds.items():
            cells = []
            for half in ("guide", "model"):
                has = any(key.startswith(f"{half}.") for key in self.mean[name])
                cells.append(f"{self.total(name, half):.3g}" if has else "-")
                cells.append(f"{self.signal_to_noise(name, half):.2g}" if has else "-")
            lines.append(
                (name, f"{bound:.3f} +- {error:.3f}", *cells, f"{1e3 * self.seconds[name]:.2f}")
            )
        head = (
            "objective", "bound", "guide variance", "signal/noise", "model variance",
            "signal/noise", "ms",
        )  # fmt: skip
        table = text_table(head, lines, right=" " + "r" * 6)
        return "\n".join(
            [
                table,
                f"  {self.draws} estimates each; bounds and gradients in nats per row.",
                "  Variances are summed over parameters; ms: one estimate, here.",
                *(f"  Biased: {name}: {bias}." for name, bias in self.biases.items()),
            ]
        )

    def plot(self, *, figure: Canvas | None = None) -> Figure:
        """Draw the variance of each parameter, summed over its elements, by objective.

        Arguments:
            figure: A figure or subfigure to draw into; by default a new picture, which shows itself
                in a notebook and has `savefig`.
        """
        from ppl_models.evaluate.plots import plot_gradient_variance

        return plot_gradient_variance(self, figure=figure)


def gradient_variance(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    objectives: Mapping[str, Callable[..., tuple[Tensor, Tensor]]],
    draws: int = 1000,
    seed: int | None = 0,
) -> GradientVariance:
    """Estimate a gradient over and over, with each of some objectives, at fixed parameters.

    Unbiased estimators of one bound agree in the mean, within their errors, and differ in variance;
    those with a bias show it beside the others. Estimators with a memory, such as `RunningAverage`,
    learn as they go; what others train, such as the networks of `NVIL` and the factors of `REBAR`, no
    optimiser trains here. To see them trained, give the `objective` of a `Fit`.

    Arguments:
        model: Any Pyro model.
        guide: Any Pyro guide for it.
        batch: The data; all of them are used in each estimate.
        objectives: By the names that the table gives them, such as
            `{"DisARM": ELBO(score=DisARM()), "LOO": ELBO(2, score=LeaveOneOut())}`.
        draws: Estimates of each, at least 2.
        seed: Of all draws; the global random state is left as it was. None draws from that.

    Raises:
        ValueError: If there is no objective, or one does not fit the pair; nothing has run then.

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import SigmoidBeliefNetwork
        >>> from ppl_models.infer import ELBO
        >>> from ppl_models.infer.gradients import DisARM, Reinforce
        >>> model = SigmoidBeliefNetwork(data_dim=5, latent_dims=(3,))
        >>> guide = Amortized(model, hidden=(4,))
        >>> both = {"REINFORCE": ELBO(score=Reinforce()), "DisARM": ELBO(score=DisARM())}
        >>> found = gradient_variance(model, guide, model(size=8), objectives=both, draws=50)
        >>> found.total("DisARM", "guide") < found.total("REINFORCE", "guide")
        True
    """
    check_count("gradient_variance", "draws", draws)
    if draws < 2 or not objectives:
        raise ValueError(
            "gradient_variance: at least one objective and 2 draws are required, got "
            f"{list(objectives)} and draws={draws}."
        )
    check_programs("gradient_variance", model=model, guide=guide)
    data = as_batch(batch, model, guide) if batch else ()
    size = len(data[0]) if data else 1
    found: dict[str, dict[str, dict[str, Tensor]]] = {"mean": {}, "variance": {}, "se": {}}
    bounds: dict[str, tuple[float, float]] = {}
    seconds: dict[str, float] = {}
    for name, objective in objectives.items():
        if isinstance(objective, type | PyroELBO | Score) or not callable(objective):
            raise ValueError(
                f"gradient_variance: objectives['{name}'] must be an objective of ppl_models.infer, "
                f"such as ELBO(score=DisARM()), or a function of your own, got {objective!r}."
            )
    with own_parameters(model, guide), seeded(seed), unchanged_on_error(), torch.enable_grad():
        check_model(model, data, plate="data", rows=size)
        leaves = _leaves(model, guide, data)
        ready = {
            # A copy: what it learns here is not to change what is learnt elsewhere.
            name: copy.deepcopy(o).prepare(model, guide, *data) if isinstance(o, Bound) else o
            for name, o in objectives.items()
        }
        for name, objective in ready.items():
            with seeded(None if seed is None else seed):
                moments, bounds[name], seconds[name] = _moments(
                    model, guide, data, objective, list(leaves.values()), size, draws
                )
            for kind, values in moments.items():
                found[kind][name] = dict(zip(leaves, values, strict=True))
        biases = _biases(model, guide, data, ready)
    return GradientVariance(**found, bounds=bounds, seconds=seconds, draws=draws, biases=biases)


def _biases(model: Any, guide: Any, data: Batch, objectives: Mapping[str, Any]) -> dict[str, str]:
    """Say of each objective how its gradients differ in the mean from those of the bound."""
    nodes = dict(stochastic_nodes(run_pair(model, guide, *data).guide))
    smooth = {n for n, v in nodes.items() if getattr(base_distribution(v["fn"]), "biased", False)}
    between = {
        n for n in smooth if bool(((v := nodes[n]["value"]) != 0.0).logical_and(v != 1.0).any())
    }
    found: dict[str, str] = {}
    for name, objective in objectives.items():
        # By score the draws of a straight-through family are as good as any.
        by_score = isinstance(objective, Bound) and objective.score and objective.score.everywhere
        if sites := sorted(between if by_score else smooth):
            found[name] = f"the guide's draws at {sites} carry those of a smooth version"
        found[name] = getattr(objective, "bias", None) or found.get(name, "")
    return {name: told for name, told in found.items() if told}


def _moments(
    model: Any, guide: Any, data: Batch, objective: Any, leaves: list[Tensor], size: int, draws: int
) -> tuple[dict[str, list[Tensor]], tuple[float, float], float]:
    """Return moments of each gradient, mean and error of the bound, and seconds of an estimate."""

    def evaluate(*part: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        surrogate, bound = objective(model, guide, *part)
        slopes = torch.autograd.grad(surrogate / size, leaves, allow_unused=True)
        return bound.detach() / size, list(slopes)

    def vanilla() -> tuple[Tensor, list[Tensor | None]]:
        return evaluate(*data)

    take: Callable[[], tuple[Tensor, list[Tensor | None]]] = vanilla
    if draws >= RECORDED:
        try:
            graph = capture(evaluate, leaves, *data)
        except Untraceable:
            pass
        else:

            def recorded_graph() -> tuple[Tensor, list[Tensor | None]]:
                bound, *slopes = graph(*data)
                by_leaf = dict(zip(graph.leaves, slopes, strict=True))
                return bound, [by_leaf.get(i) for i in range(len(leaves))]

            take = recorded_graph
    # Sums of differences from the first estimate: no cancellation.
    first: list[Tensor] = []
    sums = [[torch.zeros_like(v, dtype=torch.float64) for v in leaves] for _ in range(2)]
    values: list[float] = []
    start = time.perf_counter()
    for _ in range(draws):
        bound, slopes = take()
        values.append(float(bound))
        now = [
            torch.zeros_like(v, dtype=torch.float64) if s is None else s.detach().double()
            for s, v in zip(slopes, leaves, strict=True)
        ]
        first = first or now
        for total, square, new, pivot in zip(*sums, now, first, strict=True):
            total += new - pivot
            square += (new - pivot).square()
    seconds = (time.perf_counter() - start) / draws
    mean = [pivot + total / draws for pivot, total in zip(first, sums[0], strict=True)]
    variance = [
        (square - total.square() / draws).clamp(min=0.0) / (draws - 1)
        for total, square in zip(*sums, strict=True)
    ]
    se = [(v / draws).sqrt() for v in variance]
    all_bounds = torch.tensor(values, dtype=torch.float64)
    bound = (all_bounds.mean().item(), all_bounds.std().item() / math.sqrt(draws))
    return {"mean": mean, "variance": variance, "se": se}, bound, seconds


def _leaves(model: Any, guide: Any, data: Batch) -> dict[str, Tensor]:
    """Find the parameters of both, by name: those of modules, and what `pyro.param` is asked for."""
    with evaluation_mode(model, guide):
        with recorded(guide) as guided:
            guide(*data)
        with poutine.trace(param_only=True) as asked, recorded(model) as told:
            poutine.replay(model, trace=guided.trace)(*data)
    check_sites(model, told.trace, guided.trace)
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for half, program, trace in (("model", model, asked.trace), ("guide", guide, guided.trace)):
        own = dict(program.named_parameters()) if isinstance(program, nn.Module) else {}
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, node in nodes.items():
            if node["type"] != "param":
                continue
            value = node["value"].unconstrained()
            if all(value is not other for other in own.values()):
                own[name] = value
        for name, value in own.items():
            if value.requires_grad and value.is_leaf and id(value) not in known:
                known.add(id(value))
                found[f"{half}.{name}"] = value
    if not found:
        raise ValueError(
            "gradient_variance: neither model nor guide has a parameter with requires_grad=True."
        )
    return found

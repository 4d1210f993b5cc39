"""Gradient estimators on sigmoid belief networks of static MNIST, from one start, for as many steps.

As in the papers: two linear layers of 200 binary units (or one), a recognition network with one
linear layer for each of them, from the data upwards; it reads x less the mean image, and units as
-1 and 1. Output bias at the logit of the mean image. Batches of 50, Adam at 1e-3, 10,000 steps where
the papers take a million and more. For each estimator

    bound         mean training bound of the last 500 steps, nats per image: of what it ascends, so
                  those of VIMCO(5) and ReweightedWakeSleep(5) are bounds of 5 particles, and that
                  of Concrete is no bound
    NLL           by 1000 importance samples, on 1000 test images drawn at random
    variance      of the gradient by the guide's parameters, summed over them, (nats per image)^2:
                  the same batch of 50 images and the same parameters for all, those of the DisARM
                  run half way and at its end. Networks and factors that an estimator brings along
                  are trained for 500 steps there first.
    log mean      the natural logarithm of its mean over the guide's parameters
    ms            a step of `fit`, compiled, without set-up: the least of rounds that are interleaved;
                  and as a ratio to REINFORCE
    train s       the whole training; the DisARM run keeps its parameters half way, which costs a little

--curve trains two layers of 200 by the REBAR authors' setting, rate 3e-4, batch 24, one epoch after
the other, and puts the mean bound of each epoch beside the one they print, with dynamic REBAR.
There the model as well reads units as -1 and 1: the same family of distributions, which trains
faster. Theirs differs in Adam's beta2 (.99999) and in a rate ten times as high for what the estimator
brings along.

    python benchmarks/sbn.py
    python benchmarks/sbn.py --layers 200 --estimators disarm vimco
    python benchmarks/sbn.py --curve --estimators disarm rebar
    python benchmarks/sbn.py --quick                                        # a look, in minutes

Sources: https://arxiv.org/abs/1807.11143, table 2; https://arxiv.org/abs/1703.07370 and the curve at
https://github.com/tensorflow/models/tree/master/research/rebar
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor, nn

from guides import Amortized, families
from guides.base import key
from guides.families import Family
from ppl_models import SigmoidBeliefNetwork
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.core.types import Distribution
from ppl_models.data import Dataset, load
from ppl_models.evaluate import elbo, gradient_variance, log_evidence
from ppl_models.infer import ELBO, Fit, fit
from ppl_models.infer.estimators import BY_SCORE, tuned
from ppl_models.infer.objectives import Bound

TEST = 1000
LAST = 500
FIRST = 5  # steps that are not timed
PUBLISHED = {2084: -231.026, 4168: -156.868, 6252: -143.465, 8336: -137.653}
#: Objective and family of each: the family is Bernoulli unless said otherwise.
RUNS: dict[str, tuple[Bound, Family | None]] = {
    "disarm": (BY_SCORE["disarm"], None),  # the first: variances are measured along it
    **{name: (one, None) for name, one in BY_SCORE.items() if name not in ("disarm", "enumerate")},
    "straight-through": (ELBO(), families.StraightThrough()),
    "concrete": (ELBO(), families.Concrete()),
}
Pair = tuple[SigmoidBeliefNetwork, "Recognition"]


class Signed(SigmoidBeliefNetwork):
    """Reads units as -1 and 1: other numbers for the same distributions."""

    def conditional(self, level: int, above: Tensor) -> Distribution:
        """Return p(h_level | h_{level + 1})."""
        return super().conditional(level, 2.0 * above - 1.0)


class Recognition(Amortized):
    """One linear layer for each layer of units, from the one below it; the lowest reads the data.

    `Amortized(hidden=())` is linear in the data for the lowest layer only: the others read the data
    as well, through a tanh layer.
    """

    def __init__(
        self, model: SigmoidBeliefNetwork, mean: Tensor, *, family: Family | None = None
    ) -> None:
        super().__init__(model, hidden=(), family=family, mean_field=True, bottom_up=True)
        sizes = (model.data_dim, *model.latent_dims)
        for name, below in zip(self.local_sites(), sizes, strict=False):
            self.heads[key(name)] = nn.Linear(below, self.numbers(name))
        self.register_buffer("mean", mean)

    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Return the logits of a layer."""
        names = self.local_sites()
        place = names.index(site)
        below = (
            2.0 * self.flat(names[place - 1], earlier[names[place - 1]]) - 1.0
            if place
            else batch[0] - self.get_buffer("mean")
        )
        return self.heads[key(site)](below)


def start(data: Dataset, family: Family | None, options: argparse.Namespace) -> Pair:
    """Make model and guide, the same for all but for what a family changes."""
    mean = data.x.mean(0)
    with seeded(options.seed):
        network = Signed if options.curve else SigmoidBeliefNetwork
        model = network(data.x.shape[-1], options.layers)
        guide = Recognition(model, mean, family=family)
    with torch.no_grad():
        model.layers[0].net[-1].bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
    return model, guide


class Keeper:
    """Keeps the parameters half way, and the times at which steps ended."""

    def __init__(self, pair: Pair, steps: int) -> None:
        self.pair = pair
        self.middle = max(1, steps // 2)
        self.kept: dict[str, dict[str, Any]] = {}

    def __call__(self, step: int, bound: float) -> None:
        if step == self.middle:
            self.keep("middle")

    def keep(self, name: str) -> None:
        """Keep the parameters of now under a name."""
        states = (copy.deepcopy(half.state_dict()) for half in self.pair)
        self.kept[name] = dict(zip(("model", "guide"), states, strict=True))


def train(
    pair: Pair,
    data: Dataset,
    objective: Bound,
    options: argparse.Namespace,
    *,
    steps: int,
    **others: Any,
) -> Fit:
    """Train a pair, as all runs of this script do."""
    return fit(
        *pair,
        data.x,
        objective=objective,
        steps=steps,
        batch_size=options.batch,
        lr=options.lr,
        seed=options.seed,
        device=options.device,
        **others,
    )


def run(
    name: str, data: Dataset, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Train with one estimator, and measure; return the parameters on the way as well."""
    objective, family = RUNS[name]
    pair = start(data, family, options)
    keeper = Keeper(pair, options.steps)
    callbacks = [keeper] if name == next(iter(RUNS)) else []
    result = train(
        pair,
        data,
        objective,
        options,
        steps=options.steps,
        callbacks=callbacks,
        progress=name,
    )
    keeper.keep("end")
    with seeded(0):
        test = data.x_test[torch.randperm(len(data.x_test))[: options.test]]
    bound = elbo(*pair, test, particles=10, seed=1)
    evidence = log_evidence(*pair, test, particles=options.particles, seed=3)
    last = result.bounds[-min(LAST, options.steps // 2 or 1) :]
    row = {
        "estimator": name,
        "objective": repr(objective),
        "family": "Bernoulli()" if family is None else repr(family),
        "steps": result.steps,
        "train_seconds": result.seconds,
        "compiled": result.compiled,
        "bound": last.mean().item(),
        "bound_se": last.std().item() / math.sqrt(len(last)),
        "elbo": bound.mean,
        "elbo_se": bound.se,
        "evidence": evidence.mean,
        "evidence_se": evidence.se,
        "evidence_bias": evidence.bias,
        "test_rows": len(test),
        # What other test images would have given is another error, and a larger one.
        "evidence_se_of_images": _spread(evidence.rows),
        "bounds_by_500": [part.mean().item() for part in result.bounds.split(LAST)],
    }
    return row, keeper.kept


def _spread(rows: Tensor | None) -> float | None:
    return None if rows is None else rows.std().item() / math.sqrt(len(rows))


def variances(
    rows: list[dict[str, Any]],
    where: dict[str, dict[str, Any]],
    data: Dataset,
    options: argparse.Namespace,
) -> None:
    """Add the variance of each estimator's gradient at the parameters that were kept."""
    with seeded(options.seed):
        batch = data.x[torch.randperm(len(data.x))[: options.batch]]
    for place, states in where.items():
        for row in rows:
            if f"variance_{place}" in row:
                continue
            objective, family = RUNS[row["estimator"]]
            pair = start(data, family, options)
            for half, kept in zip(pair, states.values(), strict=True):
                half.load_state_dict(kept)
            if options.device is not None:
                for half in pair:
                    half.to(options.device)
            ready = tuned(
                objective, *pair, data.x, rows=options.batch, steps=options.tune, seed=options.seed
            )
            found = gradient_variance(
                *pair, batch, objectives={"it": ready}, draws=options.draws, seed=options.seed
            )
            total = found.total("it", "guide")
            count = sum(p.numel() for p in pair[1].parameters())
            row[f"variance_{place}"] = total
            row[f"log_mean_variance_{place}"] = math.log(total / count) if total else None
            row[f"signal_to_noise_{place}"] = found.signal_to_noise("it", "guide")
            row[f"model_variance_{place}"] = found.total("it", "model")
            print(f"variance {place}: {row['estimator']} {total:.3g}", flush=True)


def step_times(rows: list[dict[str, Any]], data: Dataset, options: argparse.Namespace) -> None:
    """Add the time of a compiled step, by rounds in which all estimators take their turn."""
    names = list(dict.fromkeys(["reinforce", *(row["estimator"] for row in rows)]))
    took: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            took[name].append(step_time(name, data, options))
        print(f"step times: round {turn + 1} of {options.rounds}", flush=True)
    least = {name: min(times) for name, times in took.items()}
    for row in rows:
        name = row["estimator"]
        row |= {
            "milliseconds_per_step": least[name],
            "ratio_to_reinforce": least[name] / least["reinforce"],
            "milliseconds_per_step_of_rounds": took[name],
            "ratio_to_reinforce_of_rounds": [
                one / other for one, other in zip(took[name], took["reinforce"], strict=True)
            ],
        }


def step_time(name: str, data: Dataset, options: argparse.Namespace) -> float:
    """Return milliseconds of a compiled step, those of the first steps and of set-up left out."""
    objective, family = RUNS[name]
    began: list[float] = []
    callbacks: list[Callable[[int, float], Any]] = []

    def start_the_clock(step: int, bound: float) -> None:
        if step == FIRST:
            callbacks.clear()  # from here on `fit` is as it is without callbacks
            began.append(time.perf_counter())

    callbacks.append(start_the_clock)
    steps = FIRST + options.time_steps
    pair = start(data, family, options)
    train(
        pair,
        data,
        objective,
        options,
        steps=steps,
        compile="now",
        progress=False,
        callbacks=callbacks,
    )
    return 1000 * (time.perf_counter() - began[0]) / options.time_steps


def curve(name: str, data: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Train in the setting of the published curve; return the mean bound of each epoch."""
    objective, family = RUNS[name]
    pair = start(data, family, options)
    epoch = math.ceil(len(data.x) / options.batch)  # 2084 steps of 24 images
    steps = options.steps if options.quick else 4 * epoch
    result = train(pair, data, objective, options, steps=steps, progress=f"{name}, curve")
    parts = result.bounds.split(epoch)
    return {
        "estimator": name,
        "objective": repr(objective),
        "steps": result.steps,
        "train_seconds": result.seconds,
        "compiled": result.compiled,
        "epochs": {str(epoch * (i + 1)): part.mean().item() for i, part in enumerate(parts)},
        "published": {str(step): value for step, value in PUBLISHED.items()},
        "last_500_steps": result.bounds[-LAST:].mean().item(),
    }


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far."""

    def cell(row: dict[str, Any], name: str, form: Callable[[Any], str]) -> str:
        return form(row[name]) if row.get(name) is not None else "-"

    head = (
        "estimator", "bound", "test ELBO", f"NLL, {options.particles}", "variance, half way",
        "at the end", "log mean", "ms/step", "/ REINFORCE", "train s",
    )  # fmt: skip
    lines = [
        (
            row["estimator"],
            f"{row['bound']:.2f}",
            f"{row['elbo']:.2f}",
            f"{-row['evidence']:.2f} +- {row['evidence_se']:.2f}",
            cell(row, "variance_middle", lambda v: f"{v:.3g}"),
            cell(row, "variance_end", lambda v: f"{v:.3g}"),
            cell(row, "log_mean_variance_end", lambda v: f"{v:.2f}"),
            cell(row, "milliseconds_per_step", lambda v: f"{v:.2f}"),
            cell(row, "ratio_to_reinforce", lambda v: f"{v:.2f}"),
            f"{row['train_seconds']:.0f}",
        )
        for row in rows
    ]
    table = text_table(head, lines, right=" " + "r" * (len(head) - 1))
    title = (
        f"Sigmoid belief network {'-'.join(map(str, options.layers))} on static MNIST, "
        f"{options.steps} steps of {options.batch} images, lr {options.lr:g}, nats per image"
    )
    record.write(options.name, title, table, rows)


def report_curve(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the curves that are there so far beside the published one."""
    lines = [
        (row["estimator"], *(f"{value:.2f}" for value in [*row["epochs"].values()][:4]))
        for row in rows
    ]
    lines = [line + ("-",) * (5 - len(line)) for line in lines]
    lines.append(("published (dynamic REBAR)", *(f"{value:.2f}" for value in PUBLISHED.values())))
    head = ("mean bound of the epoch up to step", *map(str, PUBLISHED))
    title = (
        f"Sigmoid belief network {'-'.join(map(str, options.layers))} on static MNIST, batches of "
        f"{options.batch}, lr {options.lr:g}: training bound, nats per image"
    )
    record.write(options.name, title, text_table(head, lines, right=" rrrr"), rows)


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    data = load("mnist", binarize="static")
    rows: list[dict[str, Any]] = []
    if options.curve:
        for name in options.estimators:
            rows.append(curve(name, data, options))
            report_curve(rows, options)
        return
    where: dict[str, dict[str, Any]] = {}
    for name in sorted(options.estimators, key=list(RUNS).index):
        row, kept = run(name, data, options)
        rows.append(row)
        where = where or (kept if name == "disarm" else {})
        if options.draws and where:
            variances(rows, where, data, options)
        report(rows, options)  # after each, so that nothing is lost
    if options.rounds:
        step_times(rows, data, options)
        report(rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--estimators", nargs="+", choices=RUNS, default=None, metavar="NAME",
        help=f"of {', '.join(RUNS)};\nby default all, and disarm for --curve. Variances need disarm.",
    )  # fmt: skip
    parser.add_argument("--layers", nargs="+", type=int, default=[200, 200], help="units of each")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, help="by default 50, and 24 for --curve")
    parser.add_argument("--lr", type=float, help="by default 1e-3, and 3e-4 for --curve")
    parser.add_argument("--curve", action="store_true", help="the published curve instead")
    parser.add_argument("--particles", type=int, default=1000, help="of the test NLL")
    parser.add_argument("--test", type=int, default=TEST, help="test images")
    parser.add_argument("--draws", type=int, default=500, help="gradients for a variance, or 0")
    parser.add_argument("--tune", type=int, default=500, help="steps before these; see above")
    parser.add_argument("--rounds", type=int, default=5, help="of step times, or 0")
    parser.add_argument("--time-steps", type=int, default=400, help="steps of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--quick", action="store_true", help="very few steps: nothing to quote")
    parser.add_argument(
        "--name", help="name of the result files, by default sbn and what was chosen"
    )
    options = parser.parse_args()
    options.batch = options.batch or (24 if options.curve else 50)
    options.lr = options.lr or (3e-4 if options.curve else 1e-3)
    if options.estimators is None:
        options.estimators = ["disarm"] if options.curve else list(RUNS)
    if options.quick:
        options.steps, options.test, options.particles = 20, 20, 20
        options.draws, options.tune, options.rounds, options.time_steps = 5, 2, 1, 20
    if options.name is None:
        layers = "" if len(options.layers) > 1 else "_one_layer"
        options.name = (
            "sbn"
            + layers
            + ("_curve" if options.curve else "")
            + ("_quick" if options.quick else "")
        )
    return options


if __name__ == "__main__":
    main()

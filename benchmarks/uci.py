"""Bayesian neural networks on regressions of the UCI repository, mean-field, in the 20 given splits.

One hidden layer of 50 ReLU units, a standard normal prior of all weights, Adam at 1e-3, batches of
32, 500 epochs; 100 draws of the weights in each step, and in predictions. Inputs and target are
standardised on the training rows, and figures are in raw units, means over splits with their
standard errors:

    NLL    minus the log predictive density of a test row, nats
    RMSE   of the predictive mean

The scale of the noise is a latent as well, log-normal(-1, 1) in units of the target's scale, with a
log-normal guide. Means start at torch's weights for linear layers, scales at 0.01: after 500 epochs
most scales are still on their way up, and a start at 0.05 ends with better bounds and worse
predictions, of test rows (`results/uci_scale_05.md`) as of a tenth of the training rows that was held
out (NLL on four splits of boston and yacht, two of energy, by 30 draws a step: 2.58, 1.42, .85 from
0.01, and 2.71, 1.99, 1.05 from 0.05). Published figures are of mean-field networks in the same splits;
"s.e." is the distance to them in joint standard errors, negative where ours is better.

    python benchmarks/uci.py
    python benchmarks/uci.py --data yacht boston --splits 5
    python benchmarks/uci.py --particles 1                     # sooner, and worse: noisy gradients
    python benchmarks/uci.py --jobs 4                          # four splits at a time
    python benchmarks/uci.py --quick                           # a look, in a minute
    python benchmarks/uci.py --nuts --data boston energy yacht # NUTS beside it, on the first split
    python benchmarks/uci.py --nuts --known-noise --data yacht # of the weights alone

With --nuts the chains start at draws of the mean-field guide. R-hat is of the network's output, a
function of the weights that does not change when units are renamed: the largest over test rows, the
median, and the share of rows below 1.05. Where the noise is next to nothing the posterior falls apart
into modes that chains do not leave; --known-noise gives NUTS the noise that mean-field found.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import pyro.distributions as dist
import record
import torch
from pyro import poutine
from torch import Tensor, nn

from guides import Local
from ppl_models import BayesianNeuralNetwork
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.core.types import Distribution
from ppl_models.data import Dataset, load
from ppl_models.evaluate import predict
from ppl_models.infer import ELBO, NUTS, Posterior, fit, sample
from ppl_models.parts.likelihoods import Homoscedastic

#: NLL, its standard error, RMSE and its standard error.
PUBLISHED = {
    "boston": (2.52, 0.03, 2.89, 0.17),
    "concrete": (3.11, 0.02, 5.42, 0.11),
    "energy": (0.77, 0.02, 0.51, 0.01),
    "wine": (0.96, 0.01, 0.63, 0.01),
    "yacht": (1.77, 0.01, 0.81, 0.05),
}


def start(data: Dataset, options: argparse.Namespace) -> tuple[BayesianNeuralNetwork, Local]:
    """Make the network and its guide."""
    assert data.y is not None
    with seeded(options.seed):
        model = network(data, options, dist.LogNormal(-1.0, 1.0))
        guide = Local(model, example=(data.x[:2], data.y[:2]))
    noise = torch.tensor(math.exp(-1.0))
    guide.start_around(model.net.starts() | {"noise_scale": noise}, scale=options.scale)
    return model, guide


def network(
    data: Dataset, options: argparse.Namespace, noise: float | Distribution
) -> BayesianNeuralNetwork:
    """Make the network."""
    features, units = data.x.shape[-1], options.hidden
    net = nn.Sequential(nn.Linear(features, units), nn.ReLU(), nn.Linear(units, 1))
    return BayesianNeuralNetwork(features, net=net, likelihood=Homoscedastic(noise))


def run(name: str, split: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure on one split."""
    torch.set_num_threads(options.threads)  # of a process of its own
    data = load(f"uci/{name}", split=split).standardized()
    assert data.y is not None
    model, guide = start(data, options)
    began = time.perf_counter()
    result = fit(
        model,
        guide,
        (data.x, data.y),
        objective=ELBO(options.particles),
        epochs=options.epochs,
        batch_size=options.batch,
        lr=options.lr,
        seed=options.seed,
        progress=False,
    )
    figures = {
        "data": name,
        "split": split,
        **measured(model, guide, data, options),
        "bound": result.bounds[-100:].mean().item(),
        "steps": result.steps,
        "compiled": result.compiled,
        "seconds": time.perf_counter() - began,
    }
    return figures | (sampled(model, guide, data, options) if options.nuts else {})


def measured(
    model: BayesianNeuralNetwork, posterior: Any, data: Dataset, options: argparse.Namespace
) -> dict[str, Any]:
    """Predict the test rows, and say how well, in raw units."""
    assert data.y_test is not None
    assert data.y_scale is not None
    found = predict(
        model, posterior, data.x_test, data.y_test, draws=options.draws, seed=options.seed
    )
    assert found.log_density is not None
    square = (found.mean - data.y_test).square().mean().item()
    return {
        # The density of the raw target is that of the standardised one, over its scale.
        "nll": math.log(data.y_scale) - found.log_density.mean,
        "nll_se": found.log_density.se,
        "rmse": math.sqrt(square) * data.y_scale,
        "noise_scale": found.aleatoric.mean().item() * data.y_scale,
        "epistemic": found.epistemic.mean().item() * data.y_scale,
    }


def sampled(
    model: BayesianNeuralNetwork, guide: Local, data: Dataset, options: argparse.Namespace
) -> dict[str, Any]:
    """Sample the same posterior, started at the guide, and measure as before."""
    if options.known_noise:
        found = predict(model, guide, data.x_test[:1], draws=1000, seed=options.seed)
        model = network(data, options, found.aleatoric.mean().item())
    posterior = sample(
        model,
        data.x,
        data.y,
        sampler=NUTS(max_depth=options.depth, float32=options.float32),
        init=guide,
        chains=options.chains,
        draws=options.nuts_draws,
        warmup=options.warmup,
        seed=options.seed,
        progress=options.progress,
    )
    figures = measured(model, posterior, data, options)
    assert posterior.leapfrogs is not None
    rhat = outputs(model, posterior, data.x_test).rhat()["outputs"]
    return {f"nuts_{key}": value for key, value in figures.items()} | {
        "nuts_rhat": rhat.max().item(),
        "nuts_rhat_median": rhat.median().item(),
        "nuts_rhat_good": (rhat < 1.05).double().mean().item(),
        "nuts_rhat_weights": max(value.max().item() for value in posterior.rhat().values()),
        "nuts_divergences": int(posterior.divergences.sum()),
        "nuts_leapfrogs": posterior.leapfrogs.double().mean().item(),
        "nuts_compiled": posterior.compiled,
        "nuts_seconds": posterior.seconds,
    }


def outputs(model: BayesianNeuralNetwork, posterior: Posterior, x: Tensor) -> Posterior:
    """Return what the network puts out for each row in each draw, shape (chains, draws, rows)."""
    rows = []
    for chain in range(posterior.chains):
        # A network for each draw; the 1 stands for the rows, which share it.
        weights = {site: posterior[site][chain].unsqueeze(1) for site in model.net.starts()}
        with torch.no_grad(), poutine.condition(data=weights):
            rows.append(model.net(x.to(next(iter(weights.values())))).squeeze(-1))
    return Posterior({"outputs": torch.stack(rows)})


def summary(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Return the mean over splits, and its standard error."""
    values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), se


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far, beside what is published."""
    title = (
        f"Bayesian neural networks on UCI regressions: mean-field, {options.hidden} units, "
        f"{options.epochs} epochs, {options.particles} draws a step, lr {options.lr:g}, raw units"
    )
    if options.nuts:
        title += f"; NUTS, {options.chains} chains of {options.nuts_draws} after {options.warmup}"
    table = beside_nuts(rows, options) if options.nuts else beside_published(rows)
    record.write(options.name, title, table, rows)


def beside_published(rows: list[dict[str, Any]]) -> str:
    """Lay out means over splits, and how far they are from the published ones in joint errors."""
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of = [row for row in rows if row["data"] == name]
        line = [name, str(len(of))]
        for key, there, error in zip(
            ("nll", "rmse"), PUBLISHED[name][::2], PUBLISHED[name][1::2], strict=True
        ):
            mean, se = summary(of, key)
            line += [
                f"{mean:.3f} +- {se:.3f}",
                f"{there:.2f} +- {error:.2f}",
                f"{(mean - there) / math.hypot(se, error):+.1f}",
            ]
        lines.append((*line, f"{summary(of, 'seconds')[0]:.1f}"))
    head = ("data", "splits", "NLL", "published", "s.e.", "RMSE", "published", "s.e.", "s a split")
    return text_table(head, lines, right=" rrrrrrrr")


def beside_nuts(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Lay out both posteriors of each split."""
    head = ("data", "split", "posterior", "NLL", "RMSE", "R-hat", "median", "below 1.05")
    head += ("of weights", "leapfrogs", "s")
    lines = []
    for row in rows:
        start = (row["data"], str(row["split"]))
        lines.append(
            (
                *start,
                "mean-field",
                f"{row['nll']:.3f}",
                f"{row['rmse']:.3f}",
                *("",) * 5,
                f"{row['seconds']:.0f}",
            )
        )
        lines.append(
            (
                *start,
                "NUTS, known noise" if options.known_noise else "NUTS",
                f"{row['nuts_nll']:.3f}",
                f"{row['nuts_rmse']:.3f}",
                f"{row['nuts_rhat']:.3f}",
                f"{row['nuts_rhat_median']:.3f}",
                f"{row['nuts_rhat_good']:.0%}",
                f"{row['nuts_rhat_weights']:.2f}",
                f"{row['nuts_leapfrogs']:.0f}",
                f"{row['nuts_seconds']:.0f}",
            )
        )
    return text_table(head, lines, right="   rrrrrrrr")


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for name in options.data:
            work = partial(run, name, options=options)
            for row in pool.map(work, range(options.splits)):
                rows.append(row)
                print("{data} {split}: NLL {nll:.3f}, RMSE {rmse:.3f}".format(**row), flush=True)
                if options.nuts:
                    told = "  NUTS: NLL {nuts_nll:.3f}, RMSE {nuts_rmse:.3f}, R-hat {nuts_rhat:.3f}"
                    print(told.format(**row), flush=True)
            report(rows, options)  # after each data set, so that nothing is lost


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--splits", type=int, help="the first of the 20; by default all, or 1")
    parser.add_argument("--hidden", type=int, default=50, help="units of the hidden layer")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--particles", type=int, default=100, help="draws a step")
    parser.add_argument("--scale", type=float, default=0.01, help="of the guide at the start")
    parser.add_argument("--draws", type=int, default=100, help="of the predictions")
    parser.add_argument("--nuts", action="store_true", help="NUTS as well, from the guide")
    parser.add_argument("--chains", type=int, default=4, help="of NUTS")
    parser.add_argument("--nuts-draws", type=int, default=500, help="of each chain")
    parser.add_argument("--warmup", type=int, default=500, help="transitions before them")
    parser.add_argument("--depth", type=int, default=8, help="doublings of a trajectory, at most")
    parser.add_argument(
        "--known-noise",
        action="store_true",
        help="NUTS of the weights alone, at the noise that mean-field found",
    )
    parser.add_argument("--float32", action="store_true", help="NUTS in single precision")
    parser.add_argument("--progress", action="store_true", help="a bar for NUTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="splits at a time, one process each")
    parser.add_argument("--quick", action="store_true", help="few epochs: nothing to quote")
    parser.add_argument("--name", help="name of the result files, by default uci")
    options = parser.parse_args()
    if options.quick:
        options.splits, options.epochs = 1, 10
    options.splits = options.splits or (1 if options.nuts else 20)
    name = "uci_nuts" if options.nuts else "uci"
    options.name = options.name or (f"{name}_quick" if options.quick else name)
    return options


if __name__ == "__main__":
    main()

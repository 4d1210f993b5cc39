"""Iterative inference against amortised inference: what a network for the posterior buys.

A VAE with 20 latents and one tanh layer of 200 units, on the first N images of static MNIST. Two ways to
train it, each for the same seconds:

    amortised    SVI in batches of 100: a network of 200 units reads an image and says what its latents are
    iterative    variational EM: ten gradient steps on the bound for the latents of each of the N
                 images, then one for the parameters, and again

An epoch is one pass over all N images: of the iterative algorithm, one such round. The bounds are by 100
draws, of up to 1000 training images and of 1000 test images drawn at random. The iterative algorithm has
no answer for a new image: it has to go through 500 steps for it (1000 change the bound by as much as
the column says). Milliseconds of a new image are by all 1000 at once, of the parameters of its posterior; of
the network, the median of several passes.

The gap is what the network loses: the bound of the same family with parameters of its own for each
image, started at the network and refined, less that of the network, the model the same. Errors are those
of the mean over the images drawn.

    python benchmarks/amortisation.py
    python benchmarks/amortisation.py --rows 100 1000 --seconds 5     # a look, in two minutes

Sources: Kingma & Welling (2014), https://arxiv.org/abs/1312.6114; Cremer, Li & Duvenaud (2018),
https://arxiv.org/abs/1801.03558
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

from guides import Amortized, Local
from ppl_models import VAE
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.data import load
from ppl_models.evaluate import elbo
from ppl_models.infer import VariationalE, expectation_maximization, fit

TEST = 1000
STEPS = 500  # of a refinement
INNER = 10  # gradient steps for the latents in a round


def start(x: Tensor, seed: int) -> VAE:
    """Make the model, its output bias at the logit of the mean image."""
    with seeded(seed):
        model = VAE(data_dim=x.shape[-1], latent_dim=20, hidden=(200,))
    with torch.no_grad():
        model.decoder.net[-1].bias.copy_(x.mean(0).clamp(1e-3, 1 - 1e-3).logit())
    return model


def until(seconds: float) -> Callable[[int, float], bool]:
    """Return a callback that ends the training after so many seconds, set-up left out."""
    began: list[float] = []

    def over(step: int, bound: float) -> bool:
        began.append(time.perf_counter()) if not began else None
        return time.perf_counter() - began[0] >= seconds

    return over


def amortised(x: Tensor, test: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train with a network, and measure: it, and what it loses."""
    model = start(x, options.seed)
    with seeded(options.seed):
        guide = Amortized(model, hidden=(200,))
    batch = min(100, len(x))
    result = fit(
        model,
        guide,
        x,
        epochs=10**6,
        batch_size=batch,
        lr=1e-3,
        seed=options.seed,
        callbacks=[until(options.seconds)],
        progress=f"amortised, {len(x)} rows",
    )
    epochs = result.steps * batch / len(x)
    passes = []
    for _ in range(20):
        began = time.perf_counter()
        with torch.no_grad():
            guide.parameters_of("z", test)
        passes.append(time.perf_counter() - began)
    local = guide.local(test).refine(test, steps=STEPS, lr=0.01, seed=1, progress=False)
    bound, refined = (elbo(model, q, test, particles=100, seed=2) for q in (guide, local))
    assert refined.rows is not None
    assert bound.rows is not None
    gap = refined.rows - bound.rows
    mine = known(x)
    return {
        "method": "amortised",
        "rows": len(x),
        "epochs": epochs,
        "seconds": result.seconds,
        "epoch_seconds": result.seconds / epochs,
        "train": elbo(model, guide, mine, particles=100, seed=2).mean,
        "test": bound.mean,
        "new_row_ms": 1000.0 * statistics.median(passes) / len(test),
        "gap": gap.mean().item(),
        "gap_se": gap.std().item() / math.sqrt(len(gap)),
        "compiled": result.compiled,
    }


def iterative(x: Tensor, test: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train by variational EM, and measure."""
    model = start(x, options.seed)
    guide = Local(model, rows=len(x))
    ends = until(options.seconds)
    ends(0, 0.0)
    result = expectation_maximization(
        model,
        x,
        VariationalE(guide, steps=INNER, lr=0.05, draws=1),
        iterations=10**6,
        steps=1,
        lr=1e-3,
        seed=options.seed,
        callbacks=[ends],
        progress=f"iterative, {len(x)} rows",
    )
    mine = known(x)
    began = time.perf_counter()
    new = guide.refine(test, steps=STEPS, seed=1, progress=False)
    seconds = time.perf_counter() - began
    longer = guide.refine(test, steps=2 * STEPS, seed=1, progress=False)
    old = guide if len(x) == len(mine) else guide.refine(mine, steps=STEPS, progress=False)
    bound = elbo(model, new, test, particles=100, seed=2)
    return {
        "method": "iterative",
        "rows": len(x),
        "epochs": float(result.iterations),
        "seconds": result.seconds,
        "epoch_seconds": result.seconds / result.iterations,
        "train": elbo(model, old, mine, particles=100, seed=2).mean,
        "test": bound.mean,
        "new_row_ms": 1000.0 * seconds / len(test),
        "longer": elbo(model, longer, test, particles=100, seed=2).mean - bound.mean,
    }


def known(x: Tensor) -> Tensor:
    """Return the training rows that the bound is measured on."""
    return x[:TEST]


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far."""
    lines = []
    for row in rows:
        partner = [
            one["new_row_ms"]
            for one in rows
            if one["rows"] == row["rows"] and one["method"] == "amortised"
        ]
        other = row["method"] == "iterative"
        lines.append(
            (
                f"{row['rows']:,}",
                row["method"],
                f"{row['epoch_seconds']:.2f}",
                f"{row['epochs']:.1f}",
                f"{row['train']:.1f}",
                f"{row['test']:.1f}",
                f"{row['new_row_ms']:.4f}",
                f"{row['new_row_ms'] / partner[0]:,.0f}" if other else "1",
                "" if other else f"{row['gap']:.2f} +- {row['gap_se']:.2f}",
                f"{row['longer']:+.2f}" if other else "",
            )
        )
    head = ("N", "inference", "s an epoch", "epochs", "bound", "test bound", "ms a new row")
    head += ("ratio", "gap of the network", "by 1000 steps")
    title = f"Iterative against amortised inference, static MNIST, {options.seconds:g} s each"
    record.write(options.name, title, text_table(head, lines, right="r rrrrrrrr"), rows)


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    data = load("mnist", binarize="static")
    assert isinstance(data.x, Tensor)
    assert data.x_valid is not None
    x = torch.cat([data.x, data.x_valid])  # the 60,000 of MNIST
    with seeded(0):  # the first rows of the static file are no fair sample
        x = x[torch.randperm(len(x))]
        test = data.x_test[torch.randperm(len(data.x_test))[:TEST]]
    found: list[dict[str, Any]] = []
    for rows in options.rows:
        for method in (amortised, iterative):
            found.append(method(x[:rows].clone(), test, options))
            report(found, options)  # after each, so that nothing is lost


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 1000, 10_000, 60_000])
    parser.add_argument("--seconds", type=float, default=40.0, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="amortisation", help="name of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()

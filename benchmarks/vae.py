"""The 1-layer VAE of Burda, Grosse & Salakhutdinov (2016) in its cheap form, on binary MNIST.

784-200-200-z50, tanh, mirrored; output bias at the logit of the mean image; batch 100; Adam at
1e-3 with eps 1e-4; 20 epochs rather than 3280. NLL and bounds on 1000 test images drawn at random:
the first ones are no fair sample, as the static file has its rows in an order of its own. The
published rows (k = 1: 86.76, k = 5: 86.47 by L5000 on dynamic MNIST, all test images) are for the
full training: a cheap run lies above them. Dynamic and static MNIST are two data sets: rows of one
are not compared with rows of the other.

    python benchmarks/vae.py
    python benchmarks/vae.py --epochs 1 --particles 100 --data dynamic     # a look, in a minute

Source: https://arxiv.org/abs/1509.00519, section 5 and table 1.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import record
import torch

from guides import Amortized
from ppl_models import VAE
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.data import Dataset, Dynamic, load
from ppl_models.evaluate import active_units, elbo, iwae_bound, log_evidence
from ppl_models.infer import ELBO, fit

TEST = 1000


def burda(data: Dataset, seed: int) -> tuple[VAE, Amortized]:
    """Make model and guide, the output bias at the logit of the mean image."""
    with seeded(seed):
        model = VAE(data_dim=784, latent_dim=50, hidden=(200, 200))
        guide = Amortized(model, hidden=(200, 200))
    grey = data.x.probabilities if isinstance(data.x, Dynamic) else data.x
    with torch.no_grad():
        model.decoder.net[-1].bias.copy_(grey.mean(0).clamp(1e-3, 1 - 1e-3).logit())
    return model, guide


def run(data: Dataset, k: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once, and measure on the test images."""
    model, guide = burda(data, options.seed)
    result = fit(
        model,
        guide,
        data.x,
        objective=ELBO(particles=k),
        epochs=options.epochs,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, eps=1e-4),
        lr=1e-3,
        seed=options.seed,
        device=options.device,
        progress=f"{data.binarize}, k={k}",
    )
    with seeded(0):
        test = data.x_test[torch.randperm(len(data.x_test))[:TEST]]
    bound = elbo(model, guide, test, particles=100, seed=1)
    hundred = iwae_bound(model, guide, test, particles=100, seed=2)
    evidence = log_evidence(model, guide, test, particles=options.particles, seed=3)
    active, units = active_units(model, guide, test, seed=4)
    return {
        "data": data.binarize,
        "k": k,
        "steps": result.steps,
        "train_seconds": result.seconds,
        "milliseconds_per_step": 1000 * result.seconds / result.steps,
        "compiled": result.compiled,
        "last_epoch_bound": result.bounds[-(result.steps // options.epochs) :].mean().item(),
        "elbo": bound.mean,
        "elbo_se": bound.se,
        "l100": hundred.mean,
        "l100_se": hundred.se,
        "evidence": evidence.mean,
        "evidence_se": evidence.se,
        "evidence_bias": evidence.bias,
        "active": active,
        "units": units,
    }


def main() -> None:
    """Run what was asked for, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data", nargs="+", default=["dynamic", "static"])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="vae", help="name of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for how in options.data:
        data = load("mnist", binarize=how)
        for k in options.k:
            rows.append(run(data, k, options))
            report(rows, options)  # after each, so that nothing is lost


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far."""
    table = text_table(
        ("MNIST", "k", "train s", "ms/step", "-ELBO", "-L100", f"-L{options.particles}", "active"),
        [
            (
                row["data"],
                str(row["k"]),
                f"{row['train_seconds']:.0f}",
                f"{row['milliseconds_per_step']:.1f}",
                f"{-row['elbo']:.2f} +- {row['elbo_se']:.2f}",
                f"{-row['l100']:.2f} +- {row['l100_se']:.2f}",
                f"{-row['evidence']:.2f} +- {row['evidence_se']:.2f}",
                f"{row['active']}/{row['units']}",
            )
            for row in rows
        ],
        right=" rrrrrrr",
    )
    title = f"1-layer VAE on binary MNIST, {options.epochs} epochs, nats per test image"
    record.write(options.name, title, table, rows)


if __name__ == "__main__":
    main()

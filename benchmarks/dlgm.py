"""Deep latent Gaussian models on static MNIST: do two layers of latents beat one?

All have tanh networks of the same width between what is drawn, an output bias at the logit of the
mean image, batches of 100, Adam at 1e-3 (eps 1e-4), and a warm-up: the terms of latents rise to full
weight in the first tenth of the steps. One layer is trained twice, for as many steps as the others
and for as many seconds as the slowest of them. Scores are on 1000 test images drawn at random, means
over seeds with their standard errors:

    -ELBO    minus the bound by 100 draws, nats
    -L1000   minus the importance-weighted bound, an estimate of -log p(x), nats
    nats     KL of each layer's posterior from its conditional prior: what it is told of an image

    python benchmarks/dlgm.py
    python benchmarks/dlgm.py --epochs 2 --seeds 1     # a look, in a minute
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import record
import torch
from pyro import poutine
from torch import Tensor

from guides import Amortized, Ladder
from ppl_models import DeepLatentGaussian
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.data import load
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.infer import ELBO, fit

TEST = 1000
WARM_UP = 0.1  # of all steps

Guide = Callable[[DeepLatentGaussian], Any]


def pair(
    layers: tuple[int, ...], guide: Guide, mean: Tensor, options: argparse.Namespace, seed: int
) -> tuple[DeepLatentGaussian, Any]:
    """Make a model and its guide."""
    with seeded(seed):
        model = DeepLatentGaussian(784, layers, hidden=(options.hidden,) * 2)
        made = guide(model)
    lowest: Any = model.layers[0]
    with torch.no_grad():
        lowest.net[-1].bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
    return model, made


def run(
    layers: tuple[int, ...],
    guide: Guide,
    x: Tensor,
    test: Tensor,
    options: argparse.Namespace,
    *,
    epochs: int,
    seed: int,
    label: str,
) -> dict[str, Any]:
    """Train once, and measure on the test images."""
    model, made = pair(layers, guide, x.mean(0), options, seed)
    weight = torch.tensor(0.0)
    steps = WARM_UP * epochs * math.ceil(len(x) / options.batch)

    def rise(step: int, bound: float) -> None:
        weight.fill_(min(1.0, step / steps))

    result = fit(
        model,
        made,
        x,
        objective=ELBO(kl_weight=weight),
        epochs=epochs,
        batch_size=options.batch,
        optimizer=partial(torch.optim.Adam, eps=1e-4),
        lr=1e-3,
        seed=seed,
        callbacks=[rise],
        progress=f"{label}, seed {seed}",
    )
    bound = elbo(model, made, test, particles=100, seed=1)
    evidence = log_evidence(model, made, test, particles=options.particles, seed=2)
    return {
        "label": label,
        "layers": list(layers),
        "seed": seed,
        "epochs": epochs,
        "steps": result.steps,
        "seconds": result.seconds,
        "compiled": result.compiled,
        "elbo": bound.mean,
        "elbo_se": bound.se,
        "evidence": evidence.mean,
        "evidence_se": evidence.se,
        "evidence_bias": evidence.bias,
        "nats": nats_by_layer(model, made, test),
    }


def nats_by_layer(model: DeepLatentGaussian, guide: Any, x: Tensor, draws: int = 20) -> list[float]:
    """Return the mean over rows of log q - log p of each layer."""
    names = [f"z{level + 1}" for level in range(len(model.latent_dims))]
    totals = dict.fromkeys(names, 0.0)
    with seeded(3), torch.no_grad():
        for _ in range(draws):
            guided: Any = poutine.trace(guide).get_trace(x)
            told: Any = poutine.trace(poutine.replay(model, trace=guided)).get_trace(x)
            guided.compute_log_prob()
            told.compute_log_prob()
            for name in names:
                gap = guided.nodes[name]["log_prob"] - told.nodes[name]["log_prob"]
                totals[name] += gap.mean().item() / draws
    return list(totals.values())


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    data = load("mnist", binarize="static")
    assert isinstance(data.x, Tensor)
    with seeded(0):  # the first rows of the static file are no fair sample
        test = data.x_test[torch.randperm(len(data.x_test))[:TEST]]
    units = (options.hidden,) * 2
    one = tuple(options.layers[:1])
    two = tuple(options.layers)
    cases: dict[str, tuple[tuple[int, ...], Guide]] = {
        "one layer": (one, lambda model: Amortized(model, hidden=units)),
        "two, bottom up": (two, lambda model: Amortized(model, hidden=units, bottom_up=True)),
        "two, ladder": (two, lambda model: Ladder(model, hidden=units)),
    }
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        mine: list[dict[str, Any]] = []
        work = partial(run, x=data.x, test=test, options=options, seed=seed)
        for label, (layers, guide) in cases.items():
            mine.append(work(layers, guide, epochs=options.epochs, label=label))
        longest = max(row["seconds"] for row in mine)
        epochs = max(options.epochs, round(options.epochs * longest / mine[0]["seconds"]))
        layers, guide = cases["one layer"]
        mine.append(work(layers, guide, epochs=epochs, label="one layer, as many seconds"))
        rows += mine
        report(rows, options)  # after each, so that nothing is lost


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far."""
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of = [row for row in rows if row["label"] == label]
        nats = torch.tensor([row["nats"] for row in of]).mean(0).tolist()
        lines.append(
            (
                label,
                "-".join(str(units) for units in of[0]["layers"]),
                str(len(of)),
                f"{mean(of, 'epochs'):.0f}",
                f"{mean(of, 'seconds'):.0f}",
                spread(of, "elbo"),
                spread(of, "evidence"),
                ", ".join(f"{value:.1f}" for value in nats),
            )
        )
    head = ("latents", "units", "seeds", "epochs", "s")
    head += ("-ELBO", f"-L{options.particles}", "nats, lowest first")
    title = f"Deep latent Gaussian models on static MNIST, {options.epochs} epochs, nats per image"
    record.write(options.name, title, text_table(head, lines, right="  rrrrrr"), rows)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Return the mean over seeds."""
    return sum(row[key] for row in rows) / len(rows)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Write minus the mean over seeds, with its error; with one seed, that of the rows."""
    values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    one = rows[0][f"{key}_se"]
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else one
    return f"{-values.mean().item():.2f} +- {error:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", nargs=2, type=int, default=[50, 20], help="units of latents")
    parser.add_argument("--hidden", type=int, default=200, help="units of each of two tanh layers")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="dlgm", help="name of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Deep exponential families on faces, by path and by score, and on texts, with one layer and two.

Faces: 320 of Olivetti, integer pixels 64 x 64, layers 100, 40, 15 of the sparse gamma family:
w ~ Gamma(.1, rate .3), top z ~ Gamma(.1, .1), lower z ~ Gamma(.1, .1 / (z above . w)), x ~ Poisson.
A mean-field guide with free parameters, all rows in each step, Adam, whose rate falls to 0 by a cosine
over all steps. Starts are those of `guides.deep_exponential_family.start_near`, but for runs called
"blind". ELBO in nats in total, by 20 draws in double precision, after 500 steps and at the end, beside
those published for RSVI (-7.67e6 at 500 iterations, -7.04e6 at 2000) and for BBVI by score alone
(about -1.36e7 after ten hours).

    path gamma        ELBO(), gamma guide, implicit gradients
    path log-normal   ELBO(), log-normal guide
    blind             path gamma from the guide's own start, which knows nothing of the data
    score average     ELBO(score=RunningAverage(everywhere=True)), gamma guide: by score, terms that
                      cannot depend on a draw left out, less the mean cost of earlier steps
    score loo         ELBO(4, score=LeaveOneOut(everywhere=True)), gamma guide

Texts: document-completion perplexity of test documents, by 50 draws: half of the words of each for its
latents, the other half scored. The sparse gamma family, gamma guides with free parameters for each
document, refined for those of the test: 20 units next to the words and 8 above them for reuters, 50 and 15
for newsgroups, of which the first 1000 documents train and the first 500 test. All documents in each
step. The unigram adds 1 to the count of each word.

    python benchmarks/deep_exponential_family.py
    python benchmarks/deep_exponential_family.py --faces "path gamma" "score loo" --texts
    python benchmarks/deep_exponential_family.py --quick                    # a look, in two minutes

Sources: Naesseth et al. (2017), https://arxiv.org/abs/1610.05683, figure 3 and section 6.2; Ranganath et
al. (2015), https://arxiv.org/abs/1411.2581
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from typing import Any

import record
import torch
from torch import Tensor

from guides import Local, families
from guides.deep_exponential_family import start_near
from ppl_models import DeepExponentialFamily
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.data import load
from ppl_models.evaluate import elbo, halves, perplexity, unigram_perplexity
from ppl_models.infer import ELBO, Fit, fit
from ppl_models.infer.gradients import LeaveOneOut, RunningAverage

MIDDLE = 500
PUBLISHED = {500: -7.67e6, 2000: -7.04e6}
BY_SCORE = -1.36e7
#: Objective, family, learning rate, and whether the start is near the data.
FACES: dict[str, tuple[Any, families.Family, float, bool]] = {
    "path gamma": (ELBO(), families.Gamma(), 0.1, True),
    "path log-normal": (ELBO(), families.Normal(), 0.05, True),
    "blind": (ELBO(), families.Gamma(), 0.1, False),
    "score average": (ELBO(score=RunningAverage(everywhere=True)), families.Gamma(), 0.01, True),
    "score loo": (ELBO(4, score=LeaveOneOut(everywhere=True)), families.Gamma(), 0.01, True),
}
#: Units of each layer: with more, the prior of so many weights smooths 316 documents away.
LAYERS = {
    "reuters": {"one layer": (20,), "two layers": (20, 8)},
    "newsgroups": {"one layer": (50,), "two layers": (50, 15)},
}


def train(pair: tuple[Any, Any], x: Tensor, steps: int, lr: float, **options: Any) -> Fit:
    """Train with a rate that falls to 0."""
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    return fit(*pair, x, steps=steps, lr=lr, schedule=schedule, **options)


def everywhere(model: DeepExponentialFamily, family: families.Family) -> dict[str, families.Family]:
    """Give one family to all latents, weights too."""
    sites = [f"{kind}{n}" for kind, first in (("w", 0), ("z", 1)) for n in
             range(first, first + len(model.latent_dims))]  # fmt: skip
    return dict.fromkeys(sites, family)


def faces(name: str, x: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train on faces, and score half way and at the end."""
    objective, family, lr, near = FACES[name]
    with seeded(options.seed):
        model = DeepExponentialFamily(x.shape[1], options.layers)
        guide = Local(model, rows=len(x), family=everywhere(model, family))
    if near:
        start_near(guide, x, seed=options.seed)
    middle = min(MIDDLE, options.steps)
    states = {0: copy.deepcopy(guide.state_dict())}

    def keep(step: int, bound: float) -> None:
        if step in (middle, options.steps):
            states[step] = copy.deepcopy(guide.state_dict())

    result = train(
        (model, guide), x, options.steps, lr,
        objective=objective, batch_size=len(x), seed=options.seed, callbacks=[keep], progress=name,
    )  # fmt: skip
    least = least_concentration(guide)
    model.double()
    guide.double()
    row: dict[str, Any] = {
        "run": name, "objective": repr(objective), "family": repr(family), "lr": lr,
        "steps": result.steps, "train_seconds": result.seconds, "compiled": result.compiled,
        "least_concentration": least,
    }  # fmt: skip
    for step, state in states.items():
        guide.load_state_dict(state)
        bound = elbo(model, guide, x.double(), particles=options.particles, seed=1)
        row[f"elbo_{step}"], row[f"elbo_se_{step}"] = bound.mean * len(x), bound.se * len(x)
    print(row, flush=True)
    return row


def text(data: str, layers: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train on documents, and score words of others."""
    loaded = load(data)
    assert isinstance(loaded.x, Tensor)
    x = loaded.x[: options.train]
    first, second = loaded.halves or halves(loaded.x_test, seed=0)
    first, second = first[: options.documents], second[: options.documents]
    with seeded(options.seed):
        model = DeepExponentialFamily(x.shape[1], LAYERS[data][layers])
        family = everywhere(model, families.Gamma())
        guide = Local(model, rows=len(x), family=family)
    start_near(guide, x, seed=options.seed)
    lr = 0.05
    result = train(
        (model, guide), x, options.text_steps, lr,
        batch_size=len(x), seed=options.seed, progress=f"{data}, {layers}",
    )  # fmt: skip
    found = perplexity(model, guide, first, second, draws=50, seed=1, steps=300)
    words = model.top_words(loaded.vocabulary or (), 8, weights=guide.q("w0").mean)
    row = {
        "data": data, "layers": layers, "units": LAYERS[data][layers], "train_documents": len(x),
        "lr": lr, "steps": result.steps, "train_seconds": result.seconds,
        "bound": result.bounds[-20:].mean().item(), "perplexity": found.value,
        "perplexity_se": found.se, "words": found.words, "documents": found.documents,
        "unigram": unigram_perplexity(x, second), "top_words": words,
    }  # fmt: skip
    print({key: value for key, value in row.items() if key != "top_words"}, flush=True)
    return row


def least_concentration(guide: Local) -> float | None:
    """Return the least concentration of gamma variables: below .05 single precision may deceive."""
    tables = [*guide.global_parameters.values(), *guide.row_parameters.values()]
    own = [f for f in guide.families.values() if isinstance(f, families.Gamma)]
    if not own:
        return None
    logs = (table.detach().chunk(2, -1)[0].min().item() for table in tables)
    return own[0].min_concentration + math.exp(min(logs))


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write both tables on one page."""
    blocks, steps = [], options.steps
    middle = min(MIDDLE, steps)
    if faced := [row for row in rows if "run" in row]:
        lines = [
            (
                row["run"], f"{row['lr']:g}",
                *(f"{row[f'elbo_{n}']:.4g}" for n in (0, middle, steps)),
                f"{row['train_seconds']:.0f}",
            )
            for row in faced
        ]  # fmt: skip
        published = [f"{PUBLISHED[n]:.3g}" if n in PUBLISHED else "" for n in (middle, steps)]
        lines.append(("published, RSVI", "", "", *published, ""))
        lines.append(("published, by score, ten hours", "", "", "", f"{BY_SCORE:.3g}", ""))
        head = ("faces: ELBO, nats in total", "lr", "start", f"{middle} steps", f"{steps} steps",
                "train s")  # fmt: skip
        blocks.append(text_table(head, lines, right=" " + "r" * 5))
        ends = {row["run"]: row[f"elbo_{steps}"] for row in faced}
        if {"path gamma", "score average"} <= set(ends):
            ratio = ends["score average"] / ends["path gamma"]
            blocks.append(f"  by score / by path at the end, of the same guide: {ratio:.2f}")
    if written := [row for row in rows if "data" in row]:
        lines = [
            (
                row["data"], row["layers"], f"{row['perplexity']:.0f} +- {row['perplexity_se']:.0f}",
                f"{row['unigram']:.0f}", f"{row['documents']:,}", f"{row['words']:,}",
                f"{row['steps']}", f"{row['train_seconds']:.0f}",
            )
            for row in written
        ]  # fmt: skip
        head = ("texts", "", "perplexity", "unigram", "documents", "words", "steps", "train s")
        blocks.append(text_table(head, lines, right="  " + "r" * 6))
        blocks += [
            f"  {row['data']}, {row['layers']}: " + "; ".join(" ".join(w[:5]) for w in row["top_words"][:6])
            for row in written
        ]  # fmt: skip
    title = "Deep exponential families on faces and texts"
    record.write(options.name, title, "\n\n".join(blocks), rows)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faces", nargs="*", choices=FACES, help="runs on faces",
        default=["path gamma", "path log-normal", "score average"],
    )  # fmt: skip
    texts = ["reuters", "newsgroups"]
    parser.add_argument("--texts", nargs="*", choices=texts, default=texts, help="data sets")
    parser.add_argument("--steps", type=int, default=2000, help="on faces")
    parser.add_argument("--text-steps", type=int, default=600, help="on texts")
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 40, 15], help="on faces")
    parser.add_argument("--train", type=int, default=1000, help="training documents, at most")
    parser.add_argument("--documents", type=int, default=500, help="test documents, at most")
    parser.add_argument("--particles", type=int, default=20, help="draws for the final bounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="deep_exponential_family", help="of the results")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.steps, options.text_steps, options.documents = 40, 40, 50
        options.particles, options.name = 2, "deep_exponential_family_quick"
    rows: list[dict[str, Any]] = []
    if options.faces:
        pixels = (load("olivetti").x * 255).round()
        rows += [faces(name, pixels, options) for name in options.faces]
    rows += [text(data, layers, options) for data in options.texts for layers in LAYERS[data]]
    report(rows, options)


if __name__ == "__main__":
    main()

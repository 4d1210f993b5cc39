"""Ten posteriors of posteriordb: moments of `sample` beside the reference draws.

For each posterior and seed: the worst |z| of a mean, the error being that of both (ours by MCSE,
theirs sd / sqrt(ess)); the worst ratio of standard deviations, by distance from 1; the worst R-hat;
least bulk ESS; divergences; seconds, warm-up and compilation included. The data are read from the
folder `posteriordb` of the cache, which the environment variable PPL_MODELS_DATA moves; the models
are those of tests/infer/mcmc/references.py.

    python benchmarks/posteriordb.py
    python benchmarks/posteriordb.py --names eight kidiq --seeds 1 --chains 4 --draws 200    # a look
    python benchmarks/posteriordb.py --chains 4 --draws 2000 --name posteriordb_4    # files of its own
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import record
import torch

from ppl_models.core.table import text_table
from ppl_models.infer import NUTS, Posterior, sample

ROOT = Path(__file__).resolve().parents[1]
WIDEST = 5.0  # combined standard errors of a mean
SPREAD = 0.05  # of a standard deviation, relative
RHAT = 1.01


def load_references() -> Any:
    """Load the models beside the tests, which are not a package that is installed."""
    path = ROOT / "tests" / "infer" / "mcmc" / "references.py"
    spec = importlib.util.spec_from_file_location("references", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(known: Any, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Sample one posterior once, and compare."""
    posterior = sample(
        known.model,
        *known.arguments,
        sampler=NUTS(target_accept=options.target_accept),
        chains=options.chains,
        draws=options.draws,
        warmup=options.warmup,
        seed=seed,
        progress=f"{known.name}, seed {seed}",
    )
    reported = Posterior({"reported": known.transform(posterior)})
    names, mean, sd, ess = (getattr(known.moments, n) for n in ("names", "mean", "sd", "ess"))
    ours = {
        name: getattr(reported, name)()["reported"].cpu()
        for name in ("mean", "scale", "mcse", "ess", "rhat")
    }
    z = (ours["mean"] - mean) / (ours["mcse"].square() + sd.square() / ess).sqrt()
    ratio = ours["scale"] / sd
    worst = {"z": z.abs().argmax(), "ratio": ratio.log().abs().argmax()}
    return {
        "posterior": known.name,
        "seed": seed,
        "z": z[worst["z"]].abs().item(),
        "z_of": names[worst["z"]],
        "ratio": ratio[worst["ratio"]].item(),
        "ratio_of": names[worst["ratio"]],
        "rhat": ours["rhat"].max().item(),
        "ess": ours["ess"].min().item(),
        "divergences": int(posterior.divergences.sum()),
        "seconds": posterior.seconds,
    }


def passes(row: dict[str, Any]) -> bool:
    return row["z"] < WIDEST and abs(row["ratio"] - 1) < SPREAD and row["rhat"] < RHAT


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table of what is there so far."""
    head = [
        "posterior",
        "seed",
        "|z|",
        "of",
        "sd-ratio",
        "of",
        "R-hat",
        "ESS",
        "divergences",
        "s",
        "good",
    ]
    table = text_table(
        head,
        [
            (
                row["posterior"].partition("-")[2],
                str(row["seed"]),
                f"{row['z']:.2f}",
                row["z_of"],
                f"{row['ratio']:.3f}",
                row["ratio_of"],
                f"{row['rhat']:.4f}",
                f"{row['ess']:.0f}",
                str(row["divergences"]),
                f"{row['seconds']:.1f}",
                "yes" if passes(row) else "NO",
            )
            for row in rows
        ],
        right=" rr r rrrr",
    )
    good = sum(map(passes, rows))
    table += (
        f"\n\n{good} of {len(rows)} runs are good: |z| below {WIDEST:.0f}, sd within {SPREAD:.0%}, "
        f"R-hat below {RHAT}."
    )
    title = (
        f"posteriordb: {options.chains} chains of {options.draws} draws after {options.warmup} of "
        f"warm-up, target_accept {options.target_accept}"
    )
    record.write(options.name, title, table, rows)


def main() -> None:
    """Run what was asked for, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--names", nargs="+", default=[""], help="parts of names of posteriors")
    parser.add_argument("--target-accept", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="posteriordb", help="name of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64)
    references = load_references()
    names = [name for name in references.NAMES if any(part in name for part in options.names)]
    if not names:
        parser.error(f"no posterior has any of {options.names} in its name: {references.NAMES}")
    rows: list[dict[str, Any]] = []
    for name in names:
        known = references.reference(name)
        for seed in range(options.seeds):
            rows.append(run(known, seed, options))
        report(rows, options)  # after each, so that nothing is lost


if __name__ == "__main__":
    main()

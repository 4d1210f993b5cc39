"""The command line: what the library does, for data in files, without a line of Python."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from guides import Local
from guides.families import Family, FullNormal, LowRankNormal
from guides.fitting import for_model
from guides.registry import GUIDES, MODELS, ModelEntry, build, lookup
from ppl_models.bnn import BayesianNeuralNetwork
from ppl_models.core import recipe
from ppl_models.core.batch import as_batch, check_model
from ppl_models.core.checks import check_known
from ppl_models.core.random import seeded
from ppl_models.core.table import text_table
from ppl_models.core.types import Refinable
from ppl_models.data import Dataset
from ppl_models.data.source import Source
from ppl_models.evaluate import GradientVariance, Prediction, Scorecard, gradient_variance, score
from ppl_models.evaluate import compare as compare_guides
from ppl_models.evaluate import generate as draw_rows
from ppl_models.evaluate import predict as predict_rows
from ppl_models.evaluate.pictures import (
    plot_interpolation,
    plot_latents,
    plot_reconstructions,
    plot_samples,
)
from ppl_models.infer import ELBO, NUTS, Fit
from ppl_models.infer import fit as train
from ppl_models.infer import sample as sample_posterior
from ppl_models.infer.estimators import ESTIMATORS, Fitting, estimators_for, tuned
from ppl_models.infer.step import Compile
from ppl_models.parts.likelihoods import Classes, Counts, Homoscedastic, Likelihood
from ppl_models.runs import Run, load_run, save_run

app = typer.Typer(
    name="ppl-models",
    help="""Deep probabilistic models in Pyro: train them, swap guides, see how good they are.

    Start here:

    \b
      ppl-models models                          what there is
      ppl-models fit vae --epochs 20             train one on handwritten digits, and save it
      ppl-models evaluate runs/vae-amortized     how good its guide is, on test rows
      ppl-models compare vae --epochs 20         the same for several guides, side by side
      ppl-models estimators sbn                  how noisy each estimator of its gradient is
      ppl-models predict --out predicted         a network that predicts, and says how surely

    Tables go to standard output, progress to standard error. `ppl-models COMMAND --help` has an
    example for each option.""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


#: Families of the weights of a network, by name.
WEIGHTS: Mapping[str, Family | None] = {
    "mean-field": None,
    "low-rank": LowRankNormal(),
    "full": FullNormal(),
}

#: What `fit` draws, where there is something to draw.
PICTURES = ("bounds", "latents", "reconstructions", "samples", "interpolation")


class Binarization(StrEnum):
    """How grey values become 0 and 1."""

    NONE = "none"
    THRESHOLD = "threshold"
    STATIC = "static"
    DYNAMIC = "dynamic"


class CompileChoice(StrEnum):
    """Values of --compile."""

    AUTO = "auto"
    NOW = "now"
    OFF = "off"

    @property
    def mode(self) -> Compile:
        """What `fit` calls it."""
        return "now" if self is CompileChoice.NOW else self is CompileChoice.AUTO


Model = Annotated[str, typer.Argument(help="A model by name, as `ppl-models models` lists them.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run that `ppl-models fit` saved.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A data set by name (digits, mnist, olivetti, uci/boston, ...; digits needs no "
        "download), or your own: a .csv, .tsv, .npy or .npz file, or a folder of images. "
        "Such as --data mnist, --data cells.csv, --data photos/.",
    ),
]
OtherData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Another data set with the same columns; by default that of the run. "
        "Such as --data digits.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Column of your table that holds labels, not data. Such as --target species."
    ),
]
Split = Annotated[
    int, typer.Option(help="Which of the splits of uci/*, 0 to 19. Such as --split 3.", min=0)
]
TestShare = Annotated[
    float | None,
    typer.Option(
        "--test",
        help="Share, or number, of your own rows that are held out to test; by default a fifth. "
        "Such as --test 0.1.",
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        help="Height x width that your own images are brought to. Such as --image-size 28x28."
    ),
]
Binarize = Annotated[
    Binarization | None,
    typer.Option(
        help="How grey values become 0 and 1: at a threshold of half, by one static draw, by a "
        "dynamic draw for each epoch, or not. By default what suits the model. "
        "Such as --binarize dynamic."
    ),
]
Standardize = Annotated[
    bool,
    typer.Option(
        "--standardize",
        help="Give each column mean 0 and scale 1, by the training rows; for tables of real values.",
    ),
]
LatentDim = Annotated[
    int | None,
    typer.Option(help="Latent features of each row. Such as --latent-dim 2.", min=1),
]
LatentDims = Annotated[
    str | None,
    typer.Option(
        help="Units of each layer of latents, from the data upwards, with commas between; for sbn. "
        "Such as --latent-dims 32,16."
    ),
]
Hidden = Annotated[
    str | None,
    typer.Option(
        help="Units of each hidden layer of the networks, with commas between; none for linear "
        "ones. Such as --hidden 200,200."
    ),
]
Epochs = Annotated[
    int, typer.Option(help="Passes over the training rows. Such as --epochs 50.", min=1)
]
BatchSize = Annotated[
    int, typer.Option(help="Rows in a training step. Such as --batch-size 100.", min=1)
]
LearningRate = Annotated[float, typer.Option(help="Learning rate of Adam. Such as --lr 1e-3.")]
Compiling = Annotated[
    CompileChoice,
    typer.Option(
        "--compile",
        help="Whether training runs as recorded and compiled graphs: auto, where they pay; now, "
        "compiled from the start, which first waits for the compiler; off, the Pyro programs "
        "themselves. Such as --compile now.",
    ),
]
Particles = Annotated[
    int, typer.Option(help="Draws a row for log p(x). Such as --particles 5000.", min=2)
]
Reference = Annotated[
    bool,
    typer.Option(help="Sample a few test rows by NUTS as well, to compare the guide with."),
]
Seed = Annotated[
    int, typer.Option(help="Seed of everything that is drawn. Such as --seed 1.", min=0)
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to work: cpu, cuda, cuda:1. Such as --device cuda."),
]
Threads = Annotated[
    int,
    typer.Option(
        help="CPU threads; small models are fastest on one. Such as --threads 4.",
        min=1,
        max=1024,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table; for scripts.")]


@app.command()
def models(as_json: Json = False) -> None:
    """List the models: what they are, what can be chosen, which guides are compared.

    \b
    Examples:
      ppl-models models
      ppl-models models --json
    """
    if as_json:
        kept = ("name", "summary", "sizes", "binarize", "guides", "objective")
        _print_json([{key: getattr(entry, key) for key in kept} for entry in MODELS.values()])
        return
    rows = [(e.name, e.summary, ", ".join(e.guides)) for e in MODELS.values()]
    typer.echo(text_table(("model", "what it is", "guides compared"), rows))


@app.command()
def guides(
    model: Model,
    data: Data = "digits",
    target: Target = None,
    as_json: Json = False,
) -> None:
    """List the guides and families that fit a model, and why the others do not.

    \b
    Examples:
      ppl-models guides vae
      ppl-models guides ppca --json
    """
    entry = lookup("model", model, MODELS)
    rows = Source(data, target=target).load(entry.binarize)
    choices = for_model(build(model, rows))
    if as_json:
        _print_json([vars(choice) for choice in choices])
    else:
        typer.echo(str(choices))
        typer.echo(f"\n--guide of `ppl-models fit` takes: {', '.join(GUIDES)}")


@app.command()
def fit(
    model: Model,
    data: Data = "digits",
    guide: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(GUIDES)}; by default the first that `ppl-models models` "
            "shows. Such as --guide flow."
        ),
    ] = None,
    latent_dim: LatentDim = None,
    latent_dims: LatentDims = None,
    hidden: Hidden = None,
    epochs: Epochs = 200,
    batch_size: BatchSize = 64,
    lr: LearningRate = 3e-3,
    target: Target = None,
    split: Split = 0,
    test: TestShare = None,
    image_size: ImageSize = None,
    binarize: Binarize = None,
    standardize: Standardize = False,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = 1,
    compile: Compiling = CompileChoice.AUTO,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the run and its pictures; a run in it is replaced. By default "
            "runs/MODEL-GUIDE. Such as --out runs/first."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model with a guide, save the run, and draw what it learnt.

    Ctrl-C ends the training early and saves what was learnt so far.

    \b
    Examples:
      ppl-models fit vae --epochs 5
      ppl-models fit vae --guide flow --latent-dim 2 --epochs 5 --out runs/flow
      ppl-models fit ppca --data digits --epochs 5 --json
    """
    torch.set_num_threads(threads)
    entry = lookup("model", model, MODELS)
    guide = entry.guides[0] if guide is None else guide
    make = lookup("guide", guide, GUIDES)
    size = _image_size(image_size)
    source = Source(data, target, split, test, size, binarize, standardize)
    rows = source.load(entry.binarize)
    sizes = _sizes(entry, latent_dim, latent_dims, hidden)
    if hidden is not None and not sizes.get("hidden") and guide in ("exact", "local"):
        raise ValueError(f"--hidden: neither {model} nor the guide {guide} has hidden layers.")
    out = _checked_folder(Path("runs") / f"{model}-{guide}" if out is None else out)
    typer.echo(f"{model} with {guide} on {_describe(rows)}", err=True)
    program = build(model, rows, seed=seed, **sizes)
    with seeded(seed):
        mine = make(program, len(rows.x), _units(hidden))
    result = train(
        program,
        mine,
        rows.x,
        objective=entry.objective,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        compile=compile.mode,
    )
    save_run(out, result, info={"model": model, "guide": guide, **source.info(rows)})
    for name in PICTURES:  # those of a run that was here before
        (out / f"{name}.png").unlink(missing_ok=True)
    pictures = _pictures(out, result, rows, seed)
    figures = {
        "model": model,
        "guide": guide,
        "data": rows.name,
        "run": str(out),
        "steps": result.steps,
        "epochs": result.epochs,
        "seconds": result.seconds,
        "compiled": result.compiled,
        "interrupted": result.interrupted,
        "bound_last_epoch": _last_bound(result),
    }
    if as_json:
        _print_json(figures)
    else:
        typer.echo(
            _listed(
                figures | {"bound_last_epoch": f"{_last_bound(result):.3f} nats per training row"}
            )
        )
    _say_written(out, [out / "config.json", *pictures])
    typer.echo(f"Next: ppl-models evaluate {shlex.quote(str(out))}", err=True)


@app.command()
def evaluate(
    run: RunFolder,
    data: OtherData = None,
    binarize: Binarize = None,
    particles: Particles = 1000,
    reference: Reference = True,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables and pictures. Such as --out report."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how good a trained guide is, on test rows: bound, evidence, gap, beside NUTS.

    \b
    Examples:
      ppl-models evaluate runs/vae-amortized
      ppl-models evaluate runs/vae-amortized --particles 100 --no-reference --json
      ppl-models evaluate runs/vae-amortized --no-reference --out report
    """
    torch.set_num_threads(threads)
    loaded, rows = _run(run, device, data, binarize)
    folder = None if out is None else _folder(out)
    card = score(
        loaded.fit,
        rows.x_test,
        name=loaded.info.get("guide"),
        particles=particles,
        seed=seed,
        reference=NUTS() if reference else None,
    )
    _print_card(card, as_json)
    if folder is not None:
        _say_written(
            folder, [*_write_card(folder, card), *_pictures(folder, loaded.fit, rows, seed)]
        )


@app.command()
def sample(
    run: RunFolder,
    data: OtherData = None,
    binarize: Binarize = None,
    rows: Annotated[
        int,
        typer.Option(help="Test rows whose latents are sampled. Such as --rows 8.", min=1),
    ] = 4,
    chains: Annotated[int, typer.Option(help="Independent chains. Such as --chains 2.", min=1)] = 4,
    draws: Annotated[
        int, typer.Option(help="Draws kept from each chain. Such as --draws 1000.", min=4)
    ] = 500,
    warmup: Annotated[
        int,
        typer.Option(help="Transitions before that, for adaptation. Such as --warmup 200.", min=0),
    ] = 500,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the draws (draws.npz) and their pictures. Such as --out posterior."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample the posterior of the latents of a few test rows by NUTS, the model as trained.

    For new rows from the model see `ppl-models generate`.

    \b
    Examples:
      ppl-models sample runs/vae-amortized --rows 1 --chains 2 --draws 50 --warmup 50 --out posterior
    """
    torch.set_num_threads(threads)
    loaded, dataset = _run(run, device, data, binarize)
    folder = None if out is None else _folder(out)
    if rows > len(dataset.x_test):
        raise ValueError(
            f"--rows must be at most {len(dataset.x_test)}, the test rows; got {rows}."
        )
    posterior = sample_posterior(
        loaded.model,
        dataset.x_test[:rows],
        rows=True,
        chains=chains,
        draws=draws,
        warmup=warmup,
        seed=seed,
    )
    if as_json:
        table = posterior.summary()
        _print_json(
            {
                "chains": posterior.chains,
                "draws": posterior.draws,
                "warmup": posterior.warmup,
                "seconds": posterior.seconds,
                "divergences": int(posterior.divergences.sum()),
                "sites": table.reset_index(names="element").to_dict("records"),
            }
        )
    else:
        typer.echo(str(posterior))
    if folder is not None:
        file = folder / "draws.npz"
        draws_by_site: dict[str, Any] = {name: v.cpu().numpy() for name, v in posterior.items()}
        np.savez(file, **draws_by_site)
        _say_written(folder, [file, _saved(posterior.plot(), folder / "posterior.png")])


@app.command()
def generate(
    run: RunFolder,
    size: Annotated[int, typer.Option(help="Rows to draw. Such as --size 16.", min=1)] = 64,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the rows (samples.csv) and their picture. Such as --out invented."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw new rows from a trained model: what it thinks data look like.

    \b
    Examples:
      ppl-models generate runs/vae-amortized --size 16 --out invented
    """
    torch.set_num_threads(threads)
    loaded = load_run(run, device=device)
    known = _known_data(loaded)
    folder = None if out is None else _folder(out)
    rows = draw_rows(loaded.model, size, seed=seed).cpu()
    if as_json:
        _print_json(rows.tolist())
    else:
        columns = {f"{size} new rows": rows}
        if known is not None:
            columns[f"{len(known.x_test)} test rows"] = known.x_test
        moments = {
            "mean": torch.mean,
            "sd": torch.std,
            "least": torch.min,
            "most": torch.max,
        }
        lines = [
            (name, *(f"{of(values).item():.4g}" for values in columns.values()))
            for name, of in moments.items()
        ]
        typer.echo(text_table(("of all values", *columns), lines, right=" rr"))
    if folder is not None:
        file = folder / "samples.csv"
        pd.DataFrame(rows.flatten(1).numpy()).to_csv(file, index=False)
        written = [file]
        if known is not None and known.image_shape is not None:
            shape, limits = known.image_shape, _range(known.x_test)
            figure = plot_samples(
                loaded.model, size, image_shape=shape, value_range=limits, seed=seed
            )
            written.append(_saved(figure, folder / "samples.png"))
        _say_written(folder, written)


@app.command()
def compare(
    model: Model,
    data: Data = "digits",
    guides: Annotated[
        str | None,
        typer.Option(
            help=f"Guides to compare, with commas between: {', '.join(GUIDES)}. "
            "By default those that `ppl-models models` shows. Such as --guides amortized,flow."
        ),
    ] = None,
    latent_dim: LatentDim = None,
    latent_dims: LatentDims = None,
    hidden: Hidden = None,
    epochs: Epochs = 200,
    batch_size: BatchSize = 64,
    lr: LearningRate = 3e-3,
    particles: Particles = 1000,
    reference: Reference = True,
    target: Target = None,
    split: Split = 0,
    test: TestShare = None,
    image_size: ImageSize = None,
    binarize: Binarize = None,
    standardize: Standardize = False,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = 1,
    compile: Compiling = CompileChoice.AUTO,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for scorecard.csv, .html and .png; made if missing. Such as --out report."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model with several guides from the same start, and score them on test rows.

    \b
    Examples:
      ppl-models compare vae --guides amortized,flow --epochs 5 --no-reference --out report
      ppl-models compare ppca --epochs 5 --no-reference --json
    """
    torch.set_num_threads(threads)
    entry = lookup("model", model, MODELS)
    size = _image_size(image_size)
    rows = Source(data, target, split, test, size, binarize, standardize).load(entry.binarize)
    names = entry.guides if guides is None else tuple(name.strip() for name in guides.split(","))
    count, units = len(rows.x), _units(hidden)
    factories = {}
    for name in names:
        make = lookup("guide", name, GUIDES)
        factories[name] = lambda program, make=make: make(program, count, units)
    folder = None if out is None else _folder(out)
    typer.echo(f"{model} on {_describe(rows)}: {', '.join(names)}", err=True)
    card = compare_guides(
        build(model, rows, seed=seed, **_sizes(entry, latent_dim, latent_dims, hidden)),
        factories,
        rows.x,
        rows.x_test,
        objective=entry.objective,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        particles=particles,
        seed=seed,
        device=device,
        reference=NUTS() if reference else None,
        compile=compile.mode,
    )
    _print_card(card, as_json)
    if folder is not None:
        _say_written(folder, _write_card(folder, card))


@app.command()
def estimators(
    model: Model,
    data: Data = "digits",
    guide: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(GUIDES)}; by default the first that `ppl-models models` "
            "shows and that has parameters. Such as --guide local."
        ),
    ] = None,
    estimators: Annotated[
        str | None,
        typer.Option(
            help=f"Estimators to compare, with commas between: {', '.join(ESTIMATORS)}. "
            "By default all that fit. Such as --estimators reinforce,disarm."
        ),
    ] = None,
    latent_dim: LatentDim = None,
    latent_dims: LatentDims = None,
    hidden: Hidden = None,
    epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the training rows before anything is measured, by the objective that "
            "`ppl-models fit` takes; 0 measures at the start. Such as --epochs 50.",
            min=0,
        ),
    ] = 10,
    rows: Annotated[
        int,
        typer.Option(help="Training rows in an estimate. Such as --rows 20.", min=1),
    ] = 100,
    draws: Annotated[
        int, typer.Option(help="Estimates by each estimator. Such as --draws 2000.", min=2)
    ] = 500,
    tune: Annotated[
        int,
        typer.Option(
            help="Steps in which networks and factors that estimators bring along are trained first, "
            "at those parameters. Such as --tune 2000.",
            min=0,
        ),
    ] = 500,
    batch_size: BatchSize = 64,
    lr: LearningRate = 3e-3,
    target: Target = None,
    split: Split = 0,
    test: TestShare = None,
    image_size: ImageSize = None,
    binarize: Binarize = None,
    standardize: Standardize = False,
    seed: Seed = 0,
    threads: Threads = 1,
    compile: Compiling = CompileChoice.AUTO,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for estimators.txt, .json (with each parameter) and .png; made if missing. "
            "Such as --out report."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how noisy the estimators of a model's gradient are, at the same parameters for all.

    The same rows are estimated over and over. Estimators of one bound agree in the mean, unless a
    line says that they are biased; what differs is the variance, and the time of an estimate. Those
    of several weighted particles, such as vimco and iwae, ascend another bound, a higher one.

    \b
    Examples:
      ppl-models estimators sbn --epochs 2 --draws 50 --tune 50
      ppl-models estimators sbn --latent-dims 5,3 --estimators disarm,enumerate --draws 50
      ppl-models estimators vae --epochs 2 --draws 50 --out report
    """
    torch.set_num_threads(threads)
    entry = lookup("model", model, MODELS)
    guide = next(g for g in entry.guides if g != "exact") if guide is None else guide
    make = lookup("guide", guide, GUIDES)
    names = None
    if estimators is not None:
        names = [name.strip() for name in estimators.split(",")]
        for name in names:
            lookup("estimator", name, ESTIMATORS)
    size = _image_size(image_size)
    loaded = Source(data, target, split, test, size, binarize, standardize).load(entry.binarize)
    if rows > len(loaded.x):
        raise ValueError(f"--rows must be at most {len(loaded.x)}, the training rows; got {rows}.")
    folder = None if out is None else _folder(out)
    typer.echo(f"{model} with {guide} on {_describe(loaded)}", err=True)
    sizes = _sizes(entry, latent_dim, latent_dims, hidden)
    program = build(model, loaded, seed=seed, **sizes)
    (whole,) = as_batch(loaded.x, program)
    with seeded(seed):
        chosen = whole[torch.randperm(len(whole))[:rows]]
        mine = make(program, len(loaded.x) if epochs else rows, _units(hidden))
    if epochs:
        train(
            program,
            mine,
            loaded.x,
            objective=entry.objective,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            compile=compile.mode,
        )
        if isinstance(mine, Refinable):  # its parameters are those of all rows
            mine = mine.refine(chosen, seed=seed)
    known = chosen if isinstance(mine, Refinable) else whole
    fitting = estimators_for(program, mine, chosen, names=names)
    if not fitting.objectives:
        reasons = " ".join(f"{name}: {reason}" for name, reason in fitting.others.items())
        raise ValueError(
            f"--estimators: none of these fits {model} with {guide}; leave it out for those that do. "
            + reasons
        )
    ready = {
        name: tuned(objective, program, mine, known, rows=rows, steps=tune, seed=seed)
        for name, objective in fitting.objectives.items()
    }
    measured = gradient_variance(program, mine, chosen, objectives=ready, draws=draws, seed=seed)
    told = _told_of_gradients(measured, fitting)
    after = f"after {epochs} epoch{'' if epochs == 1 else 's'}"
    where = [f"On {rows} training rows, {after}; seed {seed}."]
    if tune and (own := [name for name, one in ready.items() if one.parameters()]):
        where.append(f"Networks and factors of {', '.join(own)} were trained for {tune} steps.")
    if others := [name for name, one in ready.items() if not isinstance(one, ELBO)]:
        where.append(f"Of another bound than the ELBO: {', '.join(others)}.")
    text = _text_of_gradients(measured, fitting, where)
    settings = {"model": model, "guide": guide, "data": loaded.name, "binarize": loaded.binarize}
    settings |= {"rows": rows, "epochs": epochs, "draws": draws, "tune": tune, "seed": seed}
    figures = {"settings": settings, **told}
    if as_json:
        _print_json(figures)
    else:
        typer.echo(text)
    if folder is not None:
        (folder / "estimators.txt").write_text(text + "\n", encoding="utf-8")
        page = json.dumps(_plain(figures), indent=2, allow_nan=False) + "\n"
        (folder / "estimators.json").write_text(page, encoding="utf-8")
        picture = _saved(measured.plot(), folder / "estimators.png")
        files = [folder / "estimators.txt", folder / "estimators.json", picture]
        _say_written(folder, files)


@app.command()
def predict(
    data: Data = "digits",
    target: Target = None,
    hidden: Annotated[
        str,
        typer.Option(
            help="Units of each tanh layer, with commas between; none for a linear model. "
            "Such as --hidden 50,50."
        ),
    ] = "50",
    family: Annotated[
        str,
        typer.Option(
            help=f"What the posterior of the weights is taken for: {', '.join(WEIGHTS)}. "
            "Such as --family low-rank."
        ),
    ] = "mean-field",
    counts: Annotated[
        bool,
        typer.Option(
            "--counts", help="The target is a count: whole numbers are classes otherwise."
        ),
    ] = False,
    epochs: Epochs = 200,
    batch_size: BatchSize = 64,
    lr: LearningRate = 3e-3,
    draws: Annotated[
        int, typer.Option(help="Draws of the weights in a prediction. Such as --draws 5000.", min=2)
    ] = 1000,
    split: Split = 0,
    test: TestShare = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    threads: Threads = 1,
    compile: Compiling = CompileChoice.AUTO,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for predictions.csv and calibration.png; made if missing. "
            "Such as --out predicted."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a Bayesian neural network on rows with a target, and predict the test rows.

    Numbers come with two scales: aleatoric, noise that more data leave as it is, and epistemic, what
    the weights could still be. Whole numbers and words are classes, unless they are counts. Columns
    are standardised; what is told is in the units of the file.

    \b
    Examples:
      ppl-models predict --epochs 5
      ppl-models predict --data patients.csv --target progression --epochs 20 --out predicted
      ppl-models predict --data wine.csv --target cultivar --epochs 5 --family low-rank --json
    """
    torch.set_num_threads(threads)
    check_known("family", family, WEIGHTS)
    size = _image_size(image_size)
    with warnings.catch_warnings():  # a column that is constant does no harm here
        warnings.filterwarnings("ignore", ".* columns are constant")
        rows = Source(data, target, split, test, size, None, standardize=True).load()
    folder = None if out is None else _folder(out)
    likelihood, y, y_test = _response(rows, counts)
    with seeded(seed):
        model = BayesianNeuralNetwork(
            rows.x.shape[-1], hidden=_units(hidden), likelihood=likelihood
        )
        guide = Local(model, example=(rows.x[:2], y[:2]), family=WEIGHTS[family])
    guide.start_around(model.net.starts(), scale=0.01)
    typer.echo(f"Bayesian neural network, {family}, on {_describe(rows)}", err=True)
    result = train(
        model,
        guide,
        (rows.x, y),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        compile=compile.mode,
    )
    found = predict_rows(model, guide, rows.x_test, y_test, draws=draws, seed=seed)
    figures = {"data": rows.name, "target": _kind_of(likelihood), "test_rows": len(rows.x_test)}
    figures |= _figures_of(found, rows, y, y_test) | {"seconds": result.seconds}
    if as_json:
        _print_json(figures)
    else:
        density, error = figures["log_density"], figures.pop("log_density_se")
        density = f"{density:.4g} nats per row (error of the draws {error:.1g})"
        typer.echo(_listed(figures | {"log_density": density}))
    if folder is not None:
        file = folder / "predictions.csv"
        _predictions(found, rows, y_test).to_csv(file, index=False)
        _say_written(folder, [file, _saved(found.plot(), folder / "calibration.png")])


@app.command()
def show(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of it. Such as --out pictures."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run holds: model, guide, data, training, versions.

    \b
    Examples:
      ppl-models show runs/vae-amortized
      ppl-models show runs/vae-amortized --out pictures
    """
    loaded = load_run(run)
    config, result = loaded.config, loaded.fit
    figures = {
        "run": str(run),
        "saved": config["saved"],
        "model": _made_of(config["model"]),
        "guide": _made_of(config["guide"]),
        **{k: v for k, v in loaded.info.items() if v is not None and k not in ("model", "guide")},
        **{name: value for name, value in result.settings.items() if value is not None},
        "epochs": result.epochs,
        "seconds": result.seconds,
        "compiled": result.compiled,
        "interrupted": result.interrupted,
        "bound_first_step": result.bounds[0].item(),
        "bound_last_epoch": _last_bound(result),
        "versions": config["versions"],
        "files": {kind: about["name"] for kind, about in config["files"].items()},
    }
    if as_json:
        _print_json(figures)
    else:
        typer.echo(_listed(figures))
    if out is not None:
        folder = _folder(out)
        _say_written(folder, _pictures(folder, result, _known_data(loaded), 0))


def _response(data: Dataset, counts: bool) -> tuple[Likelihood, Tensor, Tensor]:
    """Return the likelihood that suits a target, the target, and that of the test rows."""
    if data.y is None or data.y_test is None:
        raise ValueError(
            f"predict: {data.name} has no target to be predicted. For a table of your own name its "
            "column, --target price; folders of images have a subfolder for each class."
        )
    y, y_test = data.y, data.y_test
    if data.classes is None:
        if counts:
            raise ValueError(
                "--counts: the target must be whole numbers, but it is continuous. Write them without "
                "a decimal point, 3 in place of 3.0."
            )
        if len(y) > 1 and bool((y == y[0]).all()):
            raise ValueError(_same(len(y), y[0].item() + (data.y_loc or 0.0)))
        return Homoscedastic(), y, y_test
    if not counts:
        if data.classes < 2:
            raise ValueError(_same(len(y), data.labels[0] if data.labels else 0))
        return Classes(data.classes), y, y_test
    values = data.labels or tuple(range(data.classes))
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"--counts: the target must be whole numbers, got {list(values[:3])}.")
    numbers = torch.tensor(values, dtype=torch.float32)
    return Counts(), numbers[y.long()], numbers[y_test.long()]


def _same(rows: int, value: Any) -> str:
    return (
        f"predict: the target must vary, but all {rows} training rows have {value!r}. Is it the right "
        "column?"
    )


def _kind_of(likelihood: Likelihood) -> str:
    return {Homoscedastic: "a number", Counts: "a count"}.get(type(likelihood), "classes")


def _figures_of(found: Prediction, data: Dataset, y: Tensor, y_test: Tensor) -> dict[str, Any]:
    """Score predictions in the units of the file, beside those of someone who knows y alone."""
    assert found.log_density is not None
    scale = 1.0 if data.y_scale is None else data.y_scale
    density = found.log_density.mean - math.log(scale)
    figures: dict[str, Any] = {"log_density": density, "log_density_se": found.log_density.se}
    if found.hits is not None:
        right = (found.mean.argmax(-1) == y_test).double().mean().item()
        most = (y_test == y.mode().values).double().mean().item()
        return figures | {"accuracy": right, "accuracy_of_the_commonest_class": most}
    off = (found.mean - y_test).square().mean().sqrt().item()
    blind = (y.double().mean() - y_test).square().mean().sqrt().item()
    return figures | {
        "rmse": off * scale,
        "rmse_of_the_mean": blind * scale,
        "aleatoric": found.aleatoric.mean().item() * scale,
        "epistemic": found.epistemic.mean().item() * scale,
    }


def _predictions(found: Prediction, data: Dataset, y_test: Tensor) -> pd.DataFrame:
    """Tabulate the predictions of the test rows, in the units of the file."""
    if found.hits is not None:
        names = [str(name) for name in data.labels or range(found.mean.shape[-1])]
        columns = {
            "true": [names[code] for code in y_test.tolist()],
            "predicted": [names[code] for code in found.mean.argmax(-1).tolist()],
        }
        probabilities = found.mean.T.cpu().tolist()
        told = {f"p({name})": of for name, of in zip(names, probabilities, strict=True)}
        return pd.DataFrame(columns | told)
    loc = 0.0 if data.y_loc is None else data.y_loc
    scale = 1.0 if data.y_scale is None else data.y_scale
    return pd.DataFrame(
        {
            "true": (y_test.double() * scale + loc).tolist(),
            "predicted": (found.mean.cpu() * scale + loc).tolist(),
            "aleatoric": (found.aleatoric.cpu() * scale).tolist(),
            "epistemic": (found.epistemic.cpu() * scale).tolist(),
        }
    )


def _run(
    path: Path, device: str | None, data: str | None, binarize: str | None
) -> tuple[Run, Dataset]:
    """Read a run, and the data it was trained on or others in their place."""
    loaded = load_run(path, device=device)
    source, suited = Source.of(loaded.info), _suited(loaded)
    if data is None:
        if binarize is not None:
            raise ValueError(
                "--binarize goes with --data: the rows of the run itself are prepared as they were."
            )
        if source is None:
            raise ValueError(
                f"'{path}' was saved without the name of its data, so say which: --data digits."
            )
        return loaded, source.again(loaded.info, suited)
    if source is None:
        return loaded, Source(data, binarize=binarize).load(suited)
    if binarize is not None:
        source = replace(source, binarize=binarize)
    return loaded, source.like(loaded.info, data, suited)


def _known_data(loaded: Run) -> Dataset | None:
    """Load the data of a run to be drawn beside it; None, with a word, if they are not there."""
    source = Source.of(loaded.info)
    if source is None:
        return None
    try:
        return source.again(loaded.info, _suited(loaded))
    except (ValueError, OSError) as error:
        typer.echo(f"ppl-models: going on without the data: {error}", err=True)
        return None


def _suited(loaded: Run) -> Any:
    """Return how grey values become 0 and 1 for the model of a run."""
    entry = MODELS.get(loaded.info.get("model", ""))
    return None if entry is None else entry.binarize


def _describe(data: Dataset) -> str:
    form = f", binarised by {data.binarize}" if data.binarize else ""
    return f"{data.name}{form} ({len(data.x)} training rows, {len(data.x_test)} test rows)"


def _sizes(
    entry: ModelEntry, latent_dim: int | None, latent_dims: str | None, hidden: str | None
) -> dict[str, Any]:
    """Return the sizes that were asked for; `hidden` is the encoder's alone in a linear model."""
    sizes: dict[str, Any] = {} if latent_dim is None else {"latent_dim": latent_dim}
    if latent_dims is not None:
        sizes["latent_dims"] = _integers("--latent-dims", latent_dims)
    if hidden is not None and "hidden" in entry.sizes:
        sizes["hidden"] = _units(hidden)
    return sizes


def _units(hidden: str | None) -> tuple[int, ...]:
    """Read the units of hidden layers: "200,200", or "none"."""
    if hidden is None:
        return (64,)
    if hidden.strip().lower() in ("", "none"):
        return ()
    return _integers("--hidden", hidden, otherwise=", or none")


def _integers(option: str, text: str, *, otherwise: str = "") -> tuple[int, ...]:
    """Read positive integers with commas between."""
    try:
        units = tuple(int(part) for part in text.split(","))
    except ValueError:
        units = (0,)
    if min(units) < 1:
        raise ValueError(
            f"{option} must be positive integers with commas between, such as 200,200{otherwise}; "
            f"got {text!r}."
        )
    return units


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"--image-size must be height x width, such as 28x28, or one side; got {text!r}."
        )
    return int(sides[0]), int(sides[-1])


def _checked_folder(out: Path) -> Path:
    """Refuse what is no folder, or cannot become one, before the work begins."""
    out = out.expanduser()
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), out)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        kind = "which cannot be written" if there.is_dir() else "which is a file"
        raise ValueError(
            f"--out must name a folder, or one to be made; got '{out}': '{there}', {kind}."
        )
    return out


def _folder(out: Path) -> Path:
    """Make the folder for results before the work begins."""
    out = _checked_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out: cannot make '{out}': {error.strerror or error}.") from error
    return out


def _last_bound(result: Fit) -> float:
    """Mean bound of the last epoch, nats per row."""
    steps = round(result.steps / result.epochs) if result.epochs else 1
    return result.bounds[-max(1, steps) :].mean().item()


def _pictures(folder: Path, result: Fit, data: Dataset | None, seed: int) -> list[Path]:
    """Draw what there is to see of a trained pair."""
    files = [_saved(result.plot(), folder / "bounds.png")]
    if data is None:
        return files
    model, guide, shape = result.model, result.guide, data.image_shape
    x, y = data.x_test[:2000], None if data.y_test is None else data.y_test[:2000]
    if y is not None and data.labels is not None:
        y = np.array([str(data.labels[code]) for code in y.tolist()])
    if isinstance(guide, Refinable):
        x, y = x[:200], None if y is None else y[:200]
        guide = guide.refine(x, seed=seed)
    options: dict[str, Any] = {"image_shape": shape, "seed": seed}
    sites = check_model(model, as_batch(x, model, guide), plate="data", rows=len(x)).locals
    continuous = any(not site.discrete for site in sites)
    if continuous:
        files.append(_saved(plot_latents(model, guide, x, y, **options), folder / "latents.png"))
    if shape is not None:
        for name, figure in (
            ("reconstructions", plot_reconstructions(model, guide, x, **options)),
            ("samples", plot_samples(model, value_range=_range(x), **options)),
        ):
            files.append(_saved(figure, folder / f"{name}.png"))
    if shape is not None and continuous:  # discrete latents have nothing between two values
        figure = plot_interpolation(model, guide, x, **options)
        files.append(_saved(figure, folder / "interpolation.png"))
    return files


def _range(x: Tensor) -> tuple[float, float] | None:
    """Return the range that images are drawn in: black and white where the data have both."""
    return (0.0, 1.0) if bool(((x >= 0) & (x <= 1)).all()) else None


def _saved(figure: Any, file: Path) -> Path:
    try:
        figure.savefig(file)
    except OSError as error:
        raise OSError(f"cannot write '{file}': {error.strerror or error}.") from error
    return file


def _write_card(folder: Path, card: Scorecard) -> list[Path]:
    card.to_pandas().to_csv(folder / "scorecard.csv")
    card.to_html(folder / "scorecard.html")
    picture = _saved(card.plot(), folder / "scorecard.png")
    return [folder / "scorecard.csv", folder / "scorecard.html", picture]


def _print_card(card: Scorecard, as_json: bool) -> None:
    if as_json:
        entries = card.to_pandas().reset_index().to_dict("records")
        _print_json({"guides": entries, "settings": card.settings, "notes": list(card.notes)})
    else:
        typer.echo(str(card))


def _text_of_gradients(found: GradientVariance, fitting: Fitting, where: Iterable[str]) -> str:
    """Lay out what was measured, what the names stand for, and why others do not fit."""
    spelt = [(name, repr(objective)) for name, objective in fitting.objectives.items()]
    blocks = ["\n  ".join([str(found), *where]), text_table(("in Python", ""), spelt)]
    if fitting.others:
        rows = [(name, " ".join(reason.split())) for name, reason in fitting.others.items()]
        blocks.append(text_table(("do not fit", ""), rows))
    return "\n\n".join(blocks)


def _told_of_gradients(found: GradientVariance, fitting: Fitting) -> dict[str, Any]:
    """Return what was measured in numbers and words that JSON can hold."""
    entries = []
    for name, objective in fitting.objectives.items():
        bound, error = found.bounds[name]
        entry: dict[str, Any] = {"name": name, "objective": repr(objective)}
        entry["bias"] = found.biases.get(name)
        entry |= {"bound": bound, "bound_se": error, "seconds": found.seconds[name]}
        for half in ("guide", "model"):
            has = any(key.startswith(f"{half}.") for key in found.mean[name])
            entry[f"{half}_variance"] = found.total(name, half) if has else None
            signal = found.signal_to_noise(name, half) if has else None
            entry[f"{half}_signal_to_noise"] = signal
        parts = found.variance[name].items()
        entry["variance_by_parameter"] = {key: part.sum().item() for key, part in parts}
        entries.append(entry)
    others = [{"name": name, "reason": reason} for name, reason in fitting.others.items()]
    return {"estimators": entries, "do_not_fit": others}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does: what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _listed(figures: Mapping[str, Any]) -> str:
    """Lay out names and values, one a line."""
    rows = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        rows.append((name.replace("_", " "), str(value)))
    return text_table(("", ""), rows).partition("\n")[2]


def _made_of(about: Mapping[str, Any]) -> str:
    """Name a saved program with what it was made with."""
    if about["recipe"] is None:
        return f"your own {about['kind']}"
    return recipe.show(about["recipe"]).partition(".")[2]


def _say_written(folder: Path, files: Iterable[Path]) -> None:
    typer.echo(f"Written to {folder}: {', '.join(file.name for file in files)}", err=True)


def main() -> None:
    """Run the command line; what a user can get wrong is told in one line."""
    warnings.showwarning = lambda message, *_: typer.echo(f"ppl-models: {message}", err=True)
    try:
        app(standalone_mode=True)
    except (ValueError, ArithmeticError, OSError) as error:
        typer.echo(f"ppl-models: {error}", err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        typer.echo("ppl-models: there is not enough memory for sizes like these.", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:
            typer.echo("ppl-models: interrupted.", err=True)
        raise


if __name__ == "__main__":
    main()

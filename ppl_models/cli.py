"""The command line: models, guides, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from guides.fitting import for_model
from guides.registry import GUIDES, MODELS, build, lookup
from ppl_models.core.table import text_table
from ppl_models.data import Dataset, load
from ppl_models.evaluate import compare as compare_guides
from ppl_models.infer import NUTS

app = typer.Typer(
    name="ppl-models",
    help="Deep probabilistic models in Pyro: train them, swap guides, see how good the guides are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="A model by name, as `ppl-models models` lists them.")]
Data = Annotated[str, typer.Option("--data", help="Data set, such as digits (needs no download).")]


@app.command()
def models() -> None:
    """List the models, and the guides that `compare` takes for each.

    Example: ppl-models models
    """
    rows = [(e.name, e.summary, ", ".join(e.guides)) for e in MODELS.values()]
    typer.echo(text_table(("model", "what it is", "guides compared"), rows))


@app.command()
def guides(model: Model, data: Data = "digits") -> None:
    """List the guides and families that fit a model, and why the others do not.

    Example: ppl-models guides vae
    """
    typer.echo(str(for_model(build(model, _data(model, data)))))


@app.command()
def compare(
    model: Model,
    data: Data = "digits",
    guides: Annotated[
        str | None,
        typer.Option(
            help=f"Guides to compare, with commas between: {', '.join(GUIDES)}. "
            "By default those that `ppl-models models` shows."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.", min=1)] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows in a training step.", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 3e-3,
    particles: Annotated[int, typer.Option(help="Draws a row for log p(x).", min=2)] = 1000,
    reference: Annotated[
        bool, typer.Option(help="Sample a few test rows by NUTS, to compare with.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="Where to work: cpu, cuda, cuda:1.")] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads; small models are fastest on one.", min=1)
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for scorecard.csv and scorecard.html; made if missing."),
    ] = None,
) -> None:
    """Train a model with several guides from the same start, and score them on test rows.

    Example: ppl-models compare vae --guides amortized,flow --epochs 50 --out report
    """
    torch.set_num_threads(threads)
    dataset = _data(model, data)
    entry = lookup("model", model, MODELS)
    names = entry.guides if guides is None else tuple(name.strip() for name in guides.split(","))
    rows = len(dataset.x)
    factories = {}
    for name in names:
        make = lookup("guide", name, GUIDES)
        factories[name] = lambda program, make=make: make(program, rows)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must name a folder, but '{out}' is a file.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    typer.echo(f"{model} on {_describe(dataset)}: {', '.join(names)}", err=True)
    card = compare_guides(
        build(model, dataset, seed=seed),
        factories,
        dataset.x,
        dataset.x_test,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        particles=particles,
        seed=seed,
        device=device,
        reference=NUTS() if reference else None,
    )
    typer.echo(str(card))
    if out is not None:
        card.to_pandas().to_csv(out / "scorecard.csv")
        card.to_html(out / "scorecard.html")
        typer.echo(f"Written: {out / 'scorecard.csv'}, {out / 'scorecard.html'}", err=True)


def _data(model: str, data: str) -> Dataset:
    """Load a data set in the form that a model needs."""
    return load(data, binarize=lookup("model", model, MODELS).binarize)


def _describe(data: Dataset) -> str:
    form = f", binarised by {data.binarize}" if data.binarize else ""
    return f"{data.name}{form} ({len(data.x)} training rows, {len(data.x_test)} test rows)"


def main() -> None:
    """Run the command line; what a user can get wrong is told in one line."""
    try:
        app(standalone_mode=True)
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"ppl-models: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

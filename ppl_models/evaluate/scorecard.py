"""The scorecard: what is known of several guides, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ppl_models.core.table import text_table
from ppl_models.evaluate.estimate import Estimate
from ppl_models.infer import Fit, Posterior

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.figure import Figure

    from ppl_models.core.picture import Canvas


@dataclass(frozen=True)
class Reference:
    """A guide beside NUTS, on a few test rows of the trained model.

    Attributes:
        mean_error: Root mean square difference of posterior means, in posterior scales.
        noise: What `mean_error` would be by Monte Carlo error alone.
        scale_ratio: Geometric mean of the guide's posterior scales over those of NUTS.
        posterior: The draws of NUTS.
    """

    mean_error: float
    noise: float
    scale_ratio: float
    posterior: Posterior = field(repr=False)


@dataclass(frozen=True)
class Entry:
    """One guide's row of a scorecard.

    Attributes:
        name: Its name.
        model: The model that was trained with it.
        guide: The guide, trained.
        fit: How the training went.
        elbo: Bound on test rows, nats per row.
        evidence: Log p(x) of test rows by importance sampling; None if it has no rows.
        active: Local latent units whose posterior mean varies over test rows, and all of them.
        parameters: Trained numbers of the guide.
        test_seconds: Time to reach the posterior of the test rows: a pass through a network, or an
            optimisation.
        refined: Whether the test rows needed an optimisation.
        reference: Comparison with NUTS; None where NUTS cannot be run.
    """

    name: str
    model: Callable[..., Any] = field(repr=False)
    guide: Callable[..., Any] = field(repr=False)
    fit: Fit
    elbo: Estimate
    evidence: Estimate | None
    active: tuple[int, int]
    parameters: int
    test_seconds: float
    refined: bool
    reference: Reference | None

    @property
    def gap(self) -> float | None:
        """Log p(x) - ELBO: how far the guide is from the posterior, nats per row."""
        return None if self.evidence is None else self.evidence.mean - self.elbo.mean

    @property
    def gap_se(self) -> float | None:
        """Standard error of `gap`."""
        return None if self.evidence is None else math.hypot(self.evidence.se, self.elbo.se)


@dataclass(frozen=True)
class Scorecard:
    """Guides side by side; prints as a table.

    Attributes:
        entries: One for each guide, in the order given.
        settings: What was the same for all.
        notes: What was not, and what to beware of.
    """

    entries: tuple[Entry, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no entry '{name}'; there are {[entry.name for entry in self.entries]}")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def to_pandas(self) -> pd.DataFrame:
        """Return the figures as a data frame, one row a guide."""
        return pd.DataFrame([_record(entry) for entry in self.entries]).set_index("guide")

    def to_html(self, path: str | Path) -> None:
        """Write the table, the settings and the notes as a page."""
        table = self.to_pandas().to_html(float_format="{:.3f}".format, na_rep="-")
        lines = "".join(f"<li>{line}</li>" for line in self._footnotes())
        page = (
            f"<!doctype html><meta charset='utf-8'><title>Scorecard</title>{table}<ul>{lines}</ul>"
        )
        Path(path).write_text(page, encoding="utf-8")

    def plot(self, *, figure: Canvas | None = None) -> Figure:
        """Draw the guides as rows: ELBO and log p(x), gap, posterior scale, time.

        Error bars are two standard errors to each side. What an entry does not have is left out of
        its row.

        Arguments:
            figure: A figure or subfigure to draw into, such as `plt.figure()` for a window; by
                default a new picture, which shows itself in a notebook and has `savefig`.

        Example:
            >>> from guides import Amortized
            >>> from ppl_models import PPCA
            >>> from ppl_models.evaluate import compare
            >>> model = PPCA(data_dim=5, latent_dim=2)
            >>> x = model(size=64)
            >>> card = compare(model, {"mine": Amortized}, x, x, steps=2, reference=None)
            >>> [label.get_text() for label in card.plot().axes[0].get_yticklabels()]
            ['mine']
        """
        from ppl_models.evaluate.plots import plot_scorecard

        return plot_scorecard(self, figure=figure)

    def __str__(self) -> str:
        head = (
            "guide",
            "ELBO",
            "log p(x)",
            "gap",
            "active",
            "train s",
            "test s",
            "params",
            "mean err",
            "scale",
        )
        table = text_table(head, [_cells(entry) for entry in self.entries], right=" " + "r" * 9)
        return "\n".join([table, *(f"  {line}" for line in self._footnotes())])

    def _footnotes(self) -> list[str]:
        same = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        beside = any(entry.reference is not None for entry in self.entries)
        reference = [
            "mean err, scale: posterior means and scales against NUTS on the same trained model.",
            "Perfect are a gap of 0, a mean err of 0 and a scale of 1.",
        ]
        return [
            "ELBO, log p(x) and gap = log p(x) - ELBO in nats per test row, +- Monte Carlo error.",
            *(reference if beside else ["Perfect is a gap of 0."]),
            f"Same for all: {same}.",
            *self.notes,
        ]


def _record(entry: Entry) -> dict[str, Any]:
    evidence, reference = entry.evidence, entry.reference
    return {
        "guide": entry.name,
        "elbo": entry.elbo.mean,
        "elbo_se": entry.elbo.se,
        "log_evidence": evidence.mean if evidence else math.nan,
        "log_evidence_se": evidence.se if evidence else math.nan,
        "log_evidence_bias": evidence.bias if evidence else math.nan,
        "gap": entry.gap if entry.gap is not None else math.nan,
        "gap_se": entry.gap_se if entry.gap_se is not None else math.nan,
        "active_units": entry.active[0],
        "units": entry.active[1],
        "train_seconds": entry.fit.seconds,
        "test_seconds": entry.test_seconds,
        "parameters": entry.parameters,
        "mean_error": reference.mean_error if reference else math.nan,
        "mean_error_noise": reference.noise if reference else math.nan,
        "scale_ratio": reference.scale_ratio if reference else math.nan,
    }


def _cells(entry: Entry) -> list[str]:
    figures = _record(entry)

    def pair(name: str) -> str:
        if math.isnan(figures[name]):
            return "-"
        return f"{figures[name]:.3f} +- {figures[f'{name}_se']:.3f}"

    reference = entry.reference
    return [
        entry.name,
        pair("elbo"),
        pair("log_evidence"),
        pair("gap"),
        f"{entry.active[0]}/{entry.active[1]}",
        f"{entry.fit.seconds:.1f}",
        f"{entry.test_seconds:.1f}",
        f"{entry.parameters:,}",
        f"{reference.mean_error:.2f}" if reference else "-",
        f"{reference.scale_ratio:.2f}" if reference else "-",
    ]

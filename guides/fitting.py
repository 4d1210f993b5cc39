"""Which guides fit a model, and why the others do not."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from guides import families
from guides.amortized import Amortized
from guides.deep_set import DeepSet
from guides.dlgm import Ladder
from guides.ensemble import Ensemble
from guides.exact import Exact
from guides.local import Local
from ppl_models.bnn import Tasks
from ppl_models.core.batch import as_batch
from ppl_models.core.sites import describe, example_batch, site_table
from ppl_models.core.table import text_table
from ppl_models.dlgm import DeepLatentGaussian


@dataclass(frozen=True)
class Choice:
    """One guide, or one family for one site.

    Attributes:
        name: What to write.
        fits: Whether it can serve the model.
        why: For a guide, the reason if it does not fit, and what it is good for if it does; for a
            family, the values that it can take.
        site: The latent that a family is for; empty for a guide.
        support: The support of that latent, in words.
    """

    name: str
    fits: bool
    why: str
    site: str = ""
    support: str = ""


@dataclass(frozen=True)
class Choices:
    """The guides and families of a model; prints as a table."""

    choices: tuple[Choice, ...]

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def fitting(self) -> tuple[str, ...]:
        """Names of the guides that fit."""
        return tuple(c.name for c in self.choices if c.fits and not c.site)

    def __str__(self) -> str:
        blocks = [
            text_table(
                ("guide", "fits", "why"),
                [(c.name, "yes" if c.fits else "no", c.why) for c in self.choices if not c.site],
            )
        ]
        alike: dict[str, list[str]] = {}  # what is said of families, and the sites it is said of
        for site in dict.fromkeys(c.site for c in self.choices if c.site):
            rows = [choice for choice in self.choices if choice.site == site]
            lines = _wrapped(
                "these fit, the first is the default:", [c.name for c in rows if c.fits]
            )
            lines += _wrapped(
                "the others need other values:", [f"{c.name} ({c.why})" for c in rows if not c.fits]
            )
            alike.setdefault("\n".join(lines), []).append(f"'{site}', {rows[0].support}")
        for said, sites in alike.items():
            title = textwrap.wrap(f"families for {'; '.join(sites)}", 98, subsequent_indent="  ")
            blocks.append("\n".join([*title, said]))
        return "\n\n".join(blocks)


def for_model(model: Callable[..., Any], *, example: Any = None, plate: str = "data") -> Choices:
    """List the guides that fit a model, and why the others do not.

    Arguments:
        model: Any Pyro model.
        example: A batch of two or more rows to trace the model with; required unless the model can
            draw one with `model(size=2)`.
        plate: Name of the plate over rows.

    Example:
        >>> from ppl_models import VAE
        >>> for_model(VAE(data_dim=4, latent_dim=2)).fitting
        ('Amortized(model)', 'Local(model, rows=len(x))')
    """
    batch = as_batch(example_batch(model, example), model)
    table = site_table(model, *batch, plate=plate)
    tries: list[tuple[str, Callable[[], Any], str]] = [
        (
            "Amortized(model)",
            lambda: Amortized(model, example=batch, plate=plate, hidden=()),
            "a network reads each row; serves new rows at once",
        ),
        (
            "Local(model, rows=len(x))",
            lambda: Local(model, rows=len(batch[0]) if batch else 1, example=batch, plate=plate),
            "free parameters for each row; new rows need refine(x)",
        ),
        (
            "Ensemble(model)",
            lambda: Ensemble(model, example=batch, plate=plate),
            "a few MAP estimates from different starts, for what all rows share; no bound",
        ),
        ("Exact(model)", lambda: Exact(model, example=batch, plate=plate), "the posterior itself"),
    ]
    if isinstance(model, DeepLatentGaussian):  # a guide made for one model is not listed for others
        why = (
            "top-down: at each layer the prior meets what the data say; needs kl_weight to warm up"
        )
        tries.append(("Ladder(model)", lambda: Ladder(model, example=batch, plate=plate), why))
    if isinstance(model, Tasks):
        why = "a network reads each task as a set; `given(x, y)` serves a new one at once"
        tries.append(("DeepSet(model)", lambda: DeepSet(model, example=batch, plate=plate), why))
    choices = []
    for name, make, good_for in tries:
        try:
            make()
            choices.append(Choice(name, True, good_for))
        except ValueError as error:
            choices.append(Choice(name, False, str(error).partition(": ")[2]))
    for site in table.latents:
        for family in families.ALL:
            fits = family.refuses(site) is None
            support = describe(site.support)
            choices.append(Choice(family.name, fits, family.wants, site.name, support))
    return Choices(tuple(choices))


def _wrapped(title: str, items: list[str]) -> list[str]:
    text = f"{title} {'; '.join(items) or 'none'}"
    return textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")

"""Pictures: figures that show themselves, in one look, without pyplot.

Nothing here touches what matplotlib keeps for a whole process: no list of figures, no backend, and
the look is in force only while something is drawn. What draws is imported when it is first asked
for, because matplotlib takes a third of a second.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias, final

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

#: What a picture can be drawn into.
Canvas: TypeAlias = Figure | SubFigure

# Ten colours that stay apart for the colour-blind: Petroff (2021), https://arxiv.org/abs/2107.02270
COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#832db6",
    "#717581",
    "#e76300",
    "#a96b59",
    "#92dadd",
    "#94a4a2",
    "#b9ac70",
)
BLUE, ORANGE, RED = COLOURS[:3]
DARK = "#1f4e79"
GREY = "#717581"

# Sizes of letters are relative: those of the user's own settings remain.
_LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelsize": "small",
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.dpi": 110,
    "figure.titlesize": "medium",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
}


@final
class Picture(Figure):
    """A figure that shows itself in a notebook and is saved with `savefig`.

    pyplot does not know it, so it opens no window and needs no closing. For a window, draw into
    axes or a figure of pyplot: `plot(ax=plt.gca())` or `plot(figure=plt.gcf())`, `plt.show()`. (A
    notebook shows what pyplot knows by itself: there, do not end a cell with it as well.)

    Example:
        >>> figure = picture(4, 3)
        >>> axes = figure.subplots()
        >>> figure._repr_png_()[1:4]
        b'PNG'
    """

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write to a file as matplotlib does, with 200 dots per inch unless `dpi` says otherwise."""
        options.setdefault("dpi", 200)
        super().savefig(fname, **options)

    def show(self, warn: bool = True) -> NoReturn:
        """Say how to see the picture."""
        raise RuntimeError(
            "Picture: it has no window. In a notebook end a cell with it; in a script write "
            "`.savefig('picture.png')`; for a window draw into pyplot's axes or figure, "
            "`plot(ax=plt.gca())` or `plot(figure=plt.gcf())`, and call `plt.show()`."
        )

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


@contextmanager
def drawing() -> Iterator[None]:
    """Run a block in the look of the library, then put matplotlib's settings back."""
    with matplotlib.rc_context(_LOOK):
        yield


def picture(width: float, height: float) -> Picture:
    """Return an empty picture.

    Arguments:
        width: In inches.
        height: In inches.
    """
    with drawing():
        return Picture(figsize=(width, height), layout="constrained")


def axes_for(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes to draw into: those given, or those of a new picture."""
    return picture(width, height).subplots() if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes are in."""
    figure: Any = ax.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def to_array(value: Tensor | np.ndarray) -> np.ndarray:
    """Return numbers to draw, from wherever they are."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)

"""Pictures: they show themselves, and leave nothing behind in matplotlib."""

from __future__ import annotations

import io
import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ppl_models.core.picture import Picture, axes_for, drawing, figure_of, picture, to_array


def run(script) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def settings() -> dict:
    """Return matplotlib's settings as they are: to ask for the backend would choose one."""
    return {name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams}


def test_importing_the_library_imports_no_matplotlib_and_drawing_no_pyplot() -> None:
    run("""
import sys
import ppl_models, ppl_models.infer, ppl_models.evaluate, guides, guides.registry
assert "plot_samples" in dir(ppl_models.evaluate)
assert not hasattr(ppl_models.evaluate, "plot_nothing")
assert not [name for name in sys.modules if name.startswith("matplotlib")]

import io, matplotlib, torch

def settings():
    return {name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams}

from guides import Exact
from ppl_models import PPCA
from ppl_models.evaluate import compare, plot_interpolation, plot_latents, plot_reconstructions
from ppl_models.evaluate import plot_samples
from ppl_models.infer import Posterior, fit
before = settings()
model = PPCA(12, 2)
x, guide = model(size=8).detach(), Exact(model)
card = compare(model, {"exact": Exact}, x, x, steps=1, particles=2, reference=None, progress=False)
posterior = Posterior({"z": torch.randn(2, 20)})
figures = [
    fit(model, guide, x, steps=2, progress=False).plot(), card.plot(), posterior.plot(),
    posterior.plot_pairs(), plot_reconstructions(model, guide, x, image_shape=(3, 4)),
    plot_samples(model, 4, image_shape=(3, 4)), plot_latents(model, guide, x, image_shape=(3, 4)),
    plot_interpolation(model, guide, x, image_shape=(3, 4)),
]
for figure in figures:
    figure.savefig(io.BytesIO())
    assert figure._repr_png_().startswith(b"\\x89PNG")
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
""")


def test_a_picture_is_a_png_of_its_own_size() -> None:
    figure = picture(4, 3)
    figure.subplots().plot([0, 1])
    image = matplotlib.image.imread(io.BytesIO(figure._repr_png_()))
    assert image.shape[:2] == (330, 440)
    assert (image[..., :3] < 0.9).any()


def test_savefig_is_sharp_unless_told_otherwise() -> None:
    figure = picture(4, 3)
    for options, width in (({}, 800), ({"dpi": 50}, 200)):
        file = io.BytesIO()
        figure.savefig(file, **options)
        file.seek(0)
        assert matplotlib.image.imread(file).shape[1] == width


def test_a_notebook_shows_a_picture_once_with_pyplot_or_without() -> None:
    pytest.importorskip("ipykernel")
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    make = "from ppl_models.core.picture import picture\nf = picture(2, 2)\na = f.subplots()"
    codes = (make, "f", "g = f", "import matplotlib.pyplot", make, "f", "g = f")
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    shown = [[o for o in cell.outputs if "image/png" in o.get("data", {})] for cell in cells]
    assert [len(images) for images in shown] == [0, 1, 0, 0, 0, 1, 0]


def test_show_says_how_a_picture_is_seen() -> None:
    with pytest.raises(RuntimeError, match=r"notebook.*savefig.*plt\.gca"):
        picture(2, 2).show()


def test_the_look_is_in_force_while_drawing_only() -> None:
    before = settings()
    with drawing():
        assert matplotlib.rcParams["axes.grid"]
    with pytest.raises(ZeroDivisionError), drawing():
        _ = 1 / 0
    assert settings() == before
    assert not matplotlib.rcParams["axes.grid"]


def test_letters_keep_the_size_that_the_user_has_set() -> None:
    with matplotlib.rc_context({"font.size": 20.0}):
        large = picture(2, 2).subplots().set_title("t").get_fontsize()
    assert large == 2 * picture(2, 2).subplots().set_title("t").get_fontsize()


def test_axes_are_those_given_and_their_figure_is_found() -> None:
    own = Figure()
    ax = own.subfigures(1, 2)[1].subplots()
    assert axes_for(ax, 1, 1) is ax
    assert figure_of(ax) is own
    assert isinstance(figure_of(axes_for(None, 1, 1)), Picture)


def test_tensors_become_arrays_wherever_they_are() -> None:
    value = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    array = to_array(value)
    assert array.dtype == np.float64
    assert array.tolist() == [1.0, 1.0]

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
LIMIT = 300_000  # bytes in a notebook, outputs included
ADDRESS = re.compile(r"https?://\S+")
MACHINE_PATH = re.compile(
    r"""(?:^|[\s"'(=:\[])          # where a path begins
    (?:/(?:home|root|Users|tmp|work|opt|mnt|usr|var|private|workspace)/|[A-Z]:\\|\S*site-packages/)
    """,
    re.MULTILINE | re.VERBOSE,
)

each_tutorial = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def _notebook(script: Path) -> nbformat.NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _texts(output: nbformat.NotebookNode) -> list[str]:
    """Whatever of an output is text: streams, results, tables, tracebacks, but no pictures."""
    data = output.get("data", {})
    shown = [value for kind, value in data.items() if kind.startswith("text/")]
    return [output.get("text", ""), *shown, *output.get("traceback", [])]


def test_there_is_a_tutorial() -> None:
    assert SCRIPTS


@each_tutorial
def test_it_runs_through_in_a_few_steps(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "SMOKE": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@each_tutorial
def test_script_and_notebook_have_the_same_cells(script: Path) -> None:
    written = jupytext.reads(script.read_text("utf-8"), fmt="py:percent")
    read = jupytext.reads(script.with_suffix(".ipynb").read_text("utf-8"), fmt="ipynb")
    assert [(cell.cell_type, cell.source) for cell in written.cells] == [
        (cell.cell_type, cell.source) for cell in read.cells
    ]


@each_tutorial
def test_the_notebook_was_run_from_top_to_bottom(script: Path) -> None:
    notebook = _notebook(script)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in _outputs(notebook))


@each_tutorial
def test_no_cell_ended_in_an_error_or_a_warning(script: Path) -> None:
    for output in _outputs(_notebook(script)):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output


@each_tutorial
def test_a_notebook_is_small(script: Path) -> None:
    size = script.with_suffix(".ipynb").stat().st_size
    assert size <= LIMIT, f"{size} bytes: fewer or smaller pictures, or a lower figure.dpi"


@each_tutorial
def test_the_outputs_name_no_path_of_a_machine(script: Path) -> None:
    for output in _outputs(_notebook(script)):
        for text in _texts(output):
            found = MACHINE_PATH.search(ADDRESS.sub("", text))
            assert found is None, f"{found and found.group()!r} in:\n{text[:2000]}"


def test_the_search_for_paths_finds_them_and_nothing_else() -> None:
    assert MACHINE_PATH.search("File /home/somebody/x.py")
    assert MACHINE_PATH.search("in '/tmp/x'")
    assert MACHINE_PATH.search(".venv/lib/python3.11/site-packages/pyro/util.py:442: UserWarning")
    assert not MACHINE_PATH.search("-8.716 nats/row, rows/s")


@each_tutorial
def test_the_reading_order_names_it(script: Path) -> None:
    assert f"({script.stem}.ipynb)" in (ROOT / "tutorials" / "README.md").read_text("utf-8")

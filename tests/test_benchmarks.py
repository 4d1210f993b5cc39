"""The benchmarks: each says what it measures, without running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "argparse" in path.read_text("utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_teaches_without_running(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"python benchmarks/{script.name}" in shown.stdout  # an example to paste
    assert not list(tmp_path.iterdir())

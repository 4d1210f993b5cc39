"""Where a result came from: written beside every result, so that it can be made again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ppl_models

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "pyro-ppl", "zuko", "numpy")


def write(name: str, title: str, table: str, rows: list[dict[str, Any]]) -> None:
    """Write a table as `results/NAME.md` for readers and its rows as `results/NAME.json`."""
    about = origin()
    lines = "\n".join(f"- {key}: {value}" for key, value in about.items())
    RESULTS.mkdir(exist_ok=True)
    page = f"# {title}\n\n```text\n{table}\n```\n\n{lines}\n"
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    text = json.dumps({"origin": about, "rows": rows}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(page)


def origin() -> dict[str, Any]:
    """Say what made a result: command, commit, machine, versions, load."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join(["python", str(script), *map(_short, sys.argv[1:])]),
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "-s", "--", ":/", ":!/benchmarks/results") else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {device}",
        "threads": torch.get_num_threads(),
        "load": "{:.1f} (1 minute), {:.1f} (5 minutes) at the end".format(*os.getloadavg()),
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                f"ppl-models {ppl_models.__version__}",
                *(f"{package} {version(package)}" for package in PACKAGES),
            ]
        ),
    }


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _short(argument: str) -> str:
    """Leave out where things lie on this machine: the last three parts of a path tell what it is."""
    parts = Path(argument).parts
    return "/".join(parts[-3:]) if argument.startswith("/") and len(parts) > 3 else argument

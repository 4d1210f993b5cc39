"""Every command that README, docs, tutorials and `--help` show is run here, as it is written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits, load_wine
from typer.main import get_command
from typer.testing import CliRunner

from ppl_models import cli

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "tutorials").glob("*.md"),
        *(ROOT / "tutorials").glob("*.py"),
    ]
)
FENCE = re.compile(r"^(?:# )?```bash\n(.*?)^(?:# )?```", re.MULTILINE | re.DOTALL)
#: What is not run here, and where it is.
ELSEWHERE = {
    "pip install -c constraints.txt . && ppl-models compare vae": "by .ci/run",
    'pip install -c constraints.txt -e ".[test]" && pytest': "by .ci/run",
}


def shown(text: str) -> Iterator[str]:
    """Yield the commands in the fenced bash blocks of a text, comments cut off."""
    for block in FENCE.findall(text):
        for line in block.splitlines():
            command = line.removeprefix("# ").partition(" #")[0].strip()
            if command and not command.startswith("#"):
                yield command


def helped() -> Iterator[tuple[str, list[str]]]:
    """Yield each command's name and the examples that its help shows."""
    for name in get_command(cli.app).commands:
        help = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"}).output
        lines = [line.strip() for line in help.splitlines()]
        yield name, [line for line in lines if line.startswith("ppl-models ")]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the texts call a reader's own."""
    monkeypatch.chdir(tmp_path)
    wine = load_wine(as_frame=True)
    table = wine.data.assign(cultivar=np.array(["one", "two", "three"])[wine.target])
    table.to_csv("wine.csv", index=False)
    patients = load_diabetes(as_frame=True)
    patients.data.assign(progression=patients.target).to_csv("patients.csv", index=False)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(load_digits().images[:60]):
        picture = Image.fromarray((image * 15.9).astype(np.uint8)).resize((20, 24))
        picture.save(tmp_path / "photos" / f"{number:03}.png")
    return tmp_path


def run(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "ppl-models", command
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        result = CliRunner().invoke(cli.app, words[1:])
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    assert result.stdout.strip(), command


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_text_run_in_their_order(path: Path, place: Path) -> None:
    for command in shown(path.read_text("utf-8")):
        if command in ELSEWHERE:
            continue
        if command.startswith("ppl-models"):
            run(command)
        elif command.startswith(("SMOKE=1 python tutorials/", "python benchmarks/")):
            script = ROOT / command.removeprefix("SMOKE=1 ").split()[1]
            assert script.exists(), command  # tutorials are run by test_tutorials.py
        else:
            assert path.name == "CONTRIBUTING.md" or command.startswith("pip install"), (
                f"{path.name} shows a command that nothing runs: {command}"
            )


def test_the_examples_of_help_run_in_their_order(place: Path) -> None:
    examples = dict(helped())
    assert all(examples.values()), (
        f"without an example: {[k for k, v in examples.items() if not v]}"
    )
    for name in sorted(examples, key=lambda name: name != "fit"):  # others read what fit has saved
        for example in examples[name]:
            assert example.startswith(f"ppl-models {name}")
            run(example)


def test_the_help_of_every_option_has_an_example_or_is_a_switch() -> None:
    for name, command in get_command(cli.app).commands.items():
        assert command.help, name
        for option in command.params:
            if option.name == "help":
                continue
            assert option.help, f"{name} {option.name}"
            if option.param_type_name == "option" and not option.is_flag:
                assert f"Such as {option.opts[0]} " in option.help, f"{name} {option.opts[0]}"


def test_the_checks_of_a_submission_run_the_first_command_of_the_readme() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    for command in ELSEWHERE:
        assert command in (ROOT / "README.md").read_text("utf-8")
        assert command in text

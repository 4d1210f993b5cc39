"""The library as a whole: what imports what, what importing does, what the README says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import guides
import ppl_models
import ppl_models.data
import ppl_models.evaluate
import ppl_models.infer
from guides import families
from guides.registry import MODELS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("ppl_models", "guides") for p in (ROOT / folder).rglob("*.py"))

# What each part may import of the others; the command line and saved runs may import everything.
ALLOWED = {
    "ppl_models.core": {"ppl_models.core"},
    "ppl_models.parts": {"ppl_models.core", "ppl_models.parts"},
    "ppl_models.data": {"ppl_models.core", "ppl_models.data"},
    "ppl_models.infer": {"ppl_models.core", "ppl_models.parts", "ppl_models.infer"},
    "ppl_models.evaluate": {"ppl_models.core", "ppl_models.infer", "ppl_models.evaluate"},
    "ppl_models": {"ppl_models", "ppl_models.core", "ppl_models.parts"},  # a model's own file
}


def part(module: str) -> str:
    words = module.split(".")
    return ".".join(words[:2]) if ".".join(words[:2]) in ALLOWED else words[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("ppl_models", "guides")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module.startswith("guides") or module in ("ppl_models.cli", "ppl_models.runs"):
        return
    used = {part(name) for name in imports(path)}
    assert used <= ALLOWED[part(module)], f"{module} imports {used - ALLOWED[part(module)]}"


def test_importing_changes_no_setting_and_draws_nothing() -> None:
    script = """
import pyro, torch

def settings():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            pyro.settings.get(), hash(tuple(torch.get_rng_state().tolist())),
            list(pyro.get_param_store()))

before = settings()
import ppl_models, ppl_models.infer, ppl_models.evaluate, ppl_models.data, ppl_models.cli
import guides, guides.registry
if settings() != before:
    raise SystemExit(f"{before} became {settings()}")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_once() -> None:
    for module in (ppl_models, guides, ppl_models.infer, ppl_models.evaluate, ppl_models.data):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name)


def test_the_readme_names_what_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for family in families.ALL:
        assert f"`{family.name}`" in text
    for name in ("Amortized", "Local", "Exact", "PPCA", "VAE", *(m for m in MODELS)):
        assert name in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link
    assert re.findall(r"^pip install .*", text, re.MULTILINE)[:2] == [
        "pip install -c constraints.txt . && ppl-models compare vae",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch) -> None:
    torch.set_default_dtype(torch.float32)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(first, "README.md", "exec"), scope)  # noqa: S102 - our own text
    slope = scope["guide"].q("slope")
    exec(compile(second, "README.md", "exec"), scope)  # noqa: S102 - our own text
    for name in ("bounds.png", "reconstructions.png", "latents.png", "runs/digits/config.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert abs(slope.mean.item() - 1.5) < 0.15
    assert slope.stddev.item() < 0.05

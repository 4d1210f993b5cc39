"""Compiled steps: built once, kept, found again; and training goes on when any of that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from guides import Amortized
from ppl_models import PPCA
from ppl_models.infer import Fit, compile, fit


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PPL_MODELS_CACHE", str(tmp_path))
    compile.folder.cache_clear()
    yield
    compile.folder.cache_clear()


def trained(**options: Any) -> Fit:
    torch.manual_seed(0)
    model = PPCA(data_dim=3, latent_dim=1)
    x = torch.randn(12, 3)
    return fit(
        model, Amortized(model, hidden=(2,)), x, seed=0, **{"steps": 6, "compile": "now"} | options
    )


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == kind)


def test_a_step_is_built_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained()
    assert first.compiled.startswith("compiled from step 2")
    kept = {path.name: path.stat().st_mtime_ns for path in files(tmp_path, ".so")}
    assert len(kept) == 1
    monkeypatch.setattr(compile._Compiler, "build", lambda *job: pytest.fail("built again"))
    again = trained()
    assert torch.equal(again.bounds, first.bounds)
    assert {path.name: path.stat().st_mtime_ns for path in files(tmp_path, ".so")} == kept
    # What is left are the step, its note and the note of products that were timed.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_damaged_is_not_loaded_but_built_anew(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = trained()
    (kept,) = files(tmp_path, ".so")
    kept.write_bytes(kept.read_bytes()[:1000] + b"rubbish")
    assert torch.equal(trained().bounds, first.bounds)
    assert len(files(tmp_path, ".so")) == 1
    told = capfd.readouterr().err
    assert "is damaged; it is compiled anew." in told
    assert told.count("\n") == 1
    (note,) = files(tmp_path, ".txt")
    note.write_bytes(b"\xff\x00../../etc")
    assert trained().compiled.startswith("compiled")
    assert "it is compiled anew." in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PPL_MODELS_CACHE", str(tmp_path / "file" / "steps"))
    assert trained().compiled.startswith("compiled")
    told = capfd.readouterr().err
    assert "cannot be written to" in told
    assert "Set PPL_MODELS_CACHE" in told
    assert told.count("\n") == 1


def test_a_step_that_cannot_be_kept_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compile.os, "replace", refuse)
        assert trained().compiled.startswith("compiled from step 2")
    assert "cannot be kept in" in capfd.readouterr().err


def test_a_compiler_that_fails_is_told_in_a_line_and_the_graph_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    compile._compiler().stop()  # the next one starts with the broken compiler
    try:
        result = trained()
    finally:
        compile._compiler().stop()
    assert result.compiled.startswith("traced graph; not compiled: ")
    assert "\n" not in result.compiled
    assert result.steps == 6


def test_a_process_of_the_compiler_that_dies_is_told_and_the_next_job_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compile, "sys", type("sys", (), {"executable": "/bin/false"}))
        compile._compiler().stop()
        result = trained()
    assert "the process of the compiler ended without an answer" in result.compiled
    assert trained().compiled.startswith("compiled")


def test_no_compiler_at_all_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    result = trained()
    assert result.compiled == (
        "traced graph; not compiled: no C++ compiler was found; install g++ or clang++, or name "
        "one in CXX"
    )


@pytest.mark.parametrize("command", ["/bin/false", "/nonexistent/g++", "nothing g++"])
def test_a_compiler_that_does_not_work_is_named(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", command)
    assert trained().compiled == (
        f"traced graph; not compiled: CXX={command} is no C++ compiler that works here"
    )


def test_a_compiler_may_be_a_command_of_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    try:
        assert trained().compiled.startswith("compiled from step 2")
    finally:
        compile._compiler().stop()


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    script = (
        "import torch; from guides import Amortized; from ppl_models import PPCA;"
        "from ppl_models.infer import fit; torch.set_num_threads(1); torch.manual_seed(0);"
        "m = PPCA(data_dim=3, latent_dim=1); x = torch.randn(12, 3);"
        "r = fit(m, Amortized(m, hidden=(2,)), x, steps=6, seed=0, compile='now');"
        "print(r.compiled, r.bounds.tolist())"
    )

    def run(_: int) -> str:
        environment = os.environ | {
            "PPL_MODELS_CACHE": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert not done.stderr
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, range(2))
    assert one == other == run(2)
    assert one.startswith("compiled from step 2")


def test_whatever_changes_the_machine_code_changes_the_key(tmp_path: Path) -> None:
    trained()
    trained(lr=0.5)
    assert len(files(tmp_path, ".txt")) == 1  # a rate is an input
    trained(optimizer=torch.optim.SGD)
    assert len(files(tmp_path, ".txt")) == 2


def test_products_are_timed_once_and_the_choice_is_kept(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = PPCA(data_dim=256, latent_dim=8)
    x = torch.randn(300, 256)

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        fresh = PPCA(data_dim=256, latent_dim=8)
        return fit(fresh, Amortized(fresh, hidden=(64,)), x, steps=6, seed=0, compile="now").bounds

    first = run()
    (note,) = files(tmp_path, ".json")
    choices = json.loads(note.read_text())
    assert choices
    assert set(choices.values()) <= {"mkl", "onednn"}
    for path in [*files(tmp_path, ".so"), *files(tmp_path, ".txt")]:
        path.unlink()
    assert torch.equal(run(), first)
    assert json.loads(note.read_text()) == choices
    assert model.data_dim == 256

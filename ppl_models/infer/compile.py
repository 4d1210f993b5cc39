"""Compiled steps: asked for, built in the background, kept in a cache for later processes.

A step is looked up by the hash of all that its machine code depends on. What is not there is built
by one process of the compiler, which serves this process until it has been idle for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ppl_models.infer import backend, updates
from ppl_models.infer.capture import LONG, Graph

CACHE = "PPL_MODELS_CACHE"  # folder of the cache
COMPILER = "PPL_MODELS_COMPILER"  # "none": never compile
IDLE = 120.0  # seconds after which the process of the compiler is let go


@dataclass(frozen=True)
class Plan:
    """What is to be compiled: the gradient of a bound, and the update of an optimiser.

    Attributes:
        graph: The gradient, as recorded.
        passed: What is passed to the graph besides what it holds: the rows and the data.
        kind: The optimiser, a key of `updates.STATE`, or None if it steps outside.
        options: Options of each of its groups.
        members: For each group, the gradients that are its own, by their place in the graph.
        states: Tensors that follow the inputs of the graph: for an optimiser in the graph the
            learning rates (G,), then for each group the powers (2,) and the state of each member;
            for one outside, a buffer for each gradient.
        per_member: State tensors that a member of a group has.
        narrow: Whether most loops are too short for the widest vectors of the machine.
    """

    graph: Graph
    passed: tuple[Tensor, ...]
    kind: str | None
    options: list[dict[str, Any]]
    members: list[list[int]]
    states: tuple[Tensor, ...]
    per_member: int
    narrow: bool = False

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """All that the compiled step is called with."""
        return tuple(v.detach() for v in (*self.graph.tensors, *self.passed, *self.states))

    @property
    def changing(self) -> list[Tensor]:
        """What the step changes in place, less the rows and the rates, which others set."""
        inputs, first = self.inputs, len(self.graph.tensors) + len(self.passed)
        states = inputs[first:] if self.kind is None else inputs[first + 1 :]
        leaves = self.graph.positions if self.kind is not None else ()
        return [*(inputs[place] for place in {*self.graph.changed, *leaves}), *states]

    @property
    def layout(self) -> dict[str, Any]:
        """How the inputs are laid out, for `updates.whole_step`."""
        groups = zip(self.options, self.members, strict=True)
        return {
            "arguments": len(self.graph.tensors) + len(self.passed),
            "leaves": list(self.graph.positions),
            "kind": self.kind,
            "groups": [
                {"options": options, "members": members, "states": self.per_member}
                for options, members in groups
            ],
        }

    def step(self, *inputs: Tensor) -> Tensor:
        """Take the step without a compiler, on other tensors than its own."""
        return updates.whole_step(self.graph.module.forward, self.layout, *inputs)

    def job(self) -> dict[str, Any]:
        """Describe it for the process of the compiler."""
        return self.layout | {
            "code": self.graph.module.code,
            "inputs": [
                [
                    list(v.shape),
                    list(v.stride()),
                    str(v.dtype).removeprefix("torch."),
                    str(v.device),
                ]
                for v in self.inputs
            ],
            "threads": torch.get_num_threads(),
            "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "narrow": self.narrow,
        }


def refusal(plan: Plan) -> str | None:
    """Return why a step cannot be compiled, where that can be told without trying."""
    if os.environ.get(COMPILER, "").lower() == "none":
        return f"{COMPILER}=none"
    if reason := backend.compiles_here():
        return reason
    devices = {value.device.type for value in plan.inputs}
    if devices == {"cuda"}:
        return None
    if devices != {"cpu"}:
        return f"the tensors are on {' and '.join(sorted(devices))}"
    if not _version_of(words := _cxx()):
        if os.environ.get("CXX"):
            return f"CXX={shlex.join(words)} is no C++ compiler that works here"
        return "no C++ compiler was found; install g++ or clang++, or name one in CXX"
    if plan.graph.nodes > LONG:
        return (
            f"the graph has {plan.graph.nodes} operations, which a compiler takes minutes for. "
            "Loops over particles, time steps or flow layers are unrolled: vectorise them"
        )
    written = {value.untyped_storage().data_ptr() for value in plan.changing} - {0}
    storages = [value.untyped_storage().data_ptr() for value in plan.inputs]
    if any(storages.count(storage) > 1 for storage in written):
        return "a tensor that the step changes shares its memory with another one"
    return None


def compiled(plan: Plan) -> Future[Path | None]:
    """Return the shared object of a step, from the cache or, in due time, from the compiler.

    On a GPU it is None: there the graph is captured and replayed.

    The future raises `backend.Unsupported`, with the reason, if it cannot be built.
    """
    done: Future[Path | None] = Future()
    if plan.inputs[0].device.type == "cuda":
        done.set_result(None)
        return done
    job = plan.job()
    key = _key(json.dumps(job, sort_keys=True))
    if (found := _find(key)) is None:
        return _compiler().build(job | {"cxx": _cxx()}, key)
    done.set_result(found)
    return done


@functools.cache
def folder() -> Path:
    """Return the folder of compiled steps, which can be written to."""
    import pooch

    given = os.environ.get(CACHE)
    place = Path(given).expanduser() if given else Path(pooch.os_cache("ppl-models"), "steps")
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".probe-{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        _say(
            f"the cache of compiled steps, {place}, cannot be written to ({error.strerror}); steps "
            f"are compiled for this process only. Set {CACHE} to a folder that can be."
        )
        place = Path(tempfile.mkdtemp(prefix="ppl-models-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _say(line: str) -> None:
    """Say in one line, on standard error, what happened: training goes on."""
    print(f"ppl-models: {line}", file=sys.stderr)


def _key(job: str) -> str:
    told = (
        job,
        _own_code(),
        torch.__version__,
        _processor(),
        shlex.join(_cxx()),
        _version_of(_cxx()),
    )
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]


@functools.cache
def _own_code() -> str:
    """What turns a graph into machine code: a later version of it finds nothing of an earlier one."""
    own = (Path(backend.__file__), Path(backend.__file__).with_name("updates.py"))
    return "".join(path.read_text() for path in own)


@functools.cache
def _processor() -> str:
    """What code made for this very processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join(sorted(told))


def _choices() -> Path:
    """Return the note of which library multiplies which matrices faster, on this processor."""
    told = hashlib.sha256(f"{torch.__version__}\0{_processor()}".encode()).hexdigest()[:16]
    return folder() / f"products-{told}.json"


def _cxx() -> tuple[str, ...]:
    """Return the words of the command that compiles C++, such as `ccache g++`; none if there is none."""
    if given := os.environ.get("CXX", "").strip():
        try:
            return tuple(shlex.split(given))
        except ValueError:  # a quotation that does not end
            return (given,)
    return tuple(name for name in ("g++", "clang++") if shutil.which(name))[:1]


@functools.cache
def _version_of(words: tuple[str, ...]) -> str:
    """Return what a compiler says of itself; nothing if it does not work."""
    try:
        told = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    except (OSError, IndexError):
        return ""
    return "" if told.returncode else told.stdout


def _find(key: str) -> Path | None:
    """Look a step up. A file that is not what was written is not loaded: it could end the process."""
    note = folder() / f"{key}.txt"
    try:
        digest = note.read_text().strip()
        path = folder() / f"{digest}.so"
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    except FileNotFoundError:
        if not note.exists():
            return None
    except (OSError, ValueError) as error:
        _say(f"the compiled step {note} cannot be read ({error}); it is compiled anew.")
        return None
    _say(f"the compiled step {note} is damaged; it is compiled anew.")
    return None


def _keep(made: Path, key: str) -> Path:
    """Put a step into the cache, where another process may be about to put the same."""
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    path = made.with_name(f"{digest}.so")
    note = made.with_name(f".{key}-{secrets.token_hex(4)}.txt")
    try:
        os.replace(made, path)
        note.write_text(digest)
        os.replace(note, made.with_name(f"{key}.txt"))
    except OSError as error:
        _say(f"a compiled step cannot be kept in {folder()} ({error.strerror}); it serves once.")
        note.unlink(missing_ok=True)
        kept = path if path.exists() else made
        atexit.register(kept.unlink, missing_ok=True)
        return kept
    return path


def _is_compiler(word: str) -> bool:
    return re.search(r"(g\+\+|c\+\+|clang|gcc)[^/]*$", word) is not None


class _Compiler:
    """The process of the compiler: one job at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[dict[str, Any], str, Future[Path | None]]] = SimpleQueue()
        self._pending: dict[str, Future[Path | None]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._cxx: tuple[str, ...] = ()  # of the process
        self._owner = os.getpid()
        threading.Thread(target=self._work, daemon=True).start()

    def build(self, job: dict[str, Any], key: str) -> Future[Path | None]:
        """Queue a job, unless the same one is there."""
        if key not in self._pending or self._pending[key].done():
            self._pending[key] = Future()
            self._queue.put((job, key, self._pending[key]))
        return self._pending[key]

    def stop(self) -> None:
        """Let the process go; the next job starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()  # waits for it, and closes what led to it

    def _work(self) -> None:
        while True:
            try:
                job, key, done = self._queue.get(timeout=IDLE if self._process else None)
            except Empty:
                self.stop()
                continue
            try:
                done.set_result(self._build(job, key))
            except Exception as error:  # noqa: BLE001 - handed to whoever waits
                known = isinstance(error, backend.Unsupported)
                said = error if known else backend.Unsupported(f"{type(error).__name__}: {error}")
                done.set_exception(said)

    def _build(self, job: dict[str, Any], key: str) -> Path:
        token = secrets.token_hex(4)
        made, asked = (folder() / f".{key}-{token}.{kind}" for kind in ("so", "json"))
        try:
            folder().mkdir(parents=True, exist_ok=True)  # it may have been deleted
            asked.write_text(json.dumps(job | {"out": str(made), "choices": str(_choices())}))
            if error := self._ask(asked, job["cxx"]):
                raise backend.Unsupported(in_words(error))
            return _keep(made, key)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        finally:
            asked.unlink(missing_ok=True)

    def _ask(self, job: Path, cxx: tuple[str, ...]) -> str | None:
        """Have one job done, and return what went wrong, if anything did."""
        if cxx != self._cxx:
            self.stop()
            self._cxx = cxx
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(backend.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Inductor asks which compiler it is, by one word; it is called by all of them.
                env=os.environ | {"CXX": next(filter(_is_compiler, cxx), cxx[-1])},
                text=True,
                start_new_session=True,  # Ctrl-C is for the training
            )
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        with contextlib.suppress(OSError):
            process.stdin.write(f"{job}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer:
            return json.loads(answer)["error"]
        self.stop()
        return "the process of the compiler ended without an answer"


def in_words(error: str) -> str:
    """Say what users know an operator by that has no compiled form.

    Example:
        >>> in_words("aten.nonzero.default").partition(";")[0]
        'indexing by a mask (aten.nonzero), as correlation matrices do it (LKJ), is not compiled'
    """
    if "aten.nonzero" in error:
        return (
            "indexing by a mask (aten.nonzero), as correlation matrices do it (LKJ), is not "
            "compiled; torch.where and fixed indices are"
        )
    return error


@functools.cache
def _compiler() -> _Compiler:
    made = _Compiler()
    atexit.register(made.stop)
    return made


# A child of a fork has no thread that would serve it: it makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compiler.cache_clear)

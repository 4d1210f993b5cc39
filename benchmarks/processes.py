"""Samplers, optimisers and compilers in processes of their own, asked line by line.

Each may live in another environment. A request is a line of JSON on its stdin, `[name, *arguments]`,
and each line on its stdout is the answer to one: `{"value": ...}`, or `{"missing": "why"}`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Peer:
    """A process that runs a script of this folder."""

    def __init__(self, python: str, script: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, name: str, *arguments: Any, limit: float | None = None) -> Any:
        """Send a request and return its answer.

        Raises:
            ImportError: If it cannot: what its environment lacks, for the most part.
            TimeoutError: If it took longer than `limit` seconds; the process has been ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)
        if limit is not None and not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
            raise TimeoutError(f"over {limit:.0f} s")
        reply = json.loads(self.process.stdout.readline() or '{"missing": "it has ended"}')
        if "missing" in reply:
            raise ImportError(reply["missing"])
        return reply["value"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(answers: dict[str, Callable[..., Any]]) -> None:
    """Be such a process: answer line by line, until stdin ends; what else is printed goes astray."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            name, *arguments = json.loads(line)
            reply = {"value": answers[name](*arguments)}
        except Exception as error:  # noqa: BLE001 - whatever a library fails with: the others go on
            text = str(error).strip() or repr(error)
            reply = {"missing": f"{type(error).__name__}: {text.splitlines()[0][:200]}"}
        print(json.dumps(reply), file=out, flush=True)


def environment(threads: int) -> dict[str, str]:
    """Give every process as many threads; NPROC is what XLA sizes its pool by."""
    eigen = "true" if threads > 1 else "false"
    flags = f"--xla_cpu_multi_thread_eigen={eigen} intra_op_parallelism_threads={threads}"
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "NPROC": count,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
    }


def caches(folder: str) -> dict[str, str]:
    """Have compilers keep what they make in a folder, each its own."""
    return {
        "PPL_MODELS_CACHE": f"{folder}/ours",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "NUMBA_CACHE_DIR": f"{folder}/numba",
        "PYTENSOR_FLAGS": f"base_compiledir={folder}/pytensor",
    }


def load() -> str:
    """Say how busy the machine is."""
    return "{:.2f} (1 minute), {:.2f} (5 minutes)".format(*os.getloadavg())


def say(text: str) -> None:
    """Tell how it goes, on stderr."""
    print(text, file=sys.stderr, flush=True)

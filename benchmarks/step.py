"""One optimisation step, in ms: `fit` beside vanilla Pyro, hand-written torch and NumPyro.

All train the same models from the same parameters with the same Adam, in float32, on as many
threads (step_cases.py has the models):

    vanilla        pyro.infer.SVI(...).step(batch) in a loop
    fit eager      ppl_models.infer.fit(..., compile=False), the same Pyro program
    fit traced     its graph without a compiler (PPL_MODELS_COMPILER=none)
    fit compiled   fit(..., compile="now")
    hand eager     the bound written in torch by hand, fused Adam
    hand compiled  the same under torch.compile, then backward()
    hand functional  the same with torch.func.grad_and_value under torch.compile, which spares
                   autograd at run time: the fastest hand-written form that was found
    NumPyro loop   the jitted update, called from Python
    NumPyro scan   lax.scan over many steps, jitted: no Python between them, and no last, smaller
                   batch of an epoch, which all others take

Rounds are interleaved: each times each variant once, drawing its minibatches included. The table
has the least of the rounds, which a busy neighbour disturbs least, and the median. A step of `fit`
is the difference of two runs, of 3 n and of n steps, over 2 n, so that its set-up cancels; its
least is the difference of the least of either, since the least difference would flatter it.

Before that, a check that the comparison is like for like: all variants must have as many
parameters, the same bound at the start (within 5 standard errors) and, trained for as many steps,
nearly the same at the end (within 5 % of what was gained). After it, the time of the first two
steps (`fit` records at the first, the second is compiled), imports not included: with empty caches, of later models in that process, and of the
first model in a second process with the caches of the first.

NumPyro may live in another environment, since it needs no torch: `pip install numpyro funsor`.

    python benchmarks/step.py --quick                                   # a look, in a minute
    python benchmarks/step.py --numpyro ~/jax/bin/python                # one thread, to be quoted
    python benchmarks/step.py --numpyro ~/jax/bin/python --threads 2    # a table of its own
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import record
import torch
from processes import HERE, Peer, caches, environment, load, say
from step_cases import CASES
from step_torch import VARIANTS, Ours, make_data, start

from ppl_models.core.table import text_table

PEERS = {"NumPyro loop": "loop", "NumPyro scan": "scan"}
NAMES = [*VARIANTS, *PEERS]
FIRST = ("small", "regression", "mixture")  # the first models of a process, in this order
RATIOS = (
    ("fit compiled", "hand compiled"),
    ("fit compiled", "hand functional"),
    ("fit compiled", "NumPyro loop"),
    ("fit compiled", "NumPyro scan"),
    ("vanilla", "fit compiled"),
)
Results = dict[str, dict[str, dict[str, Any]]]  # of each variant, by case


class Stopwatch:
    """The times of one variant, all rounds of the same number of steps."""

    def __init__(self, seconds: Callable[[int], float], steps: int) -> None:
        self.seconds = seconds
        self.steps = steps
        self.rounds: list[float] = []

    def take(self) -> None:
        """Time one round."""
        self.rounds.append(self.seconds(self.steps))

    def milliseconds(self) -> tuple[float, float]:
        """Return the least and the median of a step."""
        return self._of_a_step(min(self.rounds)), self._of_a_step(statistics.median(self.rounds))

    def _of_a_step(self, seconds: float) -> float:
        return 1000 * seconds / self.steps


class Difference(Stopwatch):
    """The times of a variant whose runs begin with a set-up, which is not to count."""

    def __init__(self, seconds: Callable[[int], float], steps: int) -> None:
        super().__init__(seconds, 2 * math.ceil(steps / 2))
        self.longer: list[float] = []
        self.shorter: list[float] = []

    def take(self) -> None:
        n = self.steps // 2
        self.shorter.append(self.seconds(n))
        self.longer.append(self.seconds(3 * n))
        self.rounds.append(self.longer[-1] - self.shorter[-1])

    def milliseconds(self) -> tuple[float, float]:
        _, median = super().milliseconds()
        return self._of_a_step(min(self.longer) - min(self.shorter)), median


def stopwatch(seconds: Callable[[int], float], target: float, unit: int = 1) -> Stopwatch:
    """Take so many steps in a round, a multiple of `unit`, that it lasts `target` seconds."""
    steps = unit
    seconds(unit)  # compiles
    while (took := seconds(steps)) < target:
        factor = min(10.0, max(2.0, 1.1 * target / max(took, 1e-9)))
        steps = unit * math.ceil(factor * steps / unit)
    return Stopwatch(seconds, steps)


def difference(variant: Ours, target: float) -> Stopwatch:
    """Take so many steps that the difference is `target` seconds, and not mostly noise of set-up.

    The shorter run has an epoch at least: its last batch may be smaller, which is set up too.
    """
    setup, step = variant.pace()
    say(f"  set-up of a run {setup:.2f} s, a step about {1000 * step:.4f} ms")
    epoch = math.ceil(variant.case.rows / variant.case.batch)
    goal = max(target, setup / 2)
    steps = max(2 * epoch, math.ceil(goal / step))
    while True:  # without callbacks, `fit` may be much faster than its pace
        watch = Difference(variant.seconds, steps)
        watch.take()
        watch.take()
        took = watch.milliseconds()[0] * watch.steps / 1000
        if took > 0.7 * goal:
            return Difference(variant.seconds, steps)
        steps *= math.ceil(min(10.0, max(2.0, goal / max(took, 1e-9))))


def measure(name: str, peer: Peer | None, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Check that the variants of a case do the same thing, and time them."""
    case = CASES[name]
    found: dict[str, dict[str, Any]] = {}
    watches: dict[str, Stopwatch] = {}
    for title, make in VARIANTS.items():
        variant = make(case, options.device)
        row = found[title] = {"parameters": variant.size(), "start": variant.bound()}
        variant.train(case.training)
        row |= {"end": variant.bound(), "how": variant.how}
        watches[title] = (
            difference(variant, options.seconds)
            if isinstance(variant, Ours)
            else stopwatch(variant.seconds, options.seconds)
        )
        say(f"{name}: {title} is ready. {variant.how}")
    for title, (row, watch) in _prepare_peers(name, peer, options).items():
        found[title], watches[title] = row, watch
        say(f"{name}: {title} is ready")
    for _ in range(options.rounds):
        for watch in watches.values():
            watch.take()
    for title, watch in watches.items():
        least, median = watch.milliseconds()
        found[title] |= {"ms": least, "median_ms": median, "steps_a_round": watch.steps}
        say(f"{name}: {title} {least:.4f} ms a step")
    return found


def _prepare_peers(
    name: str, peer: Peer | None, options: argparse.Namespace
) -> dict[str, tuple[dict[str, Any], Stopwatch]]:
    if peer is None:
        return {}
    case = CASES[name]
    ready: dict[str, tuple[dict[str, Any], Stopwatch]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            count = peer.ask("prepare", name, _hand_over(name, folder))
    except ImportError as error:
        say(f"{name}: no NumPyro, {error}")
        return {}

    def seconds(how: str) -> Callable[[int], float]:
        return lambda steps: peer.ask("seconds", name, how, steps)

    for title, how in PEERS.items():
        row = {"parameters": count, "start": peer.ask("bound", name, how), "how": ""}
        seconds(how)(case.training)
        row["end"] = peer.ask("bound", name, how)
        unit = case.scan if how == "scan" else 1
        ready[title] = row, stopwatch(seconds(how), options.seconds, unit)
    return ready


def _hand_over(name: str, folder: str) -> str:
    """Write data and first parameters for a process that has no torch."""
    path = f"{folder}/start.npz"
    arrays: dict[str, Any] = {key: value.numpy() for key, value in start(CASES[name]).items()}
    arrays |= {f"data{i}": value.numpy() for i, value in enumerate(make_data(CASES[name]))}
    np.savez(path, **arrays)
    return path


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """Say what is not like for like among the variants of a case, beside `hand eager`."""
    by = found["hand eager"]
    gained = abs(by["end"][0] - by["start"][0])
    said = []
    for title, row in found.items():
        if row["parameters"] != by["parameters"]:
            said.append(f"{title} has {row['parameters']} parameters, not {by['parameters']}")
        for when, slack in (("start", 0.0), ("end", 0.05 * gained)):
            (one, error), (other, other_error) = row[when], by[when]
            if abs(one - other) > slack + 5 * math.hypot(error, other_error):
                said.append(f"{title} has bound {one:.4f} at the {when}, not {other:.4f}")
    return said


def first_steps(options: argparse.Namespace, around: dict[str, str]) -> dict[str, Any]:
    """Seconds of the first two steps: cold, of later models, and in a second process."""
    rows: dict[str, Any] = {}
    for who in ("fit compiled", "hand compiled", "NumPyro loop"):
        if who in PEERS and options.numpyro is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            # A compiler's own caches start as empty as ours does.
            fresh = around | caches(folder)

            cold, *later = _first(who, FIRST, fresh, options)
            (again,) = _first(who, FIRST[:1], fresh, options)
        rows[who] = {"cold": cold, "later": later, "second_process": again}
        say(f"first step: {who} {rows[who]}")
    return rows


def _first(
    who: str, names: Sequence[str], around: dict[str, str], options: argparse.Namespace
) -> list[float]:
    """Take the first step of each case in a new process, and return the seconds of each."""
    if who not in PEERS:
        command = [sys.executable, str(HERE / "step_torch.py"), who, *names]
        done = subprocess.run(command, env=around, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    peer = Peer(options.numpyro, "step_numpyro.py", around)
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            peer.ask("prepare", name, _hand_over(name, folder))
            took.append(peer.ask("first", name))
    peer.close()
    return took


def write(
    results: Results, first: dict[str, Any], notes: Sequence[str], options: argparse.Namespace
) -> None:
    """Write the tables of what is there so far."""
    cases = list(results)
    right = " " + "r" * len(cases)

    def block(title: str, cell: Callable[[dict[str, Any]], str]) -> str:
        lines = [
            (name, *(cell(results[c][name]) if name in results[c] else "-" for c in cases))
            for name in NAMES
        ]
        return text_table((title, *cases), lines, right=right)

    def bound(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.3f} +- {pair[1]:.3f}"

    said = [f"{c}: {text}" for c in cases for text in differences(results[c])]
    rungs = sorted({(n, r["how"]) for c in cases for n, r in results[c].items() if r["how"]})
    blocks = [
        block("ms a step, least", lambda row: f"{row['ms']:.4f}"),
        block("median", lambda row: f"{row['median_ms']:.4f}"),
        text_table(("ratio of the least", *cases), _ratios(results), right=right),
        block("parameters", lambda row: str(row["parameters"])),
        block("bound at the start", lambda row: bound(row["start"])),
        block("bound after training", lambda row: bound(row["end"])),
        "Like for like: " + ("; ".join(said) or "all agree"),
        "\n".join(f"{name}: {how}" for name, how in rungs),
        "\n".join(f"{name}: {CASES[name].story}" for name in cases),
    ]
    if first:
        blocks.insert(3, _first_table(first))
    blocks.append("\n".join(notes))
    rows = [{"case": c, "variant": n, **row} for c in cases for n, row in results[c].items()]
    rows += [{"first_step": name, **row} for name, row in first.items()]
    title = f"One optimisation step, {options.threads} thread(s), {options.device}"
    record.write(options.name, title, "\n\n".join(filter(None, blocks)), rows)


def _ratios(results: Results) -> list[tuple[str, ...]]:
    def cell(found: dict[str, dict[str, Any]], one: str, other: str) -> str:
        if one not in found or other not in found:
            return "-"
        return f"{found[one]['ms'] / found[other]['ms']:.2f}"

    return [
        (f"{one} / {other}", *(cell(found, one, other) for found in results.values()))
        for one, other in RATIOS
    ]


def _first_table(first: dict[str, Any]) -> str:
    head = (
        "first two steps, s",
        f"{FIRST[0]}, no cache",
        *FIRST[1:],
        f"{FIRST[0]}, second process",
    )
    lines = [
        (name, *(f"{v:.2f}" for v in (row["cold"], *row["later"], row["second_process"])))
        for name, row in first.items()
    ]
    return text_table(head, lines, right=" rrrr")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"models to time, of {', '.join(CASES)}; by default all",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument(
        "--numpyro", metavar="PATH", default=sys.executable if find_spec("numpyro") else None,
        help="python of an environment with numpyro (and funsor, for the mixture); by default\n"
        "this one, if it has numpyro, and no NumPyro otherwise",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="rounds, by default 7")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds of a variant in a round, by default 0.5"
    )
    parser.add_argument("--device", default="cpu", help="where torch trains; NumPyro: the CPU")
    parser.add_argument(
        "--quick", action="store_true",
        help="two short rounds of tiny and regression, no first steps: nothing to quote",
    )  # fmt: skip
    parser.add_argument(
        "--name", help="name of the result files, by default step, or step-2-threads and the like"
    )
    options = parser.parse_args()
    if options.quick:
        options.cases, options.rounds, options.seconds = ["tiny", "regression"], 2, 0.05
    if options.name is None:
        threads = f"-{options.threads}-threads" if options.threads > 1 else ""
        options.name = "step" + threads + ("-quick" if options.quick else "")
    return options


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    notes = [f"Load before: {load()}"]
    torch.set_num_threads(options.threads)
    around = environment(options.threads)
    peer = None if options.numpyro is None else Peer(options.numpyro, "step_numpyro.py", around)
    if peer is None:
        say("No NumPyro: this environment lacks it. Say --numpyro PATH, a python that has it.")
    else:
        notes.append(f"{peer.ask('versions')}, in a process of its own")
    results: Results = {}
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= caches(folder)  # what an earlier run has compiled or chosen has no say
        for name in options.cases:
            results[name] = measure(name, peer, options)
            notes.append(f"Load after {name}: {load()}")
    if peer is not None:
        peer.close()
    write(results, first, notes, options)  # before what may fail
    if not options.quick:
        first = first_steps(options, around)
        write(results, first, notes, options)


if __name__ == "__main__":
    main()

"""Effective draws per second: `sample` beside Pyro, NumPyro, nutpie and BlackJAX.

All draw from the same posteriors in float64 on as many threads, with the same numbers of chains, of
draws and of warm-up transitions, and the same target of acceptance, 0.8 (nuts_cases.py has the
posteriors). Each sampler has a process of its own:

    ppl_models   ppl_models.infer.sample, compile="now": like the others it compiles in any case,
                 also where by default it would not, since that takes longer than the run
    Pyro         pyro.infer.NUTS, one chain after the other
    Pyro JIT     the same with jit_compile=True
    NumPyro      NUTS, chain_method="vectorized", warm-up and draws each jitted as a whole, which
                 spares it to trace and compile in every run
    BlackJAX     NUTS and window adaptation, both under vmap
    nutpie       PyMC models compiled by numba; it runs as many chains at once as there are threads

Quoted is the least bulk ESS of all parameters, by arviz-stats for everybody, per second

    sampling     of the draws that are kept
    + warm-up    and of the warm-up, everything being compiled already
    + cache      of the first call in a second process: recording, tracing and compiling too, with
                 whatever the compilers left on disk (JAX's persistent cache is on)
    + compile    of the first call in a process with empty caches; imports do not count

Rounds are interleaved: in each, every sampler runs once, with another seed; the table has the median
of the rounds. |z| is the worst difference of a posterior mean from that of the sampler with the most
effective draws, in standard errors of both: all should stay below 5. Of rows that are targets of
their own Pyro and nutpie sample the first few one by one, and their times are scaled up.

A run that would take more than --limit seconds is left out, and the table says so.

    python benchmarks/nuts.py --quick                              # eight schools, a look
    python benchmarks/nuts.py --jax ~/jax/bin/python               # with the peers, to be quoted
    python benchmarks/nuts.py --cases arK --chains 4 64 --samplers ppl_models nutpie
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import record
import torch
from arviz_stats.base.array import array_stats
from nuts_cases import CASES, LATENT
from processes import Peer, caches, environment, load, say

from ppl_models.core.table import text_table
from ppl_models.data import load as load_data
from ppl_models.data.cache import folder as data_folder

OURS = "ppl_models"
SCRIPTS = {
    OURS: "nuts_torch.py",
    "Pyro": "nuts_torch.py",
    "Pyro JIT": "nuts_torch.py",
    "NumPyro": "nuts_jax.py",
    "BlackJAX": "nuts_jax.py",
    "nutpie": "nuts_pymc.py",
}
ONE_BY_ONE = ("Pyro", "Pyro JIT", "nutpie")  # twice the chains take twice the time
CHAINS = (1, 4, 64, 1024)
WIDEST = 5.0  # standard errors that two means may be apart
RATES = ("sampling", "+ warm-up", "+ cache", "+ compile")


def make_data(name: str) -> dict[str, np.ndarray]:
    """Return the data of a case, in float64."""
    if name in ("german_credit", "german_hierarchical"):
        found = load_data("german_credit")
        x = torch.cat([torch.as_tensor(found.x), found.x_test]).double()
        x = (x - x.mean(0)) / x.std(0)
        y = torch.cat([torch.as_tensor(found.y), torch.as_tensor(found.y_test)]).double()
        return {"x": torch.cat([torch.ones(len(x), 1), x], 1).numpy(), "y": y.numpy()}
    if name == "network":
        found = load_data("uci/yacht")
        x, y = (torch.as_tensor(value)[:100].double() for value in (found.x, found.y))
        return {"x": ((x - x.mean(0)) / x.std(0)).numpy(), "y": ((y - y.mean()) / y.std()).numpy()}
    if name == "vae":
        return _vae_data(np.random.default_rng(0), CASES[name].rows)
    file = {"gp_poisson": "gp_pois_regr"}.get(name, name)
    path = data_folder() / "posteriordb" / "data" / f"{file}.json"
    if not path.is_file():
        sys.exit(f"{name} needs {path}: point PPL_MODELS_DATA at a folder with a posteriordb in it")
    data = json.loads(path.read_text(encoding="utf-8"))
    values = {key: np.asarray(value, np.float64) for key, value in data.items()}
    if name == "arK":
        lags = np.lib.stride_tricks.sliding_window_view(values["y"], data["K"])[:-1, ::-1]
        return {"lags": lags.copy(), "y": values["y"][data["K"] :]}
    keys = ("x", "k") if name == "gp_poisson" else ("y", "sigma")
    return {key: values[key] for key in keys}


def _vae_data(random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    width = 64
    data = {
        "w1": random.normal(size=(width, LATENT)) / LATENT**0.5,
        "b1": random.normal(size=width) / 2,
        "w2": 2 * random.normal(size=(width, width)) / width**0.5,
        "b2": random.normal(size=width) / 2,
    }
    z = random.normal(size=(rows, LATENT))
    logits = np.tanh(z @ data["w1"].T + data["b1"]) @ data["w2"].T + data["b2"]
    x = random.random((rows, width)) < 1 / (1 + np.exp(-logits))
    return data | {"x": x.astype(np.float64)}


@dataclass(frozen=True)
class Run:
    """What one call has come to.

    Attributes:
        set_up: Seconds before the warm-up, as far as they are told apart.
        warmup: Seconds.
        sampling: Seconds.
        ess: The least bulk ESS.
        rhat: The greatest.
        divergences: After the warm-up, of all chains.
        rows: How many were sampled where they are too many; 0 for all.
    """

    set_up: float
    warmup: float
    sampling: float
    ess: float
    rhat: float
    divergences: int
    rows: int = 0

    def rates(self) -> tuple[float, float, float]:
        """Effective draws per second: sampling, with the warm-up, with the set-up as well."""
        seconds = np.cumsum([self.sampling, self.warmup, self.set_up])
        return tuple((self.ess / seconds).tolist())


@dataclass
class Row:
    """One sampler with some number of chains on one posterior; `why` if it has no result."""

    case: str
    chains: int
    sampler: str
    why: str = ""
    cold: Run | None = None
    cached: Run | None = None
    rounds: list[Run] = field(default_factory=list)
    mean: Any = None
    error: Any = None
    z: float = math.nan

    def rates(self) -> dict[str, float]:
        """Return effective draws per second in each way of counting, as far as they are known."""
        found: dict[str, float] = {}
        if self.rounds:
            pairs = [one.rates() for one in self.rounds]
            for title, values in zip(RATES[:2], zip(*pairs, strict=True), strict=False):
                found[title] = statistics.median(values)
        for title, run in zip(RATES[2:], (self.cached, self.cold), strict=True):
            if run is not None:
                found[title] = run.rates()[-1]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all that is known but the means."""
        runs = {
            name: run and vars(run) for name, run in (("cold", self.cold), ("cached", self.cached))
        }
        return {
            "case": self.case,
            "chains": self.chains,
            "sampler": self.sampler,
            "why": self.why,
            "z": None if math.isnan(self.z) else self.z,
            "ess_per_second": self.rates(),
            "rounds": [vars(run) for run in self.rounds],
            **runs,
        }


def diagnose(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return means, their errors, the least bulk ESS and the greatest R-hat of (C, n, Q) draws."""
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = array_stats.ess(draws, method="bulk", **axes)
        rhat = array_stats.rhat(draws, **axes)
        error = array_stats.mcse(draws, method="mean", **axes)
    return draws.mean((0, 1)), np.asarray(error), float(np.min(ess)), float(np.max(rhat))


def compare(rows: Sequence[Row]) -> None:
    """Set |z| of the means of samplers of one posterior, beside that with the most draws."""
    able = [row for row in rows if row.rounds and np.isfinite(row.error).all()]
    if not able:
        return
    whole = max(len(row.mean) for row in able)
    best = max((r for r in able if len(r.mean) == whole), key=lambda row: row.rounds[-1].ess)
    for row in able:
        if row is not best:
            many = len(row.mean)
            error = np.hypot(row.error, best.error[:many])
            row.z = float(np.max(np.abs(row.mean - best.mean[:many]) / error))


class Contest:
    """The samplers on one posterior with one number of chains."""

    def __init__(self, case: str, chains: int, options: argparse.Namespace, folder: str) -> None:
        self.case, self.chains, self.options, self.folder = case, chains, options, folder
        self.data = f"{folder}/data.npz"
        self.prepared: set[Peer] = set()
        np.savez(self.data, allow_pickle=False, **make_data(case))
        self.around = environment(options.threads) | caches(folder) | {"PYTHONWARNINGS": "ignore"}

    def hold(self, skipped: dict[str, str]) -> list[Row]:
        """Run each sampler cold, then all in rounds, then each in a second process."""
        rows = [
            Row(self.case, self.chains, name, skipped.get(name, ""))
            for name in self.options.samplers
        ]
        peers: dict[str, Peer] = {}
        for row in self._able(rows):
            peers[row.sampler] = self._start(row.sampler)
            row.cold = self._take(row, peers[row.sampler], 0)
        for number in range(self.options.rounds):
            for row in self._able(rows):
                run = self._take(row, peers[row.sampler], 1 + number)
                row.rounds += [] if run is None else [run]
        for row in rows:
            if row.sampler in peers:
                peers[row.sampler].close()
            if not row.why:
                again = self._start(row.sampler)
                row.cached = self._take(row, again, 0)
                again.close()
        compare(rows)
        return rows

    def _able(self, rows: Sequence[Row]) -> Iterator[Row]:
        return (row for row in rows if not row.why)

    def _start(self, sampler: str) -> Peer:
        python = sys.executable if SCRIPTS[sampler] == "nuts_torch.py" else self.options.jax
        return Peer(python, SCRIPTS[sampler], self.around)

    def _take(self, row: Row, peer: Peer, seed: int) -> Run | None:
        o, path = self.options, f"{self.folder}/draws.npy"
        try:
            if peer not in self.prepared:
                self.prepared.add(peer)
                peer.ask("prepare", self.case, row.sampler, self.data)
            told = peer.ask(
                "run", self.chains, o.draws, o.warmup, seed, o.threads, path, limit=o.limit
            )  # fmt: skip
        except (ImportError, TimeoutError) as error:
            row.why = str(error)
            say(f"{self.case}, {self.chains} chains: {row.sampler}: {error}")
            return None
        draws = np.load(path)
        os.remove(path)
        row.mean, row.error, ess, rhat = diagnose(draws)
        run = Run(ess=ess, rhat=rhat, **told)
        say(
            f"{self.case}, {self.chains} chains: {row.sampler} {run.ess:.0f} effective draws, set-up "
            f"{run.set_up:.2f} s, warm-up {run.warmup:.3f} s, draws {run.sampling:.3f} s"
        )
        return run


def too_long(before: Sequence[Row], chains: int, options: argparse.Namespace) -> dict[str, str]:
    """Say which samplers would take too long, from what they took with fewer chains."""
    found: dict[str, str] = {}
    for row in before:
        if row.why.startswith("over"):
            found[row.sampler] = f"{row.why} with {row.chains} chains"
        elif row.why:
            found[row.sampler] = row.why
        elif row.sampler in ONE_BY_ONE and row.rounds:
            last = row.rounds[-1]
            expected = (last.warmup + last.sampling) * chains / row.chains
            if expected > options.limit:
                found[row.sampler] = f"would take {expected:.0f} s"
    return found


def tables(rows: Sequence[Row]) -> list[str]:
    """Lay out, for each posterior, what was measured and what it means."""
    blocks: list[str] = []
    head = (
        "chains", "sampler", *RATES, "ESS", "R-hat", "divergent", "|z|", "warm-up s", "draws s",
    )  # fmt: skip
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        lines = [
            _line(row) if row.rounds else (str(row.chains), row.sampler, *"-" * 4, *[""] * 6)
            for row in mine
        ]
        blocks.append(f"{case}: {CASES[case].story}")
        blocks.append(text_table(head, lines, right="r" + " " + "r" * 10))
        blocks.append(
            "\n".join(
                f"{row.chains} chains, {row.sampler}: left out, {row.why}"
                if not row.rounds
                else f"{row.chains} chains, {row.sampler}: {row.rounds[-1].rows} rows, times scaled"
                for row in mine
                if not row.rounds or row.rounds[-1].rows
            )
        )
    return [block for block in blocks if block]


def _line(row: Row) -> tuple[str, ...]:
    rates = row.rates()

    def middle(name: str) -> float:
        return statistics.median(getattr(run, name) for run in row.rounds)

    return (
        str(row.chains),
        row.sampler,
        *(_number(rates[title]) if title in rates else "-" for title in RATES),
        f"{middle('ess'):.0f}",
        f"{middle('rhat'):.3f}",
        f"{middle('divergences'):.0f}",
        "" if math.isnan(row.z) else f"{row.z:.1f}",
        f"{middle('warmup'):.3f}",
        f"{middle('sampling'):.3f}",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def ratios(rows: Sequence[Row]) -> str:
    """Tabulate how many times the effective draws per second of a peer ours are."""
    lines: list[tuple[str, ...]] = []
    peers = [name for name in SCRIPTS if name != OURS and any(row.sampler == name for row in rows)]
    for case, chains in dict.fromkeys((row.case, row.chains) for row in rows):
        rates = {
            row.sampler: row.rates() for row in rows if (row.case, row.chains) == (case, chains)
        }
        ours = rates.get(OURS, {})
        for title in RATES:
            cells = [
                f"{ours[title] / rates[name][title]:.2f}"
                if title in ours and title in rates.get(name, {})
                else "-"
                for name in peers
            ]
            lines.append((case, str(chains), title, *cells))
    return text_table(
        ("ours / theirs", "chains", "", *peers), lines, right=" r " + "r" * len(peers)
    )


def disagreements(rows: Sequence[Row]) -> str:
    """Say whose means are not those of the others."""
    wrong = [row for row in rows if row.z >= WIDEST]
    said = [f"{r.case}, {r.chains} chains, {r.sampler}: |z| {r.z:.1f}" for r in wrong]
    return "Like for like: " + ("; ".join(said) or f"all means agree within {WIDEST:.0f} errors")


def write(rows: Sequence[Row], notes: Sequence[str], options: argparse.Namespace) -> None:
    """Write the tables of what is there so far."""
    blocks = ["Effective draws per second, the least of all parameters:", *tables(rows)]
    blocks += [ratios(rows), disagreements(rows), "\n".join(notes)]
    title = (
        f"NUTS: {options.draws} draws after {options.warmup} of warm-up, {options.threads} "
        f"thread(s), median of {options.rounds} round(s)"
    )
    record.write(options.name, title, "\n\n".join(blocks), [row.to_json() for row in rows])


def _versions(options: argparse.Namespace) -> list[str]:
    """Ask each side what it is; samplers of a side that does not start are taken off the list."""
    notes: list[str] = []
    for script in dict.fromkeys(SCRIPTS[name] for name in options.samplers):
        if script == "nuts_torch.py":
            continue
        peer = Peer(options.jax, script, environment(1) | {"PYTHONWARNINGS": "ignore"})
        try:
            notes.append(f"{peer.ask('versions')}, in a process of its own")
        except (ImportError, BrokenPipeError):
            gone = [name for name in options.samplers if SCRIPTS[name] == script]
            options.samplers = [name for name in options.samplers if name not in gone]
            notes.append(f"Left out, since its environment lacks what it needs: {', '.join(gone)}")
        peer.close()
    return notes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"posteriors, of {', '.join(CASES)}; by default all",
    )  # fmt: skip
    parser.add_argument(
        "--samplers", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME",
        help=f"of {', '.join(SCRIPTS)}; by default all",
    )  # fmt: skip
    parser.add_argument("--chains", nargs="+", type=int, default=CHAINS, help="numbers of chains")
    parser.add_argument("--draws", type=int, default=500, help="of each chain, by default 500")
    parser.add_argument("--warmup", type=int, default=500, help="by default 500")
    parser.add_argument("--rounds", type=int, help="by default 3")
    parser.add_argument(
        "--limit", type=float, default=300.0,
        help="seconds that a run may take, compiling included; by default 300",
    )  # fmt: skip
    parser.add_argument(
        "--jax", metavar="PATH", default=sys.executable,
        help="python of an environment with numpyro, blackjax, nutpie and pymc; by default this one",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument(
        "--quick", action="store_true",
        help="eight schools at 4 and 64 chains and one round, unless others are asked for: a look",
    )  # fmt: skip
    parser.add_argument(
        "--name", help="name of the result files, by default nuts or nuts-2-threads"
    )
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.quick:
        options.cases = options.cases if len(options.cases) < len(CASES) else ["eight_schools"]
        options.chains = (4, 64) if options.chains is CHAINS else options.chains
    if options.name is None:
        threads = f"-{options.threads}-threads" if options.threads > 1 else ""
        options.name = "nuts" + threads + ("-quick" if options.quick else "")
    return options


def main() -> None:
    """Run what was asked for, and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    notes = [f"Load before: {load()}", *_versions(options)]
    rows: list[Row] = []
    for case in options.cases:
        known = CASES[case].chains
        before: list[Row] = []
        for chains in sorted(c for c in options.chains if not known or c in known):
            with tempfile.TemporaryDirectory() as folder:  # and caches that are empty
                skipped = too_long(before, chains, options)
                before = Contest(case, chains, options, folder).hold(skipped)
            rows += before
        notes.append(f"Load after {case}: {load()}")
        if rows:
            write(rows, notes, options)  # after each, so that nothing is lost


if __name__ == "__main__":
    main()

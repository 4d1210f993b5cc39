"""Saved runs: the same numbers in a new process, and what a damaged folder says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from guides.registry import PAIRS
from ppl_models.evaluate import elbo
from ppl_models.infer import fit
from ppl_models.runs import save_run

ROWS = 10
OWN = {"vae-convolutional"}  # pairs with networks of their own, which a run cannot name

NEW_PROCESS = """
import json, sys
import torch
from guides.registry import PAIRS
from ppl_models.evaluate import elbo
from ppl_models.runs import load_run

folder, own = sys.argv[1], set(sys.argv[2:])
x = torch.load(folder + "/x.pt")
found = {}
for pair in PAIRS:
    given = {}
    if pair.name in own:
        given = {"model": pair.model().double()}
        given["guide"] = pair.guide(given["model"], 10)
    run = load_run(f"{folder}/{pair.name}", **given)
    bound = elbo(run.model, run.guide, *x[pair.name], particles=3, seed=0)
    found[pair.name] = [bound.mean, bound.se, run.fit.bounds.tolist()]
print(json.dumps(found))
"""


def test_every_pair_gives_the_same_numbers_in_a_new_process(tmp_path) -> None:
    here, batches = {}, {}
    for pair in PAIRS:
        torch.manual_seed(1)
        model = pair.model().double()
        guide = pair.guide(model, ROWS)
        batches[pair.name] = pair.batch(model, ROWS)
        result = fit(model, guide, batches[pair.name], steps=2, seed=0)
        save_run(tmp_path / pair.name, result)
        bound = elbo(model, guide, *batches[pair.name], particles=3, seed=0)
        here[pair.name] = [bound.mean, bound.se, result.bounds.tolist()]
    torch.save(batches, tmp_path / "x.pt")
    command = [sys.executable, "-c", NEW_PROCESS, str(tmp_path), *OWN]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here

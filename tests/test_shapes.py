"""The shapes in the signatures of models and their parts hold at run time."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the checks are put into modules while they are imported, and they would
# answer bad input before the library does.
SCRIPT = """
import warnings
from jaxtyping import install_import_hook

CHECKED = ["ppl_models.ppca", "ppl_models.factor_analysis", "ppl_models.vae", "ppl_models.parts"]
CHECKED += ["ppl_models.sbn", "ppl_models.bnn", "guides.conditionals"]
with install_import_hook(CHECKED, "beartype.beartype"):
    warnings.simplefilter("ignore")  # beartype on the annotations of Pyro's metaclass
    import ppl_models
    import guides.registry
import torch
from ppl_models.infer import ELBO

torch.manual_seed(0)
{mutate}
for pair in guides.registry.PAIRS:
    model = pair.model()
    guide = pair.guide(model, 6)
    batch = pair.batch(model, 6)
    for particles in (1, 3):
        ELBO(particles).prepare(model, guide, *batch)(model, guide, *batch)
    if pair.evidence is not None:
        pair.evidence(model, batch)
        if hasattr(model, "posterior"):
            model.posterior(*batch)
x = torch.randn(20, 4)
ppl_models.PPCA.maximum_likelihood(x, 2).log_evidence(x)
ppl_models.FactorAnalysis.maximum_likelihood(x, 2).log_evidence(x)
"""
WRONG = "ppl_models.PPCA(4, 2).log_evidence(torch.zeros(3, 4, dtype=torch.int64))"


def run(mutate: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(mutate=mutate)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_pair_runs_with_the_shapes_of_its_signatures() -> None:
    done = run("")
    assert done.returncode == 0, done.stderr


def test_the_checks_are_really_there() -> None:
    done = run(WRONG)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr

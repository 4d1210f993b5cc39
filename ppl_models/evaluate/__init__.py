"""Evaluation: bounds and evidence with their errors, latents, and the scorecard."""

from ppl_models.evaluate.bounds import elbo, iwae_bound, log_evidence
from ppl_models.evaluate.comparison import compare, score
from ppl_models.evaluate.estimate import Estimate
from ppl_models.evaluate.latent import active_units, encode, generate, reconstruct
from ppl_models.evaluate.scorecard import Scorecard

__all__ = [
    "Estimate",
    "Scorecard",
    "active_units",
    "compare",
    "elbo",
    "encode",
    "generate",
    "iwae_bound",
    "log_evidence",
    "reconstruct",
    "score",
]

"""Inference: objectives and SVI, samplers and posteriors."""

from ppl_models.infer.mcmc.posterior import Posterior
from ppl_models.infer.mcmc.run import sample
from ppl_models.infer.mcmc.samplers import NUTS, GibbsWithGradients
from ppl_models.infer.objectives import ELBO, IWAE, VIMCO, ReweightedWakeSleep
from ppl_models.infer.svi import Fit, fit

__all__ = [
    "ELBO",
    "IWAE",
    "NUTS",
    "VIMCO",
    "Fit",
    "GibbsWithGradients",
    "Posterior",
    "ReweightedWakeSleep",
    "fit",
    "sample",
]

"""Inference: objectives and SVI, samplers and posteriors."""

from ppl_models.infer.em import EM, MonteCarloE, VariationalE, expectation_maximization
from ppl_models.infer.local_reparametrization import local_reparametrization
from ppl_models.infer.mcmc.posterior import Posterior
from ppl_models.infer.mcmc.run import sample
from ppl_models.infer.mcmc.samplers import NUTS, SGHMC, GibbsWithGradients
from ppl_models.infer.objectives import ELBO, IWAE, VIMCO, ReweightedWakeSleep
from ppl_models.infer.svi import Fit, fit

__all__ = [
    "ELBO",
    "EM",
    "IWAE",
    "NUTS",
    "SGHMC",
    "VIMCO",
    "Fit",
    "GibbsWithGradients",
    "MonteCarloE",
    "Posterior",
    "ReweightedWakeSleep",
    "VariationalE",
    "expectation_maximization",
    "fit",
    "local_reparametrization",
    "sample",
]

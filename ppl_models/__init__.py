"""Deep probabilistic models in Pyro and torch, and inference that says how good it was."""

from ppl_models.bnn import BayesianNeuralNetwork, Tasks
from ppl_models.core.explain import explain
from ppl_models.core.minibatch import minibatch
from ppl_models.core.render import render
from ppl_models.deep_exponential_family import DeepExponentialFamily
from ppl_models.dlgm import DeepLatentGaussian
from ppl_models.factor_analysis import FactorAnalysis
from ppl_models.parts.priors import bayesian
from ppl_models.ppca import PPCA
from ppl_models.sbn import SigmoidBeliefNetwork
from ppl_models.vae import VAE

__all__ = [
    "PPCA",
    "VAE",
    "BayesianNeuralNetwork",
    "DeepExponentialFamily",
    "DeepLatentGaussian",
    "FactorAnalysis",
    "SigmoidBeliefNetwork",
    "Tasks",
    "bayesian",
    "explain",
    "minibatch",
    "render",
]
__version__ = "0.1.0"

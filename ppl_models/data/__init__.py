"""Data sets and simulators."""

from ppl_models.core.dynamic import Dynamic
from ppl_models.data.dataset import Dataset
from ppl_models.data.load import load
from ppl_models.data.own import dataset
from ppl_models.data.simulate import LinearGaussian, Simulation, linear_gaussian, simulate

__all__ = [
    "Dataset",
    "Dynamic",
    "LinearGaussian",
    "Simulation",
    "dataset",
    "linear_gaussian",
    "load",
    "simulate",
]

"""Data sets and simulators."""

from ppl_models.data.digits import Dataset, load
from ppl_models.data.simulate import LinearGaussian, Simulation, linear_gaussian, simulate

__all__ = ["Dataset", "LinearGaussian", "Simulation", "linear_gaussian", "load", "simulate"]

"""Gradients in NumPy alone: a tensor that differentiates, layers, small data sets, and a sampler of exported flows."""

from minigrad.datasets import make_circles, make_linear_regression, make_moons, make_spirals
from minigrad.nn import MLP, Layer
from minigrad.tensor import Tensor

__all__ = ["MLP", "Layer", "Tensor", "make_circles", "make_linear_regression", "make_moons", "make_spirals"]

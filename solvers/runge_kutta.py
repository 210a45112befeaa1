"""Explicit Runge-Kutta methods of fixed step: each is a tableau and a docstring."""

from abc import abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.base_solver import BaseSolver, Field, StepCallback


class Tableau(NamedTuple):
    """Butcher's coefficients: k_i = field(x + h sum_j matrix_ij k_j, t + nodes_i h), x + h sum_i weights_i k_i.

    nodes and weights have one entry per stage; matrix has one row per stage, row i with i entries.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


class RungeKutta(BaseSolver):
    """Explicit Runge-Kutta over the intervals of the grid; a subclass is its tableau (Butcher 1964)."""

    @property
    @abstractmethod
    def tableau(self) -> Tableau:
        """Return the method's coefficients."""

    @property
    def evaluations_ahead(self) -> int:
        return self.steps * len(self.tableau.nodes)

    def solve(self, field: Field, x0: Tensor, times: Tensor | None = None, callback: StepCallback | None = None) -> Tensor:
        self.evaluations = 0
        grid = self.times(x0, times)
        x = x0
        for start, end in pairwise(grid):
            if callback is not None:
                callback(x, start)
            x = self.step(field, x, start, end)
        if callback is not None:
            callback(x, grid[-1])
        return x

    def step(self, field: Field, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Return x (B, ...) carried over one interval; lerp meets both of its ends exactly, where start + h may miss one."""
        h = end - start
        slopes: list[Tensor] = []
        for node, row in zip(self.tableau.nodes, self.tableau.matrix, strict=True):
            slopes.append(self.evaluate(field, advance(x, h, row, slopes), torch.lerp(start, end, node)))
        return advance(x, h, self.tableau.weights, slopes)


def advance(x: Tensor, h: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Return x + h sum_i weights_i slopes_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0:
            x = x + (h * weight) * slope
    return x


class Euler(RungeKutta):
    """Order 1, one evaluation per step."""

    tableau = Tableau(nodes=(0.0,), matrix=((),), weights=(1.0,))


class Midpoint(RungeKutta):
    """Order 2, two evaluations per step: the slope at the interval's middle (Runge 1895)."""

    tableau = Tableau(nodes=(0.0, 1 / 2), matrix=((), (1 / 2,)), weights=(0.0, 1.0))


class Heun(RungeKutta):
    """Order 2, two evaluations per step: the mean of the slopes at both ends (Heun 1900)."""

    tableau = Tableau(nodes=(0.0, 1.0), matrix=((), (1.0,)), weights=(1 / 2, 1 / 2))


class RK4(RungeKutta):
    """Order 4, four evaluations per step (Kutta 1901)."""

    tableau = Tableau(
        nodes=(0.0, 1 / 2, 1 / 2, 1.0),
        matrix=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    )

"""Multistep methods: they use the slopes of earlier steps, so that a step costs one evaluation."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from common.ranges import Steps
from solvers.base_solver import BaseSolver, Field, FreshNoise, StepCallback, Walker
from solvers.time_grids import TimeGrid

if TYPE_CHECKING:
    from losses.objective import FlowObjective


class AdamsBashforth(BaseSolver):
    """Order 2, one evaluation per step: x + h ((1 + w) v_n - w v_(n-1)), w = h / (2 h_(n-1)); Euler's step comes first
    (Bashforth & Adams 1883; Hairer, Norsett & Wanner 1993, III.5 for steps of different length).
    """

    def solve(self, field: Field, x0: Tensor, times: Tensor | None = None, callback: StepCallback | None = None) -> Tensor:
        self.evaluations = 0
        grid = self.times(x0, times)
        x, before, last = x0, None, None
        for start, end in pairwise(grid):
            if callback is not None:
                callback(x, start)
            slope, h = self.evaluate(field, x, start), end - start
            weight = 0.0 if last is None else h / (2 * last)
            x = x + h * (slope if before is None else (1 + weight) * slope - weight * before)
            before, last = slope, h
        if callback is not None:
            callback(x, grid[-1])
        return x


class DPMSolver2M(Walker):
    """DPM-Solver++(2M): order 2, one evaluation per step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    With l = log(alpha / sigma), h = l_t - l_s and D = E[x1 | z], the flow from s to t is exact but for the change of D:
        z_t = sigma_t / sigma_s z_s + alpha_t (1 - exp(-h)) (D_n + h / (2 h_(n-1)) (D_n - D_(n-1))).
    The first and the last step take D_n alone, the last as l is infinite at t = 1.
    """

    def __init__(self, steps: Steps = 25, grid: TimeGrid | None = None):
        super().__init__(steps, grid)
        self.before: Tensor | None = None

    def step(self, flow: FlowObjective, x: Tensor, times: Tensor, k: int, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        self.evaluations += 1
        data = flow.path.x1_from_velocity(flow.velocity(x, times[k], label), x, times[k])
        ahead = data
        if 0 < k < len(times) - 2 and self.before is not None:
            ratio = self.log_ratio(flow, times[k], times[k + 1]) / self.log_ratio(flow, times[k - 1], times[k])
            ahead = data + 0.5 * ratio * (data - self.before)
        self.before = data
        start, end = flow.path.at(times[k]), flow.path.at(times[k + 1])
        kept = end.sigma / start.sigma
        return kept * x + (end.alpha - kept * start.alpha) * ahead

    @staticmethod
    def log_ratio(flow: FlowObjective, start: Tensor, end: Tensor) -> Tensor:
        """Return h, by how much log(alpha / sigma) grows; infinite from alpha = 0."""
        s, t = flow.path.at(start), flow.path.at(end)
        return (t.alpha * s.sigma / (s.alpha * t.sigma)).log()

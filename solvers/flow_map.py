"""Sampling by a learned flow map: one evaluation crosses a whole interval of time."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from common.errors import UserError
from common.ranges import Steps
from solvers.base_solver import FreshNoise, Sampler
from solvers.time_grids import TimeGrid

if TYPE_CHECKING:
    from losses.objective import FlowObjective


class FlowMapSolver(Sampler):
    """Walks the grid's intervals with the objective's map X(x, r, t) = x + (t - r) u(x, r, t), one evaluation each.

    renoise: each step jumps to data, X(x, r, 1), and unless it was the last returns to the next time t of the grid with
    fresh noise along the path, alpha_t X + sigma_t x0: multistep sampling of consistency models (Song et al. 2023, arXiv
    2303.01469, algorithm 1), which forgets the errors of earlier steps. Either way the exact map gives the data exactly.
    """

    def __init__(self, steps: Steps = 4, grid: TimeGrid | None = None, renoise: bool = False):
        super().__init__(steps, grid)
        self.renoise = self.renoises = renoise

    def check(self, flow: FlowObjective) -> None:
        if flow.learns == "velocity":
            raise UserError(
                "solver=flow_map samples with a learned flow map, and this loss teaches only the velocity at an instant; "
                "use solver=midpoint, or train with loss=meanflow"
            )
        if self.steps > 1 and flow.learns == "generator":
            raise UserError("this loss teaches one map, from noise to data, and no step between; use solver.steps=1")
        if self.steps > 1 and flow.learns == "endpoint_map" and not self.renoise:
            raise UserError(
                "this loss teaches maps to data alone, and a walk wants maps between its steps; use solver.renoise=true, "
                "which noises the data again, or solver.steps=1"
            )

    def sample(self, flow: FlowObjective, x0: Tensor, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        """Raise UserError when the objective learns no map that these steps take."""
        self.check(flow)
        self.evaluations = 0
        grid = self.times(x0)
        x = x0
        for k, (r, t) in enumerate(pairwise(grid)):
            self.evaluations += 1
            if self.renoise:
                x = flow.flow_map(x, r, grid[-1], label)
                x = flow.path.state(fresh(k), x, t) if k + 1 < self.steps else x
            else:
                x = flow.flow_map(x, r, t, label)
        return x

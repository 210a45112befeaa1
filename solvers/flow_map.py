"""Sampling by a learned flow map: one evaluation crosses a whole interval of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from common.errors import UserError
from common.ranges import Steps
from solvers.base_solver import FreshNoise, Walker, refuse_equilibrium
from solvers.time_grids import TimeGrid

if TYPE_CHECKING:
    from losses.objective import FlowObjective


class FlowMapSolver(Walker):
    """Walks the grid's intervals with the objective's map X(x, r, t) = x + (t - r) u(x, r, t), one evaluation each.

    renoise: each step jumps to data, X(x, r, 1), and unless it was the last returns to the next time t of the grid with
    fresh noise along the path, alpha_t X + sigma_t x0: multistep sampling of consistency models (Song et al. 2023, arXiv
    2303.01469, algorithm 1), which forgets the errors of earlier steps. Either way the exact map gives the data exactly.
    """

    def __init__(self, steps: Steps = 4, grid: TimeGrid | None = None, renoise: bool = False):
        super().__init__(steps, grid)
        self.renoise = self.renoises = renoise
        self.has_path = not renoise

    def check(self, flow: FlowObjective) -> None:
        refuse_equilibrium(flow)
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

    def step(self, flow: FlowObjective, x: Tensor, times: Tensor, k: int, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        self.evaluations += 1
        if not self.renoise:
            return flow.flow_map(x, times[k], times[k + 1], label)
        x = flow.flow_map(x, times[k], times[-1], label)
        return flow.path.state(fresh(k), x, times[k + 1]) if k + 2 < len(times) else x

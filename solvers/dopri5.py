"""Dormand and Prince's adaptive Runge-Kutta method of order 5(4), from torchdiffeq."""

import torch
from torch import Tensor

from common.device import full_products
from common.ranges import Steps, Tolerance
from solvers.base_solver import BaseSolver, Field, StepCallback
from solvers.time_grids import TimeGrid

USUAL = 100  # evaluations
FIRST_STEP = 0.05  # of the whole span; torchdiffeq's own guess may call the field past the last time


class Dopri5(BaseSolver):
    """Chooses its steps so that the estimated local error stays below atol + rtol |x| (Dormand & Prince 1980).

    The error is a root mean square over the whole batch, so a row's last digits depend on the rows beside it. The grid
    only says where a callback looks. float64 states are worth their cost below tolerances of about 1e-6.
    """

    def __init__(self, rtol: Tolerance = 1e-6, atol: Tolerance = 1e-6, steps: Steps = 25, grid: TimeGrid | None = None):
        super().__init__(steps, grid)
        self.rtol, self.atol = rtol, atol

    @property
    def evaluations_ahead(self) -> int:
        return USUAL

    @full_products()
    def solve(self, field: Field, x0: Tensor, times: Tensor | None = None, callback: StepCallback | None = None) -> Tensor:
        from torchdiffeq import odeint  # here, because importing it is slow and fixed-step solvers do without

        self.evaluations = 0
        grid = self.times(x0, times)
        if callback is None:
            grid = torch.stack([grid[0], grid[-1]])
        states = odeint(
            lambda t, x: self.evaluate(field, x, t), x0, grid,
            rtol=self.rtol, atol=self.atol, method="dopri5", options=self.options(grid),
        )  # fmt: skip
        if callback is not None:
            for x, t in zip(states, grid, strict=True):
                callback(x, t)
        return states[-1]

    def options(self, grid: Tensor) -> dict[str, Tensor | torch.dtype]:
        """Step onto the last time instead of past it; keep time in float64, except on MPS, which has none."""
        dtype = torch.float32 if grid.device.type == "mps" else torch.float64
        return {"dtype": dtype, "step_t": grid[-1:], "first_step": FIRST_STEP * (grid[-1] - grid[0]).abs()}

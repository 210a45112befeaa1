"""The solver contract: carry a state along a velocity field over given intervals of time."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.time_grids import TimeGrid, UniformGrid

Field = Callable[[Tensor, Tensor], Tensor]  # field(x (B, ...), t ()) -> dx/dt (B, ...)
StepCallback = Callable[[Tensor, Tensor], None]  # callback(x (B, ...), t ()) at every grid point, the first included


class BaseSolver(ABC):
    """Integrates dx/dt = field(x, t) over the intervals of a time grid, and ends exactly at its last time.

    evaluations: how often the last solve called the field (NFE).
    """

    def __init__(self, steps: int = 25, grid: TimeGrid | None = None):
        self.steps = steps
        self.grid = grid or UniformGrid()
        self.evaluations = 0

    @abstractmethod
    def solve(
        self, field: Field, x0: Tensor, times: Tensor | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """The state at times[-1] of the path that is at x0 (B, ...) at times[0].

        times: (N + 1,) monotone, increasing (noise to data) or decreasing (data to noise); None means `steps` intervals
        of the solver's grid from 0 to 1. callback sees (state, time) at every point of the grid.
        """

    def times(self, x0: Tensor) -> Tensor:
        """The default grid, on x0's device."""
        return self.grid.times(self.steps).to(device=x0.device, dtype=torch.promote_types(x0.dtype, torch.float32))

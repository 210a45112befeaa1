"""Two contracts: a sampler carries noise to data by what a model has learned; a solver integrates any velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Steps
from solvers.time_grids import TimeGrid, UniformGrid

if TYPE_CHECKING:
    from losses.objective import FlowObjective

Field = Callable[[Tensor, Tensor], Tensor]  # field(x (B, ...), t ()) -> dx/dt (B, ...)
StepCallback = Callable[[Tensor, Tensor], None]  # callback(x (B, ...), t ()) at every grid point, the first included
FreshNoise = Callable[[int], Tensor]  # fresh(k) -> source noise (B, ...) of step k, for solvers that add noise again


def refuse_equilibrium(flow: FlowObjective) -> None:
    """Raise UserError when the objective teaches a field without time, which carries nothing from one time to another."""
    if flow.learns == "equilibrium":
        raise UserError("this loss teaches a field without time, which is climbed, and no flow; use solver=ascent")


class Sampler(ABC):
    """Carries noise to data by what an objective has learned, over the intervals of a time grid that ends at t = 1.

    evaluations: network evaluations a sample took last time (NFE); one under guidance costs two forward passes.
    renoises: whether a sample depends on fresh noise besides its x0, so that it has no one true end. has_path: whether its
    states go on from each other. gaussian_source: whether it needs noise of a centred Gaussian.
    Raises UserError when `steps` is not a whole number of at least 1.
    """

    renoises: bool = False
    has_path: bool = True
    gaussian_source: bool = False

    def __init__(self, steps: Steps = 25, grid: TimeGrid | None = None):
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"solver.steps={steps} is not a number of steps; give a whole number of at least 1")
        self.steps = steps
        self.grid = grid or UniformGrid()
        self.evaluations = 0

    @property
    def evaluations_ahead(self) -> int:
        """Return how often a solve will call the field, as far as can be known before."""
        return self.steps

    @abstractmethod
    def sample(
        self, flow: FlowObjective, x0: Tensor, label: Tensor | None, fresh: FreshNoise, callback: StepCallback | None = None
    ) -> Tensor:
        """Return samples (B, ...) from noise x0 (B, ...), label (B,) or None. callback sees (state, time) on the grid."""

    def check(self, flow: FlowObjective) -> None:
        """Raise UserError when this sampler cannot use what the objective learns; called before a run trains."""
        refuse_equilibrium(flow)
        if not flow.learns_velocity:
            use = "use solver=flow_map solver.steps=1"
            raise UserError(f"this loss teaches where a state is carried to, not its velocity at an instant; {use}")

    def times(self, x0: Tensor, times: Tensor | None = None) -> Tensor:
        """Return `times`, or else the solver's own grid: (N + 1,) on x0's device, in x0's precision or fp32.

        Raises UserError when the solver's own grid is too dense for that precision to tell its times apart.
        """
        dtype = torch.promote_types(x0.dtype, torch.float32)
        if times is not None:
            return times.to(x0.device, dtype)
        grid = self.grid.times(self.steps).to(dtype)  # on the CPU: looking at it there costs no device synchronisation
        if (grid.diff() <= 0).any():
            raise UserError(f"solver.grid has some of its {self.steps} times twice; use fewer steps, or solver/grid=uniform")
        return grid.to(x0.device)


class Walker(Sampler, ABC):
    """A sampler that takes the grid's intervals one after the other, each by `step`."""

    def sample(
        self, flow: FlowObjective, x0: Tensor, label: Tensor | None, fresh: FreshNoise, callback: StepCallback | None = None
    ) -> Tensor:
        self.check(flow)
        return self.walk(flow, x0, self.times(x0), label, fresh, callback)

    def walk(
        self,
        flow: FlowObjective,
        x: Tensor,
        times: Tensor,
        label: Tensor | None,
        fresh: FreshNoise,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return the states x (B, ...) of times[0] carried to times[-1]."""
        self.evaluations = 0
        for k in range(len(times) - 1):
            if callback is not None:
                callback(x, times[k])
            x = self.step(flow, x, times, k, label, fresh)
        if callback is not None:
            callback(x, times[-1])
        return x

    @abstractmethod
    def step(self, flow: FlowObjective, x: Tensor, times: Tensor, k: int, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        """Return the states x (B, ...) carried from times[k] to times[k + 1]."""


class BaseSolver(Sampler, ABC):
    """Integrates an ODE dx/dt = field(x, t), and samples by integrating the objective's velocity."""

    @abstractmethod
    def solve(self, field: Field, x0: Tensor, times: Tensor | None = None, callback: StepCallback | None = None) -> Tensor:
        """Return the state at times[-1] of the path that is at x0 (B, ...) at times[0].

        times: (N + 1,) monotone, increasing (noise to data) or decreasing (data to noise); None means `steps` intervals
        of the solver's grid from 0 to 1. callback sees (state, time) at every point of the grid.
        """

    def sample(
        self, flow: FlowObjective, x0: Tensor, label: Tensor | None, fresh: FreshNoise, callback: StepCallback | None = None
    ) -> Tensor:
        """Raise UserError when the objective does not learn the velocity at an instant."""
        self.check(flow)
        return self.solve(lambda x, t: flow.velocity(x, t, label), x0, callback=callback)

    def evaluate(self, field: Field, x: Tensor, t: Tensor) -> Tensor:
        """Return field(x, t), and count the evaluation."""
        self.evaluations += 1
        return field(x, t)

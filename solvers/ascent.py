"""Climbing of a field without time, as equilibrium matching learns it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from common.errors import UserError
from common.ranges import Positive, ShareBelow1, Steps
from solvers.base_solver import FreshNoise, Walker

if TYPE_CHECKING:
    from losses.objective import FlowObjective


class Ascent(Walker):
    """x_(k+1) = x_k + eta f(x_k + momentum (x_k - x_(k-1))): steps along f, taken ahead as in Nesterov's method (Wang & Du
    2025, arXiv 2510.02300, whose f has the other sign).

    eta: of a step, in units of f. The way is about strength eta steps times that from noise to data. Times only number the
    steps: the field knows none.
    """

    def __init__(self, steps: Steps = 250, eta: Positive = 0.0015, momentum: ShareBelow1 = 0.3):
        super().__init__(steps)
        self.eta, self.momentum = eta, momentum
        self.before: Tensor | None = None

    def check(self, flow: FlowObjective) -> None:
        if flow.learns != "equilibrium":
            raise UserError(
                "solver=ascent climbs a field without time, and this loss teaches a flow; use solver=midpoint, or train "
                "with loss=equilibrium_matching"
            )

    def step(self, flow: FlowObjective, x: Tensor, times: Tensor, k: int, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        self.evaluations += 1
        ahead = x if k == 0 or self.before is None else x + self.momentum * (x - self.before)
        self.before = x
        return x + self.eta * flow.velocity(ahead, times[k], label)

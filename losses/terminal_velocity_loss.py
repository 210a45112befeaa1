"""Terminal velocity matching, the Lagrangian flow map."""

from typing import Any

import torch
from torch import Tensor

from common.device import full_products
from common.errors import UserError
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowBatch, FlowObjective, expand_time
from losses.total_derivative import STEP, Engine, forward_derivative, picked_engine


class TerminalVelocityLoss(FlowMapObjective):
    """|u + (t - r) du/dt - sg v(X, t)|^2, X = X(z_r, r, t), v(X, t) = u(X, t, t), and flow matching on the rows with r = t.

    (Zhou et al. 2025, terminal velocity matching; the Lagrangian map of Boffi et al. 2024, arXiv 2406.07507.) The left side
    is dX/dt, where the map arrives: it must be the velocity there. Only t is differentiated (tangents (0, 0, 1)), and the
    loss back-propagates through that derivative, so the engines are func and, with the graph of both of its evaluations,
    finite_difference (auto's choice where there is no CUDA). UserError for one without a graph: it changes the gradient.
    """

    between = True

    def __init__(self, jvp: Engine = "auto", **parts: Any) -> None:
        super().__init__(**parts)
        if jvp not in ("auto", "func", "finite_difference"):
            raise UserError(
                f"loss.jvp={jvp} cannot serve loss=terminal_velocity, which back-propagates through the derivative; "
                "use auto, func or finite_difference"
            )
        self.jvp: Engine = jvp

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        interval, instant = batch.split(rows)
        error = self.mean_velocities(instant) - instant.conditional_velocity
        if rows:
            error = torch.cat([self.arrival_error(interval), error])
        return {"loss": self.weighted(error)}

    def arrival_error(self, batch: FlowBatch) -> Tensor:
        """Return dX/dt - v(X, t) (B, ...), with the graph of dX/dt."""
        with torch.autocast(batch.input.device.type, enabled=False):
            u, du_dt = self.value_and_time_derivative(batch)
        duration = expand_time(batch.t - batch.r, u)
        arrival = self.instant_velocity((batch.input + duration * u).detach(), batch.t, batch.label)
        return u + duration * du_dt - arrival

    def value_and_time_derivative(self, batch: FlowBatch) -> tuple[Tensor, Tensor]:
        """Return u and du/dt at fixed z_r and r, (B, ...) each, both with a graph and of one dropout mask."""

        def u(t: Tensor) -> Tensor:
            return self.mean_velocity(batch.input, batch.r, t, batch.label)

        if picked_engine(self.jvp, batch.t.device) == "func":
            return forward_derivative(u, (batch.t,), (torch.ones_like(batch.t),))
        with full_products(), self.repeated():
            ahead = u(batch.t + STEP)
        with full_products(), self.repeated():
            behind = u(batch.t - STEP)
        return u(batch.t), (ahead - behind) / (2 * STEP)

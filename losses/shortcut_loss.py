"""Shortcut models."""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowBatch, FlowObjective, expand_time
from losses.time_samplers import DyadicTimes


class ShortcutLoss(FlowMapObjective):
    """|u(z_r, r, r + 2d) - sg((u1 + u2) / 2)|^2: one long step equals two short ones.

    (Frans et al. 2024, arXiv 2410.12557.) u1 = u(z_r, r, r + d) and u2 = u(z_r + d u1, r + d, r + 2d) come from the EMA
    weights; d = 2^-k, r a multiple of 2d. The rest of the batch is flow matching at r = t. The shortest steps are the
    instantaneous velocity, u(z, r, r) or a teacher's, which ties the ladder to the flow (an Euler step of d, so its own bias
    is of order d). Raises UserError for any other time sampler than loss/time_sampler=dyadic.
    """

    needs_teacher = True

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if not isinstance(self.time_sampler, DyadicTimes):
            raise UserError("loss=shortcut halves its steps, so its times lie on a ladder; use loss/time_sampler=dyadic")
        self.shortest = self.time_sampler.shortest

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        interval, instant = batch.split(rows)
        target = torch.cat([self.two_steps(teacher or self, interval), instant.conditional_velocity])
        error = self.mean_velocities(batch, rows) - target
        return {"loss": self.weighted(error)}

    def two_steps(self, teacher: FlowObjective, batch: FlowBatch) -> Tensor:
        """Return (u1 + u2) / 2 (B, ...), without a graph."""
        d = 0.5 * (batch.t - batch.r)
        middle, at_foot = batch.r + d, d < 1.5 * self.shortest
        with torch.no_grad():
            u1 = self.step(teacher, batch.input, batch.r, middle, at_foot, batch.label)
            z = batch.input + expand_time(d, u1) * u1
            u2 = self.step(teacher, z, middle, batch.t, at_foot, batch.label)
        return 0.5 * (u1 + u2)

    def step(self, teacher: FlowObjective, z: Tensor, r: Tensor, t: Tensor, at_foot: Tensor, label: Tensor | None) -> Tensor:
        """Return u(z, r, t) (B, ...) by the EMA weights, on the rows at_foot (B,) the instantaneous velocity."""
        u = teacher.mean_velocity(z, r, torch.where(at_foot, r, t), label)
        if self.teacher is None:
            return u
        return torch.where(expand_time(at_foot, u).bool(), self.instant_velocity(z, r, label), u)

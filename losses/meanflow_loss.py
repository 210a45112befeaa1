"""MeanFlow and its improved form."""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Share
from losses.meanflow_guidance import MeanFlowGuidance
from losses.objective import FlowBatch, FlowObjective, expand_time
from losses.total_derivative import DerivativeObjective
from losses.world import Field, World


class MeanFlowLoss(DerivativeObjective):
    """Mean velocity u(z_r, r, t): one evaluation crosses the whole path (Geng et al. 2025, arXiv 2505.13447, eq. 6 and 10).

    (t - r) u(z_r, r, t) = int_r^t v ds along the flow; differentiated in r,
        u = v + (t - r) D_v u,      D_v u = du/dr + v . grad_z u.
    The conditional velocity stands for v, which leaves the minimiser of the unweighted loss where it is; adaptive weighting
    (p > 0) moves it on multimodal data. Only the first interval_rows of a batch, those with r < t, pay for the derivative;
    on the rest u(z, r, r) is fitted to v_c directly. The paper's time runs the other way: its later time is the state's.

    variance_reduction: b; the derivative is taken along b v_c + (1 - b) sg u(z_r, r, r). The minimiser is the same for every
    b, since D is linear in its direction; below 1 there is less noise in the target, at one more evaluation.
    guidance: folded into the target, so that one unguided evaluation is a guided sample. Raises UserError for a network
    that is not conditional, or whose null label is never trained.
    """

    def __init__(self, guidance: MeanFlowGuidance | None = None, variance_reduction: Share = 1.0, **parts: Any) -> None:
        super().__init__(**parts)
        if guidance is not None and (not self.network.is_conditional or self.label_dropout == 0):
            raise UserError(
                "loss/guidance needs a network that knows labels and their absence: "
                "add conditional=true and keep loss.label_dropout above 0, or leave loss/guidance out"
            )
        self.guidance, self.variance_reduction = guidance, variance_reduction

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        v = self.velocity_target(batch)
        u, derivative = self.value_and_derivative(batch, rows, self.direction(batch, v[:rows]))
        duration = expand_time(batch.t - batch.r, batch.input)[:rows]
        target = torch.cat([v[:rows] + duration * derivative, v[rows:]])
        return {"loss": self.weighted(u - target)}

    def direction(self, batch: FlowBatch, v: Tensor) -> Tensor:
        """Return b v + (1 - b) u(z_r, r, r) on the rows of v (rows, ...), without a graph."""
        if self.variance_reduction == 1 or len(v) == 0:
            return v
        first, _ = batch.split(len(v))
        with self.frozen():
            own = self.velocity(first.input, first.r, first.label)
        return torch.lerp(own, v, self.variance_reduction)

    @property
    def scale(self) -> float:
        """Return the effective scale of the guidance in the target, 1 without."""
        return 1.0 if self.guidance is None else self.guidance.scale

    def exact(self, world: World) -> Field | str:
        """Return as every objective does, with guidance of the guided velocity: see MeanFlowGuidance."""
        if self.guidance is None or self.scale == 1:
            return super().exact(world)
        if reason := self.why_no_guided_flow():
            return reason
        return super().exact(world.guided(self.scale, self.guidance.start, self.guidance.end))

    def why_no_guided_flow(self) -> str | None:
        """Return why the minimiser under guidance in the target is not the guided flow's; None where it is."""
        if self.teacher is None and self.time_sampler.to_data and self.time_sampler.ratio == 1:
            return (
                "guidance in the target asks the network for u(z, r, r), which no row trains where all are headed to data "
                "(loss.time_sampler.to_data=true, ratio=1), so that the minimiser is not known"
            )
        return None

    def velocity_target(self, batch: FlowBatch) -> Tensor:
        """Return v_c (B, ...), or with guidance its guided form on the rows that have a label."""
        if self.guidance is None or batch.label is None:
            return batch.conditional_velocity
        null = self.network.null_label(batch.label)
        v_label, v_null = self.guides(batch, null)
        guided = self.guidance.target(batch.conditional_velocity, v_label, v_null, batch.r)
        hidden = (batch.label == null).reshape(len(null), -1).all(1)
        return torch.where(expand_time(hidden, guided).bool(), batch.conditional_velocity, guided)

    def guides(self, batch: FlowBatch, null: Tensor) -> tuple[Tensor, Tensor]:
        """Return u(z, r, r | c) and u(z, r, r | null) (B, ...), without a graph: the network's own, and with a teacher what
        they are at the minimiser, its guided velocity and that of the null label.
        """
        if self.teacher is None:
            with self.frozen():
                v_label, v_null = (self.velocity(batch.input, batch.r, label) for label in (batch.label, null))
            return v_label, v_null
        v_null = self.instant_velocity(batch.input, batch.r, null)
        return torch.lerp(v_null, batch.conditional_velocity, self.scale), v_null


class ImprovedMeanFlowLoss(MeanFlowLoss):
    """|u - (t - r) sg(D_v u) - v_c|^2 + |v - v_c|^2 with v = u(z_r, r, r) (Geng et al. 2025, arXiv 2512.02012).

    The direction of the derivative is the network's own instantaneous velocity, which takes the variance of v_c out of it;
    v_c enters as what is regressed to, only. The first term is taken on the rows with r < t, the second on every row. A
    teacher's velocity is the direction, too.
    """

    def __init__(self, guidance: MeanFlowGuidance | None = None, **parts: Any) -> None:
        super().__init__(guidance=guidance, variance_reduction=0.0, **parts)

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        interval, _ = batch.split(rows)
        target = self.velocity_target(batch)
        v = self.velocity(batch.input, batch.r, batch.label)
        instant_loss = self.weighted(v - target)
        if rows == 0:
            return {"loss": instant_loss}
        direction = (v if self.teacher is None else target)[:rows].detach()
        u, derivative = self.value_and_derivative(interval, rows, direction)
        residual = u - expand_time(interval.t - interval.r, u) * derivative - target[:rows]
        mean_loss = rows / len(batch) * self.weighted(residual)
        return {"instant": instant_loss, "mean": mean_loss, "loss": instant_loss + mean_loss}

"""alpha-Flow, with SoFlow as one of its schedules."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.alpha_schedules import AlphaSchedule
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowBatch, FlowObjective, expand_time


@dataclass
class AlphaBatch(FlowBatch):
    """Adds a (B,), the share of [r, t] that the consistency step crosses (1 where r = t), and whether a derivative does."""

    a: Tensor | None = None
    by_derivative: bool = False


class AlphaFlowLoss(MeanFlowLoss):
    """|u - sg(a v_c + (1 - a) u(z_s, s, t))|^2 / a, s = r + a (t - r), z_s = z_r + (s - r) v_c: MeanFlow without a JVP
    until a is so small that the derivative, its limit, takes over (the schedule's switch).

    (Zhang et al. 2025, alpha-Flow, arXiv 2510.20771; SoFlow, arXiv 2512.15657, is the exponential schedule with switch=0.)
    a = 1 regresses u to v_c over the whole interval, a -> 0 is MeanFlow; `alpha` lowers it over the run, and once it is
    below `switch` the loss is MeanFlow's own. With any a > 0 the exact mean velocity is stationary only up to O(a). Both
    evaluations draw one dropout mask.

    With t = 1 throughout (time_sampler.to_data) this is consistency training: on the linear path the residual is
    (X(z_r, r, 1) - sg X(z_s, s, 1)) / (1 - r) (Song et al. 2023, arXiv 2303.01469).
    """

    def __init__(self, alpha: AlphaSchedule, switch: float = 0.005, **parts: Any) -> None:
        super().__init__(variance_reduction=1.0, **parts)
        self.alpha, self.switch = alpha, switch

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> AlphaBatch:
        batch = super().draw(x0, x1, label, generator, progress)
        interval = torch.arange(len(batch), device=batch.r.device) < self.time_sampler.interval_rows(len(batch))
        a = torch.where(interval, self.alpha.shares(progress, batch.r), 1.0)
        return AlphaBatch(**vars(batch), a=a, by_derivative=self.alpha.share(progress) < self.switch)

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        assert isinstance(batch, AlphaBatch) and batch.a is not None
        if batch.by_derivative:
            return super().forward(batch, teacher)
        rows = self.time_sampler.interval_rows(len(batch))
        v = self.velocity_target(batch)
        target = torch.cat([self.consistency_target(batch, rows, v), v[rows:]])
        error = self.mean_velocities(batch, rows) - target
        return {"loss": self.weighted(error, batch.a)}

    def consistency_target(self, batch: AlphaBatch, rows: int, v: Tensor) -> Tensor:
        """Return a v + (1 - a) u(z_s, s, t) on the first `rows` (rows, ...), without a graph."""
        first, _ = batch.split(rows)
        assert isinstance(first, AlphaBatch) and first.a is not None
        step = first.a * (first.t - first.r)
        a, v = expand_time(first.a, first.input), v[:rows]
        with self.frozen():
            later = self.mean_velocity(first.input + expand_time(step, v) * v, first.r + step, first.t, first.label)
        return a * v + (1 - a) * later

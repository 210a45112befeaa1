"""SplitMeanFlow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowBatch, FlowObjective, expand_time


@dataclass
class SplitBatch(FlowBatch):
    """Adds share (B,), where in [r, t] each interval is split: s = (1 - share) r + share t."""

    share: Tensor | None = None


class SplitMeanFlowLoss(FlowMapObjective):
    """|u - sg(l u1 + (1 - l) u2)|^2, the mean velocity of an interval from those of its parts.

    (Guo et al. 2025, arXiv 2507.16884.) s = (1 - l) r + l t with l uniform on [0, 1], u1 = u(z_r, r, s),
    u2 = u(z_r + (s - r) u1, s, t). Algebra only, no derivative; but u = 0 satisfies it too: only the flow matching rows at
    r = t hold it to the data. The paper keeps 0.8 or more of these; a quarter of them suffices for points in few dimensions,
    with a share of intervals from 0 to 1 (loss.time_sampler.whole), where random pairs are rare.
    """

    between = True

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> SplitBatch:
        batch = super().draw(x0, x1, label, generator, progress)
        return SplitBatch(**vars(batch), share=torch.rand(len(batch), generator=generator, device=generator.device))

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        interval, instant = batch.split(rows)
        target = torch.cat([self.joined(interval), instant.conditional_velocity])
        error = self.mean_velocities(batch, rows) - target
        return {"loss": self.weighted(error)}

    def joined(self, batch: FlowBatch) -> Tensor:
        """Return l u1 + (1 - l) u2 (B, ...), without a graph, each evaluation with the dropout mask of u's own."""
        assert isinstance(batch, SplitBatch) and batch.share is not None
        s = torch.lerp(batch.r, batch.t, batch.share)
        share = expand_time(batch.share, batch.input)
        with self.frozen():
            u1 = self.mean_velocity(batch.input, batch.r, s, batch.label)
        with self.frozen():
            u2 = self.mean_velocity(batch.input + expand_time(s - batch.r, u1) * u1, s, batch.t, batch.label)
        return share * u1 + (1 - share) * u2

"""Contrastive flow matching."""

from typing import Any

from torch import Tensor

from common.ranges import ShareBelow1
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowBatch, FlowObjective, expand_time


class ContrastiveLoss(FlowMatchingLoss):
    """|v - v_c|^2 - weight |v - v_c~|^2, v_c~ the conditional velocity of another row, at the same time (Stoica et al. 2025,
    contrastive flow matching, arXiv 2506.05350, eq. 7).

    Biased on purpose: with l the weight it is least at (v* - l E) / (1 - l), E = E[v_c] over all states of a time, which is
    l / (1 - l) |v* - E| away from the field v*. (1 - l) v + l E is v* again; the paper samples without that.
    """

    def __init__(self, weight: ShareBelow1 = 0.05, **parts: Any) -> None:
        super().__init__(**parts)
        self.weight = weight

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        v = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        x0, x1 = batch.raw_source.roll(1, 0), batch.raw_target.roll(1, 0)
        other = self.path.conditional_velocity(x0, x1, expand_time(batch.r, v))
        attract, repel = self.weighted(v - batch.conditional_velocity), self.weighted(v - other)
        return {"attract": attract, "repel": repel, "loss": attract - self.weight * repel}

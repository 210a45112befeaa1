"""Inductive moment matching."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import CountFrom2, Positive, ShareAbove0
from losses.objective import FlowBatch, FlowObjective, Learns, SecondTime, check_plain, expand_time
from losses.weightings import UniformWeighting


@dataclass
class MomentBatch(FlowBatch):
    """Adds later (B, ...), the states of the same x0 and x1 at later_time (B,), r < later_time <= t."""

    later: Tensor | None = None
    later_time: Tensor | None = None


class InductiveMomentMatchingLoss(FlowObjective):
    """MMD^2 between X(z_r, r, t) and sg X(z_s, s, t), s = min(t, r + step), in groups of rows that share their times (Zhou
    et al. 2025, inductive moment matching, arXiv 2503.07565, eq. 12).

    z_r and z_s are of the same x0 and x1; the kernel is Laplace's, exp(-|x - y| / width). By induction on the length of the
    interval: from s = t, where X(z_t, t, t) = z_t, to the whole of it. Only different rows i != j of a group are compared,
    since the two ends of one row hang together: then the mean is that of MMD^2 between the two distributions, and is zero,
    with its gradient, at any map that carries the distribution of the path at r to that at t for all r < t. Labelled rows
    are sorted into groups of a label and compared with it alone. Raises UserError for a weighting: there are no errors.
    """

    second_time: SecondTime = "state"
    learns: Learns = "flow_map"
    marginals_only = True

    def __init__(self, step: ShareAbove0, width: Positive, group: CountFrom2 = 4, **parts: Any) -> None:
        super().__init__(**parts)
        if not isinstance(self.weighting, UniformWeighting):
            raise UserError("loss=inductive_moment_matching has no errors that could be weighed; use loss/weighting=uniform")
        self.step, self.width, self.group = step, width, group

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> MomentBatch:
        x0, x1, label = self.pairs(x0, x1, label, generator)
        label = check_plain(self.drop_labels(label, generator))
        if label is not None:
            order = label.argsort(stable=True)
            x0, x1, label = x0[order], x1[order], label[order]
        r, t = self.group_times(len(x1), generator)
        s = torch.minimum(r + self.step, t)
        z, later = (self.path.state(x0, x1, expand_time(time, x1)) for time in (r, s))
        v = self.path.conditional_velocity(x0, x1, expand_time(r, x1))
        return MomentBatch(x0, x1, r, t, z, v, self.unified(z, r, t), label, later, s)

    def group_times(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return r and t (rows,), the same within a group, the groups in random order."""
        groups = -(-rows // self.group)
        order = torch.randperm(groups, generator=generator, device=generator.device)
        r, t = (self.path.last_time * time[order] for time in self.time_sampler.sample(groups, generator))
        return tuple(time.repeat_interleave(self.group)[:rows] for time in (r, t))  # type: ignore[return-value]

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        assert isinstance(batch, MomentBatch) and batch.later is not None and batch.later_time is not None
        with self.frozen():
            y = self.grouped(self.flow_map(batch.later, batch.later_time, batch.t, batch.label).flatten(1))
        x = self.grouped(self.flow_map(batch.input, batch.r, batch.t, batch.label).flatten(1))
        seen = self.seen(batch)
        kernels = self.kernel(x, x) + self.kernel(y, y) - 2 * self.kernel(x, y)
        return {"loss": (kernels * seen).sum() / seen.sum().clamp(min=1)}

    def grouped(self, x: Tensor) -> Tensor:
        """Return rows (B, ...) as (groups, group, ...), the last group filled up with zeros."""
        filled = torch.cat([x, x.new_zeros(-len(x) % self.group, *x.shape[1:])])
        return filled.view(-1, self.group, *x.shape[1:])

    def seen(self, batch: MomentBatch) -> Tensor:
        """Return which rows are compared (groups, group, group): different ones of one label."""
        label = self.grouped(torch.ones_like(batch.r) if batch.label is None else batch.label + 1)  # 0: filled up
        same = (label[:, :, None] == label[:, None]) & (label[:, None] > 0)
        return same & ~torch.eye(self.group, dtype=torch.bool, device=label.device)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return exp(-|x - y| / width) of the pairs of each group (groups, group, group)."""
        return torch.exp(-torch.cdist(x, y) / self.width)

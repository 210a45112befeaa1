"""Drifting: samples move towards the data and away from each other."""

from typing import Any

import torch
from torch import Tensor

from common.ranges import Positive
from losses.objective import FlowBatch, FlowObjective, Learns, SecondTime, check_plain

FAR = -1e30  # in the place of a logarithm of zero


class DriftingLoss(FlowObjective):
    """|x - sg(x + V(x))|^2 for samples x = x0 + u(x0, 0, 1): a generator of one evaluation (Deng et al. 2026, drifting,
    arXiv 2602.04770).

    V(x) = sum k(x, y+) k(x, y-) (y+ - y-) / (Z+ Z-), k = exp(-|x - y| / tau), y+ the data and y- the other samples of the
    batch; of several tau the sum. x is not among the y-, and one datum is left out for it: with as many y+ as y-, exchanging
    them turns V(x) round, so that E[V | x] is exactly 0 where samples and data are distributed alike, however few they are.
    Labelled rows see those of their own label alone. tau, in the units of the states, is about the distances to be told
    apart: small ones sharpen, and only a large one pulls samples from one mode to another.
    """

    second_time: SecondTime = "state"
    learns: Learns = "generator"
    marginals_only = True
    pairwise = True

    def __init__(self, tau: list[Positive], **parts: Any) -> None:
        super().__init__(**parts)
        self.tau = tau

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> FlowBatch:
        x0, x1, label = self.pairs(x0, x1, label, generator)
        r, t = torch.zeros(len(x0), device=x0.device), torch.ones(len(x0), device=x0.device)
        return FlowBatch(x0, x1, r, t, x0, x1 - x0, self.unified(x0, r, t), check_plain(self.drop_labels(label, generator)))

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        x = batch.input + self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        with torch.no_grad():
            ahead = x + self.drift(x.flatten(1), batch.raw_target.flatten(1), batch.label).view_as(x)
        return {"loss": self.weighted(x - ahead)}

    def drift(self, x: Tensor, data: Tensor, label: Tensor | None) -> Tensor:
        """Return V (B, D) of samples x (B, D) among data (B, D); zero where no other row has the same label."""
        seen = others(len(x), x.device, label)
        to_data, to_samples = torch.cdist(x, data), torch.cdist(x, x)
        drifts = (pull(to_data, seen, tau) @ data - pull(to_samples, seen, tau) @ x for tau in self.tau)
        return sum(drifts, torch.zeros_like(x))


def others(rows: int, device: torch.device, label: Tensor | None) -> Tensor:
    """Return which rows each may compare itself with, (B, B): all others, of the same label (B,) where there are any."""
    seen = ~torch.eye(rows, dtype=torch.bool, device=device)
    return seen if label is None else seen & (label[:, None] == label)


def pull(distance: Tensor, seen: Tensor, tau: float) -> Tensor:
    """Return k / Z (B, B) over the rows that are seen; zero for a row that sees none."""
    return torch.softmax((-distance / tau).masked_fill(~seen, FAR), dim=1) * seen

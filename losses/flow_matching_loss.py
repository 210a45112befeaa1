"""Flow matching."""

from typing import Any

from torch import Tensor

from losses.objective import FlowBatch, FlowObjective, SecondTime


class FlowMatchingLoss(FlowObjective):
    """|u(z_t; t, 1) - v_c|^2, v_c = alpha'_t x1 + sigma'_t x0 (Lipman et al. 2022, arXiv 2210.02747, eq. 14).

    Its minimiser is the marginal velocity E[v_c | z_t]. second_time="state" feeds (t, t) instead of (t, 1), so that the
    trained flow can be fine-tuned into a MeanFlow-type model.
    """

    def __init__(self, second_time: SecondTime = "end", **parts: Any) -> None:
        super().__init__(**parts)
        self.second_time = second_time

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        v = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        return {"loss": self.weighted(v - batch.conditional_velocity)}

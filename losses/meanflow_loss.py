"""MeanFlow."""

import torch
from torch import Tensor

from losses.forward_mode import jvp
from losses.objective import FlowBatch, FlowObjective, SecondTime, expand_time


class MeanFlowLoss(FlowObjective):
    """Mean velocity u(z_r, r, t): one evaluation crosses the whole path (Geng et al. 2025, arXiv 2505.13447, eq. 6 and 10).

    (t - r) u(z_r, r, t) = int_r^t v ds along the flow; differentiated in r,
        u = v + (t - r) D_v u,      D_v u = du/dr + v . grad_z u      (one JVP, tangents (v, 1, 0)).
    The conditional velocity stands for v, which leaves the minimiser of the unweighted loss where it is; adaptive weighting
    (p > 0) moves it on multimodal data. Only the first interval_rows of a batch, those with r < t, pay for the JVP; on the
    rest u(z, r, r) is fitted to v_c directly. The paper's time runs the other way: its later time is the state's time here.
    """

    second_time: SecondTime = "state"
    learns_flow_map = True

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        interval, instant = batch.split(rows)
        target = self.interval_target(interval)
        u = self.mean_velocity(interval.input, interval.r, interval.t, interval.label)
        v = self.mean_velocity(instant.input, instant.r, instant.t, instant.label)
        errors = torch.cat([u - target, v - instant.conditional_velocity])
        return {"loss": self.weighting(errors.square().flatten(1).sum(1))}

    def interval_target(self, batch: FlowBatch) -> Tensor:
        """sg(v_c + (t - r) D_v u): the tangent is taken without building a graph, in fp32."""

        def field(z: Tensor, r: Tensor) -> Tensor:
            return self.mean_velocity(z, r, batch.t, batch.label)

        tangent = jvp(field, (batch.input, batch.r), (batch.conditional_velocity, torch.ones_like(batch.r)))
        return (batch.conditional_velocity + expand_time(batch.t - batch.r, batch.input) * tangent).detach()

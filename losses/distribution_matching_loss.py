"""Distribution matching distillation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import CountOr0, Positive
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowBatch, FlowObjective, Learns, expand_time


@dataclass
class NoisedBatch(FlowBatch):
    """Adds noise (B, ...) and time (B,): where samples are noised to z = alpha x + sigma noise."""

    noise: Tensor | None = None
    time: Tensor | None = None


class DistributionMatchingLoss(FlowMapObjective):
    """<sg(D_fake(z) - D_teacher(z)), x> for samples x = x0 + u(x0, 0, 1), noised to z = alpha_t x + sigma_t noise (Yin et
    al. 2024, DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

    The noised samples' law falls towards the data's along the difference of their scores, the gradient of KL(fake | data),
        s_fake - s_teacher = alpha / sigma^2 (D_fake - D_teacher) = t / (1 - t) (v_fake - v_T) on the linear path,
    D = E[x1 | z] of the law whose velocity is v. Taken is that difference times sigma^2 / alpha, without DMD's normaliser.
    v_T is the teacher's velocity; v_fake = u(z, t, t), of the same network, is fitted by flow matching to the samples as
    they are. No data are used. The gradient is zero where the samples are distributed as the teacher's, and v_fake is v_T.

    fake_rows: k; of k + 1 rows of a batch one moves the samples, and all train v_fake. The paper has k = 5 steps of a second
    network for each step of the generator; here one network is both, told apart by its times, and init_from= starts both.
    strength: of the samples' term beside the fit of v_fake, which alone has the noise of v_c in its gradient.
    Raises UserError without a teacher.
    """

    learns: Learns = "generator"
    marginals_only = True

    def __init__(self, fake_rows: CountOr0 = 1, strength: Positive = 30.0, **parts: Any) -> None:
        super().__init__(**parts)
        if self.teacher is None:
            raise UserError("loss=distribution_matching follows a teacher; give loss.teacher=exact or a flow's checkpoint")
        self.learns, self.fake_rows, self.strength = "generator", fake_rows, strength

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> NoisedBatch:
        x0, x1, label = self.pairs(x0, x1, label, generator)
        r, t = torch.zeros(len(x0), device=x0.device), torch.ones(len(x0), device=x0.device)
        time, noise = self.path.last_time * self.time_sampler.sample(len(x0), generator)[0], x0.roll(1, 0)
        unified, label = self.unified(x0, r, t), self.drop_labels(label, generator)
        return NoisedBatch(x0, x1, r, t, x0, x1 - x0, unified, label, noise, time)

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        assert isinstance(batch, NoisedBatch) and batch.noise is not None and batch.time is not None
        moving, still = batch.split(max(1, round(len(batch) / (1 + self.fake_rows))))
        x = self.samples(moving)
        with torch.no_grad():
            fixed = torch.cat([x, self.samples(still)])
        time = expand_time(batch.time, fixed)
        z = self.path.state(batch.noise, fixed, time)
        v_fake = self.velocity(z, batch.time, batch.label)
        fake = self.weighted(v_fake - self.path.conditional_velocity(batch.noise, fixed, time))
        rows = slice(len(moving))
        v_teacher = self.instant_velocity(z[rows], batch.time[rows], moving.label)
        ours, theirs = (self.path.x1_from_velocity(v, z[rows], time[rows]) for v in (v_fake[rows].detach(), v_teacher))
        moved = self.strength * self.weighted(x - (x - (ours - theirs)).detach())
        return {"fake": fake, "generator": moved, "loss": fake + moved}

    def samples(self, batch: FlowBatch) -> Tensor:
        """Return x0 + u(x0, 0, 1) (B, ...)."""
        return batch.input + self.predict(batch.unified_input, batch.input, batch.r, batch.label)

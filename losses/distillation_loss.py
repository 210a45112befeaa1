"""Direct distillation: regression on the paths of a trained flow."""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from losses.couplings import ReflowCoupling
from losses.objective import FlowBatch, FlowObjective, SecondTime, check_labels, expand_time
from losses.world import EXACT, Field, World


class DistillationLoss(FlowObjective):
    """|u(z_r, r, t) - (z_t - z_r) / (t - r)|^2 for two states z_r and z_t of one path of a teacher's solver.

    With the ends alone (loss.coupling.points=2) this is u(x0, 0, 1) regressed on x1 - x0, x1 = X(x0) (Luhman & Luhman 2021,
    arXiv 2101.02388). With more points any two of them are a pair, as in mid-training (Hu et al. 2025, arXiv 2509.24526),
    but for a share time_sampler.whole that goes from 0 to 1. A path is determined by its x0: the target has no variance, and
    the minimum, where the loss is zero, is the teacher's own map. Raises UserError for other pairs than a teacher's, and for
    a label_dropout: a path of a hidden label would be one of its class, and the mean over classes is no map.
    """

    second_time: SecondTime = "state"
    coupling: ReflowCoupling

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if not isinstance(self.coupling, ReflowCoupling):
            raise UserError("loss=distillation learns from the paths of a teacher; use loss/coupling=reflow")
        if self.label_dropout:
            raise UserError("loss=distillation hides no labels, as paths are those of a class; leave loss.label_dropout=0")
        self.learns = "generator" if self.coupling.points == 2 else "flow_map"

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> FlowBatch:
        paths = self.coupling.paths(x1, generator)
        check_labels(self.network, label, paths.label)
        first, last = self.two_points(len(paths.times), len(x1), generator)
        row, states = torch.arange(len(x1), device=x1.device), paths.states
        z, end, r, t = states[first, row], states[last, row], paths.times[first], paths.times[last]
        mean = (end - z) / expand_time(t - r, z)
        label = self.drop_labels(paths.label, generator)
        return FlowBatch(states[0], states[-1], r, t, z, mean, self.unified(z, r, t), label)

    def two_points(self, points: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return which two of a path's points each row goes from and to, (rows,) each."""
        draw = lambda most: torch.randint(most, (rows,), generator=generator, device=generator.device)  # noqa: E731
        one, other = draw(points), draw(points - 1)
        other += other >= one
        first, last = torch.minimum(one, other), torch.maximum(one, other)
        whole = round(self.time_sampler.whole * rows)
        first[:whole], last[:whole] = 0, points - 1
        return first, last

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        u = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        return {"loss": self.weighted(u - batch.conditional_velocity)}

    def exact(self, world: World) -> Field | str:
        if self.coupling.teacher != EXACT:
            return f"the map of the teacher {self.coupling.teacher} is not known exactly"
        return world.mean_velocity

"""Objectives that learn the mean velocity u(z, r, t), from v_c or from a velocity that is known beforehand."""

from abc import ABC
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from losses.objective import FlowBatch, FlowObjective, Learns, SecondTime
from losses.world import EXACT, Field, World

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # at states z (B, ...) of times r (B,), for labels or None


class FlowMapObjective(FlowObjective, ABC):
    """Learns u(z, r, t) for every r <= t.

    teacher: None, or whose velocity v_T takes the place of v_c: "exact" (of data whose flow is known), or a checkpoint's.
    The minimiser is then the mean velocity of v_T, and v_c's variance is gone from the loss. Where a loss takes an
    instantaneous velocity from its own network, it takes v_T's, too. `follow` gives the velocity itself.
    between: whether its targets are maps that end before t. Raises UserError for one of these whose times all end at 1.
    """

    second_time: SecondTime = "state"
    learns: Learns = "flow_map"
    between: bool = False

    def __init__(self, teacher: str | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        if self.time_sampler.to_data:
            self.learns = "endpoint_map"
        if self.time_sampler.to_data and self.between:
            raise UserError(
                f"{type(self).__name__} makes its targets of maps that end before the data, and with "
                "loss.time_sampler.to_data=true no such map is trained; leave it out, or use loss=consistency"
            )
        self.teacher = teacher
        self.teacher_velocity: Velocity | None = None

    def follow(self, velocity: Velocity) -> None:
        """Take v_T, which is to need no gradient."""
        self.teacher_velocity = velocity

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> FlowBatch:
        batch = super().draw(x0, x1, label, generator, progress)
        if self.teacher is None:
            return batch
        return replace(batch, conditional_velocity=self.instant_velocity(batch.input, batch.r, batch.label))

    @torch.no_grad()
    def instant_velocity(self, z: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        """Return v_T at states z (B, ...) of times r (B,), without a teacher the network's own u(z, r, r); no graph."""
        if self.teacher is None:
            return self.velocity(z, r, label)
        assert self.teacher_velocity is not None, "an objective with a teacher is given its velocity before it draws"
        return self.teacher_velocity(z, r, label).to(z)

    def stationary(self, world: World) -> Field | str:
        if self.teacher not in (None, EXACT):
            return f"the flow of the teacher {self.teacher} is not known exactly"
        return super().stationary(world)

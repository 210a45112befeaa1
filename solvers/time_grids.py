"""Where a fixed-step solver places its steps on [0, 1]."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from torch import Tensor

from common.ranges import Range


class TimeGrid(ABC):
    """Places N + 1 increasing times on [0, 1], exactly 0 first and exactly 1 last."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """Return (steps + 1,) float64 times on the CPU."""


class UniformGrid(TimeGrid):
    """Equal steps."""

    def times(self, steps: int) -> Tensor:
        return torch.arange(steps + 1, dtype=torch.float64) / steps


class PowerGrid(TimeGrid):
    """Steps that shrink towards one end: s^power near the noise, 1 - (1 - s)^power near the data, s uniform.

    Worth it when the data is narrow beside the noise: the path then bends sharply near t = 1. On mixtures such as kmeans
    uniform is better; docs/models.md has the figures.
    power: 1 (uniform) or more; less would be dense at the other end.
    """

    def __init__(self, power: Annotated[float, Range(1, most=100)] = 2.0, dense: Literal["noise", "data"] = "data"):
        self.power, self.dense = power, dense

    def times(self, steps: int) -> Tensor:
        times = UniformGrid().times(steps) ** self.power
        return times if self.dense == "noise" else 1 - times.flip(0)


class ShiftedGrid(TimeGrid):
    """t / (shift - (shift - 1) t), t uniform: more steps near the noise, as larger pictures want (Esser et al. 2024, arXiv
    2403.03206, eq. 23, whose noise is at 1).

    shift: the square root of how many times more pixels there are; 1 is uniform, 3 is theirs for 1024 x 1024.
    """

    def __init__(self, shift: Annotated[float, Range(1, most=100)] = 3.0):
        self.shift = shift

    def times(self, steps: int) -> Tensor:
        t = UniformGrid().times(steps)
        return t / (self.shift - (self.shift - 1) * t)

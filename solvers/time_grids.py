"""Where a fixed-step solver places its steps on [0, 1]."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class TimeGrid(ABC):
    """Places N + 1 increasing times on [0, 1], exactly 0 first and exactly 1 last."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """(steps + 1,) float64 times on the CPU."""


class UniformGrid(TimeGrid):
    """Equal steps."""

    def times(self, steps: int) -> Tensor:
        return torch.arange(steps + 1, dtype=torch.float64) / steps

"""How far ahead a consistency step looks: a(progress), the share of the interval [r, t] that it crosses."""

import math
from abc import ABC, abstractmethod

from common.errors import UserError


class AlphaSchedule(ABC):
    """Lowers a from 1 (regression to v_c over the whole interval) towards 0 (the derivative)."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return a in (0, 1] when `progress` in [0, 1] of the run is done."""


class SigmoidAlpha(AlphaSchedule):
    """1 - sigmoid(sharpness (progress - middle) / (end - begin)), middle = (begin + end) / 2 (alpha-Flow).

    Raises UserError unless 0 <= begin < end <= 1.
    """

    def __init__(self, begin: float = 0.0, end: float = 1.0, sharpness: float = 25.0):
        if not 0 <= begin < end <= 1:
            raise UserError(f"loss.alpha takes 0 <= begin < end <= 1, shares of the run, not begin={begin} and end={end}")
        self.begin, self.end, self.sharpness = begin, end, sharpness

    def share(self, progress: float) -> float:
        angle = self.sharpness * (progress - 0.5 * (self.begin + self.end)) / (self.end - self.begin)
        return 1 / (1 + math.exp(min(angle, 700.0)))


class ExponentialAlpha(AlphaSchedule):
    """least^(progress / over), constant from progress = over on (SoFlow).

    Raises UserError unless 0 < least <= 1 and 0 < over <= 1.
    """

    def __init__(self, least: float = 1 / 3200, over: float = 1.0):
        if not 0 < least <= 1 or not 0 < over <= 1:
            raise UserError(f"loss.alpha takes least and over above 0 and at most 1, not least={least} and over={over}")
        self.least, self.over = least, over

    def share(self, progress: float) -> float:
        return float(self.least ** min(progress / self.over, 1.0))

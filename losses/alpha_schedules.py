"""How far ahead a consistency step looks: a(progress), the share of the interval [r, t] that it crosses."""

import math
from abc import ABC, abstractmethod

from common.errors import UserError
from common.ranges import Share, ShareAbove0


class AlphaSchedule(ABC):
    """Lowers a from 1 (regression to v_c over the whole interval) towards 0 (the derivative)."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return a in (0, 1] when `progress` in [0, 1] of the run is done."""


class SigmoidAlpha(AlphaSchedule):
    """1 - sigmoid(sharpness (progress - middle) / (end - begin)), middle = (begin + end) / 2 (alpha-Flow).

    Raises UserError unless begin < end.
    """

    def __init__(self, begin: Share = 0.0, end: Share = 1.0, sharpness: float = 25.0):
        if begin >= end:
            raise UserError(f"loss.alpha takes begin < end, shares of the run, not begin={begin} and end={end}")
        self.begin, self.end, self.sharpness = begin, end, sharpness

    def share(self, progress: float) -> float:
        angle = self.sharpness * (progress - 0.5 * (self.begin + self.end)) / (self.end - self.begin)
        return 1 / (1 + math.exp(min(angle, 700.0)))


class ExponentialAlpha(AlphaSchedule):
    """least^(progress / over), constant from progress = over on (SoFlow)."""

    def __init__(self, least: ShareAbove0 = 1 / 3200, over: ShareAbove0 = 1.0):
        self.least, self.over = least, over

    def share(self, progress: float) -> float:
        return float(self.least ** min(progress / self.over, 1.0))

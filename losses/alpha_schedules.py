"""How far ahead a consistency step looks: a(progress), the share of the interval [r, t] that it crosses."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, Positive, Share, ShareAbove0

LARGEST_NOISE = 80.0  # (1 - r) / r of the times next to r = 0


class AlphaSchedule(ABC):
    """Lowers a from 1 (regression to v_c over the whole interval) towards 0 (the derivative)."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return a in (0, 1] when `progress` in [0, 1] of the run is done."""

    def shares(self, progress: float, r: Tensor) -> Tensor:
        """Return a of states at times r (B,), the same of all unless a subclass says otherwise."""
        return torch.full_like(r, self.share(progress))


class SigmoidAlpha(AlphaSchedule):
    """1 - sigmoid(sharpness (progress - middle) / (end - begin)) (alpha-Flow). Raises UserError unless begin < end."""

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


class EasyConsistencyAlpha(AlphaSchedule):
    """Steps in the noise level sigma = (1 - r) / r of the linear path: sigma_next = sigma (1 - n(sigma) / q^k), not below 0,
    n(sigma) = 1 + 8 sigmoid(-sigma), at stage k = 1, 2, ... `stages` of equal lengths (Geng et al. 2024, easy consistency
    tuning, arXiv 2406.14548). The first steps are long, some of them all the way to data. What the last ones leave of the
    minimiser's bias falls almost q-fold with every stage: 2.7 % of the field after 8 on the mixture of --prove.

    share is that of sigma, the least over all levels: q^-k. Raises UserError unless q > 1.
    """

    def __init__(self, q: Positive = 2.0, stages: Count = 10):
        if q <= 1:
            raise UserError(f"loss.alpha.q={q} does not shorten the steps; give a number above 1")
        self.q, self.stages = q, stages

    def share(self, progress: float) -> float:
        return float(self.q ** -min(1 + math.floor(progress * self.stages), self.stages))

    def shares(self, progress: float, r: Tensor) -> Tensor:
        sigma = ((1 - r) / r).clamp(max=LARGEST_NOISE)
        fall = ((1 + 8 * torch.sigmoid(-sigma)) * self.share(progress)).clamp(max=1)
        return fall / (1 + sigma * (1 - fall))  # of s - r in 1 - r, s = 1 / (1 + sigma_next)

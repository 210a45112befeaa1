"""Which times a batch is trained at: pairs (r, t), r <= t, the state being at r and headed to t."""

from typing import Annotated

import torch
from torch import Tensor

from common.ranges import Positive, Range, Share


class TimeSampler:
    """Draws times in [0, 1] (1 is data); subclasses give the distribution of a single time.

    ratio: share of rows with r != t, the first round(ratio n) of the batch, so that shapes are static; 0 for plain flow
    matching. whole: share of those rows, the very first, that go the whole way from 0 to 1, as one-step samples do; of
    random pairs next to none come near. to_data: t = 1 on all those rows, r being a single time, as consistency models have.
    """

    def __init__(self, ratio: Share = 0.0, whole: Share = 0.0, to_data: bool = False):
        self.ratio, self.whole, self.to_data = ratio, whole, to_data

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return independent times of the given shape on the generator's device, uniform on [0, 1] by default."""
        return torch.rand(shape, generator=generator, device=generator.device)

    def interval_rows(self, n: int) -> int:
        """Return how many rows of a batch of n, the first ones, have r != t."""
        return round(self.ratio * n)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return r and t, (n,) each, r <= t; r = t from row interval_rows(n) on."""
        rows = self.interval_rows(n)
        r, t = self.intervals(rows, generator)
        whole = round(self.whole * rows)
        r[:whole], t[:whole] = 0.0, 1.0
        instants = self.draw((n - rows,), generator)
        return torch.cat([r, instants]), torch.cat([t, instants])

    def intervals(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random r and t, (rows,) each, r < t."""
        if self.to_data:
            r = self.draw((rows,), generator)
            return r, torch.ones_like(r)
        pairs = self.draw((2, rows), generator)
        return pairs.amin(0), pairs.amax(0)


class UniformTimes(TimeSampler):
    """Uniform on [0, 1]."""


class LogitNormalTimes(TimeSampler):
    """sigmoid(N(mean, std^2)) (Esser et al. 2024, arXiv 2403.03206). Papers with t = 1 as noise use -mean for our mean."""

    def __init__(
        self, mean: float = 0.0, std: Positive = 1.0, ratio: Share = 0.0, whole: Share = 0.0, to_data: bool = False
    ):
        super().__init__(ratio, whole, to_data)
        self.mean, self.std = mean, std

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(shape, generator=generator, device=generator.device))


class DyadicTimes(TimeSampler):
    """Intervals of length 2^-k, k uniform in 0 .. levels - 1, that begin at a multiple of their length (Frans et al. 2024,
    arXiv 2410.12557); instants uniform on [0, 1].

    shortest: half of the shortest interval, 2^-levels.
    """

    def __init__(self, levels: Annotated[int, Range(1, most=50)] = 7, ratio: Share = 0.125, whole: Share = 0.0):
        super().__init__(ratio, whole)
        self.levels, self.shortest = levels, 2.0**-levels

    def intervals(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        steps = 2.0 ** torch.randint(self.levels, (rows,), generator=generator, device=generator.device)
        place = (self.draw((rows,), generator) * steps).floor().clamp(max=steps - 1)
        return place / steps, (place + 1) / steps

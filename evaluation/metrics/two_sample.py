"""What all distances between generated and held-out samples share: the noise floor, and when there is no score."""

from abc import abstractmethod

import torch
from torch import Tensor

from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers
from training.errors import UserError
from training.seeds import generator_for


def not_finite(samples: Tensor) -> str | None:
    """Why samples (N, ...) cannot be scored, None when all are finite."""
    bad = len(samples) - int(samples.flatten(1).isfinite().all(1).sum())
    return f"{bad:,} of {len(samples):,} samples are not finite" if bad else None


class TwoSampleMetric(Metric):
    """A distance between samples and held-out states, beside the same distance between real and real (its noise floor).

    replicates: how many real pairs the floor is the mean and standard deviation of. They are drawn once for a dataset and
    a pair of counts, from seeds of their own, and cached: every run is held against the same floor. A small set has a floor
    of fewer states than the score, which floor_note tells. least: states that a side must have.
    """

    name: str
    least: int = 1

    def __init__(self, replicates: int = 20):
        if replicates < 2:
            raise UserError(f"a noise floor needs at least 2 replicates, not {replicates}; mend evaluation.metrics")
        self.replicates = replicates

    def names(self) -> list[str]:
        return [self.name]

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> float:
        """Between x (N, D) and y (M, D), finite fp32 states in random order on one device."""

    def counts(self, first: int, second: int) -> tuple[int, int]:
        """How many of so many states the distance looks at."""
        return first, second

    def refusal(self, generation: Generation) -> str | None:
        """Why this distance is not given."""
        return not_finite(generation.samples)

    def compute(self, generation: Generation) -> list[Score | Absent]:
        reason = self.refusal(generation)
        if reason is not None:
            return [Absent(self.name, reason)]
        samples = generation.samples
        real = generation.dataset.held_out(len(samples), generation.generator("held_out"))[0].to(samples.device)
        if min(len(samples), len(real)) < self.least:
            few = f"{len(samples)} samples and {len(real)} held-out states are fewer than the {self.least} a side must have"
            return [Absent(self.name, few)]
        value = self.distance(samples.flatten(1), real.flatten(1))
        note = f"{len(samples):,} samples against {len(real):,} held-out states"
        first, second, *distances = self.floor(generation, len(samples), len(real))
        if not distances:
            return [Score(self.name, value, note=note, floor_note="the real states are too few for two sets")]
        floor = torch.tensor(distances)
        used, own = self.counts(int(first), int(second)), self.counts(len(samples), len(real))
        floor_note = "" if used == own else f"of {used[0]:,} against {used[1]:,}"
        return [Score(self.name, value, None, floor.mean().item(), floor.std().item(), None, note, floor_note=floor_note)]

    def floor(self, generation: Generation, first: int, second: int) -> list[float]:
        """How many real states each side has, and their distance, once for each replicate; none when they are too few.

        As many as these, or as many of each where the distance looks at equal sides.
        """
        if self.counts(first, second) != (first, second):
            first = second = min(first, second)
        key = {"dataset": generation.data_key, "first": first, "second": second, "settings": vars(self)}
        return cached_numbers(generation.cache, f"{self.name}_floor", key, lambda: self.replicate(generation, first, second))

    def replicate(self, generation: Generation, first: int, second: int) -> list[float]:
        device = generation.samples.device
        distances: list[float] = []
        for i in range(self.replicates):
            x, y = generation.dataset.real_pair(first, second, generator_for(0, f"{self.name}/floor", i, device))
            if min(len(x), len(y)) < self.least:
                break
            distances.append(self.distance(x.flatten(1), y.flatten(1)))
        return [float(len(x)), float(len(y)), *distances]

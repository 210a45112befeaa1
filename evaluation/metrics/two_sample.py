"""What all distances between generated and held-out samples share: the noise floor, and when there is no score."""

from abc import abstractmethod
from itertools import chain

import torch
from scipy.special import bdtr, nctdtrit, ndtri
from torch import Tensor

from common.progress import each
from common.ranges import Replicates
from common.seeds import generator_for
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers
from evaluation.threads import side_by_side

LEVEL, CONFIDENCE = 0.99, 0.9  # with this confidence, this share of real sets lies below a floor's upper end
SPLITS = 100  # of real states from which on a p is given: of fewer, none could be small


def not_finite(samples: Tensor) -> str | None:
    """Return why samples (N, ...) cannot be scored, None when all are finite."""
    bad = len(samples) - int(samples.flatten(1).isfinite().all(1).sum())
    return f"{bad:,} of {len(samples):,} samples are not finite" if bad else None


def upper_end(replicates: list[float]) -> float:
    """Return a number that with 90 % confidence 99 % of further replicates stay below (a one-sided tolerance limit).

    From 230 replicates on one of the largest, whatever their law; of fewer, or of the normal law with their mean and
    standard deviation.
    """
    values, count = torch.tensor(replicates, dtype=torch.float64), len(replicates)
    rank = sum(bdtr(k, count, 1 - LEVEL) <= 1 - CONFIDENCE for k in range(count))
    if rank:
        return values.sort(descending=True).values[rank - 1].item()
    factor = nctdtrit(count - 1, ndtri(LEVEL) * count**0.5, CONFIDENCE) / count**0.5
    return (values.mean() + factor * values.std()).item()


def as_far(value: float, replicates: list[float]) -> float:
    """Return the p of a permutation test: the share of distances between real sets, and of this one, that are as large."""
    return (1 + sum(distance >= value for distance in replicates)) / (1 + len(replicates))


class TwoSampleMetric(Metric):
    """A distance between samples and held-out states, beside the same distance between real and real (its noise floor).

    replicates: how many real pairs the floor is of. They are random splits of `pools` sets of real states (each a pair of
    its own without a number), drawn once for a set of data and a pair of counts, from seeds of the data's own, and cached:
    every run on the data is held against the same floor. A small set has a floor of fewer states than the score, which
    floor_note says. least: states that a side must have.
    """

    least: int = 1
    pools: int | None = None

    def __init__(self, replicates: Replicates = 230):
        self.replicates = replicates

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> float:
        """Return the distance between x (N, D) and y (M, D), finite fp32 states in random order on one device."""

    def counts(self, first: int, second: int) -> tuple[int, int]:
        """Return how many of so many states the distance looks at."""
        return first, second

    def refusal(self, generation: Generation) -> str | None:
        """Return why this distance is not given."""
        return not_finite(generation.samples)

    def compute(self, generation: Generation) -> list[Score | Absent]:
        if reason := self.refusal(generation):
            return self.absent(reason)
        samples = generation.samples
        real = generation.dataset.held_out(len(samples), generation.generator("held_out"))[0].to(samples.device)
        counts = f"{len(samples):,} samples against {len(real):,} held-out states"
        if min(len(samples), len(real)) < self.least:
            return self.absent(f"{counts} are fewer than the {self.least} a side must have")
        value = self.distance(samples.flatten(1), real.flatten(1))
        own = self.counts(len(samples), len(real))
        first, second, *distances = self.floor(generation, *own)
        if not distances:
            return [Score(self.name, value, note=counts, floor_note="the real states are too few for two sets")]
        floor, used = torch.tensor(distances), self.counts(int(first), int(second))
        note = "" if used == own else f"of {used[0]:,} against {used[1]:,}"
        mean, sd, end = floor.mean().item(), floor.std().item(), upper_end(distances)
        p = None if note or len(distances) < SPLITS else as_far(value, distances)
        return [Score(self.name, value, floor=mean, floor_sd=sd, note=counts, floor_note=note, floor_q99=end, p=p)]

    def trial(self, generation: Generation) -> list[Score | Absent]:
        x, y = generation.samples.flatten(1)[: 2 * max(self.least, 2)].chunk(2)
        return [Score(self.name, self.distance(x, y))]

    def floor(self, generation: Generation, first: int, second: int) -> list[float]:
        """Return how many real states each side has, then their distance for each replicate; no distance of too few."""
        settings = vars(self) | {"pools": self.pools}
        key = {"dataset": generation.data_key, "first": first, "second": second, "settings": settings}
        return cached_numbers(generation.cache, f"{self.name}_floor", key, lambda: self.replicate(generation, first, second))

    def replicate(self, generation: Generation, first: int, second: int) -> list[float]:
        """Return what `floor` gives, computed."""
        device, stream = generation.samples.device, f"{self.name}/floor/{generation.data_key}"
        pools = min(self.pools or self.replicates, self.replicates)

        def of_pool(i: int) -> list[float]:
            """Return both sides' counts, then the distances of this pool's splits."""
            x, y = generation.dataset.real_pair(first, second, generator_for(0, stream, i, device))
            counts, splits = [float(len(x)), float(len(y))], len(range(i, self.replicates, pools))
            if min(len(x), len(y)) < self.least:
                return counts
            x, y = x.flatten(1), y.flatten(1)
            if splits == 1:
                return [*counts, self.distance(x, y)]
            return counts + self.of_splits(torch.cat([x, y]), len(x), splits, generator_for(0, f"{stream}/splits", i))

        others = range(1, pools)
        rest = side_by_side(of_pool, others) if device.type == "cpu" else map(of_pool, others)
        parts = chain(map(of_pool, [0]), rest)  # the first by itself: some data is read from disk when first asked
        found = list(each(parts, f"noise floor of {self.name}", pools))
        return found[0] + [distance for part in found[1:] for distance in part[2:]]

    def of_splits(self, pool: Tensor, first: int, splits: int, generator: torch.Generator) -> list[float]:
        """Return the distances of `first` random states of pool (N, D) to the rest, by split. generator: on the CPU."""
        orders = (torch.randperm(len(pool), generator=generator).to(pool.device) for _ in range(splits))
        return [self.distance(pool[order[:first]], pool[order[first:]]) for order in orders]

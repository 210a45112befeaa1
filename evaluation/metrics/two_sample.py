"""What all distances between generated and held-out samples share: the noise floor, and when there is no score."""

from abc import abstractmethod

import torch
from scipy.special import bdtr, nctdtrit, ndtri
from torch import Tensor

from common.errors import UserError
from common.ranges import Replicates
from common.seeds import generator_for
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers
from evaluation.threads import side_by_side

LEVEL, CONFIDENCE = 0.99, 0.9  # with this confidence, this share of real sets lies below a floor's upper end


def not_finite(samples: Tensor) -> str | None:
    """Why samples (N, ...) cannot be scored, None when all are finite."""
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


class TwoSampleMetric(Metric):
    """A distance between samples and held-out states, beside the same distance between real and real (its noise floor).

    replicates: how many real pairs the floor is of. They are random splits of `pools` sets of real states (each a pair of
    its own without a number), drawn once for a set of data and a pair of counts, from seeds of the data's own, and cached:
    every run on the data is held against the same floor. A small set has a floor of fewer states than the score, which
    floor_note tells. least: states that a side must have.
    """

    name: str
    least: int = 1
    pools: int | None = None

    def __init__(self, replicates: Replicates = 230):
        if replicates < 2:
            raise UserError(f"a noise floor needs at least 2 replicates, not {replicates}; correct evaluation.metrics")
        self.replicates = replicates

    def names(self) -> list[str]:
        return [self.name]

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> float:
        """Between x (N, D) and y (M, D), finite fp32 states in random order on one device."""

    def counts(self, first: int, second: int) -> tuple[int, int]:
        """Return how many of so many states the distance looks at."""
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
        own = self.counts(len(samples), len(real))
        first, second, *distances = self.floor(generation, *own)
        if not distances:
            return [Score(self.name, value, note=note, floor_note="the real states are too few for two sets")]
        floor, used = torch.tensor(distances), self.counts(int(first), int(second))
        floor_note = "" if used == own else f"of {used[0]:,} against {used[1]:,}"
        return [
            Score(
                self.name, value, None, floor.mean().item(), floor.std().item(), None, note, floor_note=floor_note,
                floor_q99=upper_end(distances),
            )
        ]  # fmt: skip

    def floor(self, generation: Generation, first: int, second: int) -> list[float]:
        """Return how many real states each side has, and their distance, once for each replicate; none when they are too
        few.
        """
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

        found = of_pool(0)  # by itself: some data read from disk when first asked
        others = range(1, pools)
        rest = side_by_side(of_pool, others) if device.type == "cpu" else [of_pool(i) for i in others]
        return found + [distance for part in rest for distance in part[2:]]

    def of_splits(self, pool: Tensor, first: int, splits: int, generator: torch.Generator) -> list[float]:
        """Return the distance between the parts of random splits of pool (N, D), `first` states and the rest; generator: on
        the CPU.
        """
        raise NotImplementedError

"""What is measured between the features of two sets of images, beside the same between real and real."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.progress import each
from common.seeds import generator_for
from evaluation.feature_networks import FeatureNetwork
from evaluation.fid import fit_gaussian, frechet_distance, kernel_distance, neighbour_shares
from evaluation.metrics.base_metric import Absent, Score
from evaluation.metrics.two_sample import upper_end

DISTANCES = ("frechet_distance", "kernel_distance")
SHARES = ("precision", "recall", "density", "coverage")  # of which a larger value is better


@dataclass(frozen=True)
class Floor:
    """rows (replicates, S): the first S scores between two sets of real images, of these counts, cut from a pool. S and the
    counts are 0 where the pool is too small."""

    rows: Tensor
    first: int
    second: int
    pool: int

    def numbers(self) -> list[float]:
        """Return the floor as the cache keeps it."""
        return [float(n) for n in (self.first, self.second, self.pool, len(self.rows))] + self.rows.flatten().tolist()

    @staticmethod
    def of(numbers: list[float]) -> "Floor":
        """Return the floor that has these numbers()."""
        first, second, pool, replicates = map(int, numbers[:4])
        return Floor(torch.tensor(numbers[4:]).view(replicates, -1 if numbers[4:] else 0), first, second, pool)

    def note(self, first: int, second: int, most: int | None = None) -> str:
        """Return its counts where they are not these of the score, which looks at `most` images of a side."""
        limit = most or max(first, second, self.first, self.second)
        own = min(self.first, limit), min(self.second, limit)
        return "" if own == (min(first, limit), min(second, limit)) else f"of {own[0]:,} against {own[1]:,}"

    def beside(self, i: int, counts: tuple[int, int], most: int | None) -> dict[str, Any]:
        """Return the floor of score i as fields of Score; most: as in note, given for shares: the lower end is the worse."""
        if i >= self.rows.shape[1]:
            return {"floor_note": f"{self.pool:,} real images are too few for two sets"}
        values = self.rows[:, i]
        end = {"floor_q01": -upper_end((-values).tolist())} if most else {"floor_q99": upper_end(values.tolist())}
        return {"floor": values.mean().item(), "floor_sd": values.std().item(), "floor_note": self.note(*counts, most)} | end

    def described(self, i: int) -> str:
        """Return what the floor of score i is of, for provenance."""
        if i >= self.rows.shape[1]:
            return f"no floor: {self.pool:,} real images are too few for two sets"
        return f"floor: {self.first:,} against {self.second:,} real images, {len(self.rows)} times"


@dataclass(frozen=True)
class FeatureScores:
    """What is measured between the features of two sets of images: distances, and shares by k nearest neighbours.

    k 0: no shares. points: images of each side that the shares look at, at most (they take all pairs), drawn at random.
    """

    k: int = 5
    points: int = 5000

    @property
    def least(self) -> int:
        """Return how many images a side must have."""
        return self.k + 2 if self.k else 2

    def names(self) -> tuple[str, ...]:
        return (*DISTANCES, *(SHARES if self.k else ()))

    def fitting(self, count: int) -> "FeatureScores":
        """Return those of the scores that can be had of so many images on a side: without shares, of fewer than `least`."""
        return self if count >= self.least else FeatureScores(0, self.points)

    def too_few(self, network: FeatureNetwork, first: int, second: int) -> list[Absent]:
        """Return why some or all scores of so many generated and real images cannot be given."""
        given = self.fitting(min(first, second))
        names = [name for name in self.names() if name not in given.names() or min(first, second) < given.least]
        reason = f"{first:,} samples and {second:,} real images are fewer than the {{}} on a side it takes"
        return [Absent(network.metric(name), reason.format(self.least if name in SHARES else given.least)) for name in names]

    def measure(self, x: Tensor, y: Tensor) -> list[float]:
        """Return the scores of generated features x (N, F) and real ones y (M, F), in the order of names()."""
        if x.device.type == "mps":  # which has no float64
            x, y = x.cpu(), y.cpu()
        shares = neighbour_shares(self.drawn(x, "generated"), self.drawn(y, "real"), self.k) if self.k else {}
        frechet = frechet_distance(fit_gaussian(x), fit_gaussian(y))
        return [frechet, kernel_distance(x, y), *(shares[name] for name in SHARES if self.k)]

    def drawn(self, x: Tensor, side: str) -> Tensor:
        """Return at most `points` of the rows of x (N, F), from a fixed seed: files and samples may be sorted by class."""
        if len(x) <= self.points:
            return x
        return x[torch.randperm(len(x), generator=generator_for(0, f"features/{side}"))[: self.points].to(x.device)]

    def split(self, pool: int, first: int, second: int) -> tuple[int, int]:
        """Return counts of two disjoint parts of a pool of at least 2 `least`: these, or both shrunk alike to `least`."""
        shrink = min(1.0, pool / (first + second))
        n = min(max(int(first * shrink), self.least), pool - self.least)
        return n, min(max(int(second * shrink), self.least), pool - n)

    def replicated(self, pool: Tensor, first: int, second: int, replicates: int) -> Floor:
        """Return the scores between random disjoint parts, of these sizes, of one pool of real features (P, F); both sizes
        shrink alike when it is too small, and what is too few for the shares may do for the distances.
        """
        scores = self.fitting(len(pool) // 2)
        if len(pool) < 2 * scores.least:
            return Floor(torch.empty(0, 0), 0, 0, len(pool))
        n, m = scores.split(len(pool), first, second)
        rows = []
        for i in each(range(replicates), "noise floor of feature scores"):
            order = torch.randperm(len(pool), generator=generator_for(0, "features/floor", i)).to(pool.device)
            rows.append(scores.measure(pool[order[:n]], pool[order[n : n + m]]))
        return Floor(torch.tensor(rows), n, m, len(pool))

    def between(
        self,
        network: FeatureNetwork,
        x: Tensor,
        y: Tensor,
        floor_of: Callable[["FeatureScores"], Floor],
        own_of: Callable[[], list[float]],
        provenance: str,
    ) -> list[Score | Absent]:
        """Return each score of generated features x (N, F) and real ones y (M, F), or why it cannot be given.

        floor_of: given those of the scores that can be had, their floor. own_of: what the training set scores, or nothing.
        """
        scores, counts, results = self.fitting(min(len(x), len(y))), (len(x), len(y)), []
        if min(counts) >= scores.least:
            values, floor, own = scores.measure(x, y), floor_of(scores), own_of()
            provenance += scores.drawn_words(*counts)
            for i, short in enumerate(scores.names()):
                name, words = network.metric(short), f"{provenance}; {floor.described(i)}"
                extra = {f"{name}_train": own[i]} if i < len(own) else None
                beside = floor.beside(i, counts, self.points if short in SHARES else None)
                note = f"{counts[0]:,} samples"
                results.append(Score(name, values[i], extra=extra, note=note, provenance=words, **beside))
        return [*results, *self.too_few(network, *counts)]

    def drawn_words(self, first: int, second: int) -> str:
        """Return how many of so many images the shares look at, for provenance; nothing where it is all."""
        if not self.k or max(first, second) <= self.points:
            return ""
        n, m = (f"{min(count, self.points):,}" for count in (first, second))
        return f"; {', '.join(SHARES)} of {n} against {m} of them, drawn at random"

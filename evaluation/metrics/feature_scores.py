"""What is measured between the features of two sets of images, beside the same between real and real."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.seeds import generator_for
from evaluation.feature_networks import FeatureNetwork
from evaluation.fid import fit_gaussian, frechet_distance, kernel_distance, neighbour_shares
from evaluation.metrics.base_metric import Absent, Score

DISTANCES = ("frechet_distance", "kernel_distance")
SHARES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Floor:
    """rows (replicates, S): the first S scores between two sets of real images, of these counts, cut from a pool. S and the
    counts are 0 where the pool is too small."""

    rows: Tensor
    first: int
    second: int
    pool: int

    def numbers(self) -> list[float]:
        """As the cache keeps it."""
        return [float(n) for n in (self.first, self.second, self.pool, len(self.rows))] + self.rows.flatten().tolist()

    @staticmethod
    def of(numbers: list[float]) -> "Floor":
        """Undoes numbers()."""
        first, second, pool, replicates = map(int, numbers[:4])
        return Floor(torch.tensor(numbers[4:]).view(replicates, -1 if numbers[4:] else 0), first, second, pool)

    def note(self, first: int, second: int, most: int | None = None) -> str:
        """Return its counts where they are not these of the score, which looks at `most` images of a side."""
        limit = most or max(first, second, self.first, self.second)
        own = min(self.first, limit), min(self.second, limit)
        return "" if own == (min(first, limit), min(second, limit)) else f"of {own[0]:,} against {own[1]:,}"


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
        """Return those of the scores, the first ones, that can be had of so many images on a side; none
        of fewer than two.
        """
        return self if count >= self.least else FeatureScores(0, self.points)

    def too_few(self, network: FeatureNetwork, first: int, second: int) -> list[Absent]:
        """Why some or all scores of so many generated and real images cannot be given."""
        given = self.fitting(min(first, second))
        names = [name for name in self.names() if name not in given.names() or min(first, second) < given.least]
        reason = f"{first:,} samples and {second:,} real images are fewer than the {{}} on a side it takes"
        return [Absent(network.metric(name), reason.format(self.least if name in SHARES else given.least)) for name in names]

    def measure(self, x: Tensor, y: Tensor) -> list[float]:
        """Of generated features x (N, F) and real ones y (M, F), in the order of names()."""
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
        """Counts of two disjoint parts of a pool of at least 2 `least`: these, or both shrunk alike, never below `least`."""
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
        for i in range(replicates):
            order = torch.randperm(len(pool), generator=generator_for(0, "features/floor", i)).to(pool.device)
            rows.append(scores.measure(pool[order[:n]], pool[order[n : n + m]]))
        return Floor(torch.tensor(rows), n, m, len(pool))

    def named(
        self,
        network: FeatureNetwork,
        values: list[float],
        floor: Floor,
        own: list[float],
        counts: tuple[int, int],
        provenance: str,
    ) -> list[Score]:
        """Return one Score for each value. own: what the training set scores, or empty. counts: samples and real images
        scored.
        """
        scores = []
        provenance += self.drawn_words(*counts)
        for i, short in enumerate(self.names()):
            name = network.metric(short)
            extra = {f"{name}_train": own[i]} if i < len(own) else None
            mean, sd, note = None, None, f"{floor.pool:,} real images are too few for two sets"
            depends = f"{provenance}; no floor: {note}"
            if i < floor.rows.shape[1]:
                mean, sd = floor.rows[:, i].mean().item(), floor.rows[:, i].std().item()
                note = floor.note(*counts, self.points if short in SHARES else None)
                times = f"{len(floor.rows)} times"
                depends = f"{provenance}; floor: {floor.first:,} against {floor.second:,} real images, {times}"
            scores.append(Score(name, values[i], None, mean, sd, extra, f"{counts[0]:,} samples", depends, note))
        return scores

    def drawn_words(self, first: int, second: int) -> str:
        """Return how many of so many images the shares look at, for provenance; nothing where it is all."""
        if not self.k or max(first, second) <= self.points:
            return ""
        n, m = (f"{min(count, self.points):,}" for count in (first, second))
        return f"; {', '.join(SHARES)} of {n} against {m} of them, drawn at random"

"""2-Wasserstein distances: exact for vectors, on a subset, and sliced for anything."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.ranges import Count, CountFrom2, Replicates
from common.seeds import generator_for
from evaluation.metrics.base_metric import Generation
from evaluation.metrics.two_sample import TwoSampleMetric


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """Return W2 = sqrt(min over pairings of mean |x_i - y_p(i)|^2) of x and y (N, D): the exact assignment, O(N^3)."""
    x, y = x.cpu().double(), y.cpu().double()
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def sliced_wasserstein2(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Return sqrt(mean over directions (P, D), unit vectors, of the squared W2 of the projections) (Bonneel et al. 2015).

    Of x and y (N, D). In one dimension the best pairing is by rank, so each projection is exact.
    """
    ranked_x, ranked_y = (np.sort((directions @ side.T).cpu().numpy()) for side in (x, y))  # 5 times as fast as torch's
    return root_mean_square(ranked_x - ranked_y)


def root_mean_square(gaps: np.ndarray) -> float:
    return float(np.square(gaps, dtype=np.float64).mean() ** 0.5)


class Wasserstein(TwoSampleMetric):
    """eval/w2 of the first `points` of each side. Above its floor, which falls with the number of points, it has meaning."""

    name = "eval/w2"

    def __init__(self, points: CountFrom2 = 500, replicates: Replicates = 230):
        super().__init__(replicates)
        self.points = points

    def counts(self, first: int, second: int) -> tuple[int, int]:
        count = min(first, second, self.points)
        return count, count

    def refusal(self, generation: Generation) -> str | None:
        if len(generation.dataset.state_shape) != 1:
            return "the exact 2-Wasserstein distance is for vectors, not for images"
        return super().refusal(generation)

    def distance(self, x: Tensor, y: Tensor) -> float:
        first, second = self.counts(len(x), len(y))
        return wasserstein2(x[:first], y[:second])


class SlicedWasserstein(TwoSampleMetric):
    """eval/sliced_w2 over fixed random directions, the same in every run; the larger side is cut to the smaller's size."""

    name = "eval/sliced_w2"
    pools = 10

    def __init__(self, projections: Count = 64, replicates: Replicates = 230):
        super().__init__(replicates)
        self.projections = projections

    def counts(self, first: int, second: int) -> tuple[int, int]:
        return min(first, second), min(first, second)

    def directions(self, like: Tensor) -> Tensor:
        """Return (P, D) unit vectors for states `like` (N, D)."""
        generator = generator_for(0, f"{self.name}/directions")
        normal = torch.randn(self.projections, like.shape[1], generator=generator)
        return torch.nn.functional.normalize(normal).to(like)

    def distance(self, x: Tensor, y: Tensor) -> float:
        first, second = self.counts(len(x), len(y))
        return sliced_wasserstein2(x[:first], y[:second], self.directions(x))

    def of_splits(self, pool: Tensor, first: int, splits: int, generator: torch.Generator) -> list[float]:
        """Return the splits' distances: all states are projected and ranked once, each split takes its own ranks."""
        first = min(self.counts(first, len(pool) - first))
        pool = pool[: 2 * first]  # an odd number of states has no equal halves
        projected = (self.directions(pool) @ pool.T).cpu().numpy()
        ranks = np.argsort(projected)
        ranked, distances = np.take_along_axis(projected, ranks, 1), []
        for _ in range(splits):
            inside = (torch.randperm(len(pool), generator=generator) < first).numpy().take(ranks)
            x, y = (ranked[part].reshape(len(ranked), -1) for part in (inside, ~inside))
            distances.append(root_mean_square(x - y))
        return distances

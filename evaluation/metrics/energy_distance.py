"""Energy distance between samples and data."""

import torch
from torch import Tensor

from common.ranges import Replicates
from evaluation.metrics.base_metric import Generation
from evaluation.metrics.distances import all_distances, distance_sum
from evaluation.metrics.two_sample import TwoSampleMetric

MOST = 2000  # states a side of the noise floor


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| of x (N, ...) and y (M, ...), Euclidean norm over flattened states.

    The U-statistic (Székely & Rizzo 2013, eq. 2.1 without its diagonal): unbiased, so zero on average between equals and
    often below it; no square root and no clamp. Up to 8 dimensions by differences, above by matrix product. A side has
    at least two states.
    """
    n, m = len(x), len(y)
    x, y = x.flatten(1), y.flatten(1)
    within = distance_sum(x, x, same=True) / (n * (n - 1)) + distance_sum(y, y, same=True) / (m * (m - 1))
    return 2 * distance_sum(x, y) / (n * m) - within


class EnergyDistance(TwoSampleMetric):
    """eval/energy_distance, zero on average for a perfect generator; its floor's mean is near 0, its sd is the noise.

    No standard error of its own: a jackknife is wrong here, the statistic being degenerate at equality. For the same reason
    its law between equals is one law times 1/n + 1/m (Székely & Rizzo 2013): the floor is found with at most `MOST` states
    a side, and scaled.
    """

    name = "eval/energy_distance"
    least = 2
    pools = 4

    def __init__(self, replicates: Replicates = 1000):
        super().__init__(replicates)

    def distance(self, x: Tensor, y: Tensor) -> float:
        return energy_distance(x, y)

    def floor(self, generation: Generation, first: int, second: int) -> list[float]:
        n, m, *distances = super().floor(generation, min(first, MOST), min(second, MOST))
        if not distances:
            return [n, m]
        scale = (1 / first + 1 / second) / (1 / n + 1 / m)
        return [float(first), float(second), *(scale * distance for distance in distances)]

    def of_splits(self, pool: Tensor, first: int, splits: int, generator: torch.Generator) -> list[float]:
        """Return the splits' distances: all pairs are measured once, and the sums of every split are one matrix product."""
        distances = all_distances(pool)
        distances = distances.double() if pool.device.type == "cuda" else distances.cpu()  # see squared_distances
        n, m = first, len(pool) - first
        order = torch.rand(len(pool), splits, generator=generator).argsort(0)
        inside = (order < first).to(distances)
        within = (inside * (distances @ inside)).cpu().sum(0, dtype=torch.float64)
        rows = distances.cpu().sum(1, dtype=torch.float64)
        across = rows @ inside.cpu().double() - within
        other = rows.sum() - 2 * across - within
        return (2 * across / (n * m) - within / (n * (n - 1)) - other / (m * (m - 1))).tolist()

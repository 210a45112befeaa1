"""Energy distance between samples and data."""

from torch import Tensor

from evaluation.metrics.distances import distance_sum, self_distance_sum
from evaluation.metrics.two_sample import TwoSampleMetric
from training.errors import UserError


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of x (N, ...) and y (M, ...), Euclidean norm over flattened states.

    The U-statistic (Székely & Rizzo 2013, eq. 2.1 without its diagonal): unbiased, so zero on average between equals and
    often below it; no square root and no clamp. Up to 8 dimensions by differences, above by matrix product. UserError with
    fewer than two states on a side.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(f"the energy distance needs two states on each side, not {n} and {m}; raise evaluation.samples")
    x, y = x.flatten(1), y.flatten(1)
    within = self_distance_sum(x) / (n * (n - 1)) + self_distance_sum(y) / (m * (m - 1))
    return 2 * distance_sum(x, y) / (n * m) - within


class EnergyDistance(TwoSampleMetric):
    """eval/energy_distance, zero on average for a perfect generator; its floor's mean is near 0, its sd tells the noise.

    No standard error of its own: a jackknife is wrong here, the statistic being degenerate at equality.
    """

    name = "eval/energy_distance"
    least = 2

    def distance(self, x: Tensor, y: Tensor) -> float:
        return energy_distance(x, y)

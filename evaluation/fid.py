"""Distances between sets of images by their features: Frechet, kernel, and shares by nearest neighbours.

All take features x of generated images (N, F) and y of real ones (M, F), fp32 or fp64, on one device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from evaluation.metrics.distances import rows_at_once, squared_distances


@dataclass(frozen=True)
class GaussianFit:
    """mean (F,) and a factor (K, F) of the covariance, factor^T factor, in float64: what the Frechet distance compares."""

    mean: Tensor
    factor: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.factor.T @ self.factor


def fit_gaussian(features: Tensor) -> GaussianFit:
    """Of features (N, F): their mean and unbiased covariance. UserError for fewer than two."""
    if len(features) < 2:
        raise UserError(f"the Frechet distance needs two images on each side, not {len(features)}")
    wide = features.double()
    centred = (wide - wide.mean(0)) / (len(wide) - 1) ** 0.5
    if len(centred) <= centred.shape[1]:
        return GaussianFit(wide.mean(0), centred)  # the centred features are themselves a factor: exact, and smaller
    return from_moments(wide.mean(0), centred.T @ centred)


def from_moments(mean: Tensor, covariance: Tensor) -> GaussianFit:
    """From published statistics: mean (F,), covariance (F, F)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return GaussianFit(mean.double(), values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    With S = L^T L the last trace is the sum of the singular values of L_a L_b^T (Heusel et al. 2017, arXiv 1706.08500,
    eq. 6): no matrix square root, and exact for fewer images than features.
    """
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return ((a.mean - b.mean).square().sum() + spread).item()


def kernel_sum(x: Tensor, y: Tensor, same: bool) -> float:
    """Sum of (x_i . y_j / F + 1)^3 over all pairs; with `same` (y is x) over i != j. In float64."""
    total = 0.0
    y = y.double()
    for first in range(0, len(x), rows_at_once(y)):
        block = (x[first : first + rows_at_once(y)].double() @ y.T / x.shape[1] + 1) ** 3
        if same:
            block.diagonal(first).zero_()
        total += block.sum().item()
    return total


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x . y / F + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased estimator over all pairs, not its mean over random subsets: zero on average between equals, so at times
    below it. UserError for fewer than two images on a side.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(f"the kernel distance needs two images on each side, not {n} and {m}")
    within = kernel_sum(x, x, same=True) / (n * (n - 1)) + kernel_sum(y, y, same=True) / (m * (m - 1))
    return within - 2 * kernel_sum(x, y, same=False) / (n * m)


def squared_radii(points: Tensor, k: int) -> Tensor:
    """Return (N,): squared distance of each of points (N, F) to its k-th nearest other one."""
    blocks = points.split(rows_at_once(points))
    return torch.cat(
        [squared_distances(rows, points).topk(k + 1, largest=False).values[:, -1] for rows in blocks]
    )  # first: itself


def neighbour_shares(x: Tensor, y: Tensor, k: int = 5) -> dict[str, float]:
    """Return precision: share of x inside the k-nearest-neighbour ball of some y; recall: share of y inside that of some x
    (Kynkäänniemi et al. 2019, arXiv 1904.06991). density: balls of y that an x lies in, over k; coverage: share of the
    balls of y that hold an x (Naeem et al. 2020, arXiv 2002.09797). UserError for k + 1 images or fewer on a side.
    """
    if min(len(x), len(y)) <= k + 1:
        raise UserError(f"precision and recall by {k} neighbours need more than {k + 1} images on each side")
    x, y = x.double(), y.double()
    radii_x, radii_y = squared_radii(x, k), squared_radii(y, k)
    in_y, recalled, covered = [], torch.zeros_like(radii_y, dtype=torch.bool), torch.zeros_like(radii_y, dtype=torch.bool)
    rows = rows_at_once(y)
    for part, radii in zip(x.split(rows), radii_x.split(rows), strict=True):
        gaps = squared_distances(part, y)
        inside = gaps <= radii_y
        in_y.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (gaps <= radii[:, None]).any(0)
    balls = torch.cat(in_y).double()
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": balls.mean().item() / k,
        "coverage": covered.double().mean().item(),
    }

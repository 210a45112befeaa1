"""Distances between sets of images by their features: Frechet, kernel, and shares by nearest neighbours.

All take features x of generated images (N, F) and y of real ones (M, F), fp32 or fp64, on one device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from common.progress import Progress, progress
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
    """Return mean and unbiased covariance of features (N, F). UserError for fewer than two."""
    if len(features) < 2:
        raise UserError(f"the Frechet distance needs two images on each side, not {len(features)}")
    wide = features.double()
    centred = (wide - wide.mean(0)) / (len(wide) - 1) ** 0.5
    if len(centred) <= centred.shape[1]:
        return GaussianFit(wide.mean(0), centred)  # the centred features are themselves a factor: exact, and smaller
    return from_moments(wide.mean(0), centred.T @ centred)


def from_moments(mean: Tensor, covariance: Tensor) -> GaussianFit:
    """Return the fit of published statistics: mean (F,), covariance (F, F)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return GaussianFit(mean.double(), values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    With S = L^T L the last trace is the sum of the singular values of L_a L_b^T (Heusel et al. 2017, arXiv 1706.08500,
    eq. 6): no matrix square root, and exact for fewer images than features.
    """
    # clean-fid and torchmetrics agree to 1e-12 where there are more images than features. With fewer, as floors of small
    # sets have, their S_a S_b is singular: clean-fid's root is off by 2e-5 at 200 images of 512 features, 38 times as slow.
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return ((a.mean - b.mean).square().sum() + spread).item()


def kernel_sum(x: Tensor, y: Tensor, same: bool, shown: Progress) -> float:
    """Return the sum of (x_i . y_j / F + 1)^3 over all pairs; with `same` (y is x) over i != j. In float64."""
    total, y, rows = 0.0, y.double(), rows_at_once(y)
    for first in range(0, len(x), rows):
        block = (x[first : first + rows].double() @ y.T / x.shape[1] + 1) ** 3
        if same:
            block.diagonal(first).zero_()
        total += block.sum().item()
        shown.advance(len(block))
    return total


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return the squared maximum mean discrepancy under (x . y / F + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased estimator over all pairs, not its mean over random subsets (clean-fid, torchmetrics): zero on average
    between equals, so at times below it. A side has at least two images.
    """
    n, m = len(x), len(y)
    with progress("kernel distance", 2 * n + m) as shown:
        within = kernel_sum(x, x, True, shown) / (n * (n - 1)) + kernel_sum(y, y, True, shown) / (m * (m - 1))
        return within - 2 * kernel_sum(x, y, False, shown) / (n * m)


def squared_radii(points: Tensor, k: int) -> Tensor:
    """Return (N,): squared distance of each of points (N, F) to its k-th nearest other one."""
    parts = points.split(rows_at_once(points))
    found = [squared_distances(rows, points).topk(k + 1, largest=False).values for rows in parts]
    return torch.cat(found)[:, -1]  # the first is itself


def neighbour_shares(x: Tensor, y: Tensor, k: int = 5) -> dict[str, float]:
    """Return precision: share of x inside the k-nearest-neighbour ball of some y; recall: share of y inside that of some x
    (Kynkäänniemi et al. 2019, arXiv 1904.06991). density: balls of y that an x lies in, over k; coverage: share of the
    balls of y that hold an x (Naeem et al. 2020, arXiv 2002.09797). A side has at least k + 2 images.
    """
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

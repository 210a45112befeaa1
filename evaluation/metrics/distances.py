"""Euclidean distances between sets of points, in chunks that fit the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

FEW_DIMENSIONS = 8  # up to here differences are taken dimension by dimension; above, a matrix product is faster
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**26  # distances held at once


def rows_at_once(points: Tensor) -> int:
    """How many rows to measure against `points` at once."""
    return max(1, (CPU_ELEMENTS if points.device.type == "cpu" else GPU_ELEMENTS) // len(points))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 (N, M) of x (N, D) and y (M, D), by matrix product; rounding may leave small ones off by 1e-6 |x|^2.

    In float64 on CUDA, where a float32 product is a TF32 one with 10 bits.
    """
    if x.device.type == "cuda":
        x, y = x.double(), y.double()
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)


def difference_distances(x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """|x_i - y_j| (N, M) from differences, without cancellation; written into buffer (2, at least N M)."""
    total, square = (part[: len(x) * len(y)].view(len(x), len(y)) for part in buffer)
    torch.sub(x[:, :1], y[:, 0], out=total).square_()
    for d in range(1, x.shape[1]):
        torch.sub(x[:, d, None], y[:, d], out=square)
        total.addcmul_(square, square)
    return total.sqrt_()


def blocks(x: Tensor, y: Tensor, chunk: int, same: bool) -> Iterator[tuple[int, Tensor]]:
    """(first row, distances) of row blocks of x; with `same` (y is x) only the columns from the first row on."""
    columns = y.T.contiguous().T if x.shape[1] <= FEW_DIMENSIONS else y  # each dimension contiguous
    buffer = x.new_empty(2, chunk * len(y)) if x.shape[1] <= FEW_DIMENSIONS else x.new_empty(0)
    for first in range(0, len(x), chunk):
        rows, others = x[first : first + chunk], columns[first if same else 0 :]
        if x.shape[1] <= FEW_DIMENSIONS:
            yield first, difference_distances(rows, others, buffer)
        else:
            yield first, squared_distances(rows, others).sqrt_()


def distance_sum(x: Tensor, y: Tensor) -> float:
    """Sum of |x_i - y_j| over all pairs of x (N, D) and y (M, D), accumulated in float64."""
    sums = [distances.sum(1) for _, distances in blocks(x, y, rows_at_once(y), same=False)]
    return torch.cat(sums).cpu().double().sum().item()


def self_distance_sum(x: Tensor) -> float:
    """Sum of |x_i - x_j| over ordered pairs i != j of x (N, D): each unordered pair is measured once."""
    sums = []
    for _, distances in blocks(x, x, rows_at_once(x), same=True):
        square = distances[:, : len(distances)]
        square.fill_diagonal_(0)
        square.mul_(0.5)  # in the diagonal block each pair appears twice
        sums.append(distances.sum(1))
    return 2 * torch.cat(sums).cpu().double().sum().item()


def nearest(x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest of points (M, D) for each of x (N, D); the distance from exact differences."""
    index = torch.cat([squared_distances(rows, points).argmin(1) for rows in x.split(rows_at_once(points))])
    gaps = [(rows - points[i]).square().sum(1).sqrt() for rows, i in zip(x.split(4096), index.split(4096), strict=True)]
    return torch.cat(gaps), index

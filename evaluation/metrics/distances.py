"""Euclidean distances between sets of points, in chunks that fit the cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evaluation.threads import parallel_sum

FEW_DIMENSIONS = 8  # up to here differences are taken dimension by dimension; above, a matrix product is faster
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**26  # distances held at once


def rows_at_once(points: Tensor) -> int:
    """Return how many rows to measure against `points` at once."""
    return max(1, (CPU_ELEMENTS if points.device.type == "cpu" else GPU_ELEMENTS) // len(points))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 (N, M) of x (N, D) and y (M, D), by matrix product.

    Rounding may leave small ones off by 1e-6 |x - c|^2, c being the mean of y, wherever the origin lies. In float64 on CUDA,
    where a float32 product is a TF32 one with 10 bits.
    """
    center = y.mean(0)
    x, y = x - center, y - center
    if x.device.type == "cuda":
        x, y = x.double(), y.double()
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)


def difference_distances(x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """Return |x_i - y_j| (N, M) from differences, without cancellation; written into buffer (2, at least N M)."""
    total, square = (part[: len(x) * len(y)].view(len(x), len(y)) for part in buffer)
    torch.sub(x[:, :1], y[:, 0], out=total).square_()
    for d in range(1, x.shape[1]):
        torch.sub(x[:, d, None], y[:, d], out=square)
        total.addcmul_(square, square)
    return total.sqrt_()


def blocks(x: Tensor, y: Tensor, chunk: int, starts: Sequence[int], same: bool = False) -> Iterator[Tensor]:
    """Yield |x_i - y_j| for blocks of `chunk` rows of x; with `same` without the columns left of the block."""
    few = x.shape[1] <= FEW_DIMENSIONS
    columns = y.T.contiguous().T if few else y  # each dimension contiguous
    buffer = x.new_empty(2, chunk * len(y) if few else 0)
    for first in starts:
        rows, others = x[first : first + chunk], columns[first if same else 0 :]
        yield difference_distances(rows, others, buffer) if few else squared_distances(rows, others).sqrt_()


def block_sum(x: Tensor, y: Tensor, chunk: int, starts: Sequence[int], same: bool) -> float:
    """Return the sum of |x_i - y_j| over blocks of `chunk` rows of x, in float64. With `same` (y is x) over ordered pairs
    i != j, from the columns that are not left of the block, each of which stands for two.
    """
    total = 0.0
    for distances in blocks(x, y, chunk, starts, same):
        if same:
            square = distances[:, : len(distances)].fill_diagonal_(0)
            square.mul_(0.5)  # in the diagonal block each pair appears twice
        total += distances.sum(1).cpu().double().sum().item()
    return 2 * total if same else total


def distance_sum(x: Tensor, y: Tensor, same: bool = False) -> float:
    """Return the sum of |x_i - y_j| over all pairs of x (N, D) and y (M, D); with `same` (y is x) over ordered i != j."""
    chunk = rows_at_once(y)
    starts = range(0, len(x), chunk)
    if x.device.type == "cpu" and x.shape[1] <= FEW_DIMENSIONS:
        return parallel_sum(lambda share: block_sum(x, y, chunk, share, same), starts)
    return block_sum(x, y, chunk, starts, same)


def all_distances(x: Tensor) -> Tensor:
    """Return |x_i - x_j| (N, N) of x (N, D)."""
    chunk = rows_at_once(x)
    return torch.cat([block.clone() for block in blocks(x, x, chunk, range(0, len(x), chunk))]).fill_diagonal_(0)


def nearest(x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance to and index of the nearest of points (M, D) for each of x (N, D); the distance by differences."""
    index = torch.cat([squared_distances(rows, points).argmin(1) for rows in x.split(rows_at_once(points))])
    gaps = [(rows - points[i]).square().sum(1).sqrt() for rows, i in zip(x.split(4096), index.split(4096), strict=True)]
    return torch.cat(gaps), index

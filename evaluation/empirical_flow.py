"""The exact flow of a finite data set: what a network follows that has learned its training rows by heart."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from losses.paths import ProbabilityPath

SMALL = 0.1  # sigma below which differences of large numbers want float64
WEIGHTS, ROWS = 2**25, 2**22  # numbers in a matrix of weights, and in a chunk of rows


class Posterior(NamedTuple):
    """Of states (B, ...), all float64: mean E[x1 | z] (B, D); total log sum_i p_i exp(-|z - alpha x_i|^2 / (2 sigma^2 s^2))
    (B,); nearest max_i w_i(z) (B,), the probability that the state was made of the row it most likely was made of.
    """

    mean: Tensor
    total: Tensor
    nearest: Tensor


@dataclass(eq=False)
class EmpiricalFlow:
    """Marginal flow of z_t = alpha_t x1 + sigma_t x0, x1 one of N rows and x0 ~ N(0, s^2 I) independent of it:

        v(z, t) = sum_i w_i(z) (alpha' x_i + sigma' (z - alpha x_i) / sigma),
        w_i(z) proportional to p_i exp(-|z - alpha x_i|^2 / (2 sigma^2 s^2)).

    Callable as a field, where sigma > 0. The weights of float32 states are computed in float32 where sigma is 0.1 or more,
    else in float64; each chunk of rows costs two matrix products.

    rows: (N, ...), on the device that computes. labels (N,): each label then has a flow of its own. mirrored: the mirror
    image of each row, along the last dimension, is a row too. shares (N,): how often each is drawn, of mean 1.
    """

    rows: Tensor
    source_std: float
    path: ProbabilityPath
    labels: Tensor | None = None
    mirrored: bool = False
    shares: Tensor | None = None

    @cached_property
    def centre(self) -> Tensor:
        """Return what rows are measured from: smaller numbers, smaller errors."""
        return self.rows.mean(0).double()

    def __call__(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.velocity(z, t, label)

    def velocity(self, z: Tensor, t: Tensor, label: Tensor | None = None, without: Tensor | None = None) -> Tensor:
        """Return v(z, t) at states z (B, ...) and times t, scalar or (B,), of z's shape and dtype, for labels (B,).

        without: for each state the index (B,) of a row that is left out with its mirror image. NaN where no row is left.
        """
        times = self.times(z, t)
        return self.read(self.posterior(z, times, label, without).mean, z, times)

    def velocity_with(self, z: Tensor, t: Tensor, row: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v(z, t), as `velocity` does, of the rows and one more for each state: row (B, ...)."""
        times = self.times(z, t)
        mean, total, _ = self.posterior(z, times, label)
        p = self.path.at(times)
        for more in [row, row.flip(-1)] if self.mirrored else [row]:
            flat = more.flatten(1).double()
            squared = (z.flatten(1).double() - p.alpha[:, None] * flat).square().sum(1)
            weight = -0.5 * squared / (p.sigma * self.source_std).square()
            mean = mean.lerp(flat, (weight - total).sigmoid()[:, None])
            total = torch.logaddexp(total, weight)
        return self.read(mean, z, times)

    def times(self, z: Tensor, t: Tensor) -> Tensor:
        return t.to(z.device, torch.float64).expand(len(z))

    def read(self, mean: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return the velocity where E[x1 | z] is the mean (B, D)."""
        alpha, sigma, alpha_dot, sigma_dot = (coefficient[:, None] for coefficient in self.path.at(t))
        velocity = alpha_dot * mean + sigma_dot / sigma * (z.flatten(1).double() - alpha * mean)
        return velocity.to(z.dtype).reshape(z.shape)

    def posterior(self, z: Tensor, t: Tensor, label: Tensor | None = None, without: Tensor | None = None) -> Posterior:
        """Return what is known of the rows that states z (B, ...) at times t (B,) were made of."""
        means = z.new_empty(len(z), self.centre.numel(), dtype=torch.float64)
        found = Posterior(means, torch.empty_like(t), torch.empty_like(t))
        precise = (self.path.at(t).sigma < SMALL) | (z.dtype == torch.float64)
        most = max(1, WEIGHTS // (len(self.rows) * (1 + self.mirrored)))
        for dtype, chosen in ((torch.float32, ~precise), (torch.float64, precise)):
            for part in chosen.nonzero()[:, 0].split(most):
                of_part = (None if given is None else given[part] for given in (label, without))
                for whole, values in zip(found, self.posterior_of(z[part].to(dtype), t[part], *of_part), strict=True):
                    whole[part] = values
        return found

    def posterior_of(self, z: Tensor, t: Tensor, label: Tensor | None, without: Tensor | None) -> Posterior:
        """Return `posterior` of a few states, computed in their dtype.

        A row's mirror image is as far from a state as the row is from the state's: no mirror images are stored.
        """
        p, centre = self.path.at(t), self.centre.flatten().to(z)
        alpha, precision = p.alpha.to(z)[:, None], (0.5 / (p.sigma * self.source_std).square()).to(z)[:, None]
        views = torch.stack([z, z.flip(-1)] if self.mirrored else [z]).flatten(2) - alpha * centre  # (1 or 2, B, D)
        weights = z.new_empty(*views.shape[:2], len(self.rows))
        for place, rows in self.chunks(z.dtype):
            products = views @ rows.T
            weights[..., place] = alpha.square() * rows.square().sum(1) - 2 * alpha * products
        weights.add_(views.square().sum(2, keepdim=True)).mul_(-precision)
        self.restrict(weights, label, without)
        total = weights.logsumexp((0, 2))
        weights.sub_(total[:, None]).exp_()
        means = weights.sum(2, keepdim=True) * centre
        for place, rows in self.chunks(z.dtype):
            means += weights[..., place] @ rows
        seen = means.reshape(len(views), *z.shape)
        mean = seen[0] + seen[1].flip(-1) if self.mirrored else seen[0]
        return Posterior(mean.flatten(1).double(), total.double(), weights.amax((0, 2)).double())

    def restrict(self, weights: Tensor, label: Tensor | None, without: Tensor | None) -> None:
        """Add the logarithms of the shares to log weights (1 or 2, B, N), and rule out other labels and rows left out."""
        if self.shares is not None:
            weights += self.shares.log().to(weights)
        if self.labels is not None and label is not None:
            weights.masked_fill_(label[:, None] != self.labels, -torch.inf)
        if without is not None:
            weights[:, torch.arange(len(without), device=without.device), without] = -torch.inf

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows (n, D), measured from the centre, and which they are."""
        flat, size = self.rows.flatten(1), max(1, ROWS // self.centre.numel())
        for first in range(0, len(flat), size):
            yield slice(first, first + size), flat[first : first + size].to(dtype) - self.centre.flatten().to(dtype)

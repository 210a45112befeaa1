"""The exact flow of a finite data set: what a network follows that has learned its training rows by heart."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from losses.paths import PathPoint, ProbabilityPath

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
    image of each row, along the last dimension, is a row too. shares (N,): how often each is drawn, of mean 1. views: rows
    i, i + N / views, ... are so many of one picture, and are left out together.
    """

    rows: Tensor
    source_std: float
    path: ProbabilityPath
    labels: Tensor | None = None
    mirrored: bool = False
    shares: Tensor | None = None
    views: int = 1

    @cached_property
    def centre(self) -> Tensor:
        """Return what rows are measured from: smaller numbers, smaller errors."""
        return self.rows.mean(0).double()

    def __call__(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.velocity(z, t, label)

    def velocity(self, z: Tensor, t: Tensor, label: Tensor | None = None, without: Tensor | None = None) -> Tensor:
        """Return v(z, t) at states z (B, ...) and times t, scalar or (B,), of z's shape and dtype, for labels (B,).

        without: for each state the index (B,) of a row that is left out with its other views. NaN where no row is left.
        """
        times = self.times(z, t)
        return self.read(self.posterior(z, times, label, without).mean, z, times)

    def velocity_with(
        self, z: Tensor, t: Tensor, row: Tensor, label: Tensor | None = None, std: Tensor | None = None
    ) -> Tensor:
        """Return v(z, t), as `velocity` does, of the rows and one more for each state: row (B, ...); std: see DrawnFlow."""
        times = self.times(z, t)
        mean, total, _ = self.posterior(z, times, label)
        p = self.path.at(times)
        for more in [row, row.flip(-1)] if self.mirrored else [row]:
            own, weight = self.of_one(z, p, more.flatten(1).double(), std)
            mean = mean.lerp(own, (weight - total).sigmoid()[:, None])
            total = torch.logaddexp(total, weight)
        return self.read(mean, z, times)

    def of_one(self, z: Tensor, p: PathPoint, row: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return E[x1 | z] (B, D) and the log weight (B,) of one row (B, D) for each state, float64."""
        offset, noise = z.flatten(1).double() - p.alpha[:, None] * row, (p.sigma * self.source_std).square()
        if std is None:
            return row, -0.5 * offset.square().sum(1) / noise
        spread = std.flatten(1).double().square()
        variance = p.alpha.square()[:, None] * spread + noise[:, None]
        weight = -0.5 * (offset.square() / variance + (variance / noise[:, None]).log()).sum(1)
        return row + p.alpha[:, None] * spread / variance * offset, weight

    def of_rows(self, kept: Tensor) -> "EmpiricalFlow":
        """Return the flow of a part of the rows, kept (N,)."""
        labels, shares = (None if given is None else given[kept] for given in (self.labels, self.shares))
        return replace(self, rows=self.rows[kept], labels=labels, shares=shares)

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
        for dtype, chosen in ((torch.float32, ~precise), (torch.float64, precise)):
            for part in self.parts(chosen, t):
                of_part = (None if given is None else given[part] for given in (label, without))
                for whole, values in zip(found, self.posterior_of(z[part].to(dtype), t[part], *of_part), strict=True):
                    whole[part] = values
        return found

    def parts(self, chosen: Tensor, t: Tensor) -> Iterator[Tensor]:
        """Yield the numbers of the chosen states (B,), so many at once that their weights fit."""
        yield from chosen.nonzero()[:, 0].split(max(1, WEIGHTS // (len(self.rows) * (1 + self.mirrored))))

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
            state, count = torch.arange(len(without), device=without.device), len(self.rows) // self.views
            for view in range(self.views):
                weights[:, state, without % count + view * count] = -torch.inf

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows (n, D), measured from the centre, and which they are."""
        flat, size = self.rows.flatten(1), max(1, ROWS // self.centre.numel())
        for first in range(0, len(flat), size):
            yield slice(first, first + size), flat[first : first + size].to(dtype) - self.centre.flatten().to(dtype)


@dataclass(eq=False)
class DrawnFlow(EmpiricalFlow):
    """The same of rows that are drawn afresh each time, x1 ~ N(x_i, diag(d_i)^2), d_i the stds (N, ...) of row i:

        w_i(z) proportional to p_i N(z; alpha x_i, V_i), V_i = alpha^2 d_i^2 + sigma^2 s^2,
        E[x1 | z, i] = x_i + alpha d_i^2 / V_i (z - alpha x_i).

    The mirror images of rows, if any, are views of them. States of one time are computed together.
    """

    stds: Tensor | None = None

    def of_rows(self, kept: Tensor) -> EmpiricalFlow:
        assert self.stds is not None
        return replace(super().of_rows(kept), stds=self.stds[kept])  # type: ignore[call-arg]

    def parts(self, chosen: Tensor, t: Tensor) -> Iterator[Tensor]:
        for time in t[chosen].unique():
            yield from super().parts(chosen & (t == time), t)

    def posterior_of(self, z: Tensor, t: Tensor, label: Tensor | None, without: Tensor | None) -> Posterior:
        """Return `posterior` of a few states of one time, computed in their dtype."""
        p, centre = self.path.at(t[:1]), self.centre.flatten().to(z)
        alpha, noise = p.alpha.to(z), (p.sigma * self.source_std).square().to(z)
        moved = z.flatten(1) - alpha * centre
        weights = z.new_empty(1, len(z), len(self.rows))
        for place, rows, spread in self.spreads(z.dtype):
            precision = 1 / (alpha.square() * spread + noise)
            own = (precision * (alpha * rows).square() - (noise * precision).log()).sum(1)
            weights[0, :, place] = moved.square() @ precision.T - 2 * moved @ (alpha * precision * rows).T + own
        weights.mul_(-0.5)
        self.restrict(weights, label, without)
        total = weights.logsumexp((0, 2))
        weights.sub_(total[:, None]).exp_()
        mean = weights[0].sum(1, keepdim=True) * centre
        for place, rows, spread in self.spreads(z.dtype):
            gain, share = alpha * spread / (alpha.square() * spread + noise), weights[0, :, place]
            mean += share @ (rows * (1 - alpha * gain)) + share @ gain * moved
        return Posterior(mean.double(), total.double(), weights.amax((0, 2)).double())

    def spreads(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the rows (n, D), measured from the centre, their variances, and which they are."""
        assert self.stds is not None
        flat = self.stds.flatten(1)
        for place, rows in self.chunks(dtype):
            yield place, rows, flat[place].to(dtype).square()

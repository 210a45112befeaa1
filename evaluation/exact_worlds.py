"""Data on a line whose flow and flow map are known exactly, with labels: what a loss is proven on."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.paths import LinearPath, PathPoint, ProbabilityPath
from losses.total_derivative import forward_derivative
from losses.world import World

LEAST = 1e-15  # probability of a tail, so that the noise which leads to a state is at most 8
NOISE, CLOCK, LINE = (torch.linspace(*ends, dtype=torch.float64) for ends in ((-8, 8, 1281), (0, 1, 65), (-12, 12, 4001)))
FIXED_STEPS = 2  # of Newton without derivatives: within 2e-8 of the map on a mixture, and the last step within 1e-13
SAME_TIME = 1e-6  # apart, two times count as one: the mean velocity's error is that of the map over t - r


class MixtureWorld(World):
    """Data x1 ~ sum_k w_k N(m_k, s_k^2) in one dimension, noise N(0, 1), a label for each class of components.

    weights (C, K): p(class, component); means and stds (K,). The label C, and None, mean all classes. Everything is in
    float64 and differentiable, forward and backward.
    With F_t the distribution function of z_t, y = Phi^-1(F_t(z)) is the noise that the flow carries to z: the flow map goes
    from z to y in closed form, and from y to X(z, r, t) by a table, made once, and Newton's steps, the last of which carries
    the derivatives.
    """

    def __init__(self, path: ProbabilityPath, weights: list[list[float]], means: list[float], stds: list[float]):
        self.path = path
        self.joint, self.means, self.stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.shares = torch.cat([self.joint / self.joint.sum(1, keepdim=True), self.joint.sum(0, keepdim=True)])
        self.table = torch.stack([self.tabulated(label) for label in range(len(self.shares))])[None, None]

    def at(self, t: Tensor) -> PathPoint:
        """Return the path at times t (B,), its rates by differentiation: those that the path itself states may be wrong."""
        t = t.double() if self.path.last_time == 1 else t.double().clamp(max=0.5 + 0.5 * self.path.last_time)
        sizes = lambda time: tuple(self.path.at(time)[:2])  # noqa: E731
        values, rates = forward_derivative(sizes, (t,), (torch.ones_like(t),))
        return PathPoint(*values, *rates)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return data (count, 1), float32, and their labels (count,)."""
        drawn = torch.multinomial(self.joint.flatten(), count, replacement=True, generator=generator)
        label, component = drawn // len(self.means), drawn % len(self.means)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return (self.means[component] + self.stds[component] * noise)[:, None].float(), label

    def velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        p = self.at(r)
        share, offset, std = self.components(z[:, 0].double(), p, label)
        rate = (p.alpha * p.alpha_dot * self.stds[:, None].square() + p.sigma * p.sigma_dot) / std
        chance = share * torch.exp(-0.5 * offset.square()) / std
        own = p.alpha_dot * self.means[:, None] + rate * offset
        return ((chance * own).sum(0) / chance.sum(0).clamp(min=1e-300))[:, None]

    def density(self, z: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        share, offset, std = self.components(z[:, 0].double(), self.at(r), label)
        return (share * torch.exp(-0.5 * offset.square()) / std).sum(0)

    def mean_velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        gap = (t.double() - r.double())[:, None]
        same = gap.abs() < SAME_TIME
        mean = (self.flow_map(z, r, t, label) - z.double()) / torch.where(same, torch.ones_like(gap), gap)
        return torch.where(same, self.velocity(z, r, t, label), mean)

    def flow_map(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return X(z, r, t) (B, 1)."""
        y = self.noise_of(z[:, 0].double(), self.at(r), label)[0]
        fixed, then = y.detach(), self.at(t.detach())
        x = self.looked_up(fixed, then, label)
        for _ in range(FIXED_STEPS):
            x = self.newton(x, fixed, then, label)
        return self.newton(x, y, self.at(t), label)[:, None]

    def newton(self, x: Tensor, y: Tensor, p: PathPoint, label: Tensor | None) -> Tensor:
        """Return states (B,) after a step from x (B,) towards where the noise y (B,) is carried."""
        found, slope = self.noise_of(x, p, label)
        return x - (found - y) / slope

    def noise_of(self, z: Tensor, p: PathPoint, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y = Phi^-1(F(z)) and dy/dz at states z (B,), from the nearer tail, which loses no digits."""
        share, offset, std = self.components(z, p, label)
        if len(self.means) == 1:
            return offset[0], (1 / std[0]).expand_as(z)
        below, above = ((share * torch.special.ndtr(side)).sum(0).clamp(min=LEAST) for side in (offset, -offset))
        y = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
        density = (share * torch.exp(-0.5 * offset.square()) / std).sum(0).clamp(min=LEAST)
        return y, density * torch.exp(0.5 * y.square())

    def components(self, z: Tensor, p: PathPoint, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return p(k | label), (z - alpha m_k) / S_k and S_k of states z (B,): each (K, 1) or (K, B)."""
        std = ((p.alpha * self.stds[:, None]).square() + p.sigma.square()).sqrt()
        share = (self.shares[-1:] if label is None else self.shares[label]).T
        return share, (z - p.alpha * self.means[:, None]) / std, std

    def looked_up(self, y: Tensor, p: PathPoint, label: Tensor | None) -> Tensor:
        """Return nearly where noise y (B,) is carried: every path is the linear one in its own clock, over alpha + sigma."""
        scale, classes = p.alpha + p.sigma, len(self.joint)
        row = torch.full_like(y, classes) if label is None else label
        place = torch.stack([y / NOISE[-1], 2 * p.alpha / scale - 1, 2 * row / classes - 1], dim=-1)
        found = F.grid_sample(self.table, place[None, None, None], padding_mode="border", align_corners=True)
        return scale * found.flatten()

    def tabulated(self, label: int) -> Tensor:
        """Return the states (CLOCK, NOISE) that NOISE is carried to along the linear path."""
        labels = torch.full_like(LINE, label, dtype=torch.int64)
        scores = [self.noise_of(LINE, LinearPath().at(t), labels)[0].numpy() for t in CLOCK]
        return torch.from_numpy(np.stack([np.interp(NOISE.numpy(), score, LINE.numpy()) for score in scores]))

"""Data on a line whose flow and flow map are known exactly, with labels: what a loss is proven on."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import TOLERANCE, ExactFlow
from evaluation.threads import one_thread
from losses.paths import LinearPath, PathPoint, ProbabilityPath
from losses.total_derivative import forward_derivative
from losses.world import World
from solvers.dopri5 import Dopri5

LEAST = 1e-15  # probability of a tail, so that the noise which leads to a state is at most 8
NOISE, CLOCK, LINE = (torch.linspace(*ends, dtype=torch.float64) for ends in ((-8, 8, 1281), (0, 1, 65), (-12, 12, 4001)))
FIXED_STEPS = 2  # of Newton without derivatives: within 2e-8 of the map on a mixture, and the last step within 1e-13
ENDS, NODES, BEYOND = torch.linspace(-8, 8, 1601, dtype=torch.float64), 65, 0.01  # of the tables of a guided flow


class MixtureWorld(World):
    """Data x1 ~ sum_k w_k N(m_k, s_k^2) in one dimension, noise N(0, 1), a label for each class of components.

    weights (C, K): p(class, component); means and stds (K,). The label C, and None, mean all classes. Everything is in
    float64 and differentiable, forward and backward.
    With F_t the distribution function of z_t, y = Phi^-1(F_t(z)) is the noise that the flow carries to z: the flow map goes
    from z to y in closed form, and from y to X(z, r, t) by a table, made once, and Newton's steps, the last of which carries
    the derivatives.
    same_time: apart, two times count as one: the mean velocity's error is that of the map over t - r.
    """

    same_time = 1e-6

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
        same = gap.abs() < self.same_time
        if bool(same.all()):
            return self.velocity(z, r, t, label)
        mean = (self.flow_map(z, r, t, label) - z.double()) / torch.where(same, torch.ones_like(gap), gap)
        return torch.where(same, self.velocity(z, r, t, label), mean)

    def guided(self, scale: float, start: float, end: float) -> "GuidedWorld":
        return GuidedWorld(self, scale, start, end)

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


class Table:
    """Functions f_c(s, x) of an even grid, between its nodes by the cubic spline through them in each direction.

    values (C, S, X): of c, of s in `clock` (S,) and of x in `line` (X,). Differentiable forward and backward.
    """

    def __init__(self, values: np.ndarray, clock: Tensor, line: Tensor):
        self.grids = clock, line
        in_s, in_x = (lambda f, grid=grid, axis=axis: (grid[1] - grid[0]).item() * CubicSpline(grid, f, axis)(grid, 1)
                      for axis, grid in ((1, clock), (2, line)))  # fmt: skip
        parts = [values, in_x(values), in_s(values), in_s(in_x(values))]
        self.corners = torch.from_numpy(np.stack(parts, -1)).unflatten(-1, (2, 2))

    def __call__(self, c: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """Return f_c(s, x) (B,) for c, s, x (B,)."""
        (i, of_s), (j, of_x) = (hermite(at, grid) for at, grid in zip((s, x), self.grids, strict=True))
        near = torch.stack([torch.stack([self.corners[c, i + a, j + b] for b in (0, 1)], 1) for a in (0, 1)], 1)
        return torch.einsum("nap,nbq,nabpq->n", of_s, of_x, near)


def hermite(at: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first node (B,) of the cell of each place, and the weights (B, 2, 2) of value and slope at both nodes."""
    place = (at - grid[0]) / (grid[1] - grid[0])
    first = place.detach().floor().clamp(0, len(grid) - 2)
    u = place - first
    one = torch.stack([(1 + 2 * u) * (1 - u).square(), u * (1 - u).square()], 1)
    other = torch.stack([(3 - 2 * u) * u.square(), (u - 1) * u.square()], 1)
    return first.long(), torch.stack([one, other], 1)


class GuidedWorld(MixtureWorld):
    """The same pairs, and another velocity of a label's states: v_null + scale (v - v_null) at times in [start, end].

    v is that of the label and v_null that of all classes, which the null label, and None, keep. Guidance is the same along
    every path in that path's own clock, so that the flow across the interval is tabulated once, along the linear path: where
    each state ends, and where each end comes from. Outside the interval the flow is the plain one.
    """

    same_time = 1e-4

    def __init__(self, plain: MixtureWorld, scale: float, start: float, end: float):
        vars(self).update(vars(plain))
        self.scale, self.start, self.end = scale, start, end
        low, high = (self.clock(torch.tensor([time], dtype=torch.float64))[0].item() for time in (start, end))
        clock = torch.linspace(low - BEYOND, high + BEYOND, NODES, dtype=torch.float64)
        came_from = self.backwards(clock)
        ends = [[CubicSpline(states, ENDS)(ENDS) for states in of_label] for of_label in came_from]
        self.came_from, self.ends = Table(came_from, clock, ENDS), Table(np.array(ends), clock, ENDS)

    def backwards(self, clock: Tensor) -> np.ndarray:
        """Return the states (C, NODES, ENDS) of each label on the way to ENDS along the guided flow of the linear path."""
        flow = ExactFlow(GaussianMixture(self.shares[-1], self.means[:, None], self.stds), 1.0, LinearPath())
        chances, found = self.shares[:-1].repeat_interleave(len(ENDS), 0), list[Tensor]()
        field = lambda z, t: torch.lerp(flow(z, t), flow(z, t, chances), self.scale)  # noqa: E731
        with one_thread():
            Dopri5(TOLERANCE, TOLERANCE).solve(
                field, ENDS.repeat(len(self.joint))[:, None], clock.flip(0), lambda z, t: found.append(z)
            )
        return torch.stack(found[::-1])[..., 0].unflatten(1, (-1, len(ENDS))).transpose(0, 1).numpy()

    def clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear path's time and size of states, by which the path's own at times t are divided."""
        p = self.at(t)
        return p.alpha / (p.alpha + p.sigma), p.alpha + p.sigma

    def extrapolated(self, z: Tensor, r: Tensor, label: Tensor) -> Tensor:
        """Return the guided velocity (B, 1), whatever the time."""
        own, null = (MixtureWorld.velocity(self, z, r, r, given) for given in (label, None))
        return null + self.scale * (own - null)

    def velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return super().velocity(z, r, t)
        inside = ((self.start <= r) & (r <= self.end))[:, None]
        return torch.where(inside, self.extrapolated(z, r, label), super().velocity(z, r, t, label))

    def flow_map(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        plain = super().flow_map(z, r, t, label)
        if label is None:
            return plain
        low = self.start if self.start > 0 else -math.inf
        high = self.end if self.end < self.path.last_time else math.inf
        enters = torch.maximum(r, t.clamp(max=low))
        leaves = torch.maximum(enters, t.clamp(max=high))
        entered = z if low == -math.inf else super().flow_map(z, r, enters, label)
        left = self.crossed(entered, enters, leaves, label.clamp(max=len(self.joint) - 1))
        guided = left if high == math.inf else super().flow_map(left, leaves, t, label)
        through = (leaves > enters) & (label < len(self.joint))
        return torch.where(through[:, None], guided, plain)

    def crossed(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return X(z, r, t) (B, 1) of times within the interval."""
        (first, before), (last, after) = (self.clock(time) for time in (r, t))
        end = self.ends(label, first, z[:, 0].double() / before)
        return (after * self.came_from(label, last, end))[:, None]

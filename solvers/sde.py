"""Stochastic sampling of a learned flow: noise is added on the way and denoised again, every marginal staying the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from common.ranges import NotNegative, Steps
from losses.paths import PathPoint
from solvers.base_solver import FreshNoise, Walker
from solvers.time_grids import TimeGrid

if TYPE_CHECKING:
    from losses.objective import FlowObjective


class Diffusion(ABC):
    """How much noise is added: g^2 / sigma, in units of the source's variance. The score is of order 1 / sigma, so that g^2
    must vanish with sigma.
    """

    def __init__(self, scale: NotNegative = 1.0):
        self.scale = scale

    @abstractmethod
    def rate(self, p: PathPoint) -> Tensor:
        """Return g^2 / sigma, of the shape of the path's coefficients."""


class SigmaDiffusion(Diffusion):
    """g^2 = scale sigma: noise is added until the end."""

    def rate(self, p: PathPoint) -> Tensor:
        return self.scale * p.sigma.new_ones(p.sigma.shape)


class SquaredDiffusion(Diffusion):
    """g^2 = scale sigma^2: most noise is added early."""

    def rate(self, p: PathPoint) -> Tensor:
        return self.scale * p.sigma


class InteriorDiffusion(Diffusion):
    """g^2 = scale alpha sigma: none at either end."""

    def rate(self, p: PathPoint) -> Tensor:
        return self.scale * p.alpha


class SDESolver(Walker):
    """dz = (v + g^2 / 2 s) dt + g dW with the score s = -E[x0 | z] / (sigma s_0^2): the marginals of the flow, whatever g
    (Song et al. 2020, arXiv 2011.13456; Ma et al. 2024, arXiv 2401.08740).

    By Heun's method, of weak order 2 for additive noise (Roberts 2012, arXiv 1210.0933): two evaluations a step. dW is fresh
    noise of the source, so that its variance s_0^2 cancels in the drift. The source is a centred Gaussian.
    """

    renoises = gaussian_source = True

    def __init__(self, steps: Steps = 25, grid: TimeGrid | None = None, diffusion: Diffusion | None = None):
        super().__init__(steps, grid)
        self.diffusion = diffusion or SigmaDiffusion()

    @property
    def evaluations_ahead(self) -> int:
        return 2 * self.steps

    def step(self, flow: FlowObjective, x: Tensor, times: Tensor, k: int, label: Tensor | None, fresh: FreshNoise) -> Tensor:
        h = times[k + 1] - times[k]
        kick = self.size(flow, times[k : k + 2]) * fresh(k)
        first = self.drift(flow, x, times[k], label)
        second = self.drift(flow, x + h * first + kick, times[k + 1], label)
        return x + 0.5 * h * (first + second) + kick

    def size(self, flow: FlowObjective, ends: Tensor) -> Tensor:
        """Return the standard deviation of the noise of a step over s_0: int g^2 dt by the trapezium rule, as g is no smooth
        function where g^2 falls to 0.
        """
        p = flow.path.at(ends)
        return ((p.sigma * self.diffusion.rate(p)).mean() * (ends[1] - ends[0])).sqrt()

    def drift(self, flow: FlowObjective, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Return v + g^2 / 2 s, finite at sigma = 0."""
        self.evaluations += 1
        v = flow.velocity(x, t, label)
        return v - 0.5 * self.diffusion.rate(flow.path.at(t)) * flow.path.x0_from_velocity(v, x, t)

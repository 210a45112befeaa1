"""Probability paths z_t = alpha_t x1 + sigma_t x0 between noise (t = 0) and data (t = 1), and what can be read off them."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from common.ranges import Positive

CLAMP = 0.05  # least sigma or alpha we divide by: keeps x1- and x0-prediction finite at the path's ends


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Return a scalar or (B,) time as (B, 1, ...), to broadcast against the states x (B, ...)."""
    return t.to(device=x.device, dtype=torch.float32).expand(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))


class PathPoint(NamedTuple):
    """alpha, sigma and their time derivatives, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class ProbabilityPath(ABC):
    """z_t = alpha_t x1 + sigma_t x0 with velocity alpha'_t x1 + sigma'_t x0. Times broadcast against the states.

    last_time: the latest time that training draws; below 1 where sigma' is infinite at t = 1.
    """

    last_time: float = 1.0

    @abstractmethod
    def at(self, t: Tensor) -> PathPoint:
        """Return coefficients at times t."""

    def state(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return z_t."""
        p = self.at(t)
        return p.alpha * x1 + p.sigma * x0

    def conditional_velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return dz_t / dt for fixed x0 and x1."""
        p = self.at(t)
        return p.alpha_dot * x1 + p.sigma_dot * x0

    def velocity_from_x1(self, x1: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return velocity at z of a prediction of x1; sigma is held above CLAMP, which costs a little near t = 1."""
        p = self.at(t)
        return (p.sigma_dot * (z - p.alpha * x1) + p.sigma * p.alpha_dot * x1) / p.sigma.clamp(min=CLAMP)

    def velocity_from_x0(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return velocity at z of a prediction of x0; alpha is held above CLAMP, which costs a little near t = 0."""
        p = self.at(t)
        return (p.alpha_dot * (z - p.sigma * x0) + p.alpha * p.sigma_dot * x0) / p.alpha.clamp(min=CLAMP)

    def x1_from_velocity(self, v: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return E[x1 | z_t = z] from the velocity: solve z = alpha x1 + sigma x0, v = alpha' x1 + sigma' x0 for x1."""
        p = self.at(t)
        return (p.sigma * v - p.sigma_dot * z) / (p.sigma * p.alpha_dot - p.sigma_dot * p.alpha)

    def x0_from_velocity(self, v: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return E[x0 | z_t = z] from the velocity there."""
        p = self.at(t)
        return (p.alpha_dot * z - p.alpha * v) / (p.sigma * p.alpha_dot - p.sigma_dot * p.alpha)

    def score_from_velocity(self, v: Tensor, z: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Return grad_z log p_t(z) = -E[x0 | z] / (sigma source_std^2), source a centred Gaussian; infinite at sigma = 0."""
        return -self.x0_from_velocity(v, z, t) / (self.at(t).sigma * source_std**2)


class LinearPath(ProbabilityPath):
    """alpha = t, sigma = 1 - t: rectified flow (Liu et al. 2022, arXiv 2209.03003), conditional OT (Lipman et al. 2022)."""

    def at(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(t, 1 - t, one, -one)


class CosinePath(ProbabilityPath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the trigonometric interpolant (Albergo & Vanden-Eijnden 2022)."""

    def at(self, t: Tensor) -> PathPoint:
        angle = 0.5 * math.pi * t
        alpha, sigma = angle.sin(), angle.cos()
        return PathPoint(alpha, sigma, 0.5 * math.pi * sigma, -0.5 * math.pi * alpha)


class VariancePreservingPath(ProbabilityPath):
    """alpha = exp(-T / 2), sigma = sqrt(1 - exp(-T)), T = (1 - t)^2 (B - b) / 2 + (1 - t) b (Song et al. 2020, eq. 32).

    sigma' grows without bound as t -> 1; it is evaluated no later than last_time.
    """

    last_time = 1 - 1e-3

    def __init__(self, beta_max: Positive = 20.0, beta_min: Positive = 0.1):
        self.beta_max, self.beta_min = beta_max, beta_min

    def at(self, t: Tensor) -> PathPoint:
        left = 1 - t
        integral = 0.5 * left.square() * (self.beta_max - self.beta_min) + left * self.beta_min
        rate = left * (self.beta_max - self.beta_min) + self.beta_min  # -dT/dt
        alpha, sigma = (-0.5 * integral).exp(), (-torch.expm1(-integral)).sqrt()
        late = torch.full_like(t, 1 - self.last_time)
        floor = (-torch.expm1(-(0.5 * late.square() * (self.beta_max - self.beta_min) + late * self.beta_min))).sqrt()
        return PathPoint(alpha, sigma, 0.5 * rate * alpha, -0.5 * rate * alpha.square() / torch.maximum(sigma, floor))

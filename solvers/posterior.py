"""Samples of what is known in part: data given a linear observation of them, by moment matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from common.errors import UserError
from losses.paths import ProbabilityPath, expand_time
from solvers.base_solver import Field

EARLIEST = 0.01  # time from which on the covariance is computed: at t = 0 it is 0 / 0


@dataclass(frozen=True)
class Observation:
    """y = A x1 + noise: value ((B,) M, ...), operator x1 (B, ...) -> (B, M, ...) linear or affine, noise > 0 its std."""

    value: Tensor
    operator: Callable[[Tensor], Tensor]
    noise: float

    @classmethod
    def of(cls, seen: Tensor, shape: tuple[int, ...], noise: float) -> Observation:
        """Return what `seen` says of states of this shape: their entries where it is not NaN; or, of an image that is k
        times smaller in both directions, their means over k x k pixels. UserError for another shape, or nothing seen.
        """
        if tuple(seen.shape) == tuple(shape):
            known = ~seen.isnan()
            if not known.any():
                raise UserError("what is observed is NaN throughout, which leaves all open; sample without it")
            return cls(seen[known], lambda x: x[:, known.to(x.device)], noise)
        times = shape[-1] // seen.shape[-1] if len(seen.shape) == len(shape) == 3 and seen.shape[-1] > 0 else 0
        if times < 2 or tuple(seen.shape) != (shape[0], shape[1] / times, shape[2] / times) or seen.isnan().any():
            raise UserError(
                f"what is observed has shape {list(seen.shape)}; give a state of shape {list(shape)}, NaN where it is not "
                "known, or of an image its means over squares of k x k pixels, all of them"
            )
        return cls(seen, lambda x: avg_pool2d(x, times), noise)


def posterior_field(
    field: Field, path: ProbabilityPath, observation: Observation, source_std: float = 1.0, iterations: int = 5
) -> Field:
    """Return the velocity that carries the source to x1 given the observation, of the field that carries it to x1.

    Given z_t, x1 is taken for a Gaussian of its true mean, E[x1 | z] = (sigma v - sigma' z) / (sigma alpha' - sigma' alpha),
    and its true covariance, C = (sigma^2 source_std^2 / alpha) dE[x1 | z] / dz (Boys et al. 2023, arXiv 2310.06721, eq. 6);
    then E[x1 | z, y] = E[x1 | z] + C A^T (A C A^T + noise^2)^-1 (y - A E[x1 | z]), whose inverse `iterations` of conjugate
    gradients find (Rozet et al. 2024, arXiv 2405.13712, section 4), each one pass back through the network. Exact for
    Gaussian data with as many iterations as numbers observed. source: a centred Gaussian.
    """

    def posterior(z: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            t = torch.as_tensor(t).clamp(min=EARLIEST)
            velocity, wide = field(z, t), expand_time(t, z).to(z)
            mean = path.x1_from_velocity(velocity, z, wide)
            seen = observation.operator(mean)
        p = path.at(wide)
        gain = (p.sigma * source_std).square() / p.alpha
        origin = observation.operator(torch.zeros_like(z))

        def back(u: Tensor) -> Tensor:
            return torch.autograd.grad(seen, z, u, retain_graph=True)[0]

        def product(u: Tensor) -> Tensor:
            return observation.operator(gain * back(u)) - origin + observation.noise**2 * u

        missing = (observation.value.to(seen) - seen).detach()
        u = conjugate_gradients(product, missing, iterations, observation.noise**2)
        rate = (p.alpha_dot * p.sigma - p.sigma_dot * p.alpha) * p.sigma * source_std**2 / p.alpha
        return velocity.detach() + rate * back(u)

    return posterior


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, least: float = 0.0) -> Tensor:
    """Return x (B, ...) near the solution of product(x) = target, row by row; product: symmetric, its eigenvalues above
    `least`. A row where it is not so in the direction that comes next, as errors of a network make it, stays where it is.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))

    x, left, direction = torch.zeros_like(target), target, target
    size = inner(left, left)
    for _ in range(iterations):
        image = product(direction)
        curvature = inner(direction, image)
        step = torch.where(curvature > least * inner(direction, direction), size / curvature, 0.0)
        x, left = x + step * direction, left - step * image
        before, size = size, inner(left, left)
        direction = left + torch.where(before > 0, size / before, 0.0) * direction
    return x

"""Log-likelihood of data under a flow, by the instantaneous change of variables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.device import full_products
from common.errors import UserError
from solvers.base_solver import BaseSolver, Field

Divergence = Literal["auto", "exact", "hutchinson"]
EXACT_UP_TO = 16  # dimensions: "auto" is exact up to here, one vector-Jacobian product for each dimension


@dataclass(frozen=True)
class LogLikelihood:
    """log_prob (B,) in nats; its standard_error (B,) over the probes, or None if exact; x0 (B, ...), encoded."""

    log_prob: Tensor
    standard_error: Tensor | None
    x0: Tensor


def encode(field: Field, x1: Tensor, solver: BaseSolver) -> Tensor:
    """Return the noise x0 (B, ...) that the flow carries to the data x1 (B, ...): the solver's grid walked backwards."""
    return solver.solve(field, x1, solver.times(x1).flip(0))


@torch.inference_mode(False)
@torch.no_grad()
@full_products()
def log_likelihood(
    field: Field,
    x1: Tensor,
    source_log_prob: Callable[[Tensor], Tensor],
    solver: BaseSolver,
    divergence: Divergence = "auto",
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Return log p_1(x1) = log p_0(x0) - int_0^1 div field(x_t, t) dt along the path that ends at x1 (B, ...).

    Chen et al. 2018 (arXiv 1806.07366), eq. 8. The state and the divergence's integrals travel in one flat tensor
    (B, D + K), so that any solver works: K = 1 when exact, K = probes for Hutchinson's estimate (Grathwohl et al. 2019,
    arXiv 1810.01367), with Rademacher probes from `generator` (seed 0 if None), fixed along the path.
    The solver limits the accuracy: on the flow from N(0, 1) to N(0.7, 0.4^2) the mean error is 4e-4 nats with 25 steps
    of midpoint (50 evaluations), 2e-6 with 12 of RK4 (48), 4e-7 with Dopri5's default tolerances in float64 (49).
    source_log_prob: x0 (B, ...) -> (B,) in nats. Raises UserError for an unknown divergence or fewer than 2 probes.
    """
    x1, dim = x1.clone(), x1[0].numel()
    exact = is_exact(divergence, dim)
    directions = basis(x1) if exact else rademacher(x1, probes, generator)

    def augmented(packed: Tensor, t: Tensor) -> Tensor:
        velocity, curvatures = slopes_along(field, packed[:, :dim].reshape(x1.shape), t, directions)
        return torch.cat([velocity.flatten(1), curvatures.sum(1, keepdim=True) if exact else curvatures], dim=1)

    columns = 1 if exact else len(directions)
    packed = encode(augmented, torch.cat([x1.flatten(1), x1.new_zeros(len(x1), columns)], dim=1), solver)
    x0, integrals = packed[:, :dim].reshape(x1.shape), packed[:, dim:]  # int_1^0 div, one for each probe
    error = None if exact else integrals.std(1) / columns**0.5
    return LogLikelihood(source_log_prob(x0) + integrals.mean(1), error, x0)


def is_exact(divergence: Divergence, dim: int) -> bool:
    """Whether to sum the Jacobian's diagonal over all `dim` dimensions."""
    if divergence not in ("auto", "exact", "hutchinson"):
        raise UserError(f"divergence={divergence} is unknown; choose auto, exact or hutchinson")
    return divergence == "exact" or (divergence == "auto" and dim <= EXACT_UP_TO)


def basis(x: Tensor) -> Tensor:
    """Return the D unit vectors of x's (B, ...) state space: (D, 1, ...)."""
    dim = x[0].numel()
    return torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, 1, *x.shape[1:])


def rademacher(x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Return random signs (probes, B, ...), drawn on the generator's device."""
    if probes < 2:
        raise UserError(f"probes={probes} gives no standard error; use 2 or more, or divergence=exact")
    generator = generator or torch.Generator().manual_seed(0)
    bits = torch.randint(2, (probes, *x.shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(x)


def slopes_along(field: Field, x: Tensor, t: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the velocity (B, ...) at x (B, ...) and e^T (d velocity / dx) e (B, K) for directions e (K, B or 1, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = field(x, t)
        gradient = lambda e: torch.autograd.grad(velocity, x, e.expand_as(velocity), retain_graph=True)[0]  # noqa: E731
        products = [(gradient(e) * e).flatten(1).sum(1) for e in directions]
    return velocity.detach(), torch.stack(products, dim=1)

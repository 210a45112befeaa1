"""Derivatives of the mean velocity along the flow, by whatever engine suits the device."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.device import full_products
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowBatch
from models.layers import Recomputed, in_forward_mode

Engine = Literal["auto", "func", "separate", "finite_difference"]
STEP = 2e-3  # of the central difference: in fp32 its rounding (3e-5) and its truncation (4e-6 u''') are both small

# torch's own module of forward derivatives, imported at the first of them, warns of itself.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def picked_engine(engine: Engine, device: torch.device) -> Engine:
    """Return auto is func on CUDA; elsewhere finite_difference: on the CPU it costs least, on MPS forward mode has gaps."""
    if engine == "auto":
        return "func" if device.type == "cuda" else "finite_difference"
    return engine


def forward_derivative(function: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Return a value and its derivative by torch.func.jvp, attention in the one form that has a forward derivative."""
    with sdpa_kernel(SDPBackend.MATH), in_forward_mode():
        at = tuple(place.clone() for place in at)  # compiled forward mode refuses views
        value, derivative = torch.func.jvp(function, at, along)  # type: ignore[misc]
    return value, derivative


class DerivativeObjective(FlowMapObjective):
    """An objective whose target holds D_v u = du/dr + v . grad_z u, the derivative along a direction (v, 1, 0) of (z, r, t).

    jvp chooses how, all without a graph through the derivative, with the same dropout mask as u's own evaluation, and in
    fp32 whatever the autocast (bf16 drowns the difference of two times):
    func: forward mode, u and D_v u in one pass (the least work: 4/3 of a plain step); with blocks that compute their
        activations again as separate, since forward mode keeps them;
    separate: forward mode without a graph, then u by itself (5/3, but the activations of the derivative are never kept);
    finite_difference: (u(+e) - u(-e)) / 2e, then u by itself (5/3, of fast kernels, works on every device);
    auto: see picked_engine.
    """

    def __init__(self, jvp: Engine = "auto", **parts: Any) -> None:
        super().__init__(**parts)
        self.jvp: Engine = jvp
        self.tangent_seen = False

    def value_and_derivative(self, batch: FlowBatch, rows: int, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return u on every row (B, ...), with its graph, and D_direction u on the first `rows` (rows, ...), without."""
        if rows == 0:
            return self.mean_velocities(batch, rows), direction
        interval, instant = batch.split(rows)
        recomputed = any(isinstance(part, Recomputed) and part.recomputed for part in self.network.modules())
        if picked_engine(self.jvp, direction.device) == "func" and not recomputed:
            with torch.autocast(direction.device.type, enabled=False):
                u, derivative = self.forward_mode(interval, direction)
            self.check_tangent(u, derivative)
            return torch.cat([u, self.mean_velocities(instant)]), derivative.detach()
        with self.frozen(), torch.autocast(direction.device.type, enabled=False):
            derivative = self.derivative(interval, direction)
        u = self.mean_velocities(batch, rows)
        self.check_tangent(u[:rows], derivative)
        return u, derivative

    def check_tangent(self, u: Tensor, derivative: Tensor) -> None:
        """Raise RuntimeError, for a bug, when the derivative is zero everywhere although u is not: it was lost on the way.

        A network whose output is zero until its first step has no derivative yet, so the check goes on until one that is
        not zero was seen; what is compiled is not checked.
        """
        if self.tangent_seen or torch.compiler.is_compiling():
            return
        self.tangent_seen = bool(derivative.any())
        if not self.tangent_seen and bool(u.any()):
            raise RuntimeError(
                f"the derivative of {type(self.network).__name__} along the flow is zero everywhere: its tangent was lost "
                f"(loss.jvp={self.jvp}; a compiled or detached network inside, or one that ignores its input)"
            )

    def derivative(self, batch: FlowBatch, direction: Tensor) -> Tensor:
        """Return D_direction u (B, ...) alone."""
        if picked_engine(self.jvp, direction.device) == "finite_difference":
            return self.central_difference(batch, direction)
        return self.forward_mode(batch, direction)[1]

    def forward_mode(self, batch: FlowBatch, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and D_direction u in one pass."""

        def u(z: Tensor, r: Tensor) -> Tensor:
            return self.mean_velocity(z, r, batch.t, batch.label)

        return forward_derivative(u, (batch.input, batch.r), (direction, torch.ones_like(batch.r)))

    @full_products()
    def central_difference(self, batch: FlowBatch, direction: Tensor) -> Tensor:
        """Return D_direction u from u a step ahead and a step behind: in one doubled pass, or two with one dropout mask."""
        ahead, behind = ((batch.input + e * direction, batch.r + e, batch.t, batch.label) for e in (STEP, -STEP))
        if self.is_random:
            with self.frozen():
                u_ahead = self.mean_velocity(*ahead)
            return (u_ahead - self.mean_velocity(*behind)) / (2 * STEP)
        both = [None if a is None or b is None else torch.cat([a, b]) for a, b in zip(ahead, behind, strict=True)]
        u_ahead, u_behind = self.mean_velocity(*both).chunk(2)  # type: ignore[arg-type]
        return (u_ahead - u_behind) / (2 * STEP)

"""Equilibrium matching: a field without time, climbed from noise to data."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Positive, ShareBelow1
from losses.objective import FlowBatch, FlowObjective, Learns, expand_time
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.world import Field, World

NODES = 16  # of each of two Gauss-Legendre rules over the times of a state


class EquilibriumMatchingLoss(FlowObjective):
    """|f(z_t) - c(t) v_c|^2, c(t) = strength min(1, (1 - t) / (1 - start)), for a network that sees no time (Wang & Du 2025,
    EqM, arXiv 2510.02300, with its truncated decay).

    It is least at f*(z) = E[c(t) v_c | z], the mean over the times too at which a state may have come to z:
        f*(z) = int c(t) v*(z, t) p_t(z) dt / int p_t(z) dt.
    Data that are points are its equilibria, as c falls to 0. Data with a density are spread over a region in which f* has a
    few zeros: climbed to the end (solver=ascent), samples gather there, and how far to climb is a choice. The network's
    inputs for the times are always 0 and 1. Raises UserError for another prediction, which would depend on the time.
    """

    learns: Learns = "equilibrium"

    def __init__(self, strength: Positive = 4.0, start: ShareBelow1 = 0.8, **parts: Any) -> None:
        super().__init__(**parts)
        if not isinstance(self.prediction, VelocityPrediction):
            raise UserError(
                "loss=equilibrium_matching learns a field without time, and predictions of x1 or x0 are read with one; use "
                "loss/prediction=velocity"
            )
        self.strength, self.start = strength, start

    def unified(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return super().unified(z, torch.zeros_like(r), torch.ones_like(t))

    def decay(self, t: Tensor) -> Tensor:
        """Return c at times t."""
        return self.strength * ((1 - t) / (1 - self.start)).clamp(max=1)

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        f = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        c = expand_time(self.decay(batch.r), f)
        return {"loss": self.weighted(f - c * batch.conditional_velocity)}

    def exact(self, world: World) -> Field | str:
        known = super().exact(world)
        if isinstance(known, str):
            return known
        if type(self.time_sampler) is not UniformTimes:
            return f"the mean over times is known exactly of uniform ones, not of {type(self.time_sampler).__name__}"
        times, weights = self.quadrature()

        def field(z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            at, states = times.repeat_interleave(len(z)), z.repeat(len(times), 1)
            labels = None if label is None else label.repeat(len(times))
            chance = weights.repeat_interleave(len(z))[:, None] * world.density(states, at, labels)[:, None]
            moved = chance * self.decay(at)[:, None] * world.velocity(states, at, at, labels)
            total, mass = (part.view(len(times), len(z), -1).sum(0) for part in (moved, chance))
            return torch.div(total, mass)

        return field

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Return times and weights (2 NODES,), float64, before and after c begins to fall."""
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(NODES))
        ends = [(0.0, min(self.start, self.path.last_time)), (self.start, self.path.last_time)]
        sizes = [0.5 * max(last - first, 0.0) for first, last in ends]
        times = [first + size * (1 + nodes) for (first, _), size in zip(ends, sizes, strict=True)]
        return torch.cat(times), torch.cat([size * weights for size in sizes])

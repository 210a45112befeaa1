"""sCM: consistency in continuous time on the cosine path."""

import math
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Positive
from losses.objective import FlowBatch, FlowObjective, expand_time
from losses.paths import CosinePath
from losses.total_derivative import DerivativeObjective


class ContinuousConsistencyLoss(DerivativeObjective):
    """|F - sg(F + g)|^2, g = sin(theta) df/dtheta: the map to data f(z, theta) = sin(theta) z + cos(theta) F is to be one
    all along the path (Lu & Song 2024, sCM, arXiv 2410.11081).

    theta = pi r / 2, z = sin(theta) x1 + cos(theta) x0, and F predicts dz/dtheta (TrigFlow). The network's u(z, r, 1) gives
    f = z + (1 - r) u, so that F = u (1 - r) / cos(theta) + z tan((pi/2 - theta) / 2) and
        df/dtheta = 2/pi (v_c - u + (1 - r) D_{v_c} u),
    the residual of MeanFlow headed to t = 1, here weighted by sin(theta). The paper's time is pi/2 - theta; its learned
    weight w_phi and the warm-up of the tangent are left out.

    normalise: c of g / (|g| + c), the paper's .1, which bounds the steps and is biased, since |g| depends on v_c; None for g
    itself, whose mean is zero at the exact map. Raises UserError for another path, or rows that are not headed to t = 1.
    """

    def __init__(self, normalise: Positive | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        if not (isinstance(self.path, CosinePath) and self.time_sampler.to_data and self.time_sampler.ratio == 1):
            raise UserError(
                "loss=scm learns maps to data on the cosine path alone; leave loss/path=cosine, "
                "loss.time_sampler.to_data=true and loss.time_sampler.ratio=1, or use loss=consistency"
            )
        self.normalise = normalise

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        u, derivative = self.value_and_derivative(batch, len(batch), batch.conditional_velocity)
        left, theta = expand_time(1 - batch.r, u), expand_time(0.5 * math.pi * batch.r, u)
        f_rate = 2 / math.pi * (batch.conditional_velocity - u.detach() + left * derivative)
        g = self.bounded(theta.sin() * f_rate)
        F = 2 / math.pi * u / torch.sinc(0.5 * left) + batch.input * (0.25 * math.pi * left).tan()  # noqa: N806  the paper's
        return {"loss": self.weighted(F - (F + g).detach())}

    def bounded(self, g: Tensor) -> Tensor:
        """Return g (B, ...), or g / (|g| + c) with the norm of a row."""
        if self.normalise is None:
            return g
        return g / (expand_time(g.flatten(1).norm(dim=1), g) + self.normalise)

"""Classifier-free guidance folded into a MeanFlow target."""

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Positive, Share, ShareBelow1
from losses.objective import expand_time


class MeanFlowGuidance:
    """Classifier-free guidance folded into a MeanFlow target (Geng et al. 2025, arXiv 2505.13447, eq. 19-21, appendix).

    The guided field v_cfg = w v + (1 - w) v_null has its own mean velocity, which the network learns in place of the plain
    one: samples are guided at the cost of one evaluation a step. In v_cfg = omega v_c + kappa u(z, r, r | c)
    + (1 - omega - kappa) u(z, r, r | null) the network's own guided prediction stands for a part of v; solved for v_cfg,
    the effective scale is w = omega / (1 - kappa). omega = 1, kappa = 0 is no guidance. The paper's time runs the other
    way: rows are guided where its t = 1 - r lies in [1 - end, 1 - start].

    At the minimiser v_cfg is exact although the network stands for parts of it: rows of the null label teach it
    u(z, r, r | null) = v_null, unguided, and with this the others have the one fixed point u(z, r, r | c) = v_cfg, as
    kappa < 1. It takes rows that train u(z, r, r): where all are headed to data (time_sampler.to_data, ratio=1) no minimiser
    is known, unless a teacher's velocity stands in the network's place.
    Raises UserError when start > end.
    """

    def __init__(self, omega: Positive = 1.0, kappa: ShareBelow1 = 0.0, start: Share = 0.0, end: Share = 1.0):
        if start > end:
            raise UserError(f"loss.guidance takes start <= end (0 noise, 1 data), not start={start} and end={end}")
        self.omega, self.kappa, self.start, self.end = omega, kappa, start, end

    @property
    def scale(self) -> float:
        """Return the effective scale omega / (1 - kappa)."""
        return self.omega / (1 - self.kappa)

    def target(self, v_c: Tensor, v_label: Tensor, v_null: Tensor, r: Tensor) -> Tensor:
        """Return the guided stand-in (B, ...) for v_c: omega v_c + kappa v_label + (1 - omega - kappa) v_null, v_c itself
        where r lies outside [start, end].

        v_c (B, ...) conditional velocity of the path; v_label = u(z, r, r | c) and v_null = u(z, r, r | null), both without
        grad; r (B,) time of the state. On rows of the null label v_label = v_null, and the minimiser stays the plain v.
        """
        guided = self.omega * v_c + self.kappa * v_label + (1 - self.omega - self.kappa) * v_null
        inside = (self.start <= r) & (r <= self.end)
        return torch.where(expand_time(inside, v_c).bool(), guided, v_c)

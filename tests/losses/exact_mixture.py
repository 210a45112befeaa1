"""The exact flow of a 1-D mixture in float64, and the expected gradient of an objective there, by quadrature."""

import math
from typing import Any

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from losses.alpha_flow_loss import AlphaBatch, AlphaFlowLoss
from losses.alpha_schedules import ExponentialAlpha
from losses.couplings import IndependentCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_loss import ImprovedMeanFlowLoss, MeanFlowLoss
from losses.objective import FlowBatch, FlowObjective
from losses.paths import LinearPath
from losses.predictions import VelocityPrediction
from losses.shortcut_loss import ShortcutLoss
from losses.split_meanflow_loss import SplitBatch, SplitMeanFlowLoss
from losses.terminal_velocity_loss import TerminalVelocityLoss
from losses.time_samplers import DyadicTimes, TimeSampler, UniformTimes
from losses.weightings import UniformWeighting, Weighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.2, 0.9], [0.3, 0.5]))
POINTS = [(-1.5, 0.125, 0.875), (-0.3, 0.375, 0.75), (0.2, 0.0625, 1.0), (0.8, 0.5, 0.6875), (1.1, 0.25, 0.625)]  # z, r, t


def components(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, (z - t m_k) / S_k(t) and S_k(t) of the components, (K, ...)."""
    w, m, s = (c.view(-1, *(1,) * t.ndim) for c in (WEIGHTS, MEANS, STDS))
    big = ((1 - t).square() + (t * s).square()).sqrt()
    return w, (z - t * m) / big, big


def distribution(z: Tensor, t: Tensor) -> Tensor:
    """F_t(z) of the mixture along the path."""
    w, standard, _ = components(z, t)
    return (w * torch.special.ndtr(standard)).sum(0)


def density(z: Tensor, t: Tensor) -> Tensor:
    w, standard, big = components(z, t)
    return (w * torch.exp(-0.5 * standard.square()) / (big * math.sqrt(2 * math.pi))).sum(0)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """v(z, t), the posterior mean of the components' own velocities."""
    w, standard, big = components(z, t)
    share = w * torch.exp(-0.5 * standard.square()) / big
    m, s = (c.view(-1, *(1,) * t.ndim) for c in (MEANS, STDS))
    own = m + (t * s.square() - (1 - t)) / big.square() * (z - t * m)
    return (share * own).sum(0) / share.sum(0)


def flow_map(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """X(z, r, t) = F_t^-1(F_r(z)), by bisection in float64, with the derivatives of one Newton step for jvp."""
    target = distribution(z, r)
    with torch.no_grad():
        low, high = torch.full_like(z, -12.0), torch.full_like(z, 12.0)
        for _ in range(32):  # to 3e-9, which the Newton step squares
            middle = 0.5 * (low + high)
            below = distribution(middle, t) < target.detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = 0.5 * (low + high)
    return x - (distribution(x, t) - target) / density(x, t)


def exact_mean_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    gap = torch.where(t == r, torch.ones_like(t), t - r)
    return torch.where(t == r, velocity(z, r), (flow_map(z, r, t) - z) / gap)


def posterior_velocities(z: Tensor, r: Tensor, nodes: int = 40) -> tuple[Tensor, Tensor]:
    """v_c given z_r = z (N,) as nodes and probabilities (N, K * nodes): Gauss-Hermite over x1 within each component."""
    points, weights = (torch.tensor(a, dtype=torch.float64) for a in hermegauss(nodes))
    values, chances = [], []
    z, r = z[:, None], r[:, None]
    for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
        big = ((1 - r) ** 2 + (r * s) ** 2).sqrt()
        mean, std = m + r * s**2 / big**2 * (z - r * m), (1 - r) * s / big
        evidence = w * torch.exp(-0.5 * ((z - r * m) / big) ** 2) / big
        values.append((mean + std * points - z) / (1 - r))
        chances.append(evidence * weights)
    chance = torch.cat(chances, dim=1)
    return torch.cat(values, dim=1), chance / chance.sum(1, keepdim=True)


class Exact(VelocityModel):
    """A given u(z, r, t) of 1-D states. `shift` displaces it at each of POINTS, which a row's label numbers; the gradient
    for it is what stationarity is about.
    """

    def __init__(self, mean_velocity: Any = exact_mean_velocity):
        super().__init__()
        self.mean_velocity = mean_velocity
        self.shift = nn.Parameter(torch.zeros(len(POINTS), dtype=torch.float64))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        shift = self.shift[:1] if label is None else self.shift[label][:, None]
        return self.mean_velocity(z[:, 0], times[:, 0], times[:, 1])[:, None] + shift


class Expectation(Weighting):
    """E over v_c of the squared error, or of its adaptively weighted form, in place of the mean over a batch."""

    def __init__(self, chance: Tensor, power: float = 0.0):
        self.chance, self.power = chance, power

    def __call__(self, squared_error: Tensor, a: Tensor | float = 1.0) -> Tensor:
        return (self.chance * squared_error / a / (squared_error + 1e-3).pow(self.power).detach()).sum()


OBJECTIVES: dict[str, tuple[type[FlowObjective], dict[str, Any]]] = {
    "mse": (FlowMatchingLoss, {"second_time": "state"}),
    "meanflow": (MeanFlowLoss, {"jvp": "func"}),
    "meanflow_separate": (MeanFlowLoss, {"jvp": "separate"}),
    "improved_meanflow": (ImprovedMeanFlowLoss, {"jvp": "func"}),
    "shortcut": (ShortcutLoss, {}),
    "split_meanflow": (SplitMeanFlowLoss, {}),
    "terminal_velocity": (TerminalVelocityLoss, {"jvp": "func"}),
    "alpha_flow": (AlphaFlowLoss, {"alpha": ExponentialAlpha(), "switch": 0.0}),
}


def objective(name: str, network: VelocityModel, weighting: Weighting | None = None, **other: Any) -> FlowObjective:
    kind, settings = OBJECTIVES[name]
    sampler: TimeSampler = DyadicTimes(7, 1.0) if kind is ShortcutLoss else UniformTimes(1.0)
    parts = {
        "network": network, "path": LinearPath(), "coupling": IndependentCoupling(), "time_sampler": sampler,
        "prediction": VelocityPrediction(), "weighting": weighting or UniformWeighting(),
    }  # fmt: skip
    return kind(**(parts | settings | other))


def rows_at_points(name: str, side: str = "r", a: float = 0.0) -> tuple[FlowBatch, Tensor]:
    """One row for each of POINTS and node of v_c given z_r = z, and their probabilities, which sum to one at each point.

    side="t": the state taken for the one at t.
    """
    z, r, t = torch.tensor(POINTS, dtype=torch.float64).T
    if name == "shortcut":  # an interval of the ladder, above its foot
        r, t = torch.full_like(r, 0.25), torch.full_like(t, 0.5)
    if name == "mse":
        t = r
    v_c, chance = posterior_velocities(z, r if side == "r" else t.clamp(max=0.9))
    label = torch.arange(len(POINTS)).repeat_interleave(v_c.shape[1])
    state, r, t = z[label, None], r[label], t[label]
    batch = FlowBatch(state, state, r, t, state, v_c.view(-1, 1), torch.cat([state, r[:, None], t[:, None]], dim=1), label)
    if name == "split_meanflow":
        batch = SplitBatch(**vars(batch), share=torch.full_like(r, 0.3))
    if name == "alpha_flow":
        batch = AlphaBatch(**vars(batch), a=torch.full_like(r, a))
    return batch, chance.flatten()


def gradients(name: str, network: VelocityModel, power: float = 0.0, side: str = "r", a: float = 0.0) -> Tensor:
    """d/d(shift) of E[loss | z_r = z] at each of POINTS, exact by quadrature over v_c."""
    batch, chance = rows_at_points(name, side, a)
    loss = objective(name, network, Expectation(chance, power))(batch)["loss"]
    return torch.autograd.grad(loss, [next(network.parameters())])[0]


def gaussian_mean_velocity(z: Tensor, r: Tensor, t: Tensor, m: float = 0.7, s: float = 0.4) -> Tensor:
    big = lambda time: ((1 - time) ** 2 + (time * s) ** 2).sqrt()  # noqa: E731
    gap = torch.where(t > r, t - r, torch.ones_like(t))
    average = (t * m + big(t) / big(r) * (z - r * m) - z) / gap
    instant = m + (r * s**2 - (1 - r)) / big(r) ** 2 * (z - r * m)
    return torch.where(t > r, average, instant)

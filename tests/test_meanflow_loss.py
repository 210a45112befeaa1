"""MeanFlow against closed forms: the exact mean velocity is stationary, wrong signs and sides are not."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dataloaders.base_dataloaders import split_unified_flow_matching_input
from evaluation.evaluator import few_steps
from losses.couplings import IndependentCoupling
from losses.forward_mode import jvp
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowBatch
from losses.paths import LinearPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting, Weighting
from models.velocity_model import VelocityModel
from training.errors import UserError

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.2, 0.9], [0.3, 0.5]))


def spread(t: Tensor) -> Tensor:
    """S_k(t), (K, ...)."""
    return ((1 - t).square() + t.square() * STDS.view(-1, *(1,) * t.ndim).square()).sqrt()


def distribution(z: Tensor, t: Tensor) -> Tensor:
    """F_t(z) of the mixture along the path."""
    s, m = spread(t), t * MEANS.view(-1, *(1,) * t.ndim)
    return (WEIGHTS.view(-1, *(1,) * t.ndim) * torch.special.ndtr((z - m) / s)).sum(0)


def density(z: Tensor, t: Tensor) -> Tensor:
    s, m = spread(t), t * MEANS.view(-1, *(1,) * t.ndim)
    return (WEIGHTS.view(-1, *(1,) * t.ndim) * torch.exp(-0.5 * ((z - m) / s).square()) / (s * math.sqrt(2 * math.pi))).sum(
        0
    )


def flow_map(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """X(z, r, t) = F_t^-1(F_r(z)), by bisection in float64, with the derivatives of one Newton step for jvp."""
    target = distribution(z, r)
    with torch.no_grad():
        low, high = torch.full_like(z, -12.0), torch.full_like(z, 12.0)
        for _ in range(80):
            middle = 0.5 * (low + high)
            below = distribution(middle, t) < target.detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = 0.5 * (low + high)
    return x - (distribution(x, t) - target) / density(x, t)


def exact_mean_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return (flow_map(z, r, t) - z) / (t - r)


def posterior_velocities(z: Tensor, r: Tensor, nodes: int = 40) -> tuple[Tensor, Tensor]:
    """v_c given z_r = z as nodes and probabilities (K * nodes, ...): Gauss-Hermite over x1 within each component."""
    from numpy.polynomial.hermite_e import hermegauss

    points, weights = (torch.tensor(a, dtype=torch.float64) for a in hermegauss(nodes))
    values, chances = [], []
    for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
        big = ((1 - r) ** 2 + (r * s) ** 2).sqrt()
        mean, std = m + r * s**2 / big**2 * (z - r * m), (1 - r) * s / big
        evidence = w * torch.exp(-0.5 * ((z - r * m) / big) ** 2) / big
        for point, weight in zip(points, weights, strict=True):
            x1 = mean + std * point
            values.append((x1 - z) / (1 - r))
            chances.append(evidence * weight)
    stacked = torch.stack(chances)
    return torch.stack(values), stacked / stacked.sum(0)


class Exact(VelocityModel):
    """u exact on intervals; on the diagonal, v. `shift` displaces it."""

    def __init__(self, mean_velocity: Callable[[Tensor, Tensor, Tensor], Tensor] = exact_mean_velocity):
        super().__init__()
        self.mean_velocity = mean_velocity
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        return self.mean_velocity(z[:, 0], times[:, 0], times[:, 1])[:, None] + self.shift


def objective(network: VelocityModel) -> MeanFlowLoss:
    parts = (LinearPath(), IndependentCoupling(), UniformTimes(1.0), VelocityPrediction())
    return MeanFlowLoss(network, *parts, UniformWeighting())


class DoubleMeanFlow(MeanFlowLoss):
    """The same loss with its input fused in float64, so that quadrature is not drowned in rounding."""

    def unified(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return torch.cat([z, r[:, None], t[:, None]], dim=1)


POINTS = [(-1.5, 0.1, 0.9), (-0.3, 0.35, 0.8), (0.2, 0.05, 1.0), (0.8, 0.5, 0.7), (1.1, 0.2, 0.6)]


class Expectation(Weighting):
    """E over v_c of the squared error, or of its adaptively weighted form, in place of the mean over a batch."""

    def __init__(self, chance: Tensor, power: float):
        self.chance, self.power = chance, power

    def __call__(self, squared_error: Tensor) -> Tensor:
        return (self.chance * squared_error / (squared_error + 1e-3).pow(self.power).detach()).sum()


def gradient_at(point: tuple[float, float, float], network: VelocityModel, power: float = 0.0) -> float:
    """d/d(shift) of E[loss | z_r = z] at one (z, r, t), exact by quadrature over v_c."""
    z, r, t = (torch.tensor(v, dtype=torch.float64) for v in point)
    v_c, chance = posterior_velocities(z, r)
    n = len(v_c)
    rows, state = (r.repeat(n), t.repeat(n)), z.repeat(n, 1)
    batch = FlowBatch(state, state, *rows, state, v_c[:, None], state)
    parts = (LinearPath(), IndependentCoupling(), UniformTimes(1.0), VelocityPrediction())
    loss = DoubleMeanFlow(network, *parts, Expectation(chance, power))(batch)["loss"]
    (gradient,) = torch.autograd.grad(loss, [next(network.parameters())])
    return float(gradient)


@pytest.mark.parametrize("point", POINTS)
def test_the_exact_mean_velocity_is_stationary(point):
    assert abs(gradient_at(point, Exact())) < 1e-6


@pytest.mark.parametrize("point", POINTS)
def test_a_displaced_or_instantaneous_velocity_is_not(point):
    assert abs(gradient_at(point, Exact(lambda z, r, t: exact_mean_velocity(z, r, t) + 0.1))) > 0.1
    assert abs(gradient_at(point, Exact(lambda z, r, t: exact_mean_velocity(z, r, r + 1e-3)))) > 1e-2


def test_adaptive_weighting_is_biased_on_a_mixture():
    assert max(abs(gradient_at(point, Exact(), power=1.0)) for point in POINTS) > 0.05


def gaussian_mean_velocity(z: Tensor, r: Tensor, t: Tensor, m: float = 0.7, s: float = 0.4) -> Tensor:
    big = lambda time: ((1 - time) ** 2 + (time * s) ** 2).sqrt()  # noqa: E731
    gap = torch.where(t > r, t - r, torch.ones_like(t))
    average = (t * m + big(t) / big(r) * (z - r * m) - z) / gap
    instant = m + (r * s**2 - (1 - r)) / big(r) ** 2 * (z - r * m)
    return torch.where(t > r, average, instant)


def test_one_evaluation_of_the_exact_map_makes_the_data():
    """m != 0 and s != 1: the order of times that public code gets wrong would give mean m / s and std |2 - 1 / s|."""
    trained = objective(Exact(gaussian_mean_velocity)).double()
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = trained.flow_map(noise, torch.tensor(0.0), torch.tensor(1.0)).detach()
    assert float(samples.mean()) == pytest.approx(0.7, abs=0.005)
    assert float(samples.std()) == pytest.approx(0.4, abs=0.005)


def test_few_steps_of_the_exact_map_are_one_step():
    trained = objective(Exact(gaussian_mean_velocity))
    noise = torch.linspace(-2, 2, 9)[:, None]
    once = few_steps(trained, noise, None, 1)
    torch.testing.assert_close(once, (0.7 + 0.4 * noise), atol=1e-5, rtol=0)
    for evaluations in (2, 3, 8):
        torch.testing.assert_close(few_steps(trained, noise, None, evaluations), once, atol=1e-5, rtol=0)


def test_only_the_interval_rows_pay_for_the_derivative(monkeypatch):
    seen = []

    def spy(field, points, tangents):
        seen.append(len(points[0]))
        return jvp(field, points, tangents)

    monkeypatch.setattr("losses.meanflow_loss.jvp", spy)
    loss = objective(Exact(gaussian_mean_velocity))
    loss.time_sampler = UniformTimes(0.25)
    x = torch.randn(40, 1)
    loss(loss.draw(x, x + 1, None, torch.Generator().manual_seed(0)))
    assert seen == [10]


def test_the_tangent_is_the_central_difference_and_never_zero():
    network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1)).double()
    field = lambda z, r: network(torch.cat([z, r[:, None], torch.ones_like(r)[:, None]], dim=1))  # noqa: E731
    z, r, v = torch.randn(8, 1).double(), torch.rand(8).double(), torch.randn(8, 1).double()
    tangent = jvp(field, (z, r), (v, torch.ones_like(r)))
    e = 1e-5
    difference = (field(z + e * v, r + e) - field(z - e * v, r - e)) / (2 * e)
    torch.testing.assert_close(tangent, difference.detach(), rtol=1e-6, atol=1e-8)
    assert tangent.abs().min() > 0 and not tangent.requires_grad


def test_dropout_keeps_its_mask_between_the_tangent_and_the_forward_pass():
    dropout, seen = nn.Dropout(0.5), []

    def field(z: Tensor) -> Tensor:
        out = dropout(z)
        seen.append(out != 0)
        return out

    torch.manual_seed(0)
    ones = torch.ones(64, 4)
    tangent = jvp(field, (ones,), (ones,))
    assert torch.equal(tangent != 0, field(ones) != 0)


def test_an_instantaneous_model_has_no_flow_map():
    loss = objective(Exact(gaussian_mean_velocity))
    loss.learns_flow_map = False
    with pytest.raises(UserError, match="loss=meanflow"):
        loss.flow_map(torch.zeros(2, 1), torch.tensor(0.0), torch.tensor(1.0))

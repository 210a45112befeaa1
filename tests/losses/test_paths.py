"""Probability paths: every file in configs/loss/path, their coefficients, velocities and conversions."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Normal

from losses.paths import CLAMP, CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath

CONFIGS = Path(__file__).parents[2] / "configs" / "loss" / "path"
PATHS: dict[str, ProbabilityPath] = {f.stem: instantiate(OmegaConf.load(f)) for f in sorted(CONFIGS.glob("*.yaml"))}
NOISE_LEFT = {"variance_preserving": 0.01}  # how far z_0 may be from x0, in units of x1; others start at x0 exactly
every_path = pytest.mark.parametrize("name, path", PATHS.items(), ids=PATHS)

times = st.floats(0.0, 1.0)


def pair(n: int = 64) -> tuple[Tensor, Tensor]:
    """Noise and data (n, 2), float64."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    return x0, 0.7 + 0.4 * x1


def inner_times(path: ProbabilityPath, n: int = 64) -> Tensor:
    """Times (n, 1) at which no clamp is active."""
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)[:, None]
    p = path.at(t)
    free = t[(p.alpha > CLAMP) & (p.sigma > CLAMP)]
    return free[torch.linspace(0, len(free) - 1, n).long(), None]


@every_path
def test_it_runs_from_noise_to_data(name: str, path: ProbabilityPath) -> None:
    x0, x1 = pair()
    start, end = (path.state(x0, x1, torch.full((64, 1), t, dtype=torch.float64)) for t in (0.0, 1.0))
    assert (start - x0).abs().max() <= NOISE_LEFT.get(name, 1e-12) * x1.abs().max()
    assert (end - x1).abs().max() < 1e-12


@every_path
def test_velocity_is_the_slope_of_the_state(name: str, path: ProbabilityPath) -> None:
    x0, x1 = pair()
    t, h = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)[:, None], 1e-6
    slope = (path.state(x0, x1, t + h) - path.state(x0, x1, t - h)) / (2 * h)
    assert torch.allclose(path.conditional_velocity(x0, x1, t), slope, rtol=1e-6, atol=1e-7)


@every_path
def test_velocity_and_both_ends_are_recovered_from_each_other(name: str, path: ProbabilityPath) -> None:
    x0, x1 = pair()
    t = inner_times(path)
    z, v = path.state(x0, x1, t), path.conditional_velocity(x0, x1, t)
    assert torch.allclose(path.x1_from_velocity(v, z, t), x1)
    assert torch.allclose(path.x0_from_velocity(v, z, t), x0)
    assert torch.allclose(path.velocity_from_x1(x1, z, t), v)
    assert torch.allclose(path.velocity_from_x0(x0, z, t), v)


@pytest.mark.parametrize("source_std", [1.0, 1.7])
@every_path
def test_conversions_agree_with_a_single_gaussian(name: str, path: ProbabilityPath, source_std: float) -> None:
    m, s, t = 0.7, 0.4, inner_times(path)
    z = torch.linspace(-3, 3, 64, dtype=torch.float64)[:, None].requires_grad_()
    p, h = path.at(t), 1e-6
    variance = (p.alpha * s) ** 2 + (p.sigma * source_std) ** 2
    (score,) = torch.autograd.grad(Normal(p.alpha * m, variance.sqrt()).log_prob(z).sum(), z)
    after, before = path.at(t + h), path.at(t - h)
    growth = ((after.alpha**2 - before.alpha**2) * s**2 + (after.sigma**2 - before.sigma**2) * source_std**2) / (4 * h)
    v = (after.alpha - before.alpha) / (2 * h) * m + growth / variance * (z - p.alpha * m)  # std' / std = (var' / 2) / var
    assert torch.allclose(path.score_from_velocity(v, z, t, source_std), score, rtol=1e-5, atol=1e-6)
    assert torch.allclose(path.x1_from_velocity(v, z, t), m + p.alpha * s**2 / variance * (z - p.alpha * m), atol=1e-5)
    assert torch.allclose(path.x0_from_velocity(v, z, t), p.sigma * source_std**2 / variance * (z - p.alpha * m), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(t=times, z=st.floats(-3, 3), guess=st.floats(-3, 3))
def test_linear_predictions_divide_by_no_less_than_the_clamp(t: float, z: float, guess: float) -> None:
    arguments = [torch.tensor(value, dtype=torch.float64) for value in (guess, z, t)]
    assert math.isclose(LinearPath().velocity_from_x1(*arguments), (guess - z) / max(1 - t, 0.05), abs_tol=1e-9)
    assert math.isclose(LinearPath().velocity_from_x0(*arguments), (z - guess) / max(t, 0.05), abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(t=times)
def test_coefficients_are_the_textbooks(t: float) -> None:
    at = torch.tensor(t, dtype=torch.float64)
    assert LinearPath().at(at)[:2] == (at, 1 - at)
    alpha, sigma = CosinePath().at(at)[:2]
    assert math.isclose(alpha, math.sin(math.pi * t / 2), abs_tol=1e-12)
    assert math.isclose(sigma, math.cos(math.pi * t / 2), abs_tol=1e-12)
    alpha, sigma = VariancePreservingPath().at(at)[:2]
    assert math.isclose(alpha**2 + sigma**2, 1.0, abs_tol=1e-12)


@settings(max_examples=30, deadline=None)
@given(t=times, high=st.floats(5, 30), low=st.floats(0.05, 1))
def test_variance_preserving_alpha_is_the_decay_under_a_linear_rate(t: float, high: float, low: float) -> None:
    """Noise is added at rate beta(s) = low + s (high - low) from s = 0 (data) to s = 1 - t; alpha = exp(-integral / 2)."""
    integral, _ = quad(lambda s: low + s * (high - low), 0, 1 - t)
    alpha = VariancePreservingPath(high, low).at(torch.tensor(t, dtype=torch.float64)).alpha
    assert math.isclose(-2 * math.log(alpha), integral, abs_tol=1e-9)


@every_path
def test_everything_is_finite_from_end_to_end(name: str, path: ProbabilityPath) -> None:
    x0, x1 = (x[0].float() for x in pair())
    t = torch.cat([torch.linspace(0, 1, 201), 1 - torch.logspace(-8, -2, 20), torch.logspace(-8, -2, 20)])[:, None]
    z, v = path.state(x0, x1, t), path.conditional_velocity(x0, x1, t)
    read = [path.velocity_from_x1(x1, z, t), path.velocity_from_x0(x0, z, t), path.x1_from_velocity(v, z, t)]
    for value in [*path.at(t), z, v, *read, path.x0_from_velocity(v, z, t)]:
        assert value.isfinite().all()
    assert v.abs().max() < 20, "training would be ruled by a few rows near an end"
    assert 0.99 <= path.last_time <= 1

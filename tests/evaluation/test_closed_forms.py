"""The exact flow against derivations that share nothing with its formula."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from evaluation.threads import one_thread
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath

PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]
TIMES = [0.0, 0.2, 0.5, 0.83, 0.99]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SINGLE = GaussianMixture(tensor(1.0), tensor(0.7)[:, None], tensor(0.4))
MIXTURE = GaussianMixture(tensor(0.35, 0.65), tensor(-1.2, 0.9)[:, None], tensor(0.3, 0.5))
MEANS = torch.tensor([[-1.0, 0.5], [1.2, 0.3], [0.1, -1.4]]).double()
PLANE = GaussianMixture(tensor(0.2, 0.5, 0.3), MEANS, tensor(0.3, 0.6, 0.4))


def named(path: ProbabilityPath) -> str:
    return type(path).__name__


def posterior_velocity(path: ProbabilityPath, z: float, t: float, source_std: float) -> float:
    """E[v_c | z_t = z] for MIXTURE by quadrature over x0 (or, where sigma is the larger, over x1)."""
    alpha, sigma, alpha_dot, sigma_dot = (float(c) for c in path.at(tensor(t)[0]))
    grid = np.linspace(-16.0, 16.0, 100_001)
    prior = sum(w * norm.pdf(grid, m, s) for w, m, s in ((0.35, -1.2, 0.3), (0.65, 0.9, 0.5)))
    if sigma > alpha:
        x1, x0 = grid, (z - alpha * grid) / sigma
        weight = prior * norm.pdf(x0, 0, source_std)
    else:
        x0, x1 = grid, (z - sigma * grid) / alpha
        weight = norm.pdf(x0, 0, source_std) * sum(
            w * norm.pdf(x1, m, s) for w, m, s in ((0.35, -1.2, 0.3), (0.65, 0.9, 0.5))
        )
    return float((weight * (alpha_dot * x1 + sigma_dot * x0)).sum() / weight.sum())


@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize("source_std", [1.0, 1.7])
def test_velocity_is_the_conditional_expectation(path: ProbabilityPath, source_std: float) -> None:
    flow = ExactFlow(MIXTURE, source_std, path)
    z = torch.linspace(-1.8, 1.8, 5, dtype=torch.float64)
    for t in TIMES:
        expected = tensor(*(posterior_velocity(path, float(x), t, source_std) for x in z))
        assert torch.allclose(flow(z[:, None], tensor(t)[0])[:, 0], expected, rtol=1e-7, atol=1e-7), t


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_velocity_is_the_derivative_of_a_gaussians_flow_map(path: ProbabilityPath) -> None:
    # quantiles move as m alpha + S q: a derivation without conditional expectations
    flow, step = ExactFlow(SINGLE, 1.3, path), 1e-5

    def quantile(t: float, q: Tensor) -> Tensor:
        alpha, sigma, _, _ = path.at(tensor(t))
        return 0.7 * alpha + ((0.4 * alpha) ** 2 + (1.3 * sigma) ** 2).sqrt() * q

    q = torch.linspace(-2, 2, 7, dtype=torch.float64)
    for t in (0.1, 0.4, 0.9):
        slope = (quantile(t + step, q) - quantile(t - step, q)) / (2 * step)
        assert torch.allclose(flow(quantile(t, q)[:, None], tensor(t)[0])[:, 0], slope, atol=1e-7)
        assert torch.allclose(flow.flow_map(quantile(0.1, q)[:, None], 0.1, t)[:, 0], quantile(t, q), atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_density_and_velocity_satisfy_the_continuity_equation(path: ProbabilityPath) -> None:
    flow, step = ExactFlow(PLANE, 0.9, path), 1e-5
    z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def flux(x: Tensor, t: float, dim: int) -> Tensor:
        return flow.log_prob(x, tensor(t)[0]).exp() * flow(x, tensor(t)[0])[:, dim]

    for t in (0.15, 0.5, 0.9):
        rate = flow.log_prob(z, tensor(t + step)[0]).exp() - flow.log_prob(z, tensor(t - step)[0]).exp()
        divergence = sum(flux(z + step * e, t, i) - flux(z - step * e, t, i) for i, e in enumerate(torch.eye(2).double()))
        assert (rate.abs() / (2 * step)).max() > 0.01
        assert ((rate + divergence) / (2 * step)).abs().max() < 1e-7


def test_density_integrates_to_one_and_starts_as_the_source() -> None:
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    flow = ExactFlow(MIXTURE, 1.7, LinearPath())
    for t in (0.0, 0.4, 1.0):
        assert flow.log_prob(grid, tensor(t)[0]).exp().sum().item() * 24 / 20_000 == pytest.approx(1, abs=1e-9)
    source = torch.distributions.Normal(0.0, 1.7).log_prob(grid[:, 0])
    assert torch.allclose(flow.log_prob(grid, tensor(0.0)[0]), source)


def mixture_cdf(z: float, alpha: float, sigma: float) -> float:
    parts = ((0.35, -1.2, 0.3), (0.65, 0.9, 0.5))
    return sum(w * norm.cdf(z, alpha * m, math.hypot(alpha * s, sigma)) for w, m, s in parts)


@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.7), (0.9, 0.1)])
def test_flow_map_carries_quantiles(path: ProbabilityPath, r: float, t: float) -> None:
    z = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)
    (alpha_r, sigma_r), (alpha_t, sigma_t) = ((float(c) for c in path.at(tensor(time)[0])[:2]) for time in (r, t))
    levels = [mixture_cdf(float(q), alpha_r, sigma_r) for q in z]
    expected = [brentq(lambda x, p=p: mixture_cdf(x, alpha_t, sigma_t) - p, -9, 9, xtol=1e-13) for p in levels]
    found = ExactFlow(MIXTURE, 1.0, path).flow_map(z[:, None], r, t)[:, 0]
    assert torch.allclose(found, tensor(*expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_float32_agrees_with_float64_and_both_ends_are_finite(path: ProbabilityPath) -> None:
    flow = ExactFlow(PLANE, 1.0, path)
    z = 2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    for t in (0.0, 0.5, 0.95, 1.0):
        single, double = flow(z, torch.tensor(t)), flow(z.double(), tensor(t)[0])
        assert single.dtype == torch.float32
        assert double.isfinite().all()
        assert torch.allclose(single.double(), double, rtol=2e-3, atol=2e-3)
    assert flow.flow_map(z[:4], 0.0, 1.0).dtype == torch.float32


def test_times_of_each_row_and_states_of_any_shape() -> None:
    flow = ExactFlow(PLANE, 1.0, CosinePath())
    z, t = torch.randn(6, 1, 1, 2).double(), torch.linspace(0, 1, 6, dtype=torch.float64)
    rows = torch.cat([flow(z[i : i + 1], t[i]) for i in range(6)])
    assert torch.allclose(flow(z, t), rows)
    assert rows.shape == z.shape
    assert torch.allclose(flow.log_prob(z, t)[2], flow.log_prob(z[2:3], t[2])[0])


def test_flow_map_leaves_the_thread_count_alone() -> None:
    threads = torch.get_num_threads()
    ExactFlow(MIXTURE, 1.0, LinearPath()).flow_map(torch.zeros(2, 1), 0.0, 0.1)
    assert torch.get_num_threads() == threads

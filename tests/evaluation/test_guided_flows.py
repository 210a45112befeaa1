"""Exact fields with labels, guidance and any source, against second forms: torch's densities, quadrature, scipy."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, distributions

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation import closed_forms
from evaluation.closed_forms import ExactFlow
from evaluation.guided_flows import GuidedFlow
from helpers_cfg import Guidance
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from solvers.runge_kutta import Midpoint

PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
MEANS, STDS, WEIGHTS = [[-1.0, 0.5], [1.0, 1.0], [0.3, -1.0]], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]
CLASSES, S0 = [1, 0, 1], 1.3
Velocity = Callable[[Tensor, Tensor], Tensor]


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(width: float = 1.0) -> GaussianMixture:
    stds = width * numbers(STDS)
    return GaussianMixture(numbers(WEIGHTS), numbers(MEANS), stds, torch.tensor(CLASSES))


def from_score(path: ProbabilityPath, components: list[int], width: float = 1.0) -> Velocity:
    """v = alpha' E[x1 | z] + sigma' E[x0 | z], both from the gradient of torch's own log density of these components."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        p, at = path.at(t), z.detach().requires_grad_()
        std = ((p.alpha * width * numbers(STDS)[components]) ** 2 + (p.sigma * S0) ** 2).sqrt()
        normal = distributions.Normal(p.alpha * numbers(MEANS)[components], std[:, None].expand(-1, 2))
        chance = distributions.Categorical(numbers(WEIGHTS)[components])
        law = distributions.MixtureSameFamily(chance, distributions.Independent(normal, 1))
        score = torch.autograd.grad(law.log_prob(at).sum(), at)[0]
        x0 = -p.sigma * S0**2 * score
        return p.alpha_dot * (z - p.sigma * x0) / p.alpha + p.sigma_dot * x0

    return velocity


def by_label(path: ProbabilityPath, label: Tensor) -> Velocity:
    """The same of each state's own class; label 2 is the null label."""
    kinds = [from_score(path, components) for components in ([1], [0, 2], [0, 1, 2])]

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        each = torch.stack([kind(z, t) for kind in kinds])
        return each[label, torch.arange(len(z))]

    return velocity


def states(count: int = 40, dimensions: int = 2) -> Tensor:
    return 1.5 * torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_path
def test_the_conditional_field_is_that_of_each_class_and_of_all_under_the_null_label(path: ProbabilityPath) -> None:
    flow, z, label = ExactFlow(mixture(), S0, path), states(), torch.arange(40) % 3
    for t in numbers([0.1, 0.5, 0.9]):
        torch.testing.assert_close(flow(z, t, label), by_label(path, label)(z, t), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(flow(z, t, torch.full((40,), 2)), flow(z, t), atol=1e-12, rtol=0)
        torch.testing.assert_close(flow.of_class(1)(z, t), flow(z, t, torch.ones(40).long()), atol=1e-12, rtol=0)


def cfg(path: ProbabilityPath, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> GuidedFlow:
    flow = ExactFlow(mixture(), S0, path)
    of_scale: Any = SimpleNamespace(scale=scale)
    return GuidedFlow(flow, flow, scale, partial(Guidance.extrapolated, of_scale), interval, False)


@every_path
def test_guided_fields_equal_a_second_form(path: ProbabilityPath) -> None:
    z, label = states(), torch.arange(40) % 2
    flow, weak = ExactFlow(mixture(), S0, path), ExactFlow(mixture(2.0), S0, path)
    auto = GuidedFlow(flow, weak, 2.5, lambda a, b: a + 2.5 * (b - a), (0.0, 1.0), False)
    itself = GuidedFlow(flow, flow, 3.0, lambda a, b: a + 3 * (b - a), (0.0, 1.0), True)
    strong, everything = by_label(path, label), from_score(path, [0, 1, 2])
    wide = from_score(path, [0, 1, 2], width=2.0)
    for t in numbers([0.1, 0.5, 0.9]):
        null = everything(z, t)
        expected = null + 3 * (strong(z, t) - null)
        torch.testing.assert_close(cfg(path, 3.0)(z, t, label), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(cfg(path, 1.0)(z, t, label), flow(z, t, label), atol=1e-12, rtol=0)
        expected = wide(z, t) + 2.5 * (null - wide(z, t))
        torch.testing.assert_close(auto(z, t), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(itself(z, t, label), flow(z, t, label), atol=1e-12, rtol=0)
        assert (flow(z, t) - expected).abs().max() > 1e-3, "the weak guide changes nothing here"


@pytest.mark.parametrize(
    ("path", "interval"), [(LinearPath(), (0.0, 1.0)), (CosinePath(), (0.2, 0.7)), (VariancePreservingPath(), (0.3, 1.0))]
)
def test_the_guided_flow_map_is_that_of_scipys_dop853(path: ProbabilityPath, interval: tuple[float, float]) -> None:
    """Along the path itself and by the score, piece by piece; at t = .9, before sigma' of the last path grows."""
    z, label = states(4), torch.tensor([0, 1, 1, 2])
    strong, everything = by_label(path, label), from_score(path, [0, 1, 2])

    def slope(scale: float) -> Callable[[float, np.ndarray], np.ndarray]:
        def of(t: float, y: np.ndarray) -> np.ndarray:
            at, time = torch.from_numpy(y.reshape(4, 2)), numbers(t)
            null = everything(at, time)
            return (null + scale * (strong(at, time) - null)).numpy().ravel()

        return of

    y, start = z.numpy().ravel(), 0.01
    flow = cfg(path, 3.0, interval)
    for low, high, scale in [(start, interval[0], 1.0), (max(start, interval[0]), min(interval[1], 0.9), 3.0),
                             (interval[1], 0.9, 1.0)]:  # fmt: skip
        if low < high:
            y = solve_ivp(slope(scale), (low, high), y, method="DOP853", rtol=1e-7, atol=1e-7).y[:, -1]
    exact = torch.from_numpy(y.reshape(4, 2))
    assert (flow.flow_map(z, start, 0.9, label) - exact).abs().max() < 1e-5
    sampled = Midpoint(80).solve(lambda x, t: flow(x, t, label), z, torch.linspace(start, 0.9, 81, dtype=torch.float64))
    assert (sampled - exact).abs().max() < (1e-3 if interval == (0.0, 1.0) else 2e-2)


@every_path
def test_a_mixture_as_source_equals_quadrature(path: ProbabilityPath) -> None:
    """E[v_c | z] on a line: the trapezoid rule over x1, x0 = (z - alpha x1) / sigma."""
    data = GaussianMixture(numbers([0.3, 0.7]), numbers([[-1.0], [1.5]]), numbers([0.3, 0.6]))
    noise = GaussianMixture(numbers([0.6, 0.3, 0.1]), numbers([[-2.0], [0.5], [3.0]]), numbers([0.4, 0.8, 0.5]))
    x1 = torch.linspace(-8, 8, 6001, dtype=torch.float64)
    for t in numbers([0.3, 0.5, 0.8]):
        p = path.at(t)
        for at in (-1.2, 0.4, 2.0):
            x0 = (at - p.alpha * x1) / p.sigma
            weight = (data.log_prob(x1[:, None]) + noise.log_prob(x0[:, None])).exp()
            expected = (weight * (p.alpha_dot * x1 + p.sigma_dot * x0)).sum() / weight.sum()
            found = ExactFlow(data, noise, path)(numbers([[at]]), t)
            assert abs(found.item() - expected.item()) < 1e-8 * max(1, abs(expected.item()))
            density = ExactFlow(data, noise, path).log_prob(numbers([[at]]), t).exp()
            assert density.item() == pytest.approx((weight.sum() * (x1[1] - x1[0]) / p.sigma).item(), rel=1e-8)


@every_path
def test_many_dimensions_keep_the_continuity_equation(path: ProbabilityPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """d log p / dt + v . grad log p + div v = 0 in 64 dimensions, between two mixtures; products equal differences."""
    g = torch.Generator().manual_seed(1)
    points = [torch.randn(count, 64, generator=g, dtype=torch.float64) for count in (3, 2)]
    data, noise = (GaussianMixture(numbers([*range(1, 1 + len(m))]) / sum(range(1, 1 + len(m))), m,
                                   numbers([0.5, 0.8, 0.3][: len(m)])) for m in points)  # fmt: skip
    flow, z, t = ExactFlow(data, noise, path), states(3, 64).requires_grad_(), numbers(0.4).requires_grad_()
    v, density = flow(z, t), flow.log_prob(z, t)
    slope, in_time = torch.autograd.grad(density.sum(), (z, t), retain_graph=True)
    divergence = sum(torch.autograd.grad(v[:, k].sum(), z, retain_graph=True)[0][:, k] for k in range(64))
    change = (v * slope).sum(1) + divergence
    assert abs(in_time + change.sum()) < 1e-8 * change.abs().sum()
    wide = v.detach()
    monkeypatch.setattr(closed_forms, "WIDE", 100)
    torch.testing.assert_close(flow(z, t).detach(), wide, atol=1e-10, rtol=1e-10)


def test_wide_states_are_carried_in_the_span_of_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in all of their dimensions: with labels, from a mixture, under guidance by wider components."""
    g = torch.Generator().manual_seed(2)
    centre, spread = (torch.randn(count, 20, generator=g, dtype=torch.float64) for count in (3, 2))
    data = GaussianMixture(numbers(WEIGHTS), centre, numbers(STDS), torch.tensor(CLASSES))
    wide = GaussianMixture(data.weights, 0.5 * data.means.flip(1), 2 * data.stds)
    noise = GaussianMixture(numbers([0.4, 0.6]), spread, numbers([1.0, 0.7]))
    flow, weak = (ExactFlow(law, noise, CosinePath()) for law in (data, wide))
    guided_flow = GuidedFlow(flow, weak, 1.5, lambda a, b: a + 1.5 * (b - a), (0.0, 1.0), False)
    z, label = states(3, 20).reshape(3, 2, 10), torch.tensor([0, 1, 2])
    found = [each.flow_map(z, 0.3, 0.7, label) for each in (flow, guided_flow)]
    monkeypatch.setattr(closed_forms, "WIDE", 100)
    for quick, each in zip(found, (flow, guided_flow), strict=True):
        torch.testing.assert_close(quick, each.flow_map(z, 0.3, 0.7, label), atol=1e-7, rtol=0)

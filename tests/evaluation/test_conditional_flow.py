"""The exact flow beside a condition, against the same law written down another way."""

import pytest
import torch
from torch import Tensor

from common.seeds import generator_for
from dataloaders.gaussian_mixture import ConditionalMixture
from evaluation.conditional_flow import ConditionalFlow
from losses.paths import CosinePath, LinearPath, ProbabilityPath
from models.inputs import join_condition
from solvers.dopri5 import Dopri5

K, D, SLOPE, SOURCE = 3, 2, 0.7, 0.8
DRAW = torch.Generator().manual_seed(0)
LAW = ConditionalMixture(
    torch.tensor([0.5, 0.2, 0.3]), 2 * torch.randn(K, D, generator=DRAW), torch.tensor([0.3, 0.2, 0.5]),
    torch.randn(K, D, generator=DRAW), torch.tensor([0.6, 0.9, 0.4]), SLOPE,
).to(dtype=torch.float64)  # fmt: skip


def densities(x: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """N(x; m_k, s_k^2 I) (B, K), means (B or 1, K, D)."""
    normal = torch.distributions.Normal(means, stds[:, None])
    return normal.log_prob(x[:, None]).sum(-1).exp()


def given(y: Tensor) -> tuple[Tensor, Tensor]:
    """p(k | y) (B, K), and the means of x (B, K, D), by Bayes."""
    joint = LAW.weights * densities(y, LAW.condition_means[None], LAW.condition_stds)
    return joint / joint.sum(1, keepdim=True), LAW.means + SLOPE * (y[:, None] - LAW.condition_means)


def expected_velocity(z: Tensor, t: float, y: Tensor, path: ProbabilityPath) -> Tensor:
    """alpha' E[x1 | z, y] + sigma' E[x0 | z, y], component by component."""
    chance, mean = given(y)
    alpha, sigma, alpha_dot, sigma_dot = (float(part) for part in path.at(torch.tensor(t, dtype=torch.float64)))
    variance = (alpha * LAW.stds).square() + (sigma * SOURCE) ** 2
    posterior = chance * densities(z, alpha * mean, variance.sqrt())
    posterior = posterior / posterior.sum(1, keepdim=True)
    offset = (z[:, None] - alpha * mean) / variance[:, None]
    x1 = mean + (alpha * LAW.stds.square())[:, None] * offset
    x0 = sigma * SOURCE**2 * offset
    return (posterior[:, :, None] * (alpha_dot * x1 + sigma_dot * x0)).sum(1)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
def test_velocity_density_and_map_are_those_of_the_law_given_y(path: ProbabilityPath) -> None:
    flow, generator = ConditionalFlow(LAW, SOURCE, path), generator_for(0, "test")
    x, label = flow.data(40, generator)
    x, y = x.double(), label[:, 2:].double()
    z = torch.randn(40, D, generator=generator, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        assert torch.allclose(flow(z, torch.tensor(t), label), expected_velocity(z, t, y, path), atol=1e-6)
    chance, mean = given(y)
    log_prob = (chance * densities(x, mean, LAW.stds)).sum(1).log()
    assert torch.allclose(flow.end_log_prob(x, label, lambda x: x), log_prob, atol=1e-6)
    times = torch.tensor([0.0, path.last_time])
    walked = Dopri5(rtol=1e-7, atol=1e-7).solve(lambda z, t: flow(z, t, label), z, times)
    assert torch.allclose(flow.flow_map(z, 0.0, path.last_time, label), walked, atol=1e-4)


def test_a_hidden_condition_and_none_lead_to_all_data() -> None:
    flow, z = ConditionalFlow(LAW, SOURCE, LinearPath()), torch.randn(6, D, dtype=torch.float64)
    label = join_condition(None, torch.randn(6, D))
    label[3:, 1:] = 0
    every, own = flow(z, torch.tensor(0.4)), flow(z, torch.tensor(0.4), label)
    assert torch.equal(every[3:], own[3:]) and not torch.allclose(every[:3], own[:3])
    every, own = flow.flow_map(z, 0.0, 1.0), flow.flow_map(z, 0.0, 1.0, label)
    assert torch.allclose(every[3:], own[3:], atol=1e-8) and not torch.allclose(every[:3], own[:3])


def test_draws_have_the_moments_of_the_marginal() -> None:
    x, y = LAW.sample(100_000, generator_for(0, "test"))
    law = LAW.marginal
    mean = (law.weights[:, None] * law.means).sum(0)
    second = (law.weights[:, None] * (law.means.square() + law.stds.square()[:, None])).sum(0)
    assert torch.allclose(x.double().mean(0), mean, atol=0.03)
    assert torch.allclose(x.double().square().mean(0), second, rtol=0.03)
    assert torch.allclose(y.double().mean(0), (LAW.weights[:, None] * LAW.condition_means).sum(0), atol=0.02)

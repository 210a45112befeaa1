"""Stochastic samplers on exact fields: marginals as the flow's own at every time, and weak order 2."""

import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from evaluation.metrics.energy_distance import energy_distance
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from solvers.base_solver import FreshNoise
from solvers.sde import Diffusion, InteriorDiffusion, SDESolver, SigmaDiffusion, SquaredDiffusion

MIXTURE = GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2, 0.5], [0.9, -0.3]]), torch.tensor([0.4, 0.6]))
STD = 1.3  # of the source
DIFFUSIONS = [SigmaDiffusion(), SquaredDiffusion(2.0), InteriorDiffusion(1.5)]
COUNT, STEPS = 100_000, 48


class Follows:
    """Stands for an objective: the exact flow of the mixture."""

    learns, learns_velocity = "velocity", True

    def __init__(self, path: ProbabilityPath, mixture: GaussianMixture = MIXTURE):
        self.path, self.flow = path, ExactFlow(mixture, STD, path)

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.flow(x, t)


def noise(generator: torch.Generator, count: int = COUNT) -> Tensor:
    return STD * torch.randn(count, 2, generator=generator)


def fresh(generator: torch.Generator) -> FreshNoise:
    return lambda k: noise(generator)


def at(path: ProbabilityPath, t: float) -> GaussianMixture:
    """The marginal at a time."""
    p = path.at(torch.tensor(t))
    return GaussianMixture(
        MIXTURE.weights, p.alpha * MIXTURE.means, ((p.alpha * MIXTURE.stds) ** 2 + (p.sigma * STD) ** 2).sqrt()
    )


def moments(x: Tensor) -> Tensor:
    """What mean and covariance are means of: (N, 5)."""
    return torch.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], dim=1).double()


def expected(mixture: GaussianMixture) -> Tensor:
    m, w = mixture.means.double(), mixture.weights.double()
    each = moments(m)
    each[:, 2:4] += mixture.stds.double()[:, None].square()
    return w @ each


@pytest.mark.parametrize(
    "path, diffusion",
    [*((LinearPath(), diffusion) for diffusion in DIFFUSIONS), (CosinePath(), SigmaDiffusion())],
    ids=lambda part: type(part).__name__,
)
def test_marginals_are_those_of_the_flow_at_every_time(path: ProbabilityPath, diffusion: Diffusion) -> None:
    """Mean and covariance within their joint error of the closed form, energy distance within its own."""
    seen: dict[float, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    solver = SDESolver(STEPS, None, diffusion)
    solver.sample(Follows(path), noise(generator), None, fresh(generator), lambda x, t: seen.update({round(float(t), 3): x}))
    assert solver.evaluations == solver.evaluations_ahead == 2 * STEPS
    for t in (0.25, 0.5, 0.75, 1.0):
        values, marginal = moments(seen[t]), at(path, t)
        off = values.mean(0) - expected(marginal)
        statistic = off @ torch.linalg.solve(torch.cov(values.T) / COUNT, off)
        assert chi2.sf(float(statistic), 5) > 1e-3
        real = marginal.sample(2000, torch.Generator().manual_seed(1))[0]
        again = [marginal.sample(2000, torch.Generator().manual_seed(seed))[0] for seed in range(2, 10)]
        floor = torch.tensor([energy_distance(other, real) for other in again])
        assert abs(energy_distance(seen[t][:2000], real) - floor.mean()) < 3 * (1 + 1 / 8) ** 0.5 * floor.std()


def test_a_wrong_score_or_noise_shows() -> None:
    """Without the score's part the variance grows; with half of the noise it shrinks."""

    class NoScore(SDESolver):
        def drift(self, flow, x, t, label):
            return flow.velocity(x, t, label)

    class LessNoise(SDESolver):
        def size(self, flow, ends):
            return 0.5 * super().size(flow, ends)

    generator, truth = torch.Generator().manual_seed(0), expected(at(LinearPath(), 1.0))
    for solver, sign in ((NoScore(16), 1), (LessNoise(16), -1)):
        drawn = lambda k: noise(generator, 4000)  # noqa: E731
        x = solver.sample(Follows(LinearPath()), noise(generator, 4000), None, drawn)
        assert sign * float((moments(x).mean(0) - truth)[2:4].sum()) > 0.1


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: type(d).__name__)
def test_weak_order_two(diffusion: Diffusion) -> None:
    """On one Gaussian the variance after N steps is known: the same map of variances, in closed form, step by step."""
    path, std = LinearPath(), 0.4
    flow = Follows(path, GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([std])))

    def variance(steps: int) -> float:
        """Every step is x -> a x + b noise: found from its answers to x = 1 without noise, and x = 0 with noise 1."""
        solver, value = SDESolver(steps, None, diffusion), STD**2
        times = solver.times(torch.zeros(1, dtype=torch.float64))
        one, nothing = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
        for k in range(steps):
            a = float(solver.step(flow, one, times, k, None, lambda _: nothing)[0, 0])
            b = float(solver.step(flow, nothing, times, k, None, lambda _: one)[0, 0])
            value = a * a * value + b * b * STD**2
        return value

    errors = [abs(variance(steps) - std**2) for steps in (64, 128)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15


def test_the_variance_preserving_path_ends_finite_and_near_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda k: noise(generator, 4000)  # noqa: E731
    x = SDESolver(64, None, SquaredDiffusion()).sample(Follows(VariancePreservingPath()), noise(generator, 4000), None, draw)
    assert (moments(x).mean(0) - expected(MIXTURE)).abs().max() < 0.1


def test_another_source_than_gaussian_noise_is_refused(small_run) -> None:
    from common.errors import UserError

    with pytest.raises(UserError, match="is no centred Gaussian"):
        small_run("x", "solver=sde", "source=moons", "max_steps=1")

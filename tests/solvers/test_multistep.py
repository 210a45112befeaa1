"""Multistep solvers: measured orders on exact fields, one evaluation a step, walked grids of uneven steps."""

import math

import pytest
import torch
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from losses.paths import CosinePath, LinearPath, ProbabilityPath
from solvers.multistep import AdamsBashforth, DPMSolver2M
from solvers.runge_kutta import Euler
from solvers.time_grids import PowerGrid, ShiftedGrid, TimeGrid, UniformGrid

MIXTURE = GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2, 0.5], [0.9, -0.3]]), torch.tensor([0.4, 0.6]))


class Follows:
    """Stands for an objective: the exact flow of the mixture."""

    learns, learns_velocity = "velocity", True

    def __init__(self, path: ProbabilityPath):
        self.path, self.flow = path, ExactFlow(MIXTURE, 1.0, path)

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.flow(x, t)


def start() -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def order(errors: list[float]) -> float:
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    "grid", [UniformGrid(), PowerGrid(1.5, "data"), ShiftedGrid(3.0)], ids=["uniform", "dense", "shifted"]
)
def test_adams_bashforth_is_of_order_two(grid: TimeGrid) -> None:
    flow, x = Follows(LinearPath()), start()
    truth, errors = flow.flow.flow_map(x, 0.0, 1.0), []
    for steps in (160, 320):
        solver = AdamsBashforth(steps, grid)
        errors.append(float((solver.solve(flow.velocity, x) - truth).square().mean().sqrt()))
        assert solver.evaluations == solver.evaluations_ahead == steps
    assert abs(order(errors) - 2) < 0.1


def test_adams_bashforth_is_exact_for_slopes_linear_in_time_whatever_its_steps() -> None:
    times = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.0], dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    end = AdamsBashforth(4).solve(lambda x, t: (1 + 2 * t) * torch.ones_like(x), x, times)
    assert end.item() == pytest.approx(0.1 + (1 + 1) - (0.1 + 0.1**2), abs=1e-12)  # Euler's step, then the integral


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_dpm_solver_2m_is_of_order_two_between_the_ends(path: ProbabilityPath) -> None:
    """On t in [.05, .95], uniform in the log-ratio of signal and noise; the last step is of lower order."""
    flow, x = Follows(path), start()
    truth, errors = flow.flow.flow_map(x, 0.05, 0.95), []
    p = path.at(torch.tensor([0.05, 0.95], dtype=torch.float64))
    ends, clock = (p.alpha / p.sigma).log(), torch.linspace(0, 1, 20_001, dtype=torch.float64)
    table = path.at(clock)
    for steps in (160, 320):
        ratios = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64).exp()
        signal = ratios / (1 + ratios)  # alpha / (alpha + sigma), which is t on the linear path
        known = table.alpha / (table.alpha + table.sigma)
        times = signal if isinstance(path, LinearPath) else inverse(signal, known, clock)
        solver = DPMSolver2M(steps)
        errors.append(float((solver.walk(flow, x, times, None, lambda k: x) - truth).square().mean().sqrt()))
        assert solver.evaluations == steps
    assert abs(order(errors) - 2) < 0.1


def inverse(values: Tensor, known: Tensor, clock: Tensor) -> Tensor:
    """The times at which a rising function known at the clock has these values."""
    import numpy as np

    return torch.from_numpy(np.interp(values.numpy(), known.numpy(), clock.numpy()))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_dpm_solver_2m_ends_finite_and_nearer_than_euler(steps: int) -> None:
    """From t = 0, where alpha is 0, to t = 1, where sigma is; one step jumps to the mean of the data."""
    flow, x = Follows(LinearPath()), start()
    reached, truth = DPMSolver2M(steps).sample(flow, x, None, lambda k: x), flow.flow.flow_map(x, 0.0, 1.0)
    if steps == 1:
        torch.testing.assert_close(reached, (MIXTURE.weights @ MIXTURE.means).double().expand(64, 2), atol=1e-6, rtol=1e-6)
    errors = [float((end - truth).square().mean()) for end in (reached, Euler(steps).solve(flow.velocity, x))]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_a_shifted_grid_is_that_of_the_paper_in_our_time() -> None:
    """Esser et al. 2024, eq. 23, in their time, 1 - t: s u / (1 + (s - 1) u)."""
    u = 1 - UniformGrid().times(10)
    torch.testing.assert_close(ShiftedGrid(3.0).times(10), 1 - 3 * u / (1 + 2 * u))
    torch.testing.assert_close(ShiftedGrid(1.0).times(7), UniformGrid().times(7))

"""Every solver and grid against closed forms. A new fixed-step solver joins FIXED_STEP, a new grid joins GRIDS."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from losses.paths import LinearPath
from solvers.base_solver import BaseSolver, Field
from solvers.dopri5 import Dopri5
from solvers.likelihood import encode
from solvers.runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta
from solvers.time_grids import PowerGrid, ShiftedGrid, TimeGrid, UniformGrid

FIXED_STEP: list[tuple[type[RungeKutta], int]] = [(Euler, 1), (Midpoint, 2), (Heun, 2), (RK4, 4)]  # solver, order
SOLVERS: list[type[BaseSolver]] = [*(solver for solver, _ in FIXED_STEP), Dopri5]
POWERS = [PowerGrid(2.0, "data"), PowerGrid(2.0, "noise"), PowerGrid(1.5, "data")]
GRIDS: list[TimeGrid] = [UniformGrid(), *POWERS, ShiftedGrid()]
CONFIGS = Path(__file__).parents[2] / "configs"
# The h^2 error of midpoint cancels over [0, 1] for one Gaussian; on mixtures it is 2.
SUPERCONVERGENT: dict[tuple[type[RungeKutta], str], int] = {(Midpoint, "gaussian"): 3}
FORWARDS, BACKWARDS = (0.0, 1.0), (1.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """dx/dt = field(x, t), whose path from x at r is at exact(x, r, t) at time t."""

    name: str
    field: Field
    exact: Callable[[Tensor, float, float], Tensor]


ROTATION = torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=torch.float64)


def gaussian_velocity(z: Tensor, t: Tensor, m: float = 0.7, s: float = 0.4) -> Tensor:
    """The exact velocity of the linear path from N(0, 1) to N(m, s^2)."""
    variance = (1 - t) ** 2 + (t * s) ** 2
    return m + (t * s**2 - (1 - t)) / variance * (z - t * m)


def gaussian_flow_map(z: Tensor, r: float, t: float, m: float = 0.7, s: float = 0.4) -> Tensor:
    """Where that velocity carries z from time r to time t."""
    return t * m + math.hypot(1 - t, t * s) / math.hypot(1 - r, r * s) * (z - r * m)


LINEAR = Problem(
    "linear", lambda x, t: x @ ROTATION.T.to(x), lambda x, r, t: x @ torch.linalg.matrix_exp(ROTATION * (t - r)).T.to(x)
)
FORCED = Problem(  # depends on the time and on the state, so that a node at the wrong time shows
    "forced",
    lambda x, t: 3 * t**2 * x + t * torch.exp(t**3),
    lambda x, r, t: math.exp(t**3) * (x * math.exp(-(r**3)) + (t**2 - r**2) / 2),
)
GAUSSIAN = Problem("gaussian", gaussian_velocity, gaussian_flow_map)
PROBLEMS = [LINEAR, FORCED, GAUSSIAN]


def points(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def final_error(solver: BaseSolver, problem: Problem, ends: tuple[float, float]) -> float:
    """Root mean square distance from the truth, walking the solver's own grid from ends[0] to ends[1]."""
    x = points(8, 2)
    grid = solver.times(x)
    reached = solver.solve(problem.field, x, grid if ends == FORWARDS else grid.flip(0))
    return float((reached - problem.exact(x, *ends)).square().mean().sqrt())


@pytest.mark.parametrize("ends", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("grid", [UniformGrid(), PowerGrid(1.5, "data")], ids=["uniform", "dense"])
@pytest.mark.parametrize("solver, order", FIXED_STEP)
def test_order_of_convergence(
    solver: type[RungeKutta], order: int, grid: TimeGrid, problem: Problem, ends: tuple[float, float]
) -> None:
    coarse, fine = (final_error(solver(steps, grid), problem, ends) for steps in (160, 320))
    expected = SUPERCONVERGENT.get((solver, problem.name), order)
    assert abs(math.log2(coarse / fine) - expected) < 0.15


@pytest.mark.parametrize("solver, order", FIXED_STEP)
def test_tableau_is_consistent_and_explicit(solver: type[RungeKutta], order: int) -> None:
    nodes, matrix, weights = solver().tableau
    assert math.isclose(sum(weights), 1.0)
    assert len(nodes) == len(matrix) == len(weights)
    for stage, (node, row) in enumerate(zip(nodes, matrix, strict=True)):
        assert len(row) == stage
        assert math.isclose(sum(row), node)
    assert order == 1 or math.isclose(sum(w * c for w, c in zip(weights, nodes, strict=True)), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_euler_step_on_a_unit_slope_ends_at_exactly_one(dtype: torch.dtype) -> None:
    reached = Euler(1).solve(lambda x, t: torch.ones_like(x), torch.zeros(3, 1, dtype=dtype))
    assert reached.dtype == dtype
    assert reached.tolist() == [[1.0]] * 3


@settings(max_examples=40, deadline=None)
@given(
    solver=st.sampled_from([solver for solver, _ in FIXED_STEP]),
    steps=st.integers(1, 60),
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    backwards=st.booleans(),
)
def test_evaluations_are_stages_times_steps_and_stay_inside(
    solver: type[RungeKutta], steps: int, grid: TimeGrid, dtype: torch.dtype, backwards: bool
) -> None:
    asked: list[Tensor] = []
    walker, x = solver(steps, grid), torch.zeros(2, 3, dtype=dtype)

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return torch.ones_like(x)

    for _ in range(2):  # the count starts anew with each solve
        asked.clear()
        times = walker.times(x)
        reached = walker.solve(field, x, times.flip(0) if backwards else times)
        assert len(asked) == walker.evaluations == steps * len(walker.tableau.weights)
    assert all(t.ndim == 0 and t.dtype == dtype and 0 <= t <= 1 for t in asked)
    assert torch.allclose(reached, torch.full_like(x, -1.0 if backwards else 1.0), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-5)])
@pytest.mark.parametrize("ends", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_dopri5_agrees_with_the_truth(
    problem: Problem, ends: tuple[float, float], dtype: torch.dtype, tolerance: float
) -> None:
    x = points(8, 2, dtype=dtype)
    reached = Dopri5().solve(problem.field, x, torch.tensor(ends))
    assert reached.dtype == dtype
    assert (reached - problem.exact(x, *ends)).abs().max() < tolerance


@pytest.mark.parametrize("slope", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("ends", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
def test_dopri5_counts_and_never_asks_past_the_ends(ends: tuple[float, float], slope: float) -> None:
    asked: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.full_like(x, slope) + 0.01 * slope * torch.cos(5 * t)

    solver = Dopri5()
    for _ in range(2):
        asked.clear()
        solver.solve(field, points(4, 2), torch.tensor(ends))
        assert solver.evaluations == len(asked) > 0
    assert min(asked) >= 0.0
    assert max(asked) <= 1.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_callback_sees_every_grid_point_of_the_path(solver: type[BaseSolver]) -> None:
    walker, seen = solver(steps=40), []
    x = points(5, 1)
    reached = walker.solve(gaussian_velocity, x, callback=lambda x, t: seen.append((x.clone(), t)))
    assert [float(t) for _, t in seen] == [step / 40 for step in range(41)]
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[-1][0], reached)
    for state, t in seen:
        assert (state - gaussian_flow_map(x, 0.0, float(t))).abs().max() < (0.05 if solver is Euler else 2e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_times_replace_the_grid(solver: type[BaseSolver]) -> None:
    times = torch.cat([torch.linspace(0.2, 0.5, 60), torch.linspace(0.5, 0.7, 30)[1:]])
    seen: list[Tensor] = []
    x = points(4, 1)
    reached = solver(steps=1).solve(gaussian_velocity, x, times, callback=lambda x, t: seen.append(t))
    assert torch.equal(torch.stack(seen).float(), times)
    assert (reached - gaussian_flow_map(x, 0.2, 0.7)).abs().max() < (0.02 if solver is Euler else 1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_there_and_back_again(solver: type[BaseSolver]) -> None:
    walker, x = solver(steps=100), points(16, 2)
    there = walker.solve(gaussian_velocity, x)
    assert (there - x).abs().max() > 0.5
    assert (encode(gaussian_velocity, there, walker) - x).abs().max() < (0.15 if solver is Euler else 2e-3)


@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 4, 4), (2, 5, 1, 2, 3)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_of_any_shape_move_as_their_entries_do(solver: type[BaseSolver], shape: tuple[int, ...]) -> None:
    x = points(*shape)
    reached = solver().solve(gaussian_velocity, x)
    assert reached.shape == x.shape
    alone = solver().solve(gaussian_velocity, x.reshape(-1, 1)).reshape(shape)
    assert torch.allclose(reached, alone, atol=1e-12)


def test_standard_deviation_at_fifty_evaluations() -> None:
    """From N(0, 1) to N(0.7, 0.4^2): the map is affine, so its slope is the exact standard deviation it generates."""
    allowed = {Euler(50): 1.5e-2, Midpoint(25): 2e-5, Heun(25): 6e-4, RK4(12): 1e-6, Dopri5(): 5e-6}
    for solver, bound in allowed.items():
        low, high = solver.solve(gaussian_velocity, torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        assert abs(float(high - low) - 0.4) < bound, type(solver).__name__
        assert 45 <= solver.evaluations <= 65


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 120), power=st.floats(1.0, 5.0), dense=st.sampled_from(["noise", "data"]))
def test_power_grid_rises_from_zero_to_one_and_is_dense_where_asked(
    steps: int, power: float, dense: Literal["noise", "data"]
) -> None:
    times = PowerGrid(power, dense).times(steps)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    lengths = times.diff()
    assert (lengths > 0).all()
    growth = lengths.diff() if dense == "noise" else -lengths.diff()
    assert (growth >= -1e-12).all()


def test_power_grid_is_the_power_and_its_mirror() -> None:
    assert torch.allclose(PowerGrid(2.0, "noise").times(2), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.allclose(PowerGrid(2.0, "data").times(2), torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64))
    assert torch.equal(PowerGrid(1.0).times(4), UniformGrid().times(4).flip(0).neg().add(1))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: Euler(0),
        lambda: Midpoint(-3),
        lambda: RK4(2.5),  # type: ignore[arg-type]
        lambda: Dopri5(steps=0),
        lambda: Euler(4000, PowerGrid(3.0)).times(torch.zeros(1)),  # equal times in float32
    ],
)
def test_mistakes_are_one_sentence(mistake: Callable[[], object]) -> None:
    with pytest.raises(UserError) as error:
        mistake()
    assert "\n" not in str(error.value)


class GaussianFlow:
    """Stands for an objective: the exact velocity and the exact flow map."""

    learns, learns_velocity, path = "flow_map", True, LinearPath()

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return gaussian_velocity(x, t)

    def flow_map(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return gaussian_flow_map(x, float(r), float(t))


@pytest.mark.parametrize("choice", sorted(p.stem for p in (CONFIGS / "solver").glob("*.yaml") if "grid" in p.read_text()))
@pytest.mark.parametrize("grid, kind", [("uniform", UniformGrid), ("dense", PowerGrid), ("shifted", ShiftedGrid)])
def test_every_config_builds_a_solver(choice: str, grid: str, kind: type[TimeGrid]) -> None:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(overrides=[f"+solver={choice}", f"solver/grid={grid}", "solver.steps=7"])
    solver = instantiate(config.solver)
    assert type(solver).__name__.lower().removesuffix("solver") == choice.replace("_", "")
    assert isinstance(solver.grid, kind)
    assert solver.times(torch.zeros(1)).shape == (8,)
    carried = solver.sample(GaussianFlow(), points(2, 1), None, lambda k: 0 * points(2, 1))
    assert choice == "sde" or (carried - gaussian_flow_map(points(2, 1), 0, 1)).abs().max() < 0.3


def test_gradients_flow_through_a_solve() -> None:
    x = points(3, 1).requires_grad_()
    (slope,) = torch.autograd.grad(RK4(12).solve(gaussian_velocity, x).sum(), x)
    assert torch.allclose(slope, torch.full_like(slope, 0.4), atol=1e-5)


@pytest.mark.parametrize("solver, order", FIXED_STEP)
def test_fixed_steps_never_wait_for_the_device(solver: type[RungeKutta], order: int) -> None:
    """A meta tensor has no values, so reading one on the host would raise."""
    times: list[Tensor] = []
    x = torch.empty(2, 3, device="meta")
    reached = solver(5).solve(lambda x, t: t * x, x, callback=lambda x, t: times.append(t))
    assert reached.shape == (2, 3)
    assert {(t.device.type, t.ndim) for t in times} == {("meta", 0)}

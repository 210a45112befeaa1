"""Sampling by flow maps against the exact map of a Gaussian with m != 0 and s != 1."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.sources import GaussianSource
from evaluation.generate import CHUNK, few_steps, fixed_noise, fresh_noise, generate
from evaluation.sample import TrainedModel, load
from losses.couplings import IndependentCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowObjective
from losses.paths import CosinePath, LinearPath, ProbabilityPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from solvers.base_solver import Sampler
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import Euler, Midpoint
from solvers.time_grids import PowerGrid, TimeGrid, UniformGrid

M, S = 0.7, 0.4
NAMES = ("coupling", "time_sampler", "prediction", "weighting")


class ExactGaussian(VelocityModel):
    """u(z, r, t) of the flow from N(0, 1) to N(m + label, s^2) along a path; at r = t a narrow difference quotient."""

    num_classes = 3

    def __init__(self, path: ProbabilityPath):
        super().__init__()
        self.path = path
        self.asked: list[tuple[float, float]] = []

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input.double())
        r, t = times[:, :1], times[:, 1:]
        self.asked.append((float(r[0]), float(t[0])))
        mean = M + (torch.zeros(len(z)) if label is None else label)[:, None].double()
        step = torch.where(t > r, t - r, 1e-7)
        return ((self.carried(z, r, r + step, mean) - z) / step).float()

    def carried(self, z: Tensor, r: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """X(z, r, t) = alpha_t m + S(t) / S(r) (z - alpha_r m)."""
        a, b = self.path.at(r), self.path.at(t)
        before, after = ((p.alpha * S).square() + p.sigma.square() for p in (a, b))
        return b.alpha * mean + (after / before).sqrt() * (z - a.alpha * mean)


def objective(
    kind: type[FlowObjective] = MeanFlowLoss, path: ProbabilityPath | None = None, **settings: Any
) -> FlowObjective:
    path = path or LinearPath()
    parts = (IndependentCoupling(), UniformTimes(), VelocityPrediction(), UniformWeighting())
    return kind(network=ExactGaussian(path), path=path, **dict(zip(NAMES, parts, strict=True)), **settings).eval()


def normal(count: int, seed: int = 0) -> Tensor:
    return fixed_noise(GaussianSource([1]), count, seed)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("grid", [UniformGrid(), PowerGrid(2.0, "data")], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_exact_map_ends_at_the_truth_in_any_number_of_steps(steps: int, grid: TimeGrid, path: ProbabilityPath) -> None:
    flow, solver, x0 = objective(path=path), FlowMapSolver(steps, grid), normal(50)
    samples = generate(flow, solver, x0, None)
    torch.testing.assert_close(samples, M + S * x0, atol=1e-5, rtol=0)
    times = solver.times(x0).tolist()
    assert isinstance(flow.network, ExactGaussian)
    assert flow.network.asked == list(pairwise(times))
    assert solver.evaluations == steps


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [2, 4])
def test_renoising_the_exact_map_keeps_the_distribution_and_forgets_the_start(steps: int, path: ProbabilityPath) -> None:
    """Reusing x0 instead of fresh noise, or another time than the grid's, would give another standard deviation."""
    flow, solver, x0 = objective(path=path), FlowMapSolver(steps, renoise=True), normal(100_000)
    samples = generate(flow, solver, x0, None, fresh_noise(GaussianSource([1]), 0))
    assert float(samples.mean()) == pytest.approx(M, abs=0.005)
    assert float(samples.std()) == pytest.approx(S, abs=0.004)
    kept = 1.0  # corr(x0, sample): from step to step the share of the state at t that is data, alpha_t s / S(t)
    for t in solver.times(x0)[1:-1]:
        p = path.at(t)
        kept *= float(p.alpha * S / ((p.alpha * S) ** 2 + p.sigma**2).sqrt())
    assert float(torch.corrcoef(torch.cat([x0, samples], 1).T)[0, 1]) == pytest.approx(kept, abs=0.01)
    assert solver.evaluations == steps
    assert isinstance(flow.network, ExactGaussian) and {t for _, t in flow.network.asked} == {1.0}


def test_one_step_needs_no_fresh_noise() -> None:
    flow, x0 = objective(), normal(9)
    assert torch.equal(generate(flow, FlowMapSolver(1, renoise=True), x0, None), generate(flow, FlowMapSolver(1), x0, None))


def test_fresh_noise_depends_on_seed_step_and_sample_alone() -> None:
    fresh = fresh_noise(GaussianSource([1]), 0)
    whole = fresh(1, 0, 900)
    assert torch.equal(fresh(1, 300, 411), whole[300:711])
    draws = [whole, fresh(2, 0, 900), fresh_noise(GaussianSource([1]), 1)(1, 0, 900), normal(900)]
    for i, one in enumerate(draws):
        assert all(not torch.isclose(one, other).any() for other in draws[:i])
    flow, many = objective(), CHUNK + 700
    solver = FlowMapSolver(3, renoise=True)
    long = generate(flow, solver, normal(many), None, fresh)
    torch.testing.assert_close(long[:300], generate(flow, solver, normal(300), None, fresh))
    assert len(torch.unique(long)) > 0.99 * many


def test_labels_reach_every_chunk_of_either_kind_of_solver() -> None:
    count = CHUNK + 50
    label, x0 = torch.arange(count) % 3, normal(count)
    expected = M + label[:, None] + S * x0
    solvers: list[Sampler] = [FlowMapSolver(2), Midpoint(40)]
    for solver in solvers:
        torch.testing.assert_close(generate(objective(), solver, x0, label), expected, atol=5e-3, rtol=0)


def test_few_steps_are_maps_where_maps_are_learned_and_euler_elsewhere() -> None:
    x0 = normal(20)
    torch.testing.assert_close(few_steps(objective(), x0, None, 1), M + S * x0, atol=1e-5, rtol=0)
    instant = objective(FlowMatchingLoss, second_time="state")
    once = few_steps(instant, x0, None, 1)  # v(z, 0) = m - z: one Euler step ends at m, wherever it began
    torch.testing.assert_close(once, torch.full_like(x0, M), atol=1e-5, rtol=0)
    assert isinstance(instant.network, ExactGaussian)
    instant.network.asked.clear()
    few_steps(instant, x0, None, 4)
    assert [r for r, _ in instant.network.asked] == [0, 0.25, 0.5, 0.75]
    torch.testing.assert_close(few_steps(instant, x0, None, 4), Euler(4).solve(lambda x, t: instant.velocity(x, t), x0))


def test_what_has_no_flow_map_is_said_in_one_sentence() -> None:
    with pytest.raises(UserError, match="only the velocity at an instant"):
        generate(objective(FlowMatchingLoss), FlowMapSolver(), normal(3), None)
    model = TrainedModel(objective(FlowMatchingLoss), {}, torch.device("cpu"), step=0)
    for ask in (model, model.flow_map):
        with pytest.raises(UserError, match="only the velocity at an instant"):
            ask(normal(3), r=0, t=1)


class ToData(MeanFlowLoss):
    learns = "endpoint_map"


class Generator(MeanFlowLoss):
    learns, marginals_only = "generator", True


def test_what_learns_maps_to_data_alone_is_sampled_and_asked_for_nothing_else() -> None:
    x0, fresh = normal(20_000), fresh_noise(GaussianSource([1]), 0)
    for kind in (ToData, Generator):
        torch.testing.assert_close(generate(objective(kind), FlowMapSolver(1), x0, None), M + S * x0, atol=1e-5, rtol=0)
        model = TrainedModel(objective(kind), {"dataloaders": {"state_shape": [1]}}, torch.device("cpu"), step=0)
        torch.testing.assert_close(model.flow_map(x0, 0, 1), M + S * x0, atol=1e-5, rtol=0)
        asks = [
            (lambda: generate(objective(kind), Midpoint(2), x0, None), "not its velocity at an instant"),  # noqa: B023
            (lambda: model.velocity(x0, 0.5), "not its velocity at an instant"),  # noqa: B023
            (lambda: model.log_prob(x0), "not its velocity at an instant"),  # noqa: B023
            (lambda: model.flow_map(x0, 0, 0.5), "t = 1, and"),  # noqa: B023
            (lambda: generate(objective(kind), FlowMapSolver(2), x0, None), "use solver."),  # noqa: B023
        ]
        for ask, sentence in asks:
            with pytest.raises(UserError, match=sentence):
                ask()
    samples = few_steps(objective(ToData), x0, None, 4, fresh)  # noised again between the steps
    assert float(samples.std()) == pytest.approx(S, abs=0.01) and float(samples.mean()) == pytest.approx(M, abs=0.01)
    with pytest.raises(UserError, match="one map, from noise to data"):
        few_steps(objective(Generator), x0, None, 2)
    with pytest.raises(UserError, match="no other; ask for that"):
        model.flow_map(x0, 0.5, 1)


def test_a_run_that_learns_no_map_is_refused_before_it_trains(small_run, tmp_path) -> None:
    with pytest.raises(UserError, match="solver=midpoint, or train with loss=meanflow"):
        small_run("x", "solver=flow_map")
    assert not (tmp_path / "outputs/runs/x").exists()


@pytest.mark.slow
def test_a_run_is_scored_by_its_flow_map_and_by_its_renoising_variant(small_run, capsys) -> None:
    words = ("loss=meanflow", "evaluation=generator", "max_steps=2", "evaluation.samples=40", "evaluation.final_samples=40")
    folder = small_run("m", *words, "solver=flow_map", "solver.steps=3")
    scores = json.loads((folder / "runs/m/status.json").read_text())["scores"]
    assert scores["eval/nfe"] == 3
    assert "oracle/flow_map_error" in scores and "oracle/flow_map_error_exact_field" not in scores
    capsys.readouterr()
    path = folder / "ckpts/mlp/m_last.pt"
    model, noise = load(path), torch.randn(5, 2)
    torch.testing.assert_close(noise + model(noise, r=0, t=1), model.flow_map(noise, r=0, t=1))
    r, t = torch.full((5,), 0.25), torch.full((5,), 0.75)
    torch.testing.assert_close(model.flow_map(noise, r, t), noise + 0.5 * model(noise, 0.25, t))
    torch.testing.assert_close(model(noise, 0.5, 0.5), model.velocity(noise, 0.5))
    for states, *times in ((noise, 1, 0), (noise, -1, 1), (noise, 0.5, r), (noise, 0, math.nan), (torch.randn(5, 3), 0, 1)):
        for ask in (model, model.flow_map):
            with pytest.raises(UserError, match=r"takes states of shape \(B, 2\) at times 0 <= r <= t <= 1, not"):
                ask(states, *times)
    with pytest.raises(UserError, match="takes states"):
        model.velocity(noise, 2.0)
    small_run("e", f"eval_checkpoint={path}", "solver=flow_map", "solver.steps=2", "solver.renoise=true")
    said = capsys.readouterr().out
    assert "2 evaluations each" in said and "this solver adds fresh noise" in " ".join(said.split())

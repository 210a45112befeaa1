"""Oracle metrics: zero for the exact field, known values for a wrong one, absent where there is no truth."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.seeds import generator_for
from configuration.overrides import settings_from_overrides
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import GaussianSource, Source
from dataloaders.synthetic import Gaussian, KMeans
from dataloaders.tensor_dataset import TensorDataset
from evaluation.closed_forms import ExactFlow
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.energy_distance import EnergyDistance
from evaluation.metrics.few_step import FewStep
from evaluation.metrics.oracles import OracleFlowMapError, OracleLogProbError, OracleVelocity
from evaluation.metrics.two_sample import TwoSampleMetric
from evaluation.metrics.wasserstein import Wasserstein
from evaluation.threads import one_thread
from losses.couplings import Coupling, IndependentCoupling, MinibatchOTCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowObjective, Learns, SecondTime
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import LogitNormalTimes, UniformTimes
from losses.weightings import AdaptiveWeighting, UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from solvers.runge_kutta import Euler

OFFSET = torch.tensor([0.3, -0.4])
FLOW_MAP = "oracle/flow_map_error"


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


class OffsetField(VelocityModel):
    """The exact velocity plus a constant."""

    def __init__(self, flow: ExactFlow, offset: Tensor, num_classes: int = 0):
        super().__init__()
        self.flow, self.offset, self.num_classes = flow, nn.Parameter(offset), num_classes

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        x, times = split_unified_flow_matching_input(unified_input)
        return self.flow(x.double(), times[:, 0]).float() + self.offset


class Plain(FlowObjective):
    """An objective that is only read."""

    forward = FlowMatchingLoss.forward  # type: ignore[assignment]


def generation(
    cache: Path,
    dataset: FlowDataset | None = None,
    source: Source | None = None,
    coupling: Coupling | None = None,
    path: ProbabilityPath | None = None,
    offset: Tensor | None = None,
    num_classes: int = 0,
    key: str = "kmeans",
    steps: int = 200,
    count: int = 300,
) -> Generation:
    dataset, path, source = dataset or KMeans(), path or LinearPath(), source or GaussianSource([2], 0.9)
    flow = ExactFlow((dataset.mixture or KMeans().mixture).to(dtype=torch.float64), source.gaussian_std or 1.0, path)
    network = OffsetField(flow, torch.zeros(2) if offset is None else offset, num_classes)
    objective = Plain(
        network, path, coupling or IndependentCoupling(), UniformTimes(), VelocityPrediction(), UniformWeighting()
    )
    noise, solver = source.sample(count, torch.Generator().manual_seed(0)), Euler(steps)
    with torch.no_grad():
        samples = solver.solve(objective.velocity, noise)
    return Generation(
        objective=objective, dataset=dataset, source=source, solver=solver, seed=0, dataset_key=key, cache=cache,
        final=False, noise=noise, samples=samples,
    )  # fmt: skip


def compute(metric: Metric, made: Generation) -> list[Score]:
    with torch.no_grad():
        results = metric.compute(made)
    return [result for result in results if isinstance(result, Score)]


PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_exact_field_has_no_velocity_error(tmp_path: Path, path: ProbabilityPath) -> None:
    error, squared, excess = compute(OracleVelocity(4000), generation(tmp_path, path=path))
    assert [error.name, squared.name, excess.name] == OracleVelocity().names()
    assert error.value < 1e-6
    assert excess.value == squared.value < 1e-10


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_constant_offset_is_measured_as_such(tmp_path: Path, path: ProbabilityPath) -> None:
    made = generation(tmp_path, path=path, offset=OFFSET)
    metric = OracleVelocity(20_000)
    error, squared, excess = compute(metric, made)
    assert excess.value == squared.value == pytest.approx(0.25, rel=1e-5)  # |c|^2, summed over dimensions
    # E|v*|^2 from fresh conditional draws: E|v_c|^2 - E|v_c - v*|^2
    g = torch.Generator().manual_seed(7)
    x1, x0 = KMeans().held_out(100_000, g)[0], 0.9 * torch.randn(100_000, 2, generator=g)
    t = path.last_time * torch.rand(100_000, 1, generator=g)
    network = made.objective.network
    assert isinstance(network, OffsetField)
    v_c, v = path.conditional_velocity(x0, x1, t), network.flow(path.state(x0, x1, t).double(), t[:, 0])
    size = v_c.square().sum(1).mean() - (v_c - v).square().sum(1).mean()
    assert error.value == pytest.approx(0.5 / math.sqrt(size), rel=0.02)
    paired = (v_c - v - OFFSET).square().sum(1) - (v_c - v).square().sum(1)
    assert excess.value == pytest.approx(paired.mean().item(), abs=4 * paired.std().item() / math.sqrt(100_000))
    assert error.spread is not None and 0 < error.spread < 0.02 * error.value


def test_excess_loss_is_over_the_times_the_loss_draws(tmp_path: Path) -> None:
    """A velocity that is wrong in the second half of time alone, under a loss that hardly looks there."""
    made = generation(tmp_path)
    network = made.objective.network
    assert isinstance(network, OffsetField)

    def late(unified: Tensor, label: Tensor | None = None) -> Tensor:
        t = unified[:, 2]
        return network.flow(unified[:, :2].double(), t) + (t > 0.5).double()[:, None] * OFFSET

    made.objective.network.forward = late  # type: ignore[method-assign]
    made.objective.time_sampler = LogitNormalTimes(-1.0, 1.0)  # t > .5 with probability 1 - Phi(1) = .1587
    _, squared, excess = compute(OracleVelocity(20_000), made)
    assert squared.value == pytest.approx(0.25 * 0.5, rel=0.05)
    assert excess.value == pytest.approx(0.25 * 0.1587, rel=0.08)


@pytest.mark.parametrize("what", ["loss", "weighting"])
def test_excess_loss_is_absent_where_the_least_loss_is_unknown(tmp_path: Path, what: str) -> None:
    made = generation(tmp_path, offset=OFFSET)
    if what == "loss":
        made.objective.__class__ = type("OtherLoss", (Plain,), {"forward": lambda self, batch, teacher=None: {}})
    else:
        made.objective.weighting = AdaptiveWeighting()
    _, squared, absent = OracleVelocity(2000).compute(made)
    assert isinstance(squared, Score) and squared.value == pytest.approx(0.25, rel=1e-4)
    assert absent.name == "oracle/excess_loss" and isinstance(absent, Absent)
    assert ("OtherLoss" if what == "loss" else "weighted") in absent.reason


def test_velocity_spread_is_the_scatter_over_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation(tmp_path)
    network = made.objective.network
    monkeypatch.setattr(network, "forward", lambda unified, label=None: 0.5 * unified[:, :2])
    scores = []
    for i in range(40):
        monkeypatch.setattr("evaluation.metrics.oracles.generator_for", lambda seed, name, i=i: generator_for(i, name))
        scores.append(compute(OracleVelocity(500), made))
    for k in range(3):
        values = torch.tensor([score[k].value for score in scores])
        spread = torch.tensor([score[k].spread for score in scores]).mean()
        assert spread.item() == pytest.approx(values.std().item(), rel=0.35)


def test_the_final_evaluation_has_more_draws_and_the_likelihood(tmp_path: Path) -> None:
    made = generation(tmp_path, offset=OFFSET)
    assert OracleLogProbError().compute(made) == []
    made.final = True
    assert "700 states" in compute(OracleVelocity(300, 700), made)[0].note


def test_flow_map_error_of_the_exact_field_is_the_solvers(tmp_path: Path) -> None:
    made = generation(tmp_path)
    (score,) = compute(OracleFlowMapError(), made)
    assert score.extra is not None
    assert score.value == pytest.approx(score.extra["oracle/flow_map_error_exact_field"], rel=1e-2)
    assert 1e-4 < score.extra["oracle/flow_map_error_median"] < score.value
    (finer,) = compute(OracleFlowMapError(), generation(tmp_path, steps=1600))
    assert finer.value < 0.3 * score.value
    assert made.solver.evaluations == 200


def test_flow_map_error_of_a_displaced_sampler(tmp_path: Path) -> None:
    made = generation(tmp_path, dataset=Gaussian())
    made.samples = 0.7 + 0.4 / 0.9 * made.noise + OFFSET  # one Gaussian: X* = m + s / s0 x0
    (score,) = compute(OracleFlowMapError(), made)
    assert score.extra is not None
    assert score.value == pytest.approx(0.5, abs=1e-6)
    assert score.extra["oracle/flow_map_error_median"] == pytest.approx(0.5, abs=1e-6)
    assert score.spread == pytest.approx(0, abs=1e-6)


def test_truth_is_integrated_once_for_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ExactFlow.flow_map

    def counted(self: ExactFlow, z: Tensor, r: float, t: float, label: Tensor | None) -> Tensor:
        calls.append(len(z))
        return original(self, z, r, t, label)

    monkeypatch.setattr(ExactFlow, "flow_map", counted)
    (first,) = compute(OracleFlowMapError(), generation(tmp_path, count=20))
    (again,) = compute(OracleFlowMapError(), generation(tmp_path, count=20))
    assert first == again and len(calls) == 1
    compute(OracleFlowMapError(), generation(tmp_path, count=20, key="kmeans std=0.2"))
    compute(OracleFlowMapError(), generation(tmp_path, count=20, path=CosinePath()))
    compute(OracleFlowMapError(), generation(tmp_path, count=20, path=VariancePreservingPath(beta_max=12.0)))
    compute(OracleFlowMapError(), generation(tmp_path, count=21))
    assert len(calls) == 5
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    compute(OracleFlowMapError(), generation(tmp_path, count=21))
    assert len(calls) == 6


@pytest.mark.parametrize(
    "metric", [OracleVelocity(100), OracleFlowMapError(), OracleLogProbError(9)], ids=lambda m: type(m).__name__
)
def test_absent_where_the_truth_is_unknown(tmp_path: Path, metric: Metric) -> None:
    finite, other = TensorDataset(torch.randn(30, 2), None, torch.arange(10)), GaussianSource([2])
    other.gaussian_std = None
    for reason, made in {
        "TensorDataset data": generation(tmp_path, dataset=finite),
        "density of the source": generation(tmp_path, source=other),
        "optimal-transport pairs": generation(tmp_path, coupling=MinibatchOTCoupling()),
    }.items():
        with torch.no_grad():
            results = metric.compute(made)
        assert all(isinstance(result, Absent) and reason in result.reason for result in results), results
        assert len(results) == (3 if isinstance(metric, OracleVelocity) else 1)


def test_diverged_samples_have_no_flow_map_error(tmp_path: Path) -> None:
    made = generation(tmp_path)
    made.samples[0, 0] = math.inf
    (absent,) = OracleFlowMapError().compute(made)
    assert isinstance(absent, Absent) and "not finite" in absent.reason


def test_log_prob_error_of_the_exact_field_is_nearly_nothing(tmp_path: Path) -> None:
    made = replace(generation(tmp_path, dataset=Gaussian(mean=0.7, std=0.4)), final=True)
    (score,) = compute(OracleLogProbError(50), made)
    assert score.value < 1e-4 and score.extra is not None
    assert score.extra["oracle/log_prob_error_exact_field"] < 1e-5


def test_log_prob_error_of_another_gaussians_field_is_the_difference_of_their_densities(tmp_path: Path) -> None:
    """A network that is exact for N(.9, .5^2) is judged on N(.7, .4^2): |log p' - log p| on the same points."""
    wrong, right = Gaussian(mean=0.9, std=0.5), Gaussian(mean=0.7, std=0.4)
    made = replace(generation(tmp_path, dataset=wrong), dataset=right, final=True)
    (score,) = compute(OracleLogProbError(200), made)
    points = right.held_out(200, made.generator("log_prob"))[0]
    assert wrong.mixture is not None and right.mixture is not None
    expected = (wrong.mixture.log_prob(points) - right.mixture.log_prob(points)).abs().mean().item()
    assert score.value == pytest.approx(expected, rel=1e-3) and expected > 0.1


def test_log_prob_of_many_dimensions_comes_with_the_error_of_its_probes(tmp_path: Path) -> None:
    wide = Gaussian(mean=0.7, std=0.4, state_shape=[20])
    made = replace(generation(tmp_path, dataset=wide, source=GaussianSource([20]), offset=torch.zeros(20)), final=True)
    mixing = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    made.objective.network.forward = lambda unified, label=None: 0.1 * unified[:, :20] @ mixing  # type: ignore[method-assign]
    (score,) = compute(OracleLogProbError(8), made)
    assert score.extra is not None and score.extra["oracle/log_prob_error_probes"] > 0.1


class ExactMap(Plain):
    """The exact flow map of one Gaussian, displaced by the network's offset on every step."""

    second_time: SecondTime = "state"
    learns: Learns = "flow_map"

    def flow_map(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        network = self.network
        assert isinstance(network, OffsetField)
        return network.flow.flow_map(x, float(r), float(t)) + network.offset


def mapped(cache: Path, offset: Tensor, learns: bool = True) -> Generation:
    made = generation(cache, dataset=Gaussian(), offset=offset, key="gaussian", count=400)
    o = made.objective
    kind = ExactMap if learns else Plain
    objective = kind(o.network, o.path, o.coupling, o.time_sampler, o.prediction, o.weighting).requires_grad_(False)
    return replace(made, objective=objective)


def few_step(*evaluations: int, euler: bool = False) -> FewStep:
    scores: dict[str, TwoSampleMetric | OracleFlowMapError] = {
        "energy": EnergyDistance(4), "w2": Wasserstein(400, 4), "map": OracleFlowMapError(exact_field=False)
    }  # fmt: skip
    return FewStep(scores, list(evaluations), euler)


def test_few_steps_of_the_exact_map_are_the_truth(tmp_path: Path) -> None:
    scores = {score.name: score for score in compute(few_step(1, 3), mapped(tmp_path, torch.zeros(2)))}
    assert list(scores) == [f"{name}_{n}nfe" for n in (1, 3) for name in ("eval/energy_distance", "eval/w2", FLOW_MAP)]
    for n in (1, 3):
        error = scores[f"{FLOW_MAP}_{n}nfe"]
        assert error.value < 1e-6 and error.spread is not None
        assert error.extra is not None and list(error.extra) == [f"{FLOW_MAP}_{n}nfe_median"]
        for name in ("eval/energy_distance", "eval/w2"):
            score = scores[f"{name}_{n}nfe"]
            assert score.floor is not None and score.floor_sd is not None
            assert abs(score.value - score.floor) < 5 * score.floor_sd


def test_few_steps_of_a_displaced_map_err_by_the_displacement(tmp_path: Path) -> None:
    """Each step's offset is carried on by the steps after it, by the ratio of the standard deviations."""
    scores = {score.name: score for score in compute(few_step(1, 2), mapped(tmp_path, OFFSET))}
    half = math.sqrt(0.25 * 0.9**2 + 0.25 * 0.4**2)
    for n, expected in ((1, 0.5), (2, 0.5 * (1 + 0.4 / half))):
        score = scores[f"{FLOW_MAP}_{n}nfe"]
        assert score.value == pytest.approx(expected, rel=1e-5) and score.extra is not None
        assert score.extra[f"{FLOW_MAP}_{n}nfe_median"] == pytest.approx(expected, rel=1e-5)
        assert scores[f"eval/w2_{n}nfe"].value == pytest.approx(expected, rel=0.15)


def test_few_steps_without_a_map_are_euler_steps_where_asked_for(tmp_path: Path) -> None:
    made = mapped(tmp_path, torch.zeros(2), learns=False)
    with torch.no_grad():
        absent = few_step(1, 4).compute(made)
    assert len(absent) == 6 and all(isinstance(a, Absent) and "not maps" in a.reason for a in absent)
    assert [a.name for a in absent][:3] == ["eval/energy_distance_1nfe", "eval/w2_1nfe", f"{FLOW_MAP}_1nfe"]
    score = next(score for score in compute(few_step(1, euler=True), made) if score.name == f"{FLOW_MAP}_1nfe")
    # v(x, 0) = m - x, so that one Euler step ends in m wherever it begins: the error is the spread of the true ends.
    truth = 0.4 / 0.9 * made.noise
    assert score.value == pytest.approx(truth.square().sum(1).mean().sqrt().item(), rel=1e-4)


def test_scores_of_what_an_objective_does_not_learn_are_absent_with_the_reason(tmp_path: Path) -> None:
    made = replace(mapped(tmp_path, torch.zeros(2)), final=True)
    scores = [OracleVelocity(100), OracleFlowMapError(exact_field=False), few_step(1, 2)]

    def reasons(learns: Learns, marginals_only: bool) -> dict[str, str | None]:
        made.objective.learns, made.objective.marginals_only = learns, marginals_only
        with torch.no_grad():
            results = [result for metric in scores for result in metric.results(made)]
        return {result.name: result.reason if isinstance(result, Absent) else None for result in results}

    assert set(reasons("flow_map", False).values()) <= {None, reasons("flow_map", False)["oracle/excess_loss"]}
    to_data, generator = reasons("endpoint_map", False), reasons("generator", True)
    for found in (to_data, generator):
        assert "not the velocity at an instant" in str(found["oracle/velocity_error"])
        assert found["eval/energy_distance_1nfe"] is None
    assert to_data[FLOW_MAP] is to_data[f"{FLOW_MAP}_1nfe"] is to_data["eval/w2_2nfe"] is None
    assert "fresh noise between the steps" in str(to_data[f"{FLOW_MAP}_2nfe"])
    assert "no sample has one true end" in str(generator[FLOW_MAP]) and generator[f"{FLOW_MAP}_1nfe"] == generator[FLOW_MAP]
    assert "in one evaluation" in str(generator["eval/w2_2nfe"])


@pytest.mark.parametrize("count", ["0", "1.5", "one"])
def test_a_count_of_evaluations_is_a_whole_number(count: str) -> None:
    with pytest.raises(UserError, match="whole numbers of at least 1"):
        settings_from_overrides([f"evaluation.metrics.few_step.evaluations=[{count}]"])

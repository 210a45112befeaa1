"""Oracle metrics: zero for the exact field, known values for a wrong one, absent where there is no truth."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.seeds import generator_for
from dataloaders.sources import GaussianSource
from dataloaders.synthetic import Gaussian, KMeans
from dataloaders.tensor_dataset import TensorDataset
from evaluation.closed_forms import ExactFlow
from evaluation.metrics.base_metric import Absent, Metric, Score
from evaluation.metrics.oracles import OracleFlowMapError, OracleLogProbError, OracleVelocity
from losses.couplings import MinibatchOTCoupling
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from losses.time_samplers import LogitNormalTimes
from losses.weightings import AdaptiveWeighting
from tests.evaluation.exact_generation import OFFSET, OffsetField, Plain, compute, generation

pytestmark = pytest.mark.usefixtures("single_thread")


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

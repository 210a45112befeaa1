"""Few-step scores: the exact map's are the truth, a displaced one's err by the displacement."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from configuration.overrides import settings_from_overrides
from dataloaders.synthetic import Gaussian
from evaluation.metrics.base_metric import Absent, Generation
from evaluation.metrics.energy_distance import EnergyDistance
from evaluation.metrics.few_step import FewStep
from evaluation.metrics.oracles import OracleFlowMapError, OracleVelocity
from evaluation.metrics.two_sample import TwoSampleMetric
from evaluation.metrics.wasserstein import Wasserstein
from losses.objective import Learns, SecondTime
from tests.evaluation.exact_generation import FLOW_MAP, OFFSET, OffsetField, Plain, compute, generation

pytestmark = pytest.mark.usefixtures("single_thread")


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

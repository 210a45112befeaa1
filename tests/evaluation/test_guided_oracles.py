"""Oracles of conditional and guided models, from any source, and the error budget: zero where all is exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.sources import DatasetSource, GaussianSource, Source
from dataloaders.synthetic import EightGaussians, KMeans, Mixture, MixtureDataset
from evaluation.closed_forms import ExactFlow
from evaluation.guided_flows import GuidedFlow
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.error_budget import ErrorBudget
from evaluation.metrics.oracles import OracleFlowMapError, OracleLogProbError, OracleVelocity, known_flow
from helpers_cfg import Autoguidance, ClassifierFreeGuidance, Guidance, ZeroStarGuidance, guided, unguided
from losses.couplings import IndependentCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_guidance import MeanFlowGuidance
from losses.meanflow_loss import MeanFlowLoss
from losses.paths import CosinePath, LinearPath
from losses.predictions import DataPrediction, NoisePrediction, Prediction, VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from solvers.runge_kutta import RK4, Midpoint
from tests.evaluation.test_guided_flows import CLASSES, MEANS, S0, STDS, WEIGHTS, by_label, cfg, from_score, numbers, states


class ExactMap(FlowMatchingLoss):
    """An objective that is only read, whose flow map is that of `flow`."""

    learns = "flow_map"
    flow: GuidedFlow

    def flow_map(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.flow.flow_map(x, float(r), float(t), label)


class Exact(VelocityModel):
    """The exact network of a prediction along the linear path, plus an offset to every velocity."""

    def __init__(self, flow: ExactFlow, classes: int, prediction: Prediction | None = None, offset: float = 0.0):
        super().__init__()
        self.flow, self.num_classes, self.prediction = flow, classes, prediction
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        v = self.flow(z.double(), times[:, 0], label if self.num_classes else None).float() + self.offset
        t = times[:, :1]
        if isinstance(self.prediction, DataPrediction):
            return z + (1 - t).clamp(min=0.05) * v
        return z - t.clamp(min=0.05) * v if isinstance(self.prediction, NoisePrediction) else v


def generation(
    cache: Path,
    dataset: MixtureDataset,
    source: Source,
    conditional: bool = True,
    prediction: Prediction | None = None,
    guide: Callable[[VelocityModel], Guidance] | None = None,
    offset: float = 0.0,
) -> Generation:
    law, given = source.law, prediction or VelocityPrediction()
    assert law is not None
    noise_law = law.to(dtype=torch.float64) if isinstance(law, GaussianMixture) else law
    flow = ExactFlow(dataset.mixture.to(dtype=torch.float64), noise_law, LinearPath())
    network = Exact(flow, dataset.num_classes if conditional else 0, given, offset)
    parts = (LinearPath(), IndependentCoupling(), UniformTimes(), given, UniformWeighting(), 0.1)
    names = ("path", "coupling", "time_sampler", "prediction", "weighting", "label_dropout")
    objective = FlowMatchingLoss(network=network, **dict(zip(names, parts, strict=True)))
    made = guided(objective, guide(network)) if guide else objective
    noise = source.sample(100, torch.Generator().manual_seed(0))
    label = torch.arange(100) % dataset.num_classes if conditional else None
    with torch.no_grad():
        samples = Midpoint(50).solve(lambda z, t: made.velocity(z, t, label), noise)
    return Generation(
        objective=made, dataset=dataset, source=source, solver=Midpoint(50), seed=0, dataset_key="mixture", cache=cache,
        final=True, noise=noise, samples=samples, label=label,
    )  # fmt: skip


def scores(metric: Metric, made: Generation) -> list[Score]:
    with torch.no_grad():
        return [score for score in metric.compute(made) if isinstance(score, Score)]


def weak_guide(network: VelocityModel) -> Autoguidance:
    assert isinstance(network, Exact)
    law = network.flow.mixture
    wide = ExactFlow(GaussianMixture(law.weights, law.means, 2 * law.stds), network.flow.source, network.flow.path)
    return Autoguidance(network, Exact(wide, 0), 2.0, guide_flow=wide)


DATA = [Mixture(MEANS, STDS, WEIGHTS, CLASSES), KMeans(std=0.4)]
GUIDES: dict[str, Callable[[VelocityModel], Guidance] | None] = {
    "plain": None,
    "cfg": lambda network: ClassifierFreeGuidance(network, 3.0),
    "interval": lambda network: ClassifierFreeGuidance(network, 2.0, (0.2, 0.6)),
    "auto": weak_guide,
}


@pytest.mark.parametrize("guide", GUIDES)
def test_a_perfect_conditional_model_has_no_error_and_an_offset_is_measured(guide: str, tmp_path: Path) -> None:
    """Whatever guides it. An offset c of every velocity of a network is, under CFG, c of the guided velocity too."""
    dataset, source = DATA[0], GaussianSource([2], S0)
    made = generation(tmp_path, dataset, source, guide=GUIDES[guide])
    error, squared, excess = scores(OracleVelocity(100, 3000), made)
    assert error.value < 1e-5 and squared.value < 1e-8 and excess.value < 1e-8
    (ends,) = scores(OracleFlowMapError(), made)
    assert ends.extra is not None
    assert ends.value == pytest.approx(ends.extra["oracle/flow_map_error_exact_field"], rel=0.05) and ends.value < 0.05
    made = generation(tmp_path, dataset, source, guide=GUIDES[guide], offset=0.3)
    _, squared, excess = scores(OracleVelocity(100, 3000), made)
    assert excess.value == pytest.approx(2 * 0.3**2, rel=1e-4)
    assert squared.value == pytest.approx((4 if guide == "auto" else 1) * 2 * 0.3**2, rel=1e-4)


@pytest.mark.parametrize("prediction", [DataPrediction(), NoisePrediction()], ids=lambda p: type(p).__name__)
def test_other_predictions_are_held_against_the_same_truth(prediction: Prediction, tmp_path: Path) -> None:
    made = generation(tmp_path, DATA[1], GaussianSource([2], S0), prediction=prediction)
    assert scores(OracleVelocity(100, 3000), made)[0].value < 1e-4


def test_a_mixture_as_source_has_its_oracles(tmp_path: Path) -> None:
    made = generation(tmp_path, DATA[1], DatasetSource(EightGaussians(std=0.4)), conditional=False)
    assert scores(OracleVelocity(100, 3000), made)[0].value < 1e-5
    (ends,) = scores(OracleFlowMapError(), made)
    assert ends.extra is not None and ends.value < 0.1
    assert ends.value == pytest.approx(ends.extra["oracle/flow_map_error_exact_field"], rel=0.05)


@pytest.mark.parametrize("guide", ["plain", "cfg"])
def test_likelihoods_are_those_of_each_class_and_of_the_guided_flow(guide: str, tmp_path: Path) -> None:
    """Of one Gaussian a class, CFG leads to a Gaussian that is known by pushing noise through the flow."""
    made = generation(tmp_path, Mixture([[1.0, 0.0], [-1.0, 0.5]], 0.5), GaussianSource([2]), guide=GUIDES[guide])
    (score,) = scores(OracleLogProbError(3), made)
    assert score.value < 2e-3 and score.extra is not None and score.extra["oracle/log_prob_error_exact_field"] < 2e-3
    flow = known_flow(made.objective, made.dataset, made.source)
    assert not isinstance(flow, str)
    x0, label = states(2), torch.tensor([0, 1])
    x1, step = flow.flow_map(x0, 0.0, 1.0, label), 1e-4
    columns = [(flow.flow_map(x0 + step * e, 0.0, 1.0, label) - x1) / step for e in torch.eye(2, dtype=torch.float64)]
    volume = torch.stack(columns, 2).det().abs().log()
    expected = made.source.log_prob(x0) - volume
    torch.testing.assert_close(flow.end_log_prob(x1, label, made.source.log_prob), expected, atol=2e-3, rtol=0)


def test_errors_by_time_say_when_it_errs(tmp_path: Path) -> None:
    made = generation(tmp_path, DATA[1], GaussianSource([2]))
    network = made.objective.network
    right = network.forward
    late = lambda unified, label=None: right(unified, label) + (unified[:, 2:3] > 0.75) * 0.3  # noqa: E731
    network.forward = late  # type: ignore[method-assign]
    error, _, excess = scores(OracleVelocity(100, 4000), made)
    assert error.extra is not None and excess.extra is not None
    parts = [excess.extra[f"oracle/excess_loss_t{k}"] for k in range(8)]
    assert max(parts[:6]) < 1e-8 and parts[6:] == pytest.approx([2 * 0.3**2] * 2, rel=1e-4)
    relative = [error.extra[f"oracle/velocity_error_t{k}"] for k in range(8)]
    assert max(relative[:6]) < 1e-5 and min(relative[6:]) > 0.02


def test_guidance_folded_into_training_is_the_guided_flow(tmp_path: Path) -> None:
    made = generation(tmp_path, DATA[0], GaussianSource([2], S0))
    made.objective.__class__ = MeanFlowLoss
    made.objective.guidance = MeanFlowGuidance(1.5, 0.5, 0.2, 0.8)  # type: ignore[assignment]
    made.objective.teacher = None  # type: ignore[assignment]
    flow = known_flow(made.objective, made.dataset, made.source)
    assert isinstance(flow, GuidedFlow) and (flow.scale, flow.interval) == (3.0, (0.2, 0.8))
    z, label = states(), torch.arange(40) % 3
    pushed = cfg(LinearPath(), 3.0)(z, numbers(0.5), label)
    torch.testing.assert_close(flow(z, numbers(0.5), label), pushed, atol=1e-6, rtol=0)
    torch.testing.assert_close(flow(z, numbers(0.9), label), flow.strong(z, numbers(0.9), label))
    twice = replace(made, objective=guided(made.objective, ClassifierFreeGuidance(made.objective.network, 2.0)))
    assert "guided once more" in str(known_flow(twice.objective, made.dataset, made.source))
    made.objective.time_sampler = UniformTimes(1.0, to_data=True)
    assert "which no row trains" in str(known_flow(made.objective, made.dataset, made.source))


def test_zero_star_projects_the_exact_fields_on_the_path_itself(tmp_path: Path) -> None:
    path = CosinePath()
    made = generation(tmp_path, DATA[0], GaussianSource([2], S0), guide=lambda network: ZeroStarGuidance(network, 3.0))
    made.objective.path = path
    flow = known_flow(made.objective, made.dataset, made.source)
    assert isinstance(flow, GuidedFlow)
    z, label = states(4), torch.arange(4) % 2
    strong, null = by_label(path, label), from_score(path, [0, 1, 2])

    def field(x: Tensor, t: Tensor) -> Tensor:
        v, weak = strong(x, t), null(x, t)
        part = (v * weak).sum(1, keepdim=True) / weak.square().sum(1, keepdim=True) * weak
        return part + 3 * (v - part)

    torch.testing.assert_close(flow(z, numbers(0.4), label), field(z, numbers(0.4)), atol=1e-6, rtol=0)
    exact = RK4(30).solve(field, z, torch.linspace(0.1, 0.4, 31, dtype=torch.float64))
    near = (flow.flow_map(z, 0.1, 0.4, label) - exact).abs().amax(1) < 1e-4
    assert near.sum() >= 3  # of 4: where v_null passes by 0 the projection turns faster than fixed steps follow
    early = guided(unguided(made.objective), ZeroStarGuidance(unguided(made.objective).network, 3.0, zero_until=0.1))
    assert "ZeroStarGuidance is not known" in str(known_flow(early, made.dataset, made.source))


def test_a_guide_of_unknown_data_has_no_oracle(tmp_path: Path) -> None:
    made = generation(
        tmp_path,
        DATA[1],
        GaussianSource([2]),
        guide=lambda network: Autoguidance(network, Exact(ExactFlow(DATA[1].mixture, 1.0, LinearPath()), 0), 2.0),
    )
    results = OracleVelocity(100, 100).compute(made)
    assert all(isinstance(result, Absent) and "the data that the guide learned" in result.reason for result in results)


def test_the_budget_tells_the_field_from_the_solver_and_from_guidance(tmp_path: Path) -> None:
    """An exact field sampled coarsely: all is the solver's. A displaced field sampled well: all is the field's."""
    data, source = Mixture([[0.7, -0.4]], 0.4), GaussianSource([2])
    coarse = generation(tmp_path, data, source)
    with torch.no_grad():
        coarse.samples = Midpoint(3).solve(lambda z, t: coarse.objective.velocity(z, t, coarse.label), coarse.noise)
    (ends,) = scores(OracleFlowMapError(exact_field=False), coarse)
    field, solver = scores(ErrorBudget(60), coarse)
    assert field.extra is not None and solver.extra is not None
    assert field.value < 1e-4 and solver.value == pytest.approx(ends.value, rel=0.2) and solver.value > 1e-3
    assert solver.extra["oracle/budget_solver_share"] == pytest.approx(1, abs=1e-2)
    assert max(field.extra[f"oracle/flow_map_error_t{k}"] for k in range(8)) < 3e-4
    # dx/dt = v + c from N(0, 1) to N(m, s^2): the displacement grows as that of x' = S'/S x + c does
    field, solver = scores(ErrorBudget(60), generation(tmp_path, data, source, offset=0.2))
    assert field.extra is not None and solver.extra is not None
    width = lambda t: (1 - t) ** 2 + (0.4 * t) ** 2  # noqa: E731

    def grown(t: float) -> float:
        return float(2**0.5 * 0.2 * width(t) ** 0.5 * quad(lambda s: width(s) ** -0.5, 0, t)[0])

    assert field.value == pytest.approx(grown(1.0), rel=1e-3) and solver.value < 0.05 * field.value
    assert solver.extra["oracle/budget_field_share"] == pytest.approx(1, abs=0.01)
    assert [field.extra[f"oracle/flow_map_error_t{k}"] for k in (0, 7)] == pytest.approx(
        [grown(1 / 16), grown(15 / 16)], rel=1e-3
    )
    several = generation(tmp_path, DATA[0], source, guide=GUIDES["cfg"])
    *_, moved = scores(ErrorBudget(60), several)
    flow = known_flow(several.objective, several.dataset, several.source)
    assert isinstance(flow, GuidedFlow) and moved.name == "oracle/budget_guidance"
    noise, label = several.noise[:60].double(), None if several.label is None else several.label[:60]
    guided, plain = (one.flow_map(noise, 0.0, 1.0, label) for one in (flow, flow.strong))
    away = (guided - plain).square().sum(1).mean().sqrt()
    assert moved.value == pytest.approx(away.item(), rel=1e-6) and away > 0.1


def test_a_learned_map_has_a_part_of_its_own_and_guidance_in_one_step_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.metrics.error_budget.BY_TIME", ("_t0",))
    made = generation(tmp_path, DATA[0], GaussianSource([2], S0), guide=GUIDES["cfg"])
    flow = known_flow(made.objective, made.dataset, made.source)
    assert isinstance(flow, GuidedFlow) and made.label is not None
    exact = ExactMap.__new__(ExactMap)
    exact.__dict__ = {**made.objective.__dict__}
    exact.flow = flow  # the guided flow's own map, which guidance of exact maps in one step is not
    found = {score.name: score for score in scores(ErrorBudget(6), replace(made, objective=exact))}
    noise, label = made.noise[:6].double(), made.label[:6]
    assert found["oracle/budget_map"].value < 1e-3
    null, own = (flow.strong.flow_map(noise, 0.0, 1.0, given) for given in (None, label))
    off = (null + 3 * (own - null) - flow.flow_map(noise, 0.0, 1.0, label)).square().sum(1).mean().sqrt()
    assert found["oracle/budget_guided_map"].value == pytest.approx(off.item(), rel=1e-6) and off > 0.1

"""Every loss of configs/loss is proven, and planted faults are found: see evaluation/prove.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from configuration.compose import CONFIG_DIR, compose_config, groups
from evaluation import prove as prove_module
from evaluation.exact_worlds import MixtureWorld
from evaluation.prove import ENOUGH, WORLDS, Plan, Stage, prove
from evaluation.prove_command import prepared, summed_up
from launcher import main
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_guidance import MeanFlowGuidance
from losses.meanflow_loss import ImprovedMeanFlowLoss, MeanFlowLoss
from losses.objective import FlowBatch, FlowObjective, expand_time
from losses.paths import CosinePath, LinearPath
from models.inputs import with_class

SHORT = Plan(batches=32, rows=640, curvature=1)
FINE = Plan(batches=80, rows=2048, curvature=8)


def target_of(loss: str) -> str:
    return str(OmegaConf.load(CONFIG_DIR / f"loss/{loss}.yaml")._target_)


MATCHING = [name for name in groups()["loss"] if getattr(get_class(target_of(name)), "marginals_only", False)]


def proven(words: list[str], kind: type | None = None, worlds: tuple[str, ...] = ("a mixture",), plan: Plan = SHORT) -> Any:
    """The stages of a configured loss, or of another class with its settings; why there are none."""
    _, around, path, _, _ = prepared(words)
    if isinstance(around, str):
        return around

    def build(network: Any) -> Any:
        objective = around(network)
        objective.__class__ = kind or type(objective)
        return objective

    return list(prove(build, path, list(worlds), plan))


def keeps(stages: list[Stage], declared: float | None) -> bool:
    """Whether a loss is as biased as its file declares (training.bias, a share of the field), or not at all."""
    if declared is None:
        return all(stage.verdict != "biased" and stage.seen < 0.25 for stage in stages)
    worst = max(stages, key=lambda stage: stage.bias)
    return worst.verdict == "biased" and abs(worst.bias - declared) < max(0.2 * declared, 3 * worst.spread)


@pytest.mark.slow
@pytest.mark.parametrize("loss", groups()["loss"])
def test_every_loss_is_proven_or_biased_as_it_declares(loss):
    """A new loss is proven the day its file is there. One that is biased on purpose says so: training: {bias: 0.05}."""
    words = [f"loss={loss}", *(["loss.coupling.teacher=exact"] if loss in ("reflow", "distillation") else [])]
    declared = compose_config(["run_name=x", *words]).loss.training.get("bias") if loss != "cross_entropy" else None
    worlds = ("a mixture", "two classes") if declared is None and loss not in MATCHING else ("a mixture",)
    stages = proven(words, worlds=worlds, plan=SHORT if declared is None else FINE)
    if loss in MATCHING:  # see test_distribution_losses.py
        assert all(stage.verdict != "biased" and not stage.reason for stage in stages), stages
        return
    noisy = tuple(stage.world for stage in stages if 0.25 <= stage.seen < 1) if isinstance(stages, list) else ()
    if noisy:  # a noisier loss than others
        rest = [stage for stage in stages if stage.world not in noisy]
        stages = [*rest, *proven(words, worlds=noisy, plan=replace(SHORT, rows=1920))]
    if loss in ("cross_entropy", "reflow"):
        reason = stages if isinstance(stages, str) else stages[0].reason
        assert "learns no flow" in reason or "ReflowCoupling" in reason
    else:
        assert keeps(stages, declared), summed_up(stages)


class Sign(MeanFlowLoss):
    def value_and_derivative(self, batch: FlowBatch, rows: int, direction: Tensor) -> tuple[Tensor, Tensor]:
        u, derivative = super().value_and_derivative(batch, rows, direction)
        return u, -derivative


class OrderOfTimes(MeanFlowLoss):
    def mean_velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().mean_velocity(z, t, r, label)


class SideOfTheState(MeanFlowLoss):
    def draw(self, *args: Any, **kwargs: Any) -> FlowBatch:
        batch = super().draw(*args, **kwargs)
        batch.input = self.path.state(batch.raw_source, batch.raw_target, expand_time(batch.t, batch.input))
        return batch


class NoTangent(MeanFlowLoss):
    def value_and_derivative(self, batch: FlowBatch, rows: int, direction: Tensor) -> tuple[Tensor, Tensor]:
        return super().value_and_derivative(batch, rows, torch.zeros_like(direction))


class Huber(FlowMatchingLoss):
    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        v = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        return {"loss": F.huber_loss(v, batch.conditional_velocity)}


class WithGradient:
    """The derivative with its graph."""

    def value_and_derivative(self: Any, batch: FlowBatch, rows: int, direction: Tensor) -> tuple[Tensor, Tensor]:
        interval, instant = batch.split(rows)
        u, derivative = self.forward_mode(interval, direction)
        return torch.cat([u, self.mean_velocity(instant.input, instant.r, instant.t, instant.label)]), derivative


class NoStop(WithGradient, MeanFlowLoss):
    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        rows = self.time_sampler.interval_rows(len(batch))
        v = batch.conditional_velocity
        u, derivative = self.value_and_derivative(batch, rows, v[:rows])
        duration = expand_time(batch.t - batch.r, batch.input)[:rows]
        return {"loss": (u - torch.cat([v[:rows] + duration * derivative, v[rows:]])).square().mean()}


class NoStopImproved(WithGradient, ImprovedMeanFlowLoss): ...


class LeakyLabels(FlowMatchingLoss):
    def drop_labels(self, label: Tensor | None, generator: torch.Generator) -> Tensor | None:
        shown = super().drop_labels(label, generator)
        return shown if shown is None or label is None else torch.where(label == 0, shown, with_class(label, 2))


MEAN, PLAIN = ["loss=meanflow"], ["loss=mse"]
FAULTS: list[tuple[list[str], type | None, str]] = [
    (MEAN, Sign, "a mixture"),
    (MEAN, OrderOfTimes, "a mixture"),
    (MEAN, SideOfTheState, "a mixture"),
    (MEAN, NoTangent, "a mixture"),
    (PLAIN, Huber, "a mixture"),
    ([*PLAIN, "loss/weighting=adaptive"], None, "a mixture"),
    (MEAN, NoStop, "a mixture"),
    (PLAIN, LeakyLabels, "two classes"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kind", "world"), FAULTS, ids=[kind.__name__ if kind else words[-1] for words, kind, _ in FAULTS]
)
def test_a_planted_fault_is_found(words, kind, world):
    (stage,) = proven(words, kind, (world,))
    assert stage.verdict == "biased" and stage.bias > 0.02, stage


def test_a_wrong_rate_of_the_path_is_found(monkeypatch):
    right = CosinePath.at
    wrong = lambda path, t: right(path, t)._replace(sigma_dot=-right(path, t).alpha)  # noqa: E731  without its pi / 2
    monkeypatch.setattr(CosinePath, "at", wrong)
    (stage,) = proven([*PLAIN, "loss/path=cosine"], worlds=("a Gaussian",))
    assert stage.verdict == "biased" and stage.bias > 0.1, stage


GUIDED = ["loss/guidance=meanflow", "loss.guidance.omega=1.2", "loss.guidance.kappa=0.4", "loss.guidance.end=0.8"]


QUICK = Plan(batches=32, rows=160, curvature=1)  # with a teacher, whose velocity is no random number


@pytest.mark.parametrize("loss", ["meanflow", "improved_meanflow"])
def test_guidance_in_the_target_is_that_of_its_effective_scale(loss):
    """1.2 / (1 - 0.4) = 2, whatever the network's own part in it."""
    (stage,) = proven([f"loss={loss}", *GUIDED], worlds=("two classes",))
    assert stage.verdict != "biased" and stage.seen < 0.25, stage


def test_guidance_with_an_exact_teacher_is_proven_a_wrong_scale_is_found_and_without_instants_nothing_is_known(monkeypatch):
    guided = ["loss=meanflow", *GUIDED, "+loss.time_sampler.to_data=true", "loss.time_sampler.ratio=1"]
    *_, worlds, _ = prepared(guided)
    assert worlds == ["two classes"]
    (own,), (taught,) = (proven([*guided, *more], worlds=worlds, plan=QUICK) for more in ([], ["loss.teacher=exact"]))
    assert own.verdict == "undecided" and "which no row trains" in own.reason
    assert taught.verdict == "stationary" and taught.seen < 0.03, taught
    real, wrong = MeanFlowGuidance.target, MeanFlowGuidance(1.38, 0.4, end=0.8)
    monkeypatch.setattr(MeanFlowGuidance, "target", lambda self, *given: real(wrong, *given))
    (stage,) = proven([*guided, "loss.teacher=exact"], worlds=worlds, plan=QUICK)
    assert stage.verdict == "biased" and stage.bias > 0.02, stage


@pytest.mark.parametrize(("words", "verdict"), [(PLAIN, "stationary"), (["loss=contrastive"], "biased")])
def test_batches_are_doubled_until_they_decide(words, verdict):
    few = Plan(batches=16, rows=640, curvature=2)
    (short,), (long,) = (proven(words, plan=replace(few, seconds=seconds)) for seconds in (0, 1e9))
    assert short.verdict == "undecided" and short.seen > ENOUGH and short.batches == 16
    assert long.verdict == verdict and long.seen < ENOUGH and long.batches in (32, 64, 128, 256)
    (at_once,) = proven(words, plan=replace(few, batches=long.batches))
    assert (at_once.statistic, at_once.seen) == pytest.approx((long.statistic, long.seen), rel=1e-6)


def test_the_bias_of_a_contrastive_loss_is_measured():
    """Its optimum is v* + l / (1 - l) (v* - E v*), l = 0.05: a declared bias of five per cent is kept, no other."""
    (stage,) = proven(["loss=contrastive"], plan=FINE)
    assert stage.bias == pytest.approx(0.05, abs=0.01) and "more of the exact field itself" in stage.direction
    assert keeps([stage], 0.053) and not keeps([stage], 0.1) and not keeps([stage], None)


@pytest.mark.parametrize(("stages", "bias"), [(4, 0.18), (6, 0.088)])
def test_the_bias_of_consistency_training_falls_with_its_stages(stages, bias):
    (stage,) = proven(["loss=consistency", f"loss.alpha.stages={stages}"], plan=replace(FINE, batches=24, curvature=4))
    assert stage.verdict == "biased" and abs(stage.bias - bias) < 3 * stage.spread < 0.05, stage


class Distilled(FlowMatchingLoss):
    """The map from noise to data, fitted to its exact ends; `stretch` misses them."""

    learns = "generator"
    world, stretch = MixtureWorld(LinearPath(), *WORLDS["a mixture"]), 1.0

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        x0, start, end = batch.raw_source, torch.zeros(len(batch)), torch.ones(len(batch))
        u = self.stretch * self.world.mean_velocity(x0, start, end)
        return {"loss": (self.mean_velocity(x0, start, end, batch.label) - u).square().mean()}


class Stretched(Distilled):
    stretch = 1.1


class Matching(Distilled):
    marginals_only = True


def test_a_map_from_noise_to_data_is_proven_where_pairs_are_matched():
    (right,), (wrong,), (marginal,) = (proven(PLAIN, kind) for kind in (Distilled, Stretched, Matching))
    assert right.verdict == "stationary" and right.seen < 0.02
    assert wrong.verdict == "biased" and wrong.bias == pytest.approx(0.1, abs=0.01)
    assert marginal.verdict == "stationary" and "every map" in str(
        Matching.exact(Matching.__new__(Matching), Matching.world)
    )


def test_improved_meanflow_is_stationary_with_the_gradient_of_its_derivative():
    assert keeps(proven(["loss=improved_meanflow"], NoStopImproved), None)


FUNCTIONS = """
import torch

def flow_matching(network, x0, x1):
    t = torch.rand(len(x0), 1)
    return (network((1 - t) * x0 + t * x1, t) - (x1 - x0)).square().mean()

def absolute(network, x0, x1):
    t = torch.rand(len(x0), 1)
    return (network((1 - t) * x0 + t * x1, t) - (x1 - x0)).abs().mean()

def broken(network, x0, x1):
    return network(x0, 0.5).missing()

def blind(network, x0, x1):
    return (x1 - x0).square().mean()
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()
    example = page.partition("## Proving a loss")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mine.py").write_text(FUNCTIONS + example)
    monkeypatch.setattr("evaluation.prove.Plan", lambda **words: replace(SHORT, **words))
    monkeypatch.setattr(prove_module, "ENOUGH", 0.3)
    return f"{tmp_path}/mine.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status", "verdict"),
    [
        (["{}:flow_matching"], 0, "stationary: "),
        (["{}:flow_matching", "convention=reversed"], 0, "stationary: "),
        (["{}:loss", "convention=reversed"], 0, "stationary: "),
        (["{}:loss"], 3, "biased: "),
        (["{}:absolute"], 3, "biased: on a mixture"),
        (["loss=reflow", "loss.coupling.teacher=none.pt"], 4, "undecided: the pairs of ReflowCoupling"),
        (["loss=cross_entropy"], 4, "undecided: CrossEntropyLoss learns no flow"),
    ],
)
def test_the_verdict_is_told_in_words_and_by_the_exit_status(words, status, verdict, file, capsys):
    assert main(["--prove", *(word.format(file) for word in words)]) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(verdict)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "takes one loss"),
        (["loss=nothing"], "does not exist"),
        (["loss=mse", "convention=reversed"], "of a function in a file"),
        (["{}:flow_matching", "convention=backwards"], "forward or reversed"),
        (["{}:flow_matching", "{}:absolute"], "takes one loss"),
        (["loss=mse", "loss=meanflow"], "takes one loss"),
        (["leaves.py:f"], "leaves.py cannot be run: SystemExit: 3"),
        (["{}:nothing"], "defines no function nothing"),
        (["nowhere.py:f"], "nowhere.py; write path/to/file.py:function"),
        (["loss=mse", "seconds=many"], "seconds takes a whole number"),
        (["{}:broken"], "AttributeError"),
        (["{}:blind"], "does not depend on its network"),
        (["loss=mse", "--dry-run"], "--dry-run"),
    ],
)
def test_what_cannot_be_proven_is_one_sentence(words, sentence, file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("leaves.py").write_text("raise SystemExit(3)")  # 3 is the status of a biased loss
    before = sorted(tmp_path.iterdir())
    assert main(["--prove", *(word.format(file) for word in words)]) == 1
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1 and sorted(tmp_path.iterdir()) == before

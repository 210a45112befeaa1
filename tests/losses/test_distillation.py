"""Direct distillation: which states of a teacher's path are paired, and teacher, pairs and student in one command."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from evaluation.reflow import TeacherPairs
from evaluation.sample import TrainedModel, load
from losses.couplings import IndependentCoupling, Paths, ReflowCoupling
from losses.distillation_loss import DistillationLoss
from losses.objective import FlowBatch
from losses.paths import LinearPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.flow_matching.mlp import MLP
from models.velocity_model import VelocityModel
from tests.conftest import SMALL
from tests.training.helpers import assert_equal_runs
from tests.training.test_resume import stopped

TIMES = torch.tensor([0.0, 0.2, 0.7, 1.0])


class Doubles(VelocityModel):
    """u(z, r, t) of the flow z_t = z_0 (1 + t)."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        return self.one * unified_input[:, :2] / (1 + unified_input[:, 2:3])


def objective(network: VelocityModel, coupling: object = None, **settings: float) -> DistillationLoss:
    parts = {"path": LinearPath(), "prediction": VelocityPrediction(), "weighting": UniformWeighting()}
    coupling = coupling or ReflowCoupling("none.pt", 500, TeacherPairs(), 4)
    sampler = UniformTimes(ratio=1.0, whole=0.25)
    return DistillationLoss(network=network, coupling=coupling, time_sampler=sampler, **parts, **settings)


def doubling(count: int = 500) -> Paths:
    x0 = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    return Paths(x0 * (1 + TIMES[:, None, None]), TIMES, None)


def drawn(loss: DistillationLoss, rows: int = 400) -> FlowBatch:
    x = torch.zeros(rows, 2)
    return loss.draw(x, x, None, torch.Generator().manual_seed(0))


def test_every_two_points_of_a_path_are_paired_and_the_true_map_has_no_loss():
    loss = objective(Doubles())
    loss.coupling.made = doubling()
    batch = drawn(loss)
    ends = torch.stack([batch.r, batch.t], dim=1)
    assert torch.isin(ends, TIMES).all() and (batch.r < batch.t).all()
    assert (ends[:100] == torch.tensor([0.0, 1.0])).all()  # the whole way
    counts = torch.unique(ends[100:], dim=0, return_counts=True)[1]
    assert len(counts) == 6 and (counts - 50).abs().max() < 4 * 50**0.5
    torch.testing.assert_close(batch.raw_source * (1 + batch.r[:, None]), batch.input)
    assert loss(batch)["loss"] < 1e-11
    assert loss(FlowBatch(**vars(batch) | {"conditional_velocity": batch.raw_target - batch.raw_source}))["loss"] > -1
    wrong = FlowBatch(**vars(batch) | {"unified_input": loss.unified(batch.input, batch.t, batch.t)})
    assert loss(wrong)["loss"] > 0.01


def test_what_cannot_be_distilled_is_said():
    with pytest.raises(UserError, match="use loss/coupling=reflow"):
        objective(Doubles(), IndependentCoupling())
    with pytest.raises(UserError, match="hides no labels"):
        objective(MLP([2], 3), label_dropout=0.1)


def test_the_states_of_a_path_are_those_the_teacher_passes_and_are_made_once(shared_run, tmp_path, monkeypatch):
    teacher = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    like, make = torch.zeros(1, 2), TeacherPairs(str(tmp_path))
    paths, ends = make(str(teacher), 40, like, 3), make(str(teacher), 40, like, 2)
    assert paths.times.tolist() == [0.0, 0.5, 1.0] and paths.of_data
    torch.testing.assert_close(paths.states[[0, -1]], ends.states)
    model = load(teacher, "cpu")
    from solvers.runge_kutta import Midpoint

    half = Midpoint(2).solve(model.velocity, paths.states[0], torch.tensor([0.0, 0.25, 0.5]))  # of the run's four steps
    torch.testing.assert_close(paths.states[1], half)
    monkeypatch.setattr(TrainedModel, "sample", lambda *_, **__: pytest.fail("made again"))
    again = TeacherPairs(str(tmp_path))(str(teacher), 40, like, 3)
    assert torch.equal(again.states, paths.states) and again.label is None
    with pytest.raises(UserError, match="a solver of at least 5 steps"):
        make(str(teacher), 40, like, 6)


WORDS = ["loss=distillation", "loss.coupling.teacher=${run_name}_teacher", "loss.coupling.count=100", "max_steps=6"]
WORDS += ["solver=flow_map", "solver.steps=1", 'teacher="loss=mse max_steps=3 batch_size=128 solver.steps=4"', "seed=3"]
WORDS += ["init_from=${run_name}_teacher"]


@pytest.mark.slow
def test_teacher_pairs_and_student_are_one_command_which_goes_on_wherever_it_was_stopped(small_run, monkeypatch, capsys):
    whole = small_run("x", *WORDS, output="whole")
    assert load(whole / "ckpts/mlp/x_teacher_last.pt").config["seed"] == 3
    assert load(whole / "ckpts/mlp/x_last.pt").config["init_from"] == str(whole / "ckpts/mlp/x_teacher_last.pt")
    for moment, step in {"the teacher's": 2, "the student's": 5}.items():
        capsys.readouterr()
        stopped(small_run, monkeypatch, step, *WORDS)
        said = capsys.readouterr().out
        assert ("x_teacher finished" in said) == (moment == "the student's")
        if step == 2:
            with pytest.raises(UserError, match="only the teacher has begun"):
                small_run("x", "resume=true", output="parts")
        folder = small_run(
            "x", "resume=true", *([*SMALL, *WORDS] if step == 2 else []), "~callbacks.telemetry", output="parts"
        )
        for name in ("x_teacher", "x"):
            assert_equal_runs(whole, folder, name)
        folder.rename(folder.with_name(f"parts_{step}"))


def test_a_student_begins_at_the_weights_of_the_teacher_that_is_trained_first(small_run, capsys):
    folder = small_run("x", *WORDS, "max_steps=1", "optimizer.lr=1e-9")
    assert "second_time" not in capsys.readouterr().out
    teacher, student = (load(folder / f"ckpts/mlp/{name}_last.pt").objective.network for name in ("x_teacher", "x"))
    assert student.time_features.frequencies.tolist() == [1, 2, 4, 8, 16]  # the teacher's, not those of the loss
    for one, other in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (['teacher="loss=nothing"'], "loss=nothing does not exist"),
        (["teacher=3"], "and 3 is not key=value"),
        (['teacher="run_name=y"'], "leave run_name out"),
        (["loss.coupling.teacher=other.pt", "init_from=null"], "teacher= trains the run x_teacher, of which this one reads"),
        (["loss.coupling.teacher=???"], r"such as 'loss.coupling.teacher=\$\{run_name\}_teacher'$"),
        (["solver=midpoint"], "use solver=flow_map"),
        (["solver.steps=4"], "solver.steps=1"),
    ],
)
def test_words_that_make_no_teacher_are_refused_before_anything_is_trained(small_run, tmp_path: Path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        small_run("x", *WORDS, *words)
    assert not (tmp_path / "outputs").exists()

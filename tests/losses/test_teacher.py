"""A teacher's velocity in the place of v_c: closed forms, proofs of every loss that takes one, and what does not fit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import launcher
from common.errors import UserError
from configuration.compose import CONFIG_DIR
from evaluation.prove import Plan, prove
from evaluation.prove_command import prepared
from evaluation.sample import load
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowObjective
from losses.time_samplers import UniformTimes
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from tests.losses.exact_mixture import OBJECTIVES, objective
from tests.training.helpers import weights

LOSSES = [path.stem for path in sorted(Path(CONFIG_DIR, "loss").glob("*.yaml")) if "\nteacher: null" in path.read_text()]
QUICK = Plan(batches=16, rows=160, curvature=1)  # v_T is no random number: nothing is averaged


def test_every_loss_that_learns_a_map_takes_a_teacher():
    names = "alpha_flow consistency improved_meanflow meanflow scm shortcut soflow split_meanflow terminal_velocity"
    assert names.split() == LOSSES


PROOFS = [*((loss, "a mixture") for loss in LOSSES), ("shortcut", "two classes"), ("terminal_velocity", "two classes")]


@pytest.mark.parametrize(("loss", "world"), PROOFS)
def test_the_exact_field_is_least_with_the_exact_teacher_and_not_with_a_stretched_one(loss, world, monkeypatch):
    _, around, path, _, _ = prepared([f"loss={loss}", "loss.teacher=exact"])
    (stage,) = prove(around, path, [world], QUICK)
    assert stage.verdict == "stationary" and stage.seen < 0.02, stage
    if world == "a mixture":
        real = FlowMapObjective.follow
        monkeypatch.setattr(FlowMapObjective, "follow", lambda self, v: real(self, lambda *at: 1.2 * v(*at)))
        (stage,) = prove(around, path, [world], QUICK)
        assert stage.verdict == "biased" and stage.bias > 0.05, stage


class OfTheLine(VelocityModel):
    """The mean velocity of dz/dt = z, where r < t; elsewhere nonsense."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        gap = (times[:, 1] - times[:, 0])[:, None]
        mean = z * torch.where(gap > 0, torch.expm1(gap) / gap.clamp(min=1e-6), torch.tensor(7.0))
        return self.scale * mean


def around(name: str, network: VelocityModel, teacher: str | None, **other: Any) -> FlowObjective:
    made = objective(name, network, teacher=teacher, **other)
    if isinstance(made, FlowMapObjective) and teacher:
        made.follow(lambda z, r, label: z)
    return made


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("mse", "meanflow_separate")])
def test_nothing_is_left_of_v_c_nor_of_the_networks_own_velocity(name):
    """With v_T = z the mean velocity is z (e^(t - r) - 1) / (t - r), whatever the data, the loss there zero."""
    x0, x1 = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(0))
    found = {}
    for teacher in ("exact", None):
        made = around(name, OfTheLine(), teacher)
        batch = made.draw(x0, x1, None, torch.Generator().manual_seed(1), 1.0)
        terms = made(batch, made)
        found[teacher] = float(terms["mean" if name == "improved_meanflow" else "loss"].detach())
    own = 0.0 if name == "split_meanflow" else 2e-3  # whose intervals know nothing but themselves
    assert found["exact"] < 1e-3 and found[None] >= own, found


def test_a_teacher_stands_where_v_c_stood_on_the_diagonal():
    made = around("split_meanflow", OfTheLine(), "exact", time_sampler=UniformTimes(0.0))
    x0, x1 = torch.randn(2, 64, 2)
    batch = made.draw(x0, x1, None, torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(batch)["loss"], (6 * batch.input).square().sum(1).mean())


@pytest.mark.parametrize("b", ["0", "0.5"])
def test_meanflow_is_stationary_for_every_share_of_v_c_in_its_direction(b):
    _, build, path, _, _ = prepared(["loss=meanflow", f"loss.variance_reduction={b}"])
    (stage,) = prove(build, path, ["a mixture"], Plan(batches=32, rows=640, curvature=2))
    assert stage.verdict != "biased" and stage.seen < 0.25, stage


def test_the_direction_is_a_share_of_v_c_and_the_rest_of_the_network():
    x0, x1 = torch.randn(2, 64, 2)
    for b in (0.0, 0.25, 1.0):
        made = around("meanflow", OfTheLine(), None, variance_reduction=b)
        batch = made.draw(x0, x1, None, torch.Generator().manual_seed(1))
        v = batch.conditional_velocity[:40]
        found = made.direction(batch, v)
        torch.testing.assert_close(found, b * v + (1 - b) * 7 * batch.input[:40])
        assert not found.requires_grad and (found is v) == (b == 1)
    with pytest.raises(TypeError, match="variance_reduction"):
        around("improved_meanflow", OfTheLine(), None, variance_reduction=0.5)


def test_the_exact_teacher_is_that_of_the_data_and_of_the_configuration(small_run):
    folder = small_run("x", "loss=terminal_velocity", "loss.teacher=exact", "max_steps=4", "dataloaders=gaussian")
    model = load(folder / "ckpts/mlp/x_last.pt", device="cpu")
    assert model.config["loss"]["teacher"] == "exact"
    small_run("own", "loss=terminal_velocity", "max_steps=4", "dataloaders=gaussian")
    one, two = (weights(folder, name) for name in ("x", "own"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    small_run("judged", f"eval_checkpoint={folder / 'ckpts/mlp/x_last.pt'}")
    judged = json.loads((folder / "evaluations/judged.json").read_text())["eval/loss"]
    status = json.loads((folder / "runs/x/status.json").read_text())
    assert judged == pytest.approx(status["scores"]["eval/loss"], rel=1e-4) and math.isfinite(judged)


def test_a_checkpoint_teaches_its_own_velocity(small_run, shared_run):
    path = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    seen: list[FlowMapObjective] = []
    real = FlowMapObjective.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMapObjective, "follow", lambda self, v: (seen.append(self), real(self, v))[1])
        small_run("x", "loss=meanflow", f"loss.teacher={path}", "max_steps=2")
    z, r = torch.randn(5, 2), torch.rand(5)
    for made in seen:
        torch.testing.assert_close(made.instant_velocity(z, r, None), load(path, "cpu").velocity(z, r))
    assert len(seen) == 2 and seen[0].training and not any(name.startswith("teacher") for name, _ in seen[0].named_modules())


GUIDED = ["loss/guidance=meanflow", "loss.guidance.omega=2"]
THREE = ["dataloaders=gaussian", "dataloaders.state_shape=[3]"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["loss.teacher=nowhere.pt"],
            "loss.teacher=nowhere.pt is not a file; give exact, or the checkpoint of a trained flow",
        ),
        (["loss.teacher=exact", "dataloaders=moons"], "loss.teacher=exact: the truth of Moons data is not known"),
        (["loss.teacher=exact", "loss/coupling=minibatch_ot"], "loss.teacher=exact: optimal-transport pairs"),
        (["loss.teacher=exact", "source=moons"], "loss.teacher=exact: the density of the source is not known"),
        (["loss.teacher={flow}", "conditional=true"], "its number of classes is 0, here it is 5"),
        (["loss.teacher={flow}", "loss/path=cosine"], "its path is LinearPath, here it is CosinePath"),
        (["loss.teacher={flow}", "source.std=2"], "its noise is"),
        (["loss.teacher={unhidden}", "conditional=true", *GUIDED], "knows no velocity of a hidden label, as loss/guidance"),
        (["loss.teacher={flow}", *THREE], r"its state shape is \[2\], here it is \[3\]"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_sentence_before_anything_is_written(
    words, sentence, small_run, shared_run, tmp_path
):
    flow = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    unhidden = flow
    if "{unhidden}" in words[0]:
        unhidden = shared_run("seen", "max_steps=2", "conditional=true", "loss.label_dropout=0") / "ckpts/mlp/seen_last.pt"
    with pytest.raises(UserError, match=sentence):
        small_run("x", "loss=meanflow", *(word.format(flow=flow, unhidden=unhidden) for word in words))
    assert not (tmp_path / "outputs/runs/x").exists()


def test_losses_of_velocities_take_no_teacher(capsys):
    assert launcher.main(["run_name=x", "loss=mse", "loss.teacher=exact"]) == 1
    assert "loss.teacher is a setting of loss=alpha_flow or consistency" in capsys.readouterr().err

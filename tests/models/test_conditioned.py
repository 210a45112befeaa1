"""Conditions beside the state: how networks are given them, hidden and guided like classes, from the file to the sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from configuration.build import build
from configuration.compose import compose_config, groups, resolved
from configuration.nodes import CONFIG_DIR
from dataloaders.array_dataset import ArrayDataset
from dataloaders.base_dataloaders import EpochPlan
from evaluation.evaluator import held_out_beside
from evaluation.parts import build_objective, evaluation_inputs
from evaluation.report import draw_pairs, is_drawn_from_pictures
from evaluation.sample import load
from helpers_cfg import Autoguidance, ClassifierFreeGuidance
from losses.couplings import Paths
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowObjective
from losses.terms import named_terms
from models.conditioned import Conditioned, widened
from models.inputs import classes_in, join_condition, make_unified_flow_matching_input
from models.velocity_model import VelocityModel
from scripts import sample
from tests.models.configured import model_node, shallow, suits
from training.ema import ConstantEMA
from training.state import averaged_objective

REGRESSION = ["dataloaders=regression", "conditional=true"]
COMPARING = ("drifting", "inductive_moment_matching")  # rows of one label with each other
FLOWS = [name for name in groups()["loss"] if name != "cross_entropy"]
MODELS = [name for name in groups()["model"] if "models.classifier." not in (CONFIG_DIR / f"model/{name}.yaml").read_text()]


class Seen(VelocityModel):
    """Keeps what it was given, and answers with the state it sees."""

    def __init__(self, num_classes: int = 0):
        super().__init__()
        self.num_classes, self.begun = num_classes, False

    def init_weights(self) -> None:
        self.begun = True

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        self.given, self.label = unified_input, label
        return unified_input[:, :-2]


@pytest.mark.parametrize(("state", "condition", "wide"), [
    ((2,), (3,), [6]), ((2,), (1, 2, 2), [7]), ((1, 4, 4), (3,), [5, 4, 4]), ((2, 4, 4), (3, 4, 4), [6, 4, 4]),
    ((1, 4, 4), (2, 16, 16), [4, 4, 4]),
])  # fmt: skip
@pytest.mark.parametrize("classes", [0, 3])
def test_state_shown_and_condition_stand_beside_each_other(
    state: tuple[int, ...], condition: tuple[int, ...], wide: list[int], classes: int
) -> None:
    x, y = torch.randn(5, *state), torch.rand(5, *condition, requires_grad=True)
    inner = Seen(classes)
    model, label = Conditioned(inner, state, condition), join_condition(torch.arange(5) % 3, y)
    unified = make_unified_flow_matching_input(x, torch.rand(5, 2))
    assert torch.equal(model(unified, label), x) and widened(state, condition) == wide
    assert list(inner.given.shape[1:]) == [wide[0] + 2, *wide[1:]]
    shown, seen = inner.given[:, len(x[0])], inner.given[:, len(x[0]) + 1 : -2]
    seen.sum().backward()
    assert y.grad is not None and (y.grad > 0).all()  # no pixel is passed over
    assert (shown == 1).all() and torch.equal(inner.given[:, -2:], unified[:, -2:])
    if len(condition) == 1 or len(state) == 1:
        assert torch.allclose(seen.reshape(*seen.shape[:2], -1).mean(-1), y.flatten(1))
    else:
        assert torch.allclose(seen.mean((2, 3)), y.mean((2, 3)), atol=0.05 * (condition[1:] != state[1:]) + 1e-6)
    assert (inner.label is None) == (classes == 0) and (classes == 0 or inner.label.tolist() == [0, 1, 2, 0, 1])
    model.init_weights()
    assert inner.begun
    for hidden in (None, model.null_label(label)):
        model(unified, hidden)
        assert (inner.given[:, len(x[0]) : -2] == 0).all() and (classes == 0 or (inner.label == classes).all())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_a_condition_and_its_answer_depends_on_it(name: str) -> None:
    data = suits(name)[0]
    node = model_node(name, data, *shallow(name))
    shape = node["state_shape"]
    torch.manual_seed(0)
    for condition in ((3,), (2, 8, 8)):
        model = Conditioned(build(node | {"state_shape": widened(shape, condition)}), shape, condition)
        model.init_weights()
        for weight in model.parameters():  # gates and outputs that start at zero
            torch.nn.init.normal_(weight, std=0.1)
        x, y = torch.randn(2, *shape), torch.randn(2, *condition, requires_grad=True)
        v = model(make_unified_flow_matching_input(x, torch.rand(2, 2)), join_condition(None, y))
        v.square().sum().backward()
        assert v.shape == x.shape and y.grad is not None and (y.grad != 0).any()


def objective_of(loss: str, *words: str) -> FlowObjective:
    config = resolved(compose_config(["run_name=x", f"loss={loss}", "model.width=16", "model.depth=2", *REGRESSION, *words]))
    made = build_objective(config, torch.device("cpu"))
    assert isinstance(made, FlowObjective)
    return made


@pytest.mark.parametrize("loss", FLOWS)
def test_every_objective_learns_with_conditions(loss: str) -> None:
    teacher = ["loss.coupling.teacher=none.pt"] if loss in ("reflow", "distillation") else []
    objective, label = objective_of(loss, *teacher), join_condition(None, torch.randn(64, 2))
    if teacher:
        objective.coupling.made = Paths(torch.randn(2, 64, 2), torch.tensor([0.0, 1.0]), label)
    if isinstance(objective, FlowMapObjective) and objective.teacher:
        objective.follow(lambda z, r, label: 1 - z)
    if loss in COMPARING:
        with pytest.raises(UserError, match="compares rows of one label"):
            objective.draw(torch.randn(64, 2), torch.randn(64, 2), label, torch.Generator(), 0.5)
        return
    batch = objective.draw(torch.randn(64, 2), torch.randn(64, 2), label, torch.Generator().manual_seed(0), 0.5)
    assert batch.label is not None and batch.label.shape == (64, 4)
    named_terms(objective(batch, averaged_objective(objective, ConstantEMA())), {})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.network.parameters())


def test_class_and_condition_are_hidden_together_in_a_share_of_the_rows() -> None:
    objective = objective_of("mse", "loss.label_dropout=0.3")
    objective.network.num_classes = 4
    label = join_condition(torch.zeros(20_000, dtype=torch.int64), torch.randn(20_000, 2))
    drawn = objective.drop_labels(label, torch.Generator().manual_seed(0))
    assert drawn is not None
    hidden = drawn[:, 1] == 0
    assert abs(hidden.float().mean() - 0.3) < 0.02 and torch.equal(drawn[~hidden], label[~hidden])
    assert (drawn[hidden, 0] == 4).all() and (drawn[hidden, 2:] == 0).all()


def test_guidance_goes_from_the_hidden_to_the_shown_condition() -> None:
    network = objective_of("mse").network
    torch.nn.init.normal_(network.network.layers[-1].weight)
    unified, label = torch.rand(6, 4), join_condition(None, torch.randn(6, 2))
    label[4:] = network.null_label(label[4:])
    shown, hidden = network(unified, label), network(unified, None)
    guided = ClassifierFreeGuidance(network, 3.0)(unified, label)
    assert torch.allclose(guided[:4], (hidden + 3 * (shown - hidden))[:4], atol=1e-5)
    assert torch.allclose(guided[4:], hidden[4:], atol=1e-6) and not torch.allclose(shown[:4], hidden[:4])
    guide = objective_of("mse").network
    torch.nn.init.normal_(guide.network.layers[-1].weight)
    away = Autoguidance(network, guide, 2.0)
    assert torch.allclose(away(unified, label), 2 * shown - guide(unified, label), atol=1e-5) and away.is_conditional
    assert torch.allclose(ClassifierFreeGuidance(away, 1.0)(unified, label), away(unified, label))
    with pytest.raises(UserError, match=r"takes conditions of shape \(3,\), the guided one \(2,\)"):
        Autoguidance(network, Conditioned(Seen(), (2,), (3,)), 2.0)


def test_classes_are_read_where_data_have_some() -> None:
    classes, condition = torch.tensor([2, 0, 1]), torch.randn(3, 2)
    joined = classes_in(join_condition(classes, condition), 3)
    assert joined is not None and torch.equal(joined, classes)
    assert classes_in(join_condition(None, condition), 0) is None and classes_in(None, 0) is None


def test_conditions_of_a_file_stay_with_their_rows(tmp_path: Path) -> None:
    x, y, classes = np.random.randn(40, 2), np.random.randn(40, 1, 2, 2), np.arange(40) % 3
    np.savez(tmp_path / "a.npz", x=x, condition=y, y=classes)
    dataset = ArrayDataset(str(tmp_path / "a.npz"))
    states, label = dataset.training_part(40)
    assert label is not None and dataset.condition_shape == (1, 2, 2) and dataset.num_classes == 3
    rows = zip(x.astype("f").tolist(), classes, y.reshape(40, 4).astype("f").tolist(), strict=True)
    of = {tuple(row): (c, *flat) for row, c, flat in rows}
    for state, row in zip(states.tolist(), label.tolist(), strict=True):
        assert (row[0], *row[2:]) == of[tuple(state)] and row[1] == 1


@pytest.mark.parametrize(("condition", "said"), [
    (np.zeros((39, 2)), r"conditions in .* shape \(39, 2\); .*\(40, P\)"), (np.zeros(40), r"shape \(40,\)"),
    (np.array([["a"]] * 40), "type <U1"), (np.full((40, 2), np.nan), "40 of the 40 rows"),
])  # fmt: skip
def test_unfit_conditions_of_a_file_are_one_sentence(tmp_path: Path, condition: np.ndarray, said: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((40, 2)), condition=condition)
    with pytest.raises(UserError, match=said):
        ArrayDataset(str(tmp_path / "a.npz"))


@pytest.mark.slow
@torch.no_grad()
def test_samples_stand_beside_what_they_were_drawn_from_and_what_that_was_of(tmp_path: Path) -> None:
    small = [f"model.{key}=8" for key in ("width", "inner_width", "embedding")]
    data = ["dataloaders=photos", "dataloaders.condition=grey", "dataloaders.crops=50", "dataloaders.held_out_crops=20"]
    words = ["run_name=x", *data, "model=cnn", *small, "conditional=true", "solver=euler", "solver.steps=1"]
    config = resolved(compose_config([*words, "evaluation.samples=25", "evaluation.final_samples=25"]))
    objective = build_objective(config, torch.device("cpu"))
    given = evaluation_inputs(objective, config, torch.device("cpu"), tmp_path, "none")
    made = build(config["evaluation"]).sample(objective, given)
    x, label = held_out_beside(made)
    assert (
        len(x) == 20
        and label is not None
        and torch.equal(label, made.label[:20])
        and torch.equal(label[:5], made.label[20:])
    )
    red, green, blue = x.unbind(1)
    assert torch.allclose((0.299 * red + 0.587 * green + 0.114 * blue).flatten(1), label[:, 2:], atol=1e-6)
    flipped, labels = next(given.dataset.epoch(EpochPlan(50, torch.Generator(), torch.Generator().manual_seed(0))))
    grey = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), flipped).flatten(1)
    assert torch.allclose(grey, labels[:, 2:], atol=1e-6) and labels[:, 0].unique().tolist() == [0, 1]
    draw_pairs(tmp_path / "pairs.png", made, "title", 16)
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.width > 3 * 4 * 32 and is_drawn_from_pictures(made)


def test_data_without_labels_or_conditions_make_no_conditional_run(small_run: Callable[..., Path], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.randn(40, 2))
    with pytest.raises(UserError, match="conditional=true needs labels"):
        small_run("x", "dataloaders=array", f"dataloaders.path={tmp_path / 'a.npy'}", "conditional=true")


def test_a_run_with_picture_conditions_trains_guided_and_is_sampled_with_any(
    small_run: Callable[..., Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", x=np.random.randn(60, 1, 4, 4), condition=np.random.randn(60, 2, 8, 8), y=np.arange(60) % 2)
    words = ["dataloaders=array", f"dataloaders.path={tmp_path / 'a.npz'}", "dataloaders.epoch_size=null", "model=cnn"]
    small = [f"model.{key}=8" for key in ("width", "inner_width", "embedding")] + ["model.inner_blocks=1"]
    folder = small_run("x", *words, *small, "conditional=true", "guidance=cfg", "max_steps=2", "evaluation=generator")
    model = load(folder / "ckpts/cnn/x_last.pt", "cpu")
    y = torch.randn(2, 8, 8)
    given: list[Any] = [{}, {"label": 1}, {"condition": y}, {"condition": y, "label": 1}]
    assert all(model.sample(3, **words).shape == (3, 1, 4, 4) for words in given)
    label = model.labels(3, 1, y)
    assert label is not None and label[:, 0].tolist() == [1, 1, 1] and torch.equal(label[0, 2:], y.flatten())
    known, label = model.real(60)[1], model.labels(9, 1)
    assert known is not None and label is not None and (label[:, 0] == 1).all()
    assert torch.equal(label[:, 1:], torch.cat([known, known])[:9, 1:])  # held-out conditions in turn
    with pytest.raises(UserError, match=r"condition takes a tensor of shape \[2, 8, 8\]"):
        model.sample(3, condition=torch.zeros(4))
    np.save(tmp_path / "y.npy", y.numpy())
    words = [f"ckpt={folder / 'ckpts/cnn/x_last.pt'}", "n=3", "device=cpu", f"out={tmp_path / 's.npz'}"]
    assert sample.main([*words, f"condition={tmp_path / 'y.npy'}", "label=1"]) == 0
    with np.load(tmp_path / "s.npz") as made:
        assert made["y"].tolist() == [1, 1, 1] and np.array_equal(made["condition"][2], y.numpy())
    assert sample.main([*words, "condition=none.npy"]) == 1

"""Classifiers through the same trainer: their models, their loss, their evaluation, and the digits recipe."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import launcher
from backends.submission import prepare
from common.errors import UserError
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from dataloaders.sources import GaussianSource
from dataloaders.tensor_dataset import TensorDataset, balanced_order
from evaluation.classifier_evaluator import ClassifierEvaluator, confusion_matrix
from evaluation.metrics.base_metric import EvaluationInputs
from evaluation.report import class_table, draw_picture, print_scores
from evaluation.sample import load
from losses.cross_entropy_loss import CrossEntropyLoss, LabelledBatch
from models.classifier.classifier import Classifier
from models.classifier.resnet9 import Residual
from models.flow_matching.mlp import MLP
from run_files.checkpoint import load_checkpoint
from scripts import sample
from solvers.runge_kutta import Euler
from training.assemble import assemble
from training.loop import epoch_groups

TARGETS = {name: OmegaConf.load(CONFIG_DIR / f"model/{name}.yaml")["_target_"] for name in groups()["model"]}
NAMES = [name for name, target in TARGETS.items() if target.startswith("models.classifier.")]
every_classifier = pytest.mark.parametrize("name", NAMES)
PARAMETERS = {
    "lenet": 61_706,
    "resnet18": 11_173_962,
    "resnet50": 25_557_032 - 2048 * 990 - 990 - (7 * 7 - 3 * 3) * 3 * 64,  # that of ImageNet but for its head and stem
    "wide_resnet": 36_479_194,
    "resnet9": 6_573_120,
    "small_cnn_classifier": 480_450,
    "vit_base": 85_152_010,
}  # of 3x32x32 images in 10 classes, or SHAPES
SHAPES = {"small_cnn_classifier": [1, 8, 8], "lenet": [1, 32, 32]}
SMALL = ["model.width=8", "loss=cross_entropy", "dataloaders=digits", "dataloaders.epoch_size=1438"]


def fresh(name: str, *overrides: str) -> Classifier:
    torch.manual_seed(0)
    shape = str(SHAPES.get(name, [3, 32, 32])).replace(" ", "")
    words = ["run_name=x", "dataloaders=random_images", f"dataloaders.state_shape={shape}", f"model={name}"]
    model: Classifier = build(resolved(compose_config([*words, "loss=cross_entropy", *overrides]))["model"])
    model.init_weights()
    return model


def images(name: str, rows: int = 4) -> Tensor:
    return torch.randn(rows, *SHAPES.get(name, [3, 32, 32]), generator=torch.Generator().manual_seed(1))


@every_classifier
def test_it_has_the_size_it_is_known_for(name: str) -> None:
    with torch.device("meta"):
        count = fresh(name).parameter_count()
    assert count == PARAMETERS.get(name, count)
    assert {"resnet18", "small_cnn_classifier"} <= set(NAMES)


@every_classifier
def test_logits_are_the_last_layer_of_the_features_and_rows_do_not_see_each_other(name: str) -> None:
    model, x = fresh(name, "model.width=8").eval(), images(name)
    logits, features = model(x), model.features(x)
    assert isinstance(model, Classifier) and logits.shape == (4, 10) and logits.isfinite().all()
    assert torch.allclose(nn.functional.linear(features, model.head.weight, model.head.bias), logits, atol=1e-5)
    assert torch.allclose(model(x[2:3])[0], logits[2], atol=1e-5)
    turned = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(turned, logits, atol=1e-5)


@every_classifier
def test_every_parameter_can_learn_and_dropout_is_of_training_alone(name: str) -> None:
    model, x = fresh(name, "model.width=8", "model.dropout=0.5"), images(name)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_residual_pair_of_nothing_passes_its_input_on(norm: str) -> None:
    pair, x = Residual(8, norm), torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for part in pair.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)
    assert torch.equal(pair(x), x)


@every_classifier
def test_the_compiled_loss_is_the_eager_one(name: str) -> None:
    """Traced whole; no kernels are generated."""
    shallow = ["model.depth=2"] * name.startswith("vit_") + {
        "resnet50": ["model.multipliers=[4,8]", "model.blocks=1"], "wide_resnet": ["model.blocks=1"]
    }.get(name, [])  # fmt: skip
    loss = CrossEntropyLoss(fresh(name, "model.width=8", *shallow), label_smoothing=0.1).train()
    batch = LabelledBatch(images(name), torch.arange(4))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(batch)["loss"], loss(batch)["loss"], rtol=1e-4)


class Fixed(Classifier):
    """Logits that are the pixels."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes, self.head = num_classes, nn.Linear(1, 1)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_its_definition(smoothing: float) -> None:
    logits, label = torch.randn(6, 1, 1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 0])
    expected = 0.0
    for row, k in zip(logits.flatten(1).tolist(), label.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        target = [smoothing / 4 + (1 - smoothing) * (i == k) for i in range(4)]
        expected -= sum(q * (value - normaliser) for q, value in zip(target, row, strict=True)) / 6
    terms = CrossEntropyLoss(Fixed(4), smoothing)(LabelledBatch(logits, label))
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["accuracy"].item() == pytest.approx((logits.flatten(1).argmax(1) == label).float().mean().item())


def test_a_classifiers_batch_is_the_images_themselves_and_draws_nothing() -> None:
    loss, generator = CrossEntropyLoss(Fixed(4)), torch.Generator().manual_seed(0)
    before, x, label = generator.get_state(), torch.randn(3, 1, 1, 4), torch.arange(3)
    batch = loss.batch(GaussianSource([1, 1, 4]), x, label, generator, 0.5)
    assert torch.equal(batch.images, x) and torch.equal(batch.label, label) and len(batch) == 3
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["loss=cross_entropy", "model=cnn", "dataloaders=digits"], "trains a classifier, and this model gives velocities"),
        (["loss=cross_entropy", "model=mlp"], "trains a classifier, and this model gives velocities"),
        (["loss=mse", "model=resnet18", "dataloaders=digits"], "teaches velocities, and this model is a classifier"),
        (["loss=meanflow", "model=small_cnn_classifier", "dataloaders=digits"], "this model is a classifier"),
        (["loss=cross_entropy"], "takes images"),
        (["loss=cross_entropy", "dataloaders=digits", "evaluation=generator"], "use evaluation=classifier"),
        (["loss=mse", "evaluation=classifier"], "use evaluation=generator"),
        (["loss=cross_entropy", "dataloaders=digits", "loss.label_smoothing=1"], "label_smoothing takes"),
        (["loss=cross_entropy", "dataloaders=digits", "guidance=cfg"], "guidance steers samples"),
        (["loss=cross_entropy", "dataloaders=digits", "model.width=12"], "multiples of 8"),
        (["loss=cross_entropy", "dataloaders=digits", "model.norm=layer"], "batch or group"),
        (["loss=cross_entropy", "dataloaders=digits", "model.multipliers=[1,1,1,1,1]"], "halve images 4 times"),
        (["loss=cross_entropy", "dataloaders=digits", "model=resnet50", "model.multipliers=[4,8]"], "are of 4 stages, and"),
        (["loss=cross_entropy", "dataloaders=array", "dataloaders.path={npy}"], "a classifier needs labels"),
        (["balanced=true"], "balanced=true needs a finite set"),
    ],
)  # fmt: skip
def test_an_impossible_pair_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((20, 1, 8, 8), dtype="float32"))
    filled = [word.format(npy=tmp_path / "x.npy") for word in words]
    with pytest.raises(UserError, match=sentence) as caught:
        assemble(prepare(["run_name=x", f"output_dir={tmp_path}", "trackio.enabled=false", "device=cpu", *filled]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def known_set(classes: int, rows: int = 400) -> TensorDataset:
    """One-hot images of their classes; all of them but the first `classes` are held out."""
    label = torch.arange(rows) % classes
    states = nn.functional.one_hot(label, classes).float()[:, None, None]
    return TensorDataset(states, label, torch.arange(classes, rows), num_classes=classes)


class Confused(Fixed):
    """Takes class 1 for 2 and has class 0 second wherever it is wrong."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1).clone()
        logits[:, 2] += 2 * logits[:, 1]
        return logits - 0.01 * torch.arange(logits.shape[1])


@pytest.mark.parametrize("classes", [4, 8, 30])
def test_the_evaluator_counts_right_answers_by_class(classes: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = known_set(classes)
    evaluator = ClassifierEvaluator(10_000, 10_000, batch_size=7)
    parts = (dataset, GaussianSource([1]), Euler(1), 0, "key", tmp_path, True)
    evaluation = evaluator.evaluate(EvaluationInputs(CrossEntropyLoss(Confused(classes)), *parts))
    held_out = dataset.held_out_labels
    assert held_out is not None
    share = (held_out == 1).float().mean().item()
    values = evaluation.values
    assert values["eval/accuracy"] == pytest.approx(1 - share)
    assert values["eval/accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / len(held_out)))
    assert values["eval/accuracy_class_min"] == 0
    if classes > 5:
        assert values["eval/accuracy_top5"] == pytest.approx(1)
    assert ("eval/accuracy_class_3" in values) == (classes <= 20)
    assert evaluation.confusion.sum() == len(held_out)
    assert torch.equal(evaluation.confusion.sum(1), held_out.bincount())
    assert evaluation.confusion[1, 2] == (held_out == 1).sum() and evaluation.confusion[1, 1] == 0
    assert f"| 1 | {int((held_out == 1).sum())} | 0.0% | 0.0% | 0.0% | 2 (" in class_table(evaluation)
    dataset.class_names = [f"kind\n| $k{k}\x1b\udcff" for k in range(classes)]
    evaluation = evaluator.evaluate(EvaluationInputs(CrossEntropyLoss(Confused(classes)), *parts))
    named = rf"| kind \| $k1\x1b\udcff | {int((held_out == 1).sum())} | 0.0% | 0.0% | 0.0% | kind \| $k2\x1b\udcff ("
    assert named in class_table(evaluation)
    assert draw_picture(tmp_path / "picture.png", evaluation, "x")
    assert Image.open(tmp_path / "picture.png").size[0] >= 600
    table = np.loadtxt(tmp_path / "picture.csv", delimiter=",", dtype=int)
    assert (table == evaluation.confusion.numpy()).all()
    print_scores(evaluation, 0)
    shown = capsys.readouterr().out
    assert "held-out images" in shown and "kind | $k0\\x1b\\udcff 100.0%," in shown


def test_a_confusion_matrix_has_classes_as_rows() -> None:
    label, predicted = torch.tensor([0, 0, 2]), torch.tensor([1, 0, 0])
    assert confusion_matrix(label, predicted, 3).tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_a_balanced_epoch_draws_each_class_alike_and_uses_all_of_the_small_ones() -> None:
    labels = torch.cat([torch.zeros(90), torch.ones(9), torch.full((2,), 3.0)]).long()
    drawn = balanced_order(labels, torch.Generator().manual_seed(0))
    assert len(drawn) == 101 and labels[drawn].bincount().tolist() == [33, 34, 0, 34]
    assert len(drawn[labels[drawn] == 0].unique()) == 33
    assert drawn.bincount(minlength=101)[90:99].tolist().count(3) >= 2 and (drawn.bincount()[99:] == 17).all()
    again, other = (balanced_order(labels, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


def test_balanced_is_a_setting_of_the_run(tmp_path: Path) -> None:
    label = np.repeat([0, 1], [90, 10])
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(100, 2)), y=label)
    words = ["run_name=x", f"output_dir={tmp_path}", "trackio.enabled=false", "device=cpu", "batch_size=90"]
    data = ["dataloaders=array", f"dataloaders.path={tmp_path / 'x.npz'}", "conditional=true", "loss.label_dropout=0"]
    shares = []
    for balanced in ("false", "true"):
        (group,) = epoch_groups(assemble(prepare([*words, *data, f"balanced={balanced}"])))
        shares.append(group[0].label.float().mean().item())
    assert shares == pytest.approx([0.1, 0.5])


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_checkpoint(folder / f"ckpts/small_cnn_classifier/{name}_last.pt")["network"]


@pytest.mark.slow
def test_a_classifier_is_trained_resumed_scored_and_started_from(small_run, tmp_path, capsys) -> None:
    """With batch norm, whose running means are part of the state."""
    words = [*SMALL, "model=small_cnn_classifier", "model.norm=batch", "evaluation=classifier", "batch_size=512"]
    whole = small_run("x", *words, "epochs=2", "schedule=constant", output="whole")
    parts = small_run("x", *words, "epochs=1", "schedule=constant", output="parts")
    small_run("x", "resume=true", "epochs=2", output="parts")
    one, two = weights(whole, "x"), weights(parts, "x")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert "stem.1.running_mean" in one and one["stem.1.running_mean"].any()
    rows = [json.loads(line) for line in (whole / "runs/x/metrics.jsonl").read_text().splitlines()]
    assert "train/accuracy" in set().union(*rows) and 0 < rows[-1]["eval/accuracy"] <= 1
    assert "| class | images |" in (whole / "runs/x/log.md").read_text()
    path = whole / "ckpts/small_cnn_classifier/x_last.pt"
    capsys.readouterr()
    small_run("any", f"eval_checkpoint={path}", output="whole")
    assert f"eval/accuracy            {rows[-1]['eval/accuracy']:.4g}" in capsys.readouterr().out
    assert (whole / "evaluations/any.png").exists()
    started = small_run("y", *words, f"init_from={path}", "max_steps=1", "optimizer.lr=1e-9", output="whole")
    assert torch.allclose(weights(started, "y")["head.weight"], load_checkpoint(path)["ema"]["head.weight"], atol=1e-6)


def test_what_samples_says_that_a_classifier_makes_none(small_run, tmp_path, capsys) -> None:
    folder = small_run("x", *SMALL, "model=small_cnn_classifier", "evaluation=classifier", "max_steps=1")
    path = folder / "ckpts/small_cnn_classifier/x_last.pt"
    assert sample.main([f"ckpt={path}"]) == 1
    said = capsys.readouterr().err
    assert "holds a classifier, which makes no samples" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="which makes no samples"):
        load(path)
    guided = ["guidance=autoguidance", f"guidance.checkpoint={path}", "dataloaders=digits", "model=cnn"]
    with pytest.raises(UserError, match="holds a classifier"):
        assemble(prepare(["run_name=z", f"output_dir={tmp_path}", "trackio.enabled=false", "device=cpu", *guided]))


def test_a_velocity_model_is_no_classifier() -> None:
    with pytest.raises(UserError, match="gives velocities"):
        CrossEntropyLoss(MLP([2]))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_digits_recipe_reaches_its_accuracy(tmp_path: Path) -> None:
    """Cut to a third of its length, and to its looser end: in full it takes 25 s of a core."""
    launcher.run(
        "run_name=d", "experiment=digits_classifier", "epochs=13", f"output_dir={tmp_path}", "device=cpu",
        f"log.file={tmp_path / 'LOG.md'}", "trackio.enabled=false", "eval_every=13", "~callbacks.pictures",
    )  # fmt: skip
    status = json.loads((tmp_path / "runs/d/status.json").read_text())
    assert status["scores"]["eval/accuracy"] >= 0.97


def test_the_log_has_targets_and_the_difference_to_the_run_before(small_run) -> None:
    words = [*SMALL, "model=small_cnn_classifier", "evaluation=classifier", "max_steps=2"]
    folder = small_run("first", *words)
    assert "| eval/accuracy | first |" not in (folder / "runs/first/log.md").read_text()
    small_run("other", *words, "balanced=true", "log.targets={eval/accuracy: 2.0, eval/loss: 100, eval/fid: 3}")
    log = (folder / "runs/other/log.md").read_text()
    assert "| score | first | here | difference |" in log and "| eval/accuracy | " in log
    for row in ("| eval/accuracy | >= 2 |", "| eval/loss | <= 100 |", "| eval/fid | 3 | not measured | no |"):
        assert row in log
    assert log.count("| yes |") == 1 and log.count("| no |") == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cifar10_classifier", "cifar100_classifier"])
def test_the_cifar_recipes_run_on_images_of_their_shape(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path
    launcher.run(
        "run_name=x", f"experiment={recipe}", "dataloaders=random_images", "dataloaders.state_shape=[3,32,32]",
        "~dataloaders.flip", "~dataloaders.crop_padding", "dataloaders.num_classes=10", "model.width=8", "max_steps=2",
        f"output_dir={folder}", f"log.file={folder / 'LOG.md'}", "trackio.enabled=false", "device=cpu",
    )  # fmt: skip
    config = OmegaConf.load(folder / "runs/x/config.yaml")
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert (config.batch_size, config.epochs, config.seed, config.schedule.rise) == (64, 40, 1111, 0.3)
    assert config.model.multipliers == [1, 2, 4, 8] and config.ema.decay == 0
    picture = folder / "runs/x/samples/step_00000002.png"
    assert picture.exists() and picture.with_suffix(".csv").exists()

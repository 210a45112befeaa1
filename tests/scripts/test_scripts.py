"""The fronts in scripts/: from any folder, with one sentence for a mistake."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from configuration import stored as vetting
from dev import floor_check
from evaluation.evaluator import GeneratorEvaluator
from evaluation.metrics.base_metric import EvaluationInputs
from evaluation.metrics.energy_distance import EnergyDistance
from evaluation.parts import build_dataset, build_source, dataset_key
from evaluation.report import draw_images, draw_picture, drawable
from evaluation.sample import load
from scripts import sample
from solvers.runge_kutta import Euler
from tests.conftest import DIGITS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(shared_run) -> Path:
    return shared_run("x", "epochs=1") / "ckpts/mlp/x_last.pt"


@pytest.fixture
def of_classes(shared_run) -> Path:
    return shared_run("c", "conditional=true", "epochs=1") / "ckpts/mlp/c_last.pt"


def test_samples_of_a_seed_are_the_same_however_many_are_asked_for(checkpoint):
    model = load(checkpoint)
    many, few, other = model.sample(600, seed=3), model.sample(7, seed=3), model.sample(7, seed=4)
    torch.testing.assert_close(many[:7], few)
    assert not torch.allclose(few, other) and many.shape == (600, 2)
    assert len(torch.unique(many, dim=0)) == 600


def test_sample_writes_numbers_and_pictures(checkpoint, tmp_path, capsys):
    assert sample.main([f"ckpt={checkpoint}", "n=50", f"out={tmp_path / 's.npz'}", "solver=rk4", "solver.steps=3"]) == 0
    assert np.load(tmp_path / "s.npz")["x"].shape == (50, 2)
    assert sample.main([f"ckpt={checkpoint}", "n=50", f"out={tmp_path / 's.png'}"]) == 0
    assert Image.open(tmp_path / "s.png").size[0] > 600
    assert str(tmp_path / "s.png") in capsys.readouterr().out


def test_a_picture_goes_below_outputs_and_a_disk_that_refuses_it_is_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert sample.main([f"ckpt={checkpoint}", "n=5"]) == 0
    assert Path(capsys.readouterr().out.strip()) == Path("outputs/samples") / f"{checkpoint.stem}.png"
    before = sorted(tmp_path.rglob("*"))

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.fsync", read_only)
    assert sample.main([f"ckpt={checkpoint}", "n=5", "out=s.npz"]) == 1
    assert "s.npz: read-only file system; make room there, or choose another place" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.process
def test_sample_runs_from_any_folder(checkpoint, tmp_path):
    command = [sys.executable, ROOT / "scripts/sample.py", f"ckpt={checkpoint}", "n=5", "out=here.npy"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert np.load(tmp_path / "here.npy").shape == (5, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["n=5"], "ckpt is missing"),
        (["ckpt=/nowhere.pt"], "there is no file /nowhere.pt"),
        (["ckpt={fifo}"], "fifo is not a file; `python scripts/runs.py list` shows"),
        (["ckpt={c}", "n=0"], "n takes"),
        (["ckpt={c}", "n=many"], "n takes"),
        (["ckpt={c}", "n=100000000000"], "at most 1,000,000,000"),
        (["ckpt={c}", "nfe=100000000000"], "nfe takes a whole number of at least 1 and at most 1,000,000"),
        (["ckpt={c}", "solver.steps=100000000000"], "solver.steps takes"),
        (["ckpt={c}", "out=x.txt"], "must end in"),
        (["ckpt={c}", "out=/nowhere/x.png"], "does not exist"),
        (["ckpt={c}", "label=3"], "knows no classes"),
        (["ckpt={c}", "label=all"], "knows no classes"),
        (["ckpt={c}", "label=each"], "label takes"),
        (["ckpt={c}", "real=maybe"], "real takes"),
        (["ckpt={c}", "guidance=cfg"], "conditional=true"),
        (["ckpt={c}", "guidance.scale=2"], "add guidance=cfg"),
        (["ckpt={c}", "guidance=cfg", "guidance.scale=-2"], "guidance.scale takes"),
        (["ckpt={c}", "solver=flow_map"], "only the velocity at an instant"),
        (["ckpt={c}", "nfe=0"], "nfe takes"),
        (["ckpt={c}", "nfe=1", "solver=rk4"], "not both"),
        (["ckpt={c}", "solver=rk5"], "did you mean rk4?"),
        (["ckpt={c}", "solver.step=5"], "did you mean solver.steps?"),
        (["ckpt={c}", "steps=5"], "cannot use 'steps=5'"),
        (["ckpt={c}", "device=tpu"], "device takes"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, checkpoint, tmp_path, capsys):
    os.mkfifo(fifo := tmp_path / "fifo")
    assert sample.main([word.format(c=checkpoint, fifo=fifo) for word in words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_more_samples_than_memory_holds_are_refused_before_they_are_drawn(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 4096)  # 16 MiB
    assert sample.main([f"ckpt={checkpoint}", "n=1000000"]) == 1
    assert "n=1000000 rows of shape [2] need at least" in capsys.readouterr().err


def test_a_conditional_model_is_sampled_by_class(of_classes):
    model = load(of_classes)
    assert not torch.allclose(model.sample(20, label=0), model.sample(20, label=4))
    for wrong in (5, -1, torch.tensor([0] * 19 + [5])):
        with pytest.raises(UserError, match="classes 0 to 4"):
            model.sample(20, label=wrong)


def test_sample_i_depends_on_its_label_the_seed_and_i_alone(of_classes):
    model = load(of_classes)
    everything, labels = model.sample(23, seed=2, label="all"), model.labels(23, "all")
    assert labels.tolist() == sorted(labels.tolist()) and set(labels.bincount().tolist()) == {4, 5}
    for label in range(5):
        alone = model.sample(40, seed=2, label=label)[:23]
        torch.testing.assert_close(everything[labels == label], alone[labels == label])
    torch.testing.assert_close(model.sample(23, seed=2, label=labels), everything)
    torch.testing.assert_close(model.sample(300, seed=2, label=3)[:9], model.sample(9, seed=2, label=3))


def test_data_beside_the_run_are_found_from_any_folder(tmp_path, monkeypatch):
    import launcher

    words = ["run_name=x", "trackio.enabled=false", "evaluation=loss_only", "max_steps=1", "callbacks=none", "model.width=8"]
    rows, shown = torch.randn(300, 2, dtype=torch.float32), {}
    for place, data, output_dir in (("made", "made/data", "outputs"), ("elsewhere", "checkout/data", tmp_path / "away")):
        for folder in (tmp_path / place / "below", tmp_path / data):
            folder.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / data / "own.npy", rows)
        monkeypatch.chdir((tmp_path / data).parent)
        launcher.run(*words, "dataloaders=array", "dataloaders.path=data/own.npy", f"output_dir={output_dir}")
        monkeypatch.setattr(vetting, "CONFIG_DIR", tmp_path / "checkout/configs")
        monkeypatch.chdir(tmp_path / place / "below")
        here = Path("../outputs" if output_dir == "outputs" else output_dir)
        shown[place] = load(here / "ckpts/mlp/x_last.pt").real(5)[0]
    assert torch.isin(shown["made"], rows).all() and shown["made"].equal(shown["elsewhere"])


def test_numbers_come_with_their_classes(of_classes, tmp_path):
    for label, expected in (("all", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), ("3", [3] * 10), (None, [0, 1, 2, 3, 4] * 2)):
        words = [] if label is None else [f"label={label}"]
        assert sample.main([f"ckpt={of_classes}", "n=10", f"out={tmp_path / 's.npz'}", *words]) == 0
        assert np.load(tmp_path / "s.npz")["y"].tolist() == expected
    assert sample.main([f"ckpt={of_classes}", "n=10", "label=3", f"out={tmp_path / 's.png'}"]) == 0


@pytest.mark.slow
def test_pictures_of_a_latent_model_are_decoded_and_its_numbers_are_not(shared_run, tmp_path, monkeypatch):
    """A stand-in decoder: each state becomes a red image twice as large."""
    path = shared_run("d", *DIGITS) / "ckpts/cnn/d_last.pt"
    seen = []

    def decode(states):
        seen.append(len(states))
        colour = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]
        return colour.expand(len(states), 3, 16, 16)

    monkeypatch.setattr("evaluation.state_pictures.build_decoder", lambda config, device: decode)
    assert sample.main([f"ckpt={path}", "n=20", "label=all", f"out={tmp_path / 's.png'}", "solver.steps=1"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    assert ((pixels == [255, 0, 0]).all(axis=-1)).mean() > 0.5
    assert sum(seen) == 40  # 20 generated, 20 real of the same classes
    seen.clear()
    assert sample.main([f"ckpt={path}", "n=20", "real=false", f"out={tmp_path / 's.png'}", "solver.steps=1"]) == 0
    assert sum(seen) == 20
    assert sample.main([f"ckpt={path}", "n=20", f"out={tmp_path / 's.npy'}", "solver.steps=1"]) == 0
    assert np.load(tmp_path / "s.npy").shape == (20, 1, 8, 8) and sum(seen) == 20


def test_real_images_go_beside_generated_ones_of_their_class(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("evaluation.report.image_grid_picture", lambda *arguments: drawn.extend(arguments))
    label, reference_label = torch.tensor([4, 4, 1, 1, 1]), torch.tensor([0, 1, 4, 1, 4, 1, 4, 1])
    states, reference = (y[:, None, None, None] * torch.ones(1, 1, 2, 2) for y in (label, reference_label))
    draw_images(tmp_path / "x.png", (states, label), (reference, reference_label), lambda z: z + 0.5, (0.0, 9.0), "x")
    _, panels, value_range, *_ = drawn
    (images, labels), (real, real_labels) = panels.values()
    assert value_range == (-1.0, 1.0)  # decoded images, whatever the range of the states
    assert images[:, 0, 0, 0].tolist() == [y + 0.5 for y in labels] and labels.tolist() == label.tolist()
    assert real[:, 0, 0, 0].tolist() == [y + 0.5 for y in real_labels] and real_labels.tolist() == [1, 1, 1, 4, 4]


def test_a_run_on_latents_is_drawn_decoded_and_scored_as_it_is(shared_run, tmp_path):
    """Four channels have no picture of their own; distances see the latents, pictures what they decode to."""
    path = shared_run("d", *DIGITS) / "ckpts/cnn/d_last.pt"
    model = load(path)
    parts = (build_dataset(model.config, model.device), build_source(model.config, model.device), Euler(2))
    evaluator = GeneratorEvaluator(60, 60, {"energy": EnergyDistance()})
    rest = (0, dataset_key(model.config), tmp_path / "cache", True)
    plain = evaluator.evaluate(EvaluationInputs(model.objective, *parts, *rest))
    decode = lambda z: z.expand(-1, 3, -1, -1).clamp(-1, 1)  # noqa: E731
    latent = evaluator.evaluate(EvaluationInputs(model.objective, *parts, *rest, decode=decode))
    assert plain.values["eval/energy_distance"] == latent.values["eval/energy_distance"]
    made = latent.generation
    assert made.samples.shape == (60, 1, 8, 8) and made.images.shape == (60, 3, 8, 8)
    assert torch.equal(made.images[:, 1:2], made.samples.clamp(-1, 1)) and made.images is made.images
    assert plain.generation.images is plain.generation.samples
    assert made.label is not None and latent.reference_label is not None
    assert draw_picture(tmp_path / "latent.png", latent, "x")
    assert Image.open(tmp_path / "latent.png").size[0] > 600
    assert drawable((4, 8, 8), made.decode) and not drawable((4, 8, 8), None) and not drawable((3,), None)


def test_a_meanflow_run_is_scored_and_sampled_in_one_evaluation(small_run, tmp_path):
    folder = small_run("m", "loss=meanflow", "evaluation=generator", "max_steps=4", "evaluation.samples=40")
    scores = json.loads((folder / "runs/m/status.json").read_text())["scores"]
    assert {f"eval/energy_distance_{n}nfe" for n in (1, 2, 4)} <= set(scores)
    assert sample.main([f"ckpt={folder / 'ckpts/mlp/m_last.pt'}", "nfe=1", "n=9", f"out={tmp_path / 'one.npy'}"]) == 0
    assert np.load(tmp_path / "one.npy").shape == (9, 2)


def test_log_prob_integrates_to_one(checkpoint):
    model = load(checkpoint)
    axis = torch.linspace(-6, 6, 49)
    density = model.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=0.01)


def test_floor_check_counts_false_alarms_and_finds_a_shift(capsys):
    table = floor_check.carry_out(["data=gaussian", "samples=40", "replicates=3"])
    assert table.count("of 3 |") == 3 and "false alarms of 9" in table
    for words, sentence in ((["samples=1"], "at least 2, not 1"), (["sample=5"], "cannot use 'sample=5'")):
        with pytest.raises(UserError, match=sentence):
            floor_check.carry_out(words)

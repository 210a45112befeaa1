"""The fronts in scripts/: from any folder, with one sentence for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.sample import load
from scripts import benchmark, sample
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(small_run) -> Path:
    return small_run("x", "epochs=1") / "ckpts/mlp/x_last.pt"


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


def test_sample_runs_from_any_folder(checkpoint, tmp_path):
    command = [sys.executable, ROOT / "scripts/sample.py", f"ckpt={checkpoint}", "n=5", "out=here.npy"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert np.load(tmp_path / "here.npy").shape == (5, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["n=5"], "ckpt is missing"),
        (["ckpt=/nowhere.pt"], "no checkpoint at /nowhere.pt"),
        (["ckpt={c}", "n=0"], "n takes"),
        (["ckpt={c}", "n=many"], "n takes"),
        (["ckpt={c}", "out=x.txt"], "must end in"),
        (["ckpt={c}", "out=/nowhere/x.png"], "does not exist"),
        (["ckpt={c}", "label=3"], "knows no classes"),
        (["ckpt={c}", "solver=flow_map"], "only the velocity at an instant"),
        (["ckpt={c}", "nfe=0"], "nfe takes"),
        (["ckpt={c}", "nfe=1", "solver=rk4"], "not both"),
        (["ckpt={c}", "solver=rk5"], "did you mean rk4?"),
        (["ckpt={c}", "solver.step=5"], "did you mean solver.steps?"),
        (["ckpt={c}", "steps=5"], "cannot use 'steps=5'"),
        (["ckpt={c}", "device=tpu"], "device takes"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, checkpoint, capsys):
    assert sample.main([word.format(c=checkpoint) for word in words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_conditional_model_is_sampled_by_class(small_run, tmp_path):
    path = small_run("c", "conditional=true", "epochs=1") / "ckpts/mlp/c_last.pt"
    model = load(path)
    assert not torch.allclose(model.sample(20, label=0), model.sample(20, label=4))
    with pytest.raises(UserError, match="classes 0 to 4"):
        model.sample(20, label=5)


def test_a_meanflow_run_is_scored_and_sampled_in_one_evaluation(small_run, tmp_path):
    folder = small_run("m", "loss=meanflow", "evaluation=generator", "max_steps=4", "evaluation.samples=40")
    scores = json.loads((folder / "runs/m/status.json").read_text())["scores"]
    assert {f"eval/energy_distance_{n}nfe" for n in (1, 2, 4)} <= set(scores)
    assert sample.main([f"ckpt={folder / 'ckpts/mlp/m_last.pt'}", "nfe=1", "n=9", f"out={tmp_path / 'one.npy'}"]) == 0
    assert np.load(tmp_path / "one.npy").shape == (9, 2)


def test_log_prob_integrates_to_one(checkpoint):
    model = load(checkpoint)
    axis = torch.linspace(-6, 6, 81)
    density = model.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=0.01)


def test_benchmark_compares_rows_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = ["model.width=8 batch_size=64", "model.width=8 batch_size=64 dataloaders=moons"]
    assert benchmark.main(["--rounds", "1", "--steps", "2", *rows]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 4 and "data_share" in table and "moons" in table
    assert list(tmp_path.iterdir()) == []
    assert benchmark.main(["epochs=0"]) == 1

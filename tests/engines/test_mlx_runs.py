"""Runs of engine=mlx from the command line: files, resuming, and going on or being judged by the other engine."""
# ruff: noqa: E402

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="engine=mlx needs MLX: uv sync --extra mlx")

import launcher
from evaluation.sample import load
from run_files.checkpoint import load_checkpoint
from scripts import export
from tests.training.helpers import assert_equal_runs, metric_rows, weights
from tests.training.test_resume import stopped
from training.run import Run

pytestmark = pytest.mark.mlx

MLX = ["engine=mlx", "batch_size=32", "dataloaders.epoch_size=250", "max_steps=20"]  # 8 steps an epoch


def gap(one: Path, other: Path) -> float:
    """The largest difference of two runs' newest weights and averages."""
    a, b = weights(one, "x"), weights(other, "x")
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_and_all_but_equals_that_of_torch(small_run, monkeypatch):
    words = [*MLX, "schedule=one_cycle", "ema.decay=0.9", "gradient_accumulation_steps=2", "optimizer.weight_decay=0.1"]
    whole = small_run("x", *words, output="whole")
    stopped(small_run, monkeypatch, 9, *words)
    parts = small_run("x", "resume=true", "~callbacks.telemetry", output="parts")
    assert_equal_runs(whole, parts, "x")
    by_torch = small_run("x", *words, "engine=torch", output="torch")
    assert 0 < gap(whole, by_torch) < 1e-5
    status = json.loads((whole / "runs/x/status.json").read_text())
    assert status["state"] == "finished" and status["device"].startswith("mlx ")
    for one, other in zip(metric_rows(whole, "x"), metric_rows(by_torch, "x"), strict=True):
        assert one.keys() == other.keys()
        assert one.get("train/loss", 0) == pytest.approx(other.get("train/loss", 0), rel=1e-5)


def test_what_one_engine_began_the_other_goes_on_with(small_run):
    """Half by one and half by the other is all but the whole run of one; torch samples and scores what MLX trained."""
    whole = small_run("x", *MLX, "engine=torch", output="torch")
    for first, second in (("mlx", "torch"), ("torch", "mlx")):
        half = small_run("x", *MLX, f"engine={first}", "max_steps=10", "schedule=constant", output=f"{first}_first")
        small_run("x", "resume=true", f"engine={second}", "max_steps=20", output=f"{first}_first")
        rows = metric_rows(half, "x")
        assert rows[-1]["step"] == 20 and f"| `engine` | `{first}` | `{second}` |" in (half / "runs/x/log.md").read_text()
    constant = small_run("x", *MLX, "engine=torch", "schedule=constant", output="constant")
    assert 0 < gap(half, constant) < 1e-5 < gap(half, whole)
    save = half / "ckpts/mlp/x_last.pt"
    one, two = (load(path, device="cpu").sample(16) for path in (save, constant / "ckpts/mlp/x_last.pt"))
    assert torch.allclose(one, two, atol=1e-4)


def test_a_file_of_arrays_goes_to_mlx_and_back(small_run, tmp_path):
    """MLX opens what was exported, and a run of either engine begins at what MLX has written."""
    words = [
        "dataloaders=digits",
        "model=cnn",
        "model.width=8",
        "max_steps=1",
        "batch_size=8",
        "dataloaders.epoch_size=1438",
    ]
    save = small_run("x", *words) / "ckpts/cnn/x_last.pt"
    path, changed = tmp_path / "x.npz", tmp_path / "changed.npz"
    export.export([f"ckpt={save}", "form=weights", f"out={path}"])
    arrays = mx.load(str(path))
    kernel = np.array(arrays["stem.weight"])
    assert kernel.shape == (8, 3, 3, 3) and (kernel == load_checkpoint(save)["ema"]["stem.weight"].numpy()).all()
    mx.savez(str(changed), **arrays | {"stem.weight": arrays["stem.weight"] + 1})
    export.export([f"ckpt={save}", "form=weights", f"weights={changed}", f"out={path}"])
    for engine in ("torch", "mlx"):
        run = small_run("y", *words, f"init_from={path}", "optimizer.lr=1e-9", f"engine={engine}", output=engine)
        assert np.allclose(load_checkpoint(run / "ckpts/cnn/y_last.pt")["network"]["stem.weight"], kernel + 1, atol=1e-5)


def test_the_classifier_recipe_trains_and_its_results_are_those_of_a_torch_run(official, tmp_path):
    """SGD with one cycle, batch norm, augmentation; the results section of the log, and the scores."""
    data = [f"dataloaders.{key}={'null' if value is None else value}" for key, value in official("cifar10").items()]
    size = ["model.width=4", "model.multipliers=[1]", "model.blocks=1", "epochs=1", "batch_size=16", "limit_data=32"]
    words = ["experiment=cifar10_classifier", *data, *size, "evaluation=classifier", "trackio.enabled=false"]
    rows = {}
    for engine in ("mlx", "torch"):
        place = tmp_path / engine
        launcher.run("run_name=x", f"output_dir={place}", f"log.file={place / 'log.md'}", f"engine={engine}", *words)
        rows[engine] = metric_rows(place, "x")[-1]
        text = (place / "log.md").read_text()
        assert "## x" in text and "eval/accuracy" in text and "| class |" in text
    assert rows["mlx"] == pytest.approx(rows["torch"], rel=1e-4)
    assert rows["mlx"]["epoch"] == 1 and "eval/accuracy" in rows["mlx"]


def test_a_run_on_metal_waits_for_those_of_torch_on_mps():
    """They hold one lock (test_numbers_watched.py), which goes by the device that Run names."""
    of = lambda engine: Run.shared_device.fget(SimpleNamespace(engine=engine, device=torch.device("cpu")))  # noqa: E731
    kinds = [of(engine).type for engine in (None, SimpleNamespace(on_metal=False), SimpleNamespace(on_metal=True))]
    assert kinds == ["cpu", "cpu", "mps"]

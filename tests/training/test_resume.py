"""A run that is stopped, killed or extended goes on exactly as if it had not been, and never as another one."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from evaluation.sample import load
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder
from tests.training.helpers import ONE_STEP, assert_equal_runs, metric_rows, weights
from training.run import Callback, Run, Stop

EVERYTHING = ["gradient_accumulation_steps=3", "model.dropout=0.2", "schedule=one_cycle", "ema.decay=0.9"]
EVERYTHING.append("schedule.warmup_steps=3")
LOSSES = (Path(__file__).resolve().parents[2] / "configs/loss").glob("*.yaml")
OBJECTIVES = sorted(path.stem for path in LOSSES if path.stem != "cross_entropy")  # that one: test_classifiers.py


class StopAt(Callback):
    """Behaves as a signal does after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_end(self, run: Run) -> None:
        if run.state.step == self.step:
            run.stop = Stop("stopped by SIGTERM", signal=signal.SIGTERM)


def stopped(small_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: int, *words: str) -> None:
    """Train a run that is stopped as by a signal after the step, under parts/."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("training.callbacks.DeviceTelemetry", StopAt)
        small_run("x", *words, f"+callbacks.telemetry.step={step}", output="parts")
    assert ended.value.code == 143


@pytest.mark.parametrize(
    ("extra", "stop"),
    [
        pytest.param(EVERYTHING, 4, id="accumulation, dropout, schedule, EMA, between log lines of an epoch"),
        pytest.param(EVERYTHING, 3, id="at the end of an epoch"),
        pytest.param(
            ["schedule=plateau", "schedule.patience=0", "schedule.gamma=0.5", "optimizer.lr=1e-12"], 20, id="plateau"
        ),
        pytest.param(["loss/coupling=minibatch_ot", "conditional=true"], 9, id="minibatch OT, label dropout"),
        pytest.param(["precision=bf16"], 9, id="bf16"),
        pytest.param(["optimizer=muon", "schedule.warmup_epochs=1.5"], 9, id="Muon, a warm-up in epochs"),
        pytest.param(["dataloaders=moons", "source=eight_gaussians"], 9, id="data as source"),
    ],
)
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one(small_run, extra, stop, monkeypatch):
    whole = small_run("x", *extra, output="whole")
    stopped(small_run, monkeypatch, stop, *extra)
    parts = whole.parent / "parts"
    status = json.loads((parts / "runs/x/status.json").read_text())
    assert status["state"] == "interrupted" and status["step"] == stop
    small_run("x", "resume=true", "~callbacks.telemetry", output="parts")
    assert_equal_runs(whole, parts, "x")
    assert json.loads((parts / "runs/x/status.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*OBJECTIVES, "shortcut loss.teacher"])
def test_every_objective_resumes_in_mid_epoch_bit_for_bit(small_run, loss, monkeypatch):
    """Weights, metrics and samples; with accumulation, EMA, a schedule, labels and their dropout, minibatch OT."""
    loss, *taught = loss.split()
    words = [f"loss={loss}", "conditional=true", "batch_size=64", "dataloaders.epoch_size=500", "epochs=2", *EVERYTHING]
    words.remove("gradient_accumulation_steps=3")
    words.append("gradient_accumulation_steps=2")
    if loss in ("reflow", "distillation") or taught:
        teacher = small_run("teacher", "conditional=true", "epochs=1", output="teacher") / "ckpts/mlp/teacher_last.pt"
        pairs = [f"loss.coupling.teacher={teacher}", "loss.coupling.count=200", "loss.coupling.points=3"]
        words += [f"{taught[0]}={teacher}"] if taught else pairs
    elif loss != "distribution_matching":  # of transported pairs no exact teacher is known
        words.append("loss/coupling=minibatch_ot")
    words += ["solver.steps=1"] * (loss in ONE_STEP and loss != "distillation")
    whole = small_run("x", *words, output="whole")
    stopped(small_run, monkeypatch, 5, *words)
    parts = small_run("x", "resume=true", "~callbacks.telemetry", output="parts")
    assert_equal_runs(whole, parts, "x")
    one, two = (load(folder / "ckpts/mlp/x_last.pt", device="cpu").sample(16) for folder in (whole, parts))
    assert torch.equal(one, two)


def test_what_was_logged_after_the_last_save_is_logged_once(small_run, monkeypatch):
    """A SIGKILL between saves leaves rows of steps that the resumed run takes again."""

    class Killed(Callback):
        def step_end(self, run: Run) -> None:
            if run.state.step == 13:
                raise InterruptedError("as if killed")

    whole = small_run("x", output="whole")
    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Killed)
    with pytest.raises(InterruptedError):
        small_run("x", output="parts")
    monkeypatch.undo()
    assert metric_rows(whole.parent / "parts", "x")[-1]["step"] == 12
    small_run("x", "resume=true", output="parts")
    assert_equal_runs(whole, whole.parent / "parts", "x")


def test_a_finite_dataset_resumes_mid_epoch_without_repeating_or_skipping(small_run, tmp_path, monkeypatch):
    import numpy as np

    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(700, 2)).astype("float32"))
    data = ["dataloaders=array", f"dataloaders.path={tmp_path / 'data.npz'}", "dataloaders.epoch_size=null"]
    whole = small_run("x", *data, output="whole")
    stopped(small_run, monkeypatch, 7, *data)
    small_run("x", "resume=true", "~callbacks.telemetry", output="parts")
    assert_equal_runs(whole, tmp_path / "parts", "x")


def test_a_live_run_is_neither_doubled_nor_overwritten(small_run, tmp_path):
    live = RunFolder(tmp_path / "outputs/runs/x")
    live.lock.acquire()
    for words in ([], ["overwrite=true"]):
        with pytest.raises(UserError, match="another process right now"):
            small_run("x", *words)
    live.release()
    small_run("x")
    live.lock.acquire()
    with pytest.raises(UserError, match="another process right now"):
        small_run("x", "resume=true", "epochs=4")


def test_a_run_that_ended_before_its_first_save_begins_again(small_run, capsys):
    folder = small_run("x", "epochs=1")
    for path in (folder / "ckpts").rglob("*.pt"):
        path.unlink()
    before = metric_rows(folder, "x")
    small_run("x", "resume=true")
    assert "beginning it again" in capsys.readouterr().out
    assert metric_rows(folder, "x") == before


def test_a_finished_run_is_extended_by_more_epochs(small_run):
    folder = small_run("x", "epochs=2", "schedule=constant")
    small_run("x", "resume=true", "epochs=4")
    longer = small_run("x", "epochs=4", "schedule=constant", output="longer")
    assert [row["step"] for row in metric_rows(folder, "x")] == [row["step"] for row in metric_rows(longer, "x")]
    assert torch.equal(weights(folder, "x")["network.layers.0.weight"], weights(longer, "x")["network.layers.0.weight"])


def test_resume_refuses_other_settings_key_by_key_unless_forced(small_run):
    small_run("x", "epochs=1")
    with pytest.raises(UserError, match=r"batch_size was 128 and is now 64; optimizer\.lr was 0\.005 and is now 0\.001"):
        small_run("x", "resume=true", "epochs=2", "optimizer.lr=0.001", "batch_size=64")
    folder = small_run("x", "resume=force", "epochs=2", "optimizer.lr=0.001", "log.reason='slower at the end'")
    assert "slower at the end" in (folder / "runs/x/log.md").read_text()


def test_resume_never_mixes_runs_whose_names_begin_alike(small_run):
    folder = small_run("x", "epochs=2")
    small_run("x_epoch_0001", "epochs=1", "seed=5")
    assert load_checkpoint(folder / "ckpts/mlp/x_last.pt")["run_name"] == "x"
    small_run("x", "resume=true", "epochs=3")
    assert load_checkpoint(folder / "ckpts/mlp/x_last.pt")["step"] == 24


def test_a_run_that_started_from_another_resumes_exactly_even_before_its_first_save(small_run, tmp_path):
    start = f"init_from={small_run('start', 'epochs=1', output='start') / 'ckpts/mlp/start_last.pt'}"
    whole = small_run("x", start, "schedule=constant", output="whole")
    parts = small_run("x", start, "schedule=constant", "epochs=1", output="parts")
    for path in (parts / "ckpts").rglob("*.pt"):
        path.unlink()
    small_run("x", "resume=true", "epochs=2", output="parts")  # nothing saved: begins at the other run's weights again
    small_run("x", "resume=true", "epochs=3", output="parts")
    assert_equal_runs(whole, parts, "x")


def test_an_interrupted_run_counts_its_seconds_on(small_run, monkeypatch):
    folder = small_run("x", "epochs=1")
    before = load_checkpoint(folder / "ckpts/mlp/x_last.pt")["elapsed"]
    small_run("x", "resume=true", "epochs=2")
    assert json.loads((folder / "runs/x/status.json").read_text())["seconds"] > before > 0

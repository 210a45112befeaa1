"""Numbers that are not finite, tangents that are lost, batches that are not the recipe's: noticed, said, and never saved."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.submission import prepare
from common.device import own_turn, wait_for_device
from common.errors import UserError
from run_files.checkpoint import digest_of, load_checkpoint
from training.assemble import assemble
from training.loop import after_step, epoch_groups, train_step
from training.run import Callback, Run
from training.summary import recipe_batch


class PoisonedBatch(Callback):
    """Makes the loss of one step NaN, as a broken record in the data would."""

    def __init__(self, step: int = 6) -> None:
        self.step = step

    def step_end(self, run: Run) -> None:
        forward = run.state.objective.forward
        factor = float("nan") if run.state.step == self.step - 1 else 1.0
        run.forward = lambda batch, teacher: {name: factor * term for name, term in forward(batch, teacher).items()}


def config_of(tmp_path: Path, *words: str) -> dict:
    base = ["run_name=x", f"output_dir={tmp_path / 'o'}", "trackio.enabled=false", "callbacks=none", "device=cpu"]
    return prepare([*base, "model.width=16", "dataloaders.epoch_size=256", "batch_size=64", *words])


def test_a_step_that_is_not_finite_ends_the_run(small_run, tmp_path, monkeypatch):
    """By its number, though a window of several steps is looked at together."""
    monkeypatch.setattr("training.callbacks.DeviceTelemetry", PoisonedBatch)
    with pytest.raises(UserError, match=r"train/loss became NaN or infinite at step 6; nothing was saved yet"):
        small_run("x", "log_every=8")


def test_a_skipped_step_is_counted_and_leaves_everything_as_it_was(tmp_path):
    run = assemble(config_of(tmp_path, "on_nan=skip"))
    groups = epoch_groups(run)
    train_step(run, next(groups))
    state = run.state
    before = [
        value.clone()
        for value in (
            *state.objective.network.parameters(), *state.ema_objective.network.parameters(),
            *(v for slot in state.optimizer.state.values() for v in slot.values()),
        )
    ]  # fmt: skip
    forward = run.forward
    run.forward = lambda batch, teacher: {name: term * torch.inf for name, term in forward(batch, teacher).items()}
    after_step(run, train_step(run, next(groups)))
    assert (state.step, state.skipped, state.window.count) == (2, 1, 0)
    after = [
        *state.objective.network.parameters(), *state.ema_objective.network.parameters(),
        *(v for slot in state.optimizer.state.values() for v in slot.values()),
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in state.objective.network.parameters())


@pytest.mark.parametrize(
    "words", [[], ["optimizer.fused=null"], ["optimizer=sgd"], ["optimizer=sgd", "optimizer.fused=null"]]
)
def test_a_run_with_broken_steps_is_the_run_without_them(tmp_path, words):
    """Weights, average, optimizer and record are bit for bit those of a loop that never takes the first and fourth step."""

    def trained(on_nan: str) -> Run:
        run = assemble(config_of(tmp_path, f"on_nan={on_nan}", "dataloaders.epoch_size=512", "log_every=100", *words))
        for group in epoch_groups(run):
            if run.state.step not in (0, 3):
                after_step(run, train_step(run, group))
            elif on_nan == "stop":
                run.state.step += 1
            else:
                group[0].unified_input[0] = torch.nan
                after_step(run, train_step(run, group))
        return run

    skipping, without = trained("skip"), trained("stop")
    ours, theirs = (run.state.state_dict() for run in (skipping, without))
    assert ours.pop("skipped") == 2 and theirs.pop("skipped") == 0 and ours["window"]["count"] == 6
    assert digest_of(ours) == digest_of(theirs)


def test_skipping_is_logged_and_resumed(small_run, monkeypatch):
    monkeypatch.setattr("training.callbacks.DeviceTelemetry", PoisonedBatch)
    folder = small_run("x", "on_nan=skip", "epochs=1")
    rows = [json.loads(line) for line in (folder / "runs/x/metrics.jsonl").read_text().splitlines()]
    counts = {row["step"]: row.get("train/skipped_steps", 0) for row in rows if "train/loss" in row}
    assert counts == {2: 0, 4: 0, 6: 1, 8: 1}
    assert all(row["train/loss"] > 0 for row in rows if "train/loss" in row)
    assert load_checkpoint(folder / "ckpts/mlp/x_last.pt")["skipped"] == 1


def test_skipping_ends_when_nothing_else_happens(small_run, monkeypatch):
    class Broken(Callback):
        def step_end(self, run: Run) -> None:
            if run.state.step == 12:
                forward = run.state.objective.forward
                run.forward = lambda batch, teacher: {k: v * torch.nan for k, v in forward(batch, teacher).items()}

    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Broken)
    with pytest.raises(UserError, match=r"in each of the last 20 steps, all skipped.*up to 32; the last good save is"):
        small_run("x", "on_nan=skip", "epochs=9")


def test_broken_weights_of_the_last_step_are_not_saved(small_run, monkeypatch):
    class Broken(Callback):
        def step_end(self, run: Run) -> None:
            if run.state.step == 24:
                with torch.no_grad():
                    next(run.state.ema_objective.network.parameters())[0] = float("inf")

    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Broken)
    with pytest.raises(
        UserError, match=r"train/EMA weights became NaN or infinite within the steps up to 24; the last good save"
    ):
        small_run("x")


def test_a_gradient_that_is_not_finite_ends_the_run_though_its_loss_is(small_run, monkeypatch):
    class Hooked(Callback):
        def step_end(self, run: Run) -> None:
            if run.state.step == 7:
                parameter = next(run.state.objective.network.parameters())
                parameter.register_hook(lambda gradient: gradient * torch.nan)

    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Hooked)
    with pytest.raises(UserError, match="train/grad_norm became NaN or infinite at step 8"):
        small_run("x")


def test_the_update_ratio_is_that_of_the_weights(tmp_path):
    run = assemble(config_of(tmp_path, "log_every=2"))
    groups = epoch_groups(run)
    assert "update_ratio" not in train_step(run, next(groups))
    before = torch.cat([p.detach().flatten().clone() for p in run.state.objective.network.parameters()])
    ratio = train_step(run, next(groups))["update_ratio"]
    after = torch.cat([p.detach().flatten() for p in run.state.objective.network.parameters()])
    torch.testing.assert_close(ratio, (after - before).norm() / before.norm())


@pytest.mark.parametrize("engine", ["func", "separate", "finite_difference"])
def test_a_lost_tangent_is_an_error_of_ours(tmp_path, engine, monkeypatch):
    run = assemble(config_of(tmp_path, "loss=meanflow", f"loss.jvp={engine}"))
    train_step(run, next(epoch_groups(run)))
    run = assemble(config_of(tmp_path, "loss=meanflow", f"loss.jvp={engine}"))
    network = run.state.objective.network
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="its tangent was lost"):
        patch.setattr(type(network), "forward", lambda self, unified, label=None: 0 * unified[:, :2].detach() + 1)
        train_step(run, next(epoch_groups(run)))


def test_a_busy_gpu_is_said_or_waited_for(monkeypatch, capsys):
    held, pauses = iter([9.0, 9.0, 6.0, 0.5]), []
    monkeypatch.setattr("common.device.memory_of_others", lambda _: next(held))
    wait_for_device(torch.device("cuda"), wait=False)
    assert capsys.readouterr().out.startswith("note: other processes hold 9 GiB of this GPU")
    wait_for_device(torch.device("cuda"), wait=True, pause=pauses.append)
    assert capsys.readouterr().out == "waiting: other processes hold 9 GiB of this GPU (wait=true)\n" and len(pauses) == 1
    monkeypatch.undo()
    wait_for_device(torch.device("cpu"), wait=True, pause=pauses.append)
    assert capsys.readouterr().out == "" and len(pauses) == 1


HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"


def test_one_run_at_a_time_has_mps(tmp_path, capsys):
    """Among those that wait; what a killed one held is free."""
    place = tmp_path / f"denoising-zoo-mps-{os.getuid()}.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with own_turn(torch.device("mps"), wait=False, place=tmp_path):
            assert capsys.readouterr().out.startswith(
                "note: another run uses this GPU; it may be slow or not fit (wait=true"
            )
        threading.Timer(0.3, other.kill).start()
        with own_turn(torch.device("mps"), wait=True, place=tmp_path):
            assert other.wait(5) and capsys.readouterr().out == "waiting: another run uses this GPU (wait=true)\n"
    for wait in (True, False, True):
        with own_turn(torch.device("mps"), wait=wait, place=tmp_path), place.open() as another:
            assert capsys.readouterr().out == ""
            with pytest.raises(BlockingIOError):
                fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (
        own_turn(torch.device("mps"), wait=False, place=tmp_path),
        own_turn(torch.device("mps"), wait=False, place=tmp_path),
    ):
        assert capsys.readouterr().out.startswith("note: ")


def test_another_batch_than_the_recipes_is_said_in_one_line(small_run, tmp_path, capsys):
    small_run("x", "epochs=1", "gradient_accumulation_steps=2")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: a step sees")]
    assert said == "note: a step sees 256 rows (128 rows x 2 batches), the recipe of this data 1,024"
    small_run("y", "epochs=1", "batch_size=512", "gradient_accumulation_steps=2")
    assert "note: a step sees" not in capsys.readouterr().out
    recipe = ["run_name=x", f"output_dir={tmp_path}", "experiment=eight_gaussians_to_moons"]
    assert recipe_batch(prepare(recipe)) == 256 and recipe_batch(prepare([*recipe, "batch_size=7"])) == 256


def test_a_skipped_step_leaves_the_statistics_of_batch_norms_as_they_were(small_run, tmp_path):
    """Records that overflow in the first convolution: its steps are skipped, the variance it made is not kept."""
    images = np.random.RandomState(0).randn(300, 1, 8, 8).astype("float32")
    images[::60] = 3e38
    np.savez(tmp_path / "x.npz", x=images, y=np.arange(300) % 2)
    words = [f"dataloaders.path={tmp_path / 'x.npz'}", "loss=cross_entropy", "model=resnet18", "model.width=4"]
    folder = small_run(
        "x", "dataloaders=array", *words, "dataloaders.epoch_size=270", "max_steps=6", "on_nan=skip", "evaluation=classifier"
    )
    saved = load_checkpoint(folder / "ckpts/resnet18/x_last.pt")
    assert all(value.isfinite().all() for part in ("network", "ema") for value in saved[part].values())

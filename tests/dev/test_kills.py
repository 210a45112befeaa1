"""What a signal or a kill can do to runs and scripts: they end in order, or are done again as if nothing had happened."""

import contextlib
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_atomically
from common.signals import handled_by
from dev.kill_test import watched_disk
from evaluation.leaderboard_table import write_between
from evaluation.metrics.cache import cached_numbers
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder
from run_files.trackers import NullTracker
from tests.forked import Forked, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "write",
    [
        lambda place: cached_numbers(place, "floor", {}, lambda: [1.0, 2.0]),
        lambda place: write_between(place / "page.md", "table"),
        lambda place: write_atomically(place / "report.html", "page"),
    ],
    ids=["a cached number", "the leaderboard's page", "a report"],
)
def test_a_script_killed_at_any_operation_of_the_disk_does_it_again(tmp_path, write):
    """Whatever the kill has left, the same work afterwards gives what it gives at first, no half file by that name, and no
    temporary file.
    """
    write(tmp_path / "whole")
    whole = visible(tmp_path / "whole")
    for at in range(1000):
        place = tmp_path / str(at)
        child = os.fork()
        if not child:
            with watched_disk(Kill(at)):
                write(place)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert visible(place) in ({}, whole)
        write(place)
        assert visible(place) == whole and not list(place.glob(".*.tmp"))
        if not os.WIFSIGNALED(status):
            break
    assert at >= 4


class Kill:
    """Kills the process before the operation number `at` of the disk."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, operation: str, file: str) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("async_save", ["never", "always"])
def test_a_run_killed_again_and_again_ends_as_if_left_alone(async_save):
    """The short form; `python dev/kill_test.py` is the long one."""
    done = run("dev/kill_test.py", "--kills", "6", "--and", f"async_save={async_save}", cwd=ROOT)
    assert done.returncode == 0 and "6 kills: weights, metrics and files equal" in done.stdout, done.stderr


def start_process(folder: Path, *words: str) -> Forked:
    small = ["trackio.enabled=false", "callbacks=none", "evaluation=loss_only", "evaluation.samples=16", "device=cpu",
             "evaluation.final_samples=16", "model.width=8", "log_every=1", "batch_size=64"]  # fmt: skip
    return Forked("launcher.py", "run_name=x", f"output_dir={folder}", *(words or small), cwd=ROOT)


def wait_for_steps(folder: Path, process: Forked) -> None:
    path = folder / "runs/x/metrics.jsonl"
    while not path.exists() or path.stat().st_size < 1000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.process
def test_signals_save_the_run_and_end_it_with_their_status(tmp_path):
    """SIGINT, SIGTERM, and two at once, of real processes; the next one goes on where the last stopped."""
    process = start_process(tmp_path)
    wait_for_steps(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "interrupted" in out and "saving" in err and "Traceback" not in err
    status = RunFolder(tmp_path / "runs/x").status.read()
    assert status["state"] == "interrupted" and "SIGINT" in status["why"]
    first = load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")["step"]
    assert first == status["step"] > 0
    size = (tmp_path / "runs/x/metrics.jsonl").stat().st_size
    process = start_process(tmp_path, "resume=true")
    while (tmp_path / "runs/x/metrics.jsonl").stat().st_size <= size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (-signal.SIGINT, -signal.SIGTERM, 143, 130)
    assert load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")["step"] >= first
    steps = [row["step"] for row in RunFolder(tmp_path / "runs/x").metrics.read() if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.process
def test_two_sweeps_at_once_in_one_project_keep_apart(tmp_path):
    """Same architecture, same output folder, same tracker project: each of the four runs has its own steps, each once."""
    words = ["dataloaders.epoch_size=256", "evaluation=loss_only", "evaluation.samples=16", "evaluation.final_samples=16",
             "model.width=8", "log_every=1", "batch_size=64", "epochs=3", "device=cpu", "callbacks=none",
             f"output_dir={tmp_path}", f"log.file={tmp_path / 'log.md'}"]  # fmt: skip
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    words = ["seed=0,1", *words]
    sweeps = [Forked("launcher.py", "-m", f"run_name={name}", *words, cwd=ROOT, env=environment) for name in ("a", "b")]
    for sweep in sweeps:
        said = sweep.communicate()
        assert sweep.returncode == 0, said
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio/denoising-zoo.db")) as database:
        stored = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    for name in ("a_seed=0", "a_seed=1", "b_seed=0", "b_seed=1"):
        steps = [row["step"] for row in RunFolder(tmp_path / "runs" / name).metrics.read() if "train/loss" in row]
        tracked = [step for run, step, metrics in stored if run == name and b"train/loss" in metrics]
        assert steps == tracked == list(range(1, 13))
        assert load_checkpoint(tmp_path / f"ckpts/mlp/{name}_last.pt")["run_name"] == name
    assert load_checkpoint(tmp_path / "ckpts/mlp/last.pt")["step"] == 12 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_tracker_starts_ends_the_run_in_order(small_run, tmp_path, number, monkeypatch):
    """Its name is taken already, so its status must tell; overwrite=true has moved the old run aside."""
    small_run("x", "max_steps=2")
    start = NullTracker.start

    def interrupted(self, *arguments, **keys):
        os.kill(os.getpid(), number)
        return start(self, *arguments, **keys)

    monkeypatch.setattr(NullTracker, "start", interrupted)
    with pytest.raises(SystemExit) as ended:
        small_run("x", "overwrite=true")
    assert ended.value.code == 128 + number
    status = RunFolder(tmp_path / "outputs/runs/x").status.read()
    assert status["state"] == "interrupted" and status["step"] == 0
    monkeypatch.setattr(NullTracker, "start", start)
    small_run("x", "resume=true")
    assert RunFolder(tmp_path / "outputs/runs/x").status.read()["state"] == "finished"


def test_what_handles_a_signal_is_not_put_into_words() -> None:
    class Handler:
        def __call__(self, number: int, frame: object) -> None:
            pass

        def __repr__(self) -> str:
            raise AssertionError("that of a run is all its tensors")

    with handled_by(Handler()):
        pass


@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_deleted_while_an_evaluation_is_shown_does_not_come_back(drawn, small_run, tmp_path, monkeypatch):
    run, words = tmp_path / "outputs/runs/x", ["+callbacks.p._target_=training.callbacks.SamplePictures"] * drawn
    at = "training.callbacks.draw_picture" if drawn else "training.callbacks.ProgressBar.evaluation_end"
    monkeypatch.setattr(at, lambda path, *_: shutil.rmtree(run) or (drawn and write_atomically(path, "x")))
    with pytest.raises(UserError, match="was deleted or moved while the run wrote there"):
        small_run("x", *words)
    assert not run.exists()

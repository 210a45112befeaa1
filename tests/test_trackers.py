"""Trackers: what arrives, what a resume and an overwrite leave, and that no failure of theirs reaches the run."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from training.errors import UserError
from training.run_folder import RunFolder
from training.trackers import (
    GuardedTracker,
    NullTracker,
    TensorboardTracker,
    Tracker,
    WandbTracker,
    tracker_from_config,
)
from training.trackio_tracker import TrackioTracker, delete_run, run_names

ROOT = Path(__file__).resolve().parents[1]
SCORE = "eval/energy_distance"
SUBPROCESS_START = """
import sys
from pathlib import Path
from training.trackers import GuardedTracker
from training.trackio_tracker import TrackioTracker
tracker = GuardedTracker(TrackioTracker("p"))
tracker.start("x", {}, Path("."), None)
"""


@pytest.fixture
def project() -> str:
    return f"project-{uuid.uuid4().hex[:8]}"


def run_tracker(tracker: Tracker, folder: Path, steps: range, resume_step: int | None = None, **start: bool) -> None:
    tracker.start("x", {"epochs": 3, "_hidden": 1}, folder, resume_step, **start)
    for step in steps:
        tracker.log({SCORE: step / 10, "train/loss": 1.0}, step)
    tracker.finish()


def stored_steps(project: str) -> list[int]:
    path = Path(os.environ["TRACKIO_DIR"]) / f"{project}.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT step FROM metrics WHERE run_name = 'x' ORDER BY id")]


def test_trackio_command_reads_what_was_logged_and_the_console_stays_quiet(
    project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(3))
    assert capfd.readouterr() == ("", "")
    command = [str(Path(sys.executable).with_name("trackio")), "get", "metric", "--project", project, "--run", "x"]
    output = subprocess.run([*command, "--metric", SCORE, "--json"], capture_output=True, text=True, check=True).stdout
    values = [(row["step"], row["value"]) for row in json.loads(output)["values"]]
    assert values == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_resumed_history_shows_each_step_once(project: str, tmp_path: Path) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1, 6))
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(4, 8), resume_step=3)
    assert stored_steps(project) == [1, 2, 3, 4, 5, 6, 7]
    assert delete_run(project, "x") == 1


def test_resume_of_a_run_the_tracker_never_saw_starts_one(project: str, tmp_path: Path) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(4, 6), resume_step=3)
    assert stored_steps(project) == [4, 5]


def test_overwriting_run_replaces_the_old_one_and_only_that(project: str, tmp_path: Path) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(5))
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(2), overwrite=True)
    assert stored_steps(project) == [0, 1]
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(2))
    assert stored_steps(project) == [0, 1, 0, 1]
    assert delete_run(project, "x") == 2
    assert run_names(project) == []


def test_pictures_are_stored_and_go_with_their_run(project: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    tracker = TrackioTracker(project)
    tracker.start("x", {}, tmp_path, None)
    tracker.log_image("samples", tmp_path / "grid.png", 7)
    tracker.finish()
    media = Path(os.environ["TRACKIO_DIR"]) / "media" / project / "x"
    assert len(list(media.rglob("*.png"))) == 1
    delete_run(project, "x")
    assert not media.exists()


def test_rebuilding_twice_gives_the_history_of_metrics_jsonl(
    project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import trackio_rebuild

    folder = RunFolder(tmp_path / "runs/x")
    folder.write_config(f"trackio: {{project: {project}}}\n", [])
    for step in (2, 4, 6):
        folder.append_metrics(step, 0, 1.0, {SCORE: step / 10, "nan": float("nan")})
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1, 9))
    for _ in range(2):
        assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 0
        assert stored_steps(project) == [2, 4, 6]
    assert capsys.readouterr().out == f"x: 3 rows in the project {project}\n" * 2
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x", "nobody"]) == 1
    assert trackio_rebuild.main(["--output-dir", str(tmp_path / "none"), "--all"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    with held_database(project), pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.trackio_tracker.LOCK_SECONDS", 0.1)
        assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 1
    assert "database is locked" in capsys.readouterr().err and stored_steps(project) == [2, 4, 6]


def test_rebuilding_brings_both_kinds_of_pictures(project: str, tmp_path: Path) -> None:
    """As a run on finite image data leaves them: of samples at each evaluation, and of their neighbours at the last."""
    from scripts import trackio_rebuild

    folder = RunFolder(tmp_path / "runs/x")
    folder.write_config(f"trackio: {{project: {project}}}\n", [])
    folder.append_metrics(6, 0, 1.0, {SCORE: 0.6})
    paths = [folder.sample_picture(0), folder.sample_picture(6), folder.neighbours_picture(6)]
    paths[0].parent.mkdir()
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    for _ in range(2):
        assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 0
    with contextlib.closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db")) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'x'").fetchall()
    assert [step for step, _ in rows] == [6, 6, 6]
    assert {name for _, metrics in rows for name in json.loads(metrics)} >= {SCORE, "samples", "neighbours"}


def test_rebuilding_from_damaged_files(project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged line costs itself, a damaged configuration one sentence; provenance beside scores is no number."""
    from scripts import trackio_rebuild

    folder = RunFolder(tmp_path / "runs/x")
    folder.write_config(f"trackio: {{project: {project}}}\n", [])
    for step in (2, 4, 6):
        folder.append_metrics(step, 0, 1.0, {SCORE: step / 10}, {SCORE: "of this and that"})
    lines = folder.metrics_path.read_text().splitlines(keepends=True)
    folder.metrics_path.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 0
    assert stored_steps(project) == [2, 6] and "left out: line 2" in capsys.readouterr().err
    folder.config_path.write_text("trackio: {project")
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and stored_steps(project) == [2, 6]


def test_unwritable_folder_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    script = SUBPROCESS_START + 'tracker.log({"a": 1.0}, 1); tracker.finish(); print("run goes on")'
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "file" / "trackio"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "run goes on\n")
    assert done.stderr.startswith("tracker off: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; metrics.jsonl has everything\n")


@contextlib.contextmanager
def held_database(project: str) -> Iterator[None]:
    path = Path(os.environ["TRACKIO_DIR"]) / f"{project}.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.rollback()


def test_database_locked_at_the_start_costs_one_line(
    project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.trackio_tracker.LOCK_SECONDS", 0.2)
    start = time.monotonic()
    with held_database(project):
        run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(3))
    assert time.monotonic() - start < 10, "trackio's own retries take minutes"
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "database is locked" in err


def test_database_locked_during_the_run_costs_one_line(
    project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trackio import context_vars
    from trackio.sqlite_storage import SQLiteStorage

    tracker = GuardedTracker(TrackioTracker(project))
    tracker.start("x", {}, tmp_path, None)
    connect = SQLiteStorage._get_connection
    monkeypatch.setattr(SQLiteStorage, "_get_connection", lambda path, **keys: connect(path, **(keys | {"timeout": 0.1})))
    with held_database(project):
        deadline = time.monotonic() + 20
        while tracker.on and time.monotonic() < deadline:
            tracker.log({"a": 1.0}, 1)
            time.sleep(0.02)
        assert not tracker.on, "the failure of the background writer was not noticed"
        tracker.finish()
    assert context_vars.current_run.get() is None, "trackio would finish it once more, and wait, when Python exits"
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "database is locked" in err


class Failing(NullTracker):
    def __init__(self, error: Exception) -> None:
        self.error, self.calls, self.abandoned = error, 0, 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls += 1
        raise self.error

    def start(self, *positional: object, **keys: object) -> None:
        if isinstance(self.error, UserError):
            raise self.error

    def abandon(self) -> None:
        self.abandoned += 1


def test_first_failure_turns_the_tracker_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = Failing(ValueError("two\nlines"))
    run_tracker(GuardedTracker(failing), tmp_path, range(5))
    assert (failing.calls, failing.abandoned) == (1, 1)
    assert capsys.readouterr().err == "tracker off: ValueError: two lines; metrics.jsonl has everything\n"


def test_guard_leaves_user_errors_and_interrupts_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_tracker(GuardedTracker(Failing(UserError("install it"))), tmp_path, range(1))
    with pytest.raises(KeyboardInterrupt):
        GuardedTracker(NullTracker()).guard(raise_interrupt)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(TensorboardTracker, "torch.utils.tensorboard", "tensorboard"), (WandbTracker, "wandb", "wandb")],
)
def test_missing_package_names_its_extra(
    make: Callable[[], Tracker], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"uv sync --extra {extra}"):
        GuardedTracker(make()).start("x", {}, tmp_path, None)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tracker(TensorboardTracker(), tmp_path, range(1, 6))
    run_tracker(TensorboardTracker(), tmp_path, range(4, 8), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars(SCORE)
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_stores_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8, 4)).save(tmp_path / "grid.png")
    tracker = TensorboardTracker()
    tracker.start("x", {}, tmp_path, None)
    tracker.log_image("samples", tmp_path / "grid.png", 7)
    tracker.finish()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("samples")
    assert (event.step, event.width, event.height) == (7, 8, 4)


def test_wandb_identity_survives_a_resume_and_not_a_fresh_start(tmp_path: Path) -> None:
    memo = tmp_path / "wandb_id.txt"
    first = WandbTracker.run_id(memo, resumed=False)
    assert WandbTracker.run_id(memo, resumed=True) == first
    assert WandbTracker.run_id(memo, resumed=False) != first


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tracker").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_tracker_config_builds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    assert text.startswith("# @package trackio\n# python launcher.py ")
    assert isinstance(tracker_from_config(settings), GuardedTracker)
    assert isinstance(tracker_from_config(settings | {"enabled": False}), NullTracker)


def test_importing_the_trackers_imports_no_tracker() -> None:
    script = "import sys, training.trackers, training.trackio_tracker; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("trackio", "torch", "wandb", "tensorboard", "numpy") if f"'{name}'" in loaded]

"""Trackers: what arrives, what a resume and an overwrite leave, and that no failure of theirs reaches the run."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from run_files.run_folder import RunFolder
from run_files.trackers import GuardedTracker, NullTracker, TensorboardTracker, Tracker, WandbTracker
from run_files.trackio_tracker import TrackioTracker, delete_run, run_names
from scripts import trackio_delete

ROOT = Path(__file__).resolve().parents[2]
SCORE = "eval/energy_distance"
BEGIN = """
import os, signal, sys
from pathlib import Path
from run_files.run_folder import RunFolder
from run_files.trackers import GuardedTracker
from run_files.trackio_tracker import TrackioTracker
project, folder = sys.argv[1], RunFolder(Path(sys.argv[2]))
tracker = GuardedTracker(TrackioTracker(project))
tracker.start("x", {}, folder.path, None)
for step in range(1, 6):
    folder.metrics.append(step, 0, 1.0, {"a": 1.0})
    tracker.log({"a": 1.0}, step)
"""


@pytest.fixture
def project() -> str:
    return f"project-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """trackio gives a held database up after a moment instead of half a minute."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **keys: connect(path, **(keys | {"timeout": 0.1})))


def run_tracker(
    tracker: Tracker, folder: Path, steps: range, resume_step: int | None = None, name: str = "x", **start: bool
) -> None:
    """The tracker's part of a run, and its record in metrics.jsonl."""
    record = RunFolder(folder)
    record.metrics.trim(-1 if resume_step is None else resume_step)
    tracker.start(name, {"epochs": 3, "_hidden": 1}, folder, resume_step, **start)
    for step in steps:
        metrics = {SCORE: step / 10, "train/loss": 1.0}
        record.metrics.append(step, 0, 1.0, metrics)
        tracker.log(metrics, step)
    tracker.finish()
    record.metrics.close()


def stored(project: str) -> list[tuple[int, set[str]]]:
    """(step, names of the metrics) of each row that the dashboard has of the run x, in the order of their coming."""
    path = Path(os.environ["TRACKIO_DIR"]) / f"{project}.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'x' ORDER BY id").fetchall()
    return [(step, set(json.loads(metrics))) for step, metrics in rows]


def stored_steps(project: str) -> list[int]:
    return [step for step, _ in stored(project)]


def draw(folder: Path, *steps: int, kind: str = "") -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for step in steps:
        Image.new("RGB", (4, 4)).save(folder / f"samples/step_{step:08d}{kind}.png")


@pytest.mark.process
def test_trackio_command_reads_what_was_logged_and_the_console_stays_quiet(
    project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(3))
    assert capfd.readouterr() == ("", "")
    command = [str(Path(sys.executable).with_name("trackio")), "get", "metric", "--project", project, "--run", "x"]
    output = subprocess.run([*command, "--metric", SCORE, "--json"], capture_output=True, text=True, check=True).stdout
    values = [(row["step"], row["value"]) for row in json.loads(output)["values"]]
    assert values == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_values_at_eight_times_make_no_plots_of_their_own(project: str, tmp_path: Path) -> None:
    tracker = TrackioTracker(project)
    tracker.start("x", {}, tmp_path, None)
    tracker.log({"oracle/copying": 0.5, "oracle/copying_t0": 1.0, "oracle/copying_t7": 0.5, "train/loss_t": 1.0}, 1)
    tracker.finish()
    assert [names for _, names in stored(project)] == [{"oracle/copying", "train/loss_t"}]


def test_resumed_history_shows_each_step_and_picture_once_and_is_deleted_with_them(project: str, tmp_path: Path) -> None:
    """Step 0 has a picture that no run logs; that of step 5 is of a step which the resume has taken back."""
    media = Path(os.environ["TRACKIO_DIR"]) / "media" / project / "x"
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1, 6))
    draw(tmp_path, 0, 2, 5)
    for _ in range(2):
        run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(4, 8), resume_step=3)
        assert sorted(stored_steps(project)) == [1, 2, 2, 3, 4, 5, 6, 7]
        assert (2, {"samples"}) in stored(project) and len(list(media.rglob("*.png"))) == 1
    delete_run(project, "x")
    assert not media.exists() and run_names(project) == []


def test_a_deletion_that_fails_or_is_killed_loses_no_pictures_of_others_and_the_next_one_finishes_it(
    project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    media = Path(os.environ["TRACKIO_DIR"]) / "media" / project
    for name in ("x", "other"):
        run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1), name=name)
        (media / name).mkdir(parents=True)
        (media / name / "own.png").write_text(name)
    monkeypatch.setattr("trackio.api.Run.delete", lambda run: False)
    with pytest.raises(RuntimeError, match="could not delete the run x"):
        delete_run(project, "x")
    assert (media / "x/own.png").read_text() == "x"
    monkeypatch.undo()
    monkeypatch.setattr("run_files.trackio_tracker.shutil.rmtree", lambda *_, **__: None)  # killed before its end
    delete_run(project, "x")
    monkeypatch.undo()
    assert [path.name.startswith(".leaving-") for path in media.iterdir()].count(True) == 1
    assert trackio_delete.main(["x", "--yes", "--project", project]) == 0  # its rows are gone
    assert "finished an earlier deletion, which was interrupted: x" in capsys.readouterr().out
    assert [path.name for path in media.iterdir()] == ["other"] and (media / "other/own.png").read_text() == "other"


@pytest.mark.process
def test_a_run_killed_before_its_rows_reached_the_dashboard_shows_them_after_its_resume(
    project: str, tmp_path: Path
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}os.kill(os.getpid(), signal.SIGKILL)", project, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -signal.SIGKILL
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(4, 7), resume_step=3)
    assert stored_steps(project) == [1, 2, 3, 4, 5, 6]


def test_a_resume_leaves_an_older_run_of_its_name_alone_and_overwriting_replaces_all(project: str, tmp_path: Path) -> None:
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(3))
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(2))
    assert stored_steps(project) == [0, 1, 2, 0, 1]
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1, 3), resume_step=0)
    assert stored_steps(project) == [0, 1, 2, 0, 1, 2]
    run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(2), overwrite=True)
    assert stored_steps(project) == [0, 1]


def test_rebuilding_twice_gives_the_history_of_the_folder(
    project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], impatient: None
) -> None:
    """Pictures as a run on finite image data leaves them: of samples at each evaluation, of their neighbours at the last."""
    from scripts import trackio_rebuild

    folder = RunFolder(tmp_path / "runs/x")
    folder.write_config(f"trackio: {{project: {project}}}\n", [])
    for step in (2, 4, 6):
        folder.metrics.append(step, 0, 1.0, {SCORE: step / 10, "nan": float("nan")})
    draw(folder.path, 0, 6)
    draw(folder.path, 6, kind="_neighbours")
    history = [*((step, {"epoch", SCORE}) for step in (2, 4, 6)), (6, {"neighbours"}), (6, {"samples"})]
    for _ in range(2):
        run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(1, 9))
    for _ in range(2):
        assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 0
        assert stored(project) == history
    assert capsys.readouterr().out == f"x: 3 rows in the project {project}\n" * 2
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x", "nobody"]) == 1
    assert trackio_rebuild.main(["--output-dir", str(tmp_path / "none"), "--all"]) == 1
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x", "--project", "registry-x"]) == 1
    assert capsys.readouterr().err.count("\n") == 3
    with held_database(project):
        assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 1
    assert "trackio did not take x: " in capsys.readouterr().err and stored(project) == history


def test_rebuilding_from_damaged_files(project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged line costs itself, a damaged configuration one sentence; provenance beside scores is no number."""
    from scripts import trackio_rebuild

    folder = RunFolder(tmp_path / "runs/x")
    folder.write_config(f"trackio: {{project: {project}}}\n", [])
    for step in (2, 4, 6):
        folder.metrics.append(step, 0, 1.0, {SCORE: step / 10}, {SCORE: "of this and that"})
    lines = folder.metrics.path.read_text().splitlines(keepends=True)
    folder.metrics.path.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 0
    assert stored_steps(project) == [2, 6] and "left out: line 2" in capsys.readouterr().err
    folder.config_path.write_text("trackio: {project")
    assert trackio_rebuild.main(["--output-dir", str(tmp_path), "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and stored_steps(project) == [2, 6]


@pytest.mark.process
def test_unwritable_folder_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}tracker.finish(); print('run goes on')", "p", tmp_path],
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


@pytest.mark.parametrize("resume_step", [None, 0])
def test_database_locked_at_the_start_costs_one_line(
    resume_step: int | None, project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], impatient: None
) -> None:
    run_tracker(TrackioTracker(project), tmp_path, range(3))
    with held_database(project):
        run_tracker(GuardedTracker(TrackioTracker(project)), tmp_path, range(3), resume_step)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tracker off: RuntimeError: trackio")
    assert stored_steps(project) == [0, 1, 2]


def test_database_locked_during_the_run_costs_one_line(
    project: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], impatient: None
) -> None:
    import trackio

    tracker = GuardedTracker(TrackioTracker(project))
    tracker.start("x", {}, tmp_path, None)
    with held_database(project):
        deadline = time.monotonic() + 120
        while tracker.on and time.monotonic() < deadline:
            tracker.log({"a": 1.0}, 1)
            time.sleep(0.02)
        assert not tracker.on, "the failure of the background writer was not noticed"
        tracker.finish()
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "database is locked" in err
    with pytest.raises(RuntimeError, match="init"):
        trackio.finish()  # what it calls when Python exits finds no run, and does not wait


def test_warnings_of_others_are_shown_as_before(project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    before, tracker = warnings.showwarning, TrackioTracker(project)
    tracker.start("x", {}, tmp_path, None)
    warnings.warn("of another library", stacklevel=1)
    tracker.finish()
    assert shown == ["of another library"] and warnings.showwarning is before


class Failing(NullTracker):
    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def log(self, *_: object) -> None:
        self.calls += 1
        raise self.error

    def start(self, *_: object, **__: object) -> None:
        if isinstance(self.error, UserError):
            raise self.error


def test_first_failure_turns_the_tracker_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = Failing(ValueError("two\nlines"))
    run_tracker(GuardedTracker(failing), tmp_path, range(5))
    assert failing.calls == 1
    assert capsys.readouterr().err == "tracker off: ValueError: two lines; metrics.jsonl has everything\n"


def test_guard_leaves_user_errors_and_interrupts_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_tracker(GuardedTracker(Failing(UserError("install it"))), tmp_path, range(1))
    with pytest.raises(KeyboardInterrupt):
        GuardedTracker(NullTracker()).guard(raise_interrupt)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_tensorboard_shows_each_step_once_after_a_resume_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tracker(TensorboardTracker(), tmp_path, range(1, 6))
    run_tracker(TensorboardTracker(), tmp_path, range(4, 8), resume_step=3)
    Image.new("RGB", (8, 4)).save(tmp_path / "grid.png")
    tracker = TensorboardTracker()
    tracker.start("x", {}, tmp_path, 7)
    tracker.log_image("samples", tmp_path / "grid.png", 8)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars(SCORE)] == [1, 2, 3, 4, 5, 6, 7]
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(8, 8, 4)]


def test_wandb_identity_survives_a_resume_and_not_a_fresh_start(tmp_path: Path) -> None:
    memo = tmp_path / "wandb_id.txt"
    first = WandbTracker.run_id(memo, resumed=False)
    assert WandbTracker.run_id(memo, resumed=True) == first
    assert WandbTracker.run_id(memo, resumed=False) != first

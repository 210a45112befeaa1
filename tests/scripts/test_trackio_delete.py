"""scripts/trackio_delete.py: what it deletes, what it refuses, and what it finishes."""

import contextlib
import io
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from run_files.trackio_tracker import TrackioTracker, run_names
from scripts import trackio_delete

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> str:
    name = f"project-{uuid.uuid4().hex[:8]}"
    for run_name in ("test_1", "test_2", "keep_test_3"):
        tracker = TrackioTracker(name)
        tracker.start(run_name, {}, tmp_path, None)
        tracker.log({"a": 1.0}, 1)
        tracker.finish()
    return name


def test_delete_takes_whole_names_only(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trackio_delete.main(["test_.*", "--yes", "--project", project]) == 0
    assert run_names(project) == ["keep_test_3"]
    assert capsys.readouterr().out == f"deleted 2 of the project {project}:\n  test_1\n  test_2\n"


def test_dry_run_and_list_delete_nothing(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trackio_delete.main(["test_.*", "--dry-run", "--project", project]) == 0
    assert capsys.readouterr().out == "would delete:\n  test_1\n  test_2\n"
    assert trackio_delete.main(["--list", "--project", project]) == 0
    assert capsys.readouterr().out == "keep_test_3\ntest_1\ntest_2\n"
    assert len(run_names(project)) == 3


@pytest.mark.parametrize(("answer", "left"), [("\n", 3), ("n\n", 3), ("", 3), ("y\n", 1)])
def test_delete_asks_first(answer: str, left: int, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert trackio_delete.main(["test_.*", "--project", project]) == (0 if left == 1 else 1)
    assert len(run_names(project)) == left


@pytest.mark.parametrize(
    ("pattern", "said"), [(["te("], "not a regular expression"), (["est_1"], "no run of"), ([], "say which runs")]
)
def test_delete_refuses_in_one_sentence(
    pattern: list[str], said: str, project: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trackio_delete.main([*pattern, "--yes", "--project", project]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert len(run_names(project)) == 3


@pytest.mark.parametrize("name", ["..", ".", "../keep_test_3", ""])
def test_delete_of_a_name_that_is_a_path_leaves_all_other_pictures(
    name: str, project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """trackio takes any name, its rows may come from anyone, and a run's pictures lie in a folder of its name."""
    media = Path(os.environ["TRACKIO_DIR"]) / "media"
    pictures = [media / project / "keep_test_3/0/a.png", media / f"{project}2/x/0/a.png"]
    for picture in pictures:
        picture.parent.mkdir(parents=True)
        picture.write_bytes(b"x")
    with contextlib.closing(sqlite3.connect(media.parent / f"{project}.db")) as database, database:
        database.execute("UPDATE metrics SET run_name = ? WHERE run_name = 'test_1'", (name,))
        database.execute("UPDATE configs SET run_name = ? WHERE run_name = 'test_1'", (name,))
    assert trackio_delete.main([re.escape(name), "--yes", "--project", project]) == 0
    assert "its pictures, if any, stay" in capsys.readouterr().err
    assert run_names(project) == ["keep_test_3", "test_2"] and all(picture.exists() for picture in pictures)


@pytest.mark.parametrize("pattern", ["test_1", "keep.*"])
@pytest.mark.parametrize("at", ["delete_rows", "delete_pictures"])
def test_a_deletion_killed_between_pictures_and_rows_is_finished(at, pattern, project, capsys, monkeypatch):
    """By the same command; another one gives the pictures back to a run that still has its rows."""

    media = Path(os.environ["TRACKIO_DIR"]) / "media" / project
    picture = media / "test_1/0/a.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"x")
    rmtree = shutil.rmtree

    def killed(path="", **_):
        if not isinstance(path, Path) or path.name.endswith("test_1"):
            os._exit(9)
        rmtree(path)

    if (child := os.fork()) == 0:
        monkeypatch.setattr("trackio.api.Run.delete" if at == "delete_rows" else "shutil.rmtree", killed)
        trackio_delete.main(["test_1", "--yes", "--project", project])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not picture.exists() and list(media.glob(".leaving-*-test_1/0/a.png"))
    assert trackio_delete.main([pattern, "--yes", "--project", project]) == 0
    assert not list(media.glob(".leaving-*"))
    rows_left = at == "delete_rows" and pattern != "test_1"
    assert picture.exists() == rows_left == ("test_1" in run_names(project))
    assert ("finished an earlier deletion" in capsys.readouterr().out) == (at == "delete_pictures")


def test_delete_says_that_the_database_is_held(
    project: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **keys: connect(path, **(keys | {"timeout": 0.1})))
    with contextlib.closing(connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert trackio_delete.main(["test_1", "--yes", "--project", project]) == 1
        other.rollback()
    err = capsys.readouterr().err
    assert "could not delete the run test_1" in err and err.count("\n") == 1 and len(run_names(project)) == 3


@pytest.mark.parametrize("arguments", [["--list"], ["test_1", "--yes"]], ids=["list", "delete"])
def test_delete_says_so_when_the_database_is_damaged(
    arguments: list[str], project: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(os.environ["TRACKIO_DIR"]) / f"{project}.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    assert trackio_delete.main([*arguments, "--project", project]) == 1
    err = capsys.readouterr().err
    assert f"trackio refuses the project {project}: " in err and err.count("\n") == 1


@pytest.mark.process
def test_delete_runs_from_any_folder_on_the_users_trackio_dir(project: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/trackio_delete.py"), "--list", "--project", project]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "keep_test_3\ntest_1\ntest_2\n"

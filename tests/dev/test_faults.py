"""What the disk can do to a run: nothing that was saved is lost, and the run says what happened."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import share, write_atomically
from dev.kill_test import watched_disk
from run_files.checkpoint import FORMAT, KINDS, load_checkpoint
from run_files.checkpoint_folder import CheckpointFolder
from run_files.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def payload(step: int) -> dict[str, object]:
    numbers = {"step": step, "best": 0.0, "waited": 0, "elapsed": 0.0, "network": {"w": torch.arange(1000.0) + step}}
    return {key: {} for key in KINDS} | numbers | {"run_name": "x", "second_time": None, "format": FORMAT}


class Fault:
    """Fails the operation number `at` of the disk, counted from 0, and only that one."""

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        self.at, self.code, self.count = at, code, 0

    def __call__(self, operation: str, file: str) -> None:
        self.count += 1
        if self.count == self.at + 1:
            raise OSError(self.code, os.strerror(self.code))

    @property
    def came(self) -> bool:
        return self.count > self.at


def every_fault(prepare: Callable[[], None], act: Callable[[], object], check: Callable[[bool], None]) -> int:
    """Let each operation that `act` does on the disk fail once, in turn; how many there are. check(failed) after each."""
    for at in range(1000):
        prepare()
        fault, failed = Fault(at), False
        with watched_disk(fault):
            try:
                act()
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failed = True
        check(failed)
        if not fault.came:
            return at
    raise AssertionError("it never ended")


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_no_failing_write_fsync_link_or_rename_loses_a_save(tmp_path, in_background):
    """The newest save before, or the new one, can be resumed; no file is torn or left over; the next save succeeds."""
    folders = iter(CheckpointFolder(tmp_path / str(i), "mlp", "x", 2, in_background) for i in range(1000))
    current: list[CheckpointFolder] = []

    def prepare() -> None:
        current[:] = [next(folders)]
        for step in (1, 2):
            save(step, best=step == 1)

    def save(step: int, best: bool) -> None:
        current[0].save(payload(step), step, best)
        current[0].settle()

    def check(failed: bool) -> None:
        (folder,) = current
        assert folder.newest()[1]["step"] in ((2, 3) if failed else (3,))
        for path in folder.folder.rglob("*.pt"):
            load_checkpoint(path)
        assert temporaries(folder.folder) == []
        save(3, best=True)
        assert folder.newest()[1]["step"] == load_checkpoint(folder.best)["step"] == 3
        assert [path.name for path in folder.epoch_saves()] == ["x_epoch_0002.pt", "x_epoch_0003.pt"]

    assert every_fault(prepare, lambda: save(3, best=True), check) > 15


def test_no_failing_write_tears_the_run_folder(tmp_path):
    """A row that the disk refused is written with the next; the status is the old one or the new."""
    folder = RunFolder(tmp_path / "x")

    def prepare() -> None:
        folder.metrics.close()
        folder.metrics.path.unlink(missing_ok=True)
        folder.metrics.unwritten = b""
        folder.metrics.append(1, 0, 0.0, {"a": 1.0})
        folder.status.write("running", 1, 0, 0.0)

    def act() -> None:
        folder.metrics.append(2, 0, 0.0, {"a": 1.0})
        folder.metrics.sync()
        folder.status.write("running", 2, 0, 0.0)
        folder.metrics.trim(2)

    def check(failed: bool) -> None:
        assert [row["step"] for row in folder.metrics.read()] in ([[1], [1, 2]] if failed else [[1, 2]])
        assert folder.status.read()["step"] in (1, 2)
        assert temporaries(tmp_path) == []
        folder.metrics.append(3, 0, 0.0, {"a": 1.0})
        assert [row["step"] for row in folder.metrics.read()] == [1, 2, 3]

    assert every_fault(prepare, act, check) > 7


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Within the block no file of this process grows beyond `size` bytes: what a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_quota_ends_the_run_in_one_sentence_and_its_last_save_goes_on(small_run, tmp_path):
    whole = small_run("x", output="whole")
    size = (whole / "ckpts/mlp/x_last.pt").stat().st_size
    small_run("x", "max_steps=8", "schedule=constant", output="parts")
    small_run("y", "max_steps=8", "schedule=constant", output="parts")
    folder = tmp_path / "parts"
    with (
        file_size_limit(size // 2),
        pytest.raises(UserError, match=r"x_epoch_0002\.pt: .*last good save is .*resume=true") as said,
    ):
        small_run("x", "resume=true", "max_steps=24", output="parts")
    assert "\n" not in str(said.value)
    status = json.loads((folder / "runs/x/status.json").read_text())
    assert status["state"] == "failed" and "x_epoch_0002.pt" in status["why"]
    assert temporaries(folder) == [] and load_checkpoint(folder / "ckpts/mlp/x_last.pt")["step"] == 8
    small_run("x", "resume=true", "max_steps=24", output="parts")
    small_run("y", "resume=true", "max_steps=24", output="parts")
    ended, never = (load_checkpoint(folder / f"ckpts/mlp/{name}_last.pt")["network"] for name in "xy")
    assert all(torch.equal(ended[key], never[key]) for key in ended)


def test_a_run_asked_to_go_on_without_a_disk_does_and_tells_so(small_run, tmp_path, capsys):
    """It trains to its end, says what was refused once, and does not claim to have finished with no save of its end."""
    folder = small_run("x", "max_steps=8", "schedule=constant", "on_save_error=continue")
    size = (folder / "ckpts/mlp/x_last.pt").stat().st_size
    capsys.readouterr()
    with (
        file_size_limit(size // 2),
        pytest.raises(UserError, match=r"step 24 is in no save, the last good save is .*x_last\.pt"),
    ):
        small_run("x", "resume=true", "max_steps=24")
    assert capsys.readouterr().err.count("x_epoch_0002.pt") == 1
    small_run("x", "resume=true", "max_steps=24")
    assert json.loads((tmp_path / "outputs/runs/x/status.json").read_text())["state"] == "finished"
    rows = RunFolder(tmp_path / "outputs/runs/x").metrics.read()
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, 25, 2))


def test_a_disk_that_refuses_the_first_file_asks_for_no_resume(small_run, monkeypatch):
    """There is no run to resume yet."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("run_files.run_folder.write_atomically", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="make room, and try again"):
        small_run("x")


FULL_DISK = """
import sys, torch
from pathlib import Path
from run_files.checkpoint import FORMAT, KINDS
from run_files.checkpoint_folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]), "mlp", "x", keep=0)
large = {key: {} for key in KINDS} | {"network": {"w": torch.randn(300_000)}}
large |= {"best": 0.0, "waited": 0, "elapsed": 0.0, "run_name": "x", "second_time": None, "format": FORMAT}
for step in range(1, 100):
    try:
        folder.save({**large, "step": step}, step, best=True)
    except OSError as error:
        assert error.errno == 28, error
        break
path, saved = folder.newest()
assert saved["step"] == step - 1 > 1, (saved["step"], step)
assert not [p for p in Path(sys.argv[1]).rglob("*") if p.name.endswith(".tmp")]
print("kept", saved["step"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system; the quota test above stands in for it")
@pytest.mark.process
def test_a_full_disk_keeps_the_previous_save(tmp_path):
    """A tmpfs of 4 MB, saves of 1.2 MB, filled during a save; mounted for one process alone, where the system allows it."""
    script = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} || exit 99; exec {sys.executable} -c '{FULL_DISK}' {tmp_path}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("the system refuses to mount a tmpfs; the quota test above stands in for it")
    assert done.returncode == 0 and done.stdout.startswith("kept"), done.stderr


def test_a_damaged_save_is_passed_over_for_the_newest_whole_one(small_run, tmp_path, capsys):
    whole = small_run("x", output="whole")
    small_run("x", "max_steps=16", "schedule=constant", output="parts")
    folder = tmp_path / "parts/ckpts/mlp"
    flip(folder / "x_last.pt")  # the file of epoch 2 as well: one file, two names
    capsys.readouterr()
    small_run("x", "resume=true", "max_steps=24", output="parts")
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert said == ["note: x_last.pt, x_epoch_0002.pt cannot be read; going on from x_epoch_0001.pt (step 8) instead"]
    steps = [row["step"] for row in RunFolder(tmp_path / "parts/runs/x").metrics.read() if "train/loss" in row]
    assert steps == list(range(2, 25, 2)) and whole.exists()
    for path in {path.stat().st_ino: path for path in folder.rglob("*.pt")}.values():
        flip(path)
    before = (tmp_path / "parts/runs/x/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of the 5 saves of x"):
        small_run("x", "resume=true", "max_steps=32", output="parts")
    assert (tmp_path / "parts/runs/x/metrics.jsonl").read_bytes() == before


def flip(path: Path) -> None:
    """Change one bit in the middle of the largest entry, in place: under every name of the file."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda item: item.file_size)
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(content)


def test_pruning_never_removes_the_only_whole_save(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, "mlp", "x", keep=1)
    folder.save(payload(1), 1, best=False)
    written = torch.save

    def torn(content: object, file: object) -> None:
        written(content, file)
        file.seek(700)
        file.write(b"damage")

    monkeypatch.setattr(torch, "save", torn)
    folder.save(payload(2), 2, best=False)
    monkeypatch.undo()
    assert folder.newest()[1]["step"] == 1
    folder.save(payload(3), 3, best=False)
    assert [path.name for path in folder.epoch_saves()] == ["x_epoch_0003.pt"]


def test_half_written_files_of_killed_processes_go_at_the_next_start(small_run, tmp_path):
    folder = small_run("x", "epochs=1")
    left = [
        folder / name
        for name in ("ckpts/mlp/.x_last.pt.99.tmp", "ckpts/mlp/archive/.x_epoch_0002.pt.1.tmp", "runs/x/.status.json.7.tmp",
                     "ckpts/mlp/.x.last.pt.5.tmp")
    ]  # fmt: skip
    others = [folder / name for name in ("ckpts/mlp/.y_last.pt.99.tmp", "ckpts/mlp/.x_y_last.pt.99.tmp")]
    for path in left + others:
        path.write_text("half")
    small_run("x", "resume=true", "epochs=2")
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_where_there_are_no_hard_links_copies_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    write_atomically(tmp_path / "a", "content")
    share(tmp_path / "a", tmp_path / "folder" / "b")
    assert (tmp_path / "folder/b").read_text() == "content" and (tmp_path / "folder/b").stat().st_nlink == 1
    assert temporaries(tmp_path) == []


def test_saves_whose_run_folder_is_gone_are_not_overwritten(small_run):
    folder = small_run("x")
    saves = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    for path in sorted((folder / "runs").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"run_name=x has saves already.*overwrite=true"):
        small_run("x")
    assert {path: path.read_bytes() for path in folder.rglob("*.pt")} == saves
    small_run("x", "overwrite=true")
    assert len(list(folder.rglob("x.old-*.pt"))) == 5


def test_a_run_resumed_as_another_model_or_with_another_optimizer_says_so(small_run):
    small_run("x", "epochs=1")
    with pytest.raises(UserError, match="holds the state of another optimizer than sgd"):
        small_run("x", "resume=force", "optimizer=sgd", "epochs=2")
    folder = small_run("x", "resume=force", "optimizer.weight_decay=0.5", "epochs=2")
    assert load_checkpoint(folder / "ckpts/mlp/x_last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize("words", [[], ["overwrite=true"], ["resume=true"]])
def test_a_name_that_differs_only_in_capitals_is_refused(small_run, words):
    folder = small_run("Deep", "max_steps=2")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"there is no run deep|from the run Deep in .* only in"):
        small_run("deep", "max_steps=2", *words)
    assert sorted(folder.rglob("*")) == before


def test_a_clock_that_goes_back_breaks_nothing(small_run, monkeypatch):
    """What is timed goes by another clock, and a run keeps its place by when it began."""
    hours = itertools.count(20, -1)
    monkeypatch.setattr("run_files.run_folder.timestamp", lambda: f"2026-03-01T{next(hours):02d}:00:00+00:00")
    monkeypatch.setattr("time.time", lambda: float(next(hours)))
    for words in (["max_steps=2"], ["max_steps=4", "resume=true"], ["max_steps=2", "overwrite=true"]):
        folder = RunFolder(small_run("x", *words) / "runs/x")
        seconds = [row["elapsed_seconds"] for row in folder.metrics.read()]
        status = folder.status.read()
        assert seconds == sorted(seconds) and 0 < seconds[0] <= status["seconds"] + 0.001
        assert status["updated"] < status["started"] and status["state"] == "finished"
    assert len(list(folder.path.parent.glob("x.old-*"))) == 1


def test_a_run_whose_folder_is_deleted_says_so_and_leaves_its_saves(small_run, tmp_path, monkeypatch):
    run = tmp_path / "outputs/runs/x"
    monkeypatch.setattr("training.loop.judge", lambda *_: shutil.rmtree(run) and False)
    with pytest.raises(UserError, match="was deleted or moved while the run wrote there") as said:
        small_run("x", "on_save_error=continue")
    assert "give one of them to a new run as init_from" in str(said.value) and not run.exists()

"""The run's folder: every file survives a crash, and a resumed run's metrics show each step once."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest

from backends.submission import prepare
from common.errors import UserError
from common.files import replacing, share, write_atomically
from run_files.metrics_file import MetricsFile
from run_files.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from run_files.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    folder.metrics.append(step, 0, 0.1, {"train/loss": 1.0})
    folder.status.write("running", step, 0, 0.1, {"eval/loss": 1.0} | {f"metric_{n}": 1.0 for n in range(200)})
    print(step, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


def append_steps(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.metrics.append(step, step // 2, 1.5, {"train/loss": step / 10})


def test_rows_are_flat_and_on_disk_at_once(folder: RunFolder) -> None:
    folder.metrics.append(3, 1, 2.00049, {"train/loss": 0.5, "epoch_share": 0.25})
    row = {"step": 3, "epoch": 1, "elapsed_seconds": 2.0, "train/loss": 0.5, "epoch_share": 0.25}
    assert json.loads(folder.metrics.path.read_text()) == row
    assert folder.metrics.read() == [row]


def test_not_a_number_is_null(folder: RunFolder) -> None:
    folder.metrics.append(1, 0, 0.0, {"nan": float("nan"), "inf": float("inf"), "one": 1.0})
    row = json.loads(folder.metrics.path.read_text(), parse_constant=pytest.fail)
    assert (row["nan"], row["inf"], row["one"]) == (None, None, 1.0)
    folder.status.write("failed", 1, 0, 0.0, {"eval/loss": float("nan")}, why="loss is NaN")
    assert folder.status.read()["scores"] == {"eval/loss": None}


def test_torn_last_line_is_left_out_and_overwritten(folder: RunFolder) -> None:
    append_steps(folder, 1, 2)
    folder.metrics.close()
    with folder.metrics.path.open("a") as file:
        file.write('{"step": 3, "tr')
    assert [row["step"] for row in folder.metrics.read()] == [1, 2]
    append_steps(RunFolder(folder.path), 3)
    assert [row["step"] for row in folder.metrics.read()] == [1, 2, 3]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "epo'])
def test_trimmed_run_shows_each_step_once(folder: RunFolder, torn: str) -> None:
    append_steps(folder, 1, 2, 3, 4, 5)
    with folder.metrics.path.open("a") as file:
        file.write(torn)
    folder.metrics.trim(3)
    append_steps(folder, 4, 5, 6)
    assert [row["step"] for row in folder.metrics.read()] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", ['{"step": 3, "tr', "\0" * 300, "[1]", '{"epoch": 1}', '{"step": "a"}', "\xff", "[" * 10**5])
@pytest.mark.parametrize("last", [True, False], ids=["as the last line", "in the middle"])
def test_damaged_lines_cost_only_themselves(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], bad: str, last: bool
) -> None:
    """A last one is as if torn. Before others it is told, and a resume keeps the file as it was beside the mended one."""
    append_steps(folder, 1, 2, 3)
    lines = folder.metrics.path.read_bytes().splitlines(keepends=True)
    lines.insert(3 if last else 1, bad.encode("latin-1") + b"\n")
    before = b"".join(lines)
    folder.metrics.path.write_bytes(before)
    for _ in range(2):
        assert [row["step"] for row in folder.metrics.read()] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said == ("" if last else f"note: {folder.metrics.path} is damaged; left out: line 2\n")
    for copy in (".damaged", ".damaged.2"):
        folder.metrics.path.write_bytes(before)
        folder.metrics.trim(2)
        kept = folder.metrics.path.with_name(f"metrics.jsonl{copy}")
        assert kept.exists() is not last and (last or kept.read_bytes() == before)
        append_steps(folder, 3)
        assert [row["step"] for row in RunFolder(folder.path).metrics.read()] == [1, 2, 3]


@pytest.mark.parametrize(
    "bad", ["", "\0" * 40, '{"state": "run', "[1]", '{"scores": [1]}', '{"step": "a"}', '{"seconds": "b"}']
)
def test_a_damaged_status_is_an_unknown_one(folder: RunFolder, capsys: pytest.CaptureFixture[str], bad: str) -> None:
    folder.status.write("running", 10, 1, 5.0, {"eval/loss": 0.5})
    folder.status.path.write_text(bad)
    assert folder.status.read() == {} == folder.status.read()
    assert capsys.readouterr().err.count("is damaged; what became of the run is unknown") == 1
    folder.status.write("finished", 20, 2, 9.0)
    assert folder.status.read()["state"] == "finished"


def test_scores_that_are_not_numbers_stay_so(folder: RunFolder) -> None:
    folder.status.write("running", 1, 0, 0.0, {"eval/loss": float("nan")})
    folder.status.write("running", 2, 0, 0.0)
    assert folder.status.read()["scores"] == {"eval/loss": None}


@pytest.mark.parametrize("bad", ["", "a: [1, 2", "[1, 2]", "word", "\0\0", "a: ${b", "run_name: x\nepochs: 3\n", "\xff"])
def test_a_damaged_configuration_is_one_sentence_when_a_run_goes_on(folder: RunFolder, bad: str) -> None:
    folder.path.mkdir(parents=True)
    folder.config_path.write_bytes(bad.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        prepare(["run_name=x", "resume=true", f"output_dir={folder.path.parents[1]}"])
    assert str(folder.config_path) in str(refused.value) and "\n" not in str(refused.value)
    assert "put back a copy of it" in str(refused.value)


def test_trimming_before_the_first_row_is_nothing(folder: RunFolder) -> None:
    folder.metrics.trim(3)
    assert folder.metrics.read() == []


def test_status_keeps_its_start_scores_and_details(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["first", "second"])
    monkeypatch.setattr("run_files.run_folder.timestamp", lambda: next(times))
    folder.status.write("running", 10, 1, 5.0, {"eval/loss": 0.5}, epochs=3)
    folder.status.write("interrupted", 20, 2, 9.0, why="Ctrl-C")
    status = folder.status.read()
    assert (status["started"], status["updated"], status["state"]) == ("first", "second", "interrupted")
    assert (status["step"], status["epoch"], status["seconds"], status["why"]) == (20, 2, 9.0, "Ctrl-C")
    assert (status["scores"], status["epochs"], status["pid"]) == ({"eval/loss": 0.5}, 3, os.getpid())


def test_unknown_state_is_refused(folder: RunFolder) -> None:
    with pytest.raises(AssertionError):
        folder.status.write("done", 0, 0, 0.0)


def test_nothing_written_yet_reads_as_empty(folder: RunFolder) -> None:
    assert (folder.status.read(), folder.metrics.read()) == ({}, [])


def test_config_and_overrides(folder: RunFolder) -> None:
    folder.write_config("epochs: 3\n", ["epochs=3", "model=unet"])
    assert folder.config_path.read_text() == "epochs: 3\n"
    assert folder.overrides_path.read_text() == "epochs=3\nmodel=unet\n"


def test_a_file_of_another_user_that_may_not_be_read_is_one_sentence(folder: RunFolder, monkeypatch, capsys) -> None:
    folder.write_config("seed: 0\n", [])
    folder.status.write("finished", 1, 1, 0.0)
    monkeypatch.setattr("common.files.os.access", lambda path, mode: False)  # root may read whatever its mode
    for read in (folder.read_config, folder.read_overrides):
        with pytest.raises(UserError, match="may not be read by this user"):
            read()
    assert folder.status.read() == {} and "status.json may not be read by this user" in capsys.readouterr().err


def test_sample_pictures_sort_by_step(folder: RunFolder) -> None:
    paths = [folder.sample_picture(step) for step in (1000, 20, 300_000)]
    assert sorted(paths) == [paths[1], paths[0], paths[2]]
    assert paths[0].parent == folder.path / "samples" and paths[0].suffix == ".png"


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("write", [write_atomically, lambda path, text: share(saved(path.parent, text), path)])
def test_a_written_file_is_the_one_at_the_end_of_its_links_with_its_mode_and_owner(tmp_path: Path, write) -> None:
    end, middle, first = tmp_path / "there" / "log.md", tmp_path / "middle", tmp_path / "first"
    end.parent.mkdir()
    middle.symlink_to("there/log.md")
    first.symlink_to(middle)
    write(first, "made")
    assert end.read_text() == "made" and first.is_symlink() and middle.is_symlink()


def saved(folder: Path, text: str) -> Path:
    path = folder / "saved"
    path.write_text(text)
    return path


def test_a_replaced_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "log.md"
    path.write_text("old")
    path.chmod(0o640)
    owner = (1234, 4321) if os.getuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    write_atomically(path, "new")
    status = path.stat()
    assert path.read_text() == "new" and status.st_mode & 0o7777 == 0o640 and (status.st_uid, status.st_gid) == owner


def test_a_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    path, left, of_another = tmp_path / "page.html", tmp_path / ".page.html.99.tmp", tmp_path / ".new_page.html.99.tmp"
    left.touch(), of_another.touch()
    os.mkfifo(tmp_path / ".page.html.98.tmp")  # which nobody is waited for to write
    (link := tmp_path / ".page.html.97.tmp").symlink_to(of_another)
    with replacing(path) as file:
        being_written = next(tmp_path.glob(f".page.html.{os.getpid()}.tmp"))
        write_elsewhere = os.fork()
        if not write_elsewhere:
            write_atomically(path, "of another process")
            os._exit(0)
        assert os.waitpid(write_elsewhere, 0)[1] == 0 and path.read_text() == "of another process"
        assert being_written.exists() and not left.exists()
        file.write(b"last")
    assert path.read_text() == "last" and of_another.exists() and link.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link to itself"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    given = tmp_path / "given"
    given.symlink_to(given if kind == "link to itself" else path)
    before = path.stat().st_ino
    with pytest.raises(UserError, match="is not a regular file"):
        write_atomically(given if "link" in kind else path, "new")
    assert path.stat().st_ino == before and sorted(tmp_path.iterdir()) == [given, path]


@pytest.mark.process
def test_killed_writer_leaves_whole_files(folder: RunFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    for _ in range(50):
        assert folder.status.read()["state"] == "running"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    told = int(process.communicate()[0].split()[-1])
    assert folder.status.read()["step"] >= told
    assert [row["step"] for row in folder.metrics.read()][:told] == list(range(1, told + 1))


def test_a_folder_that_is_deleted_while_its_run_writes_is_noticed_and_not_made_again(folder: RunFolder) -> None:
    folder.lock.acquire()
    append_steps(folder, 1)
    shutil.rmtree(folder.path)
    for write in (lambda: append_steps(folder, 2), folder.metrics.sync, lambda: folder.status.write("running", 2, 0, 0.0)):
        with pytest.raises(UserError, match="was deleted or moved while the run wrote there"):
            write()
    assert not folder.path.exists()
    folder.release()


def test_a_configuration_deleted_while_its_run_trains_is_there_again_with_the_next_save(small_run, monkeypatch) -> None:
    sync = MetricsFile.sync

    def lose_configuration(metrics: MetricsFile) -> None:
        metrics.path.with_name("config.yaml").unlink()
        sync(metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "sync", lose_configuration)
        small_run("x", "max_steps=2")
    small_run("x", "resume=true", "max_steps=3")


TALKER = """
import sys
from common.files import outlive_readers
outlive_readers(sys.argv[1])
for n in range(3):
    print("x" * 100_000, flush=True)
    print(f"line {n}", file=sys.stderr)
"""


@pytest.mark.process
@pytest.mark.parametrize("note", ["the work goes on", ""])
def test_a_reader_that_leaves_costs_a_line_and_not_the_process(note: str) -> None:
    command, pipe = [sys.executable, "-c", TALKER, note], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().splitlines()
    process.stderr.close()
    first = ["note: standard output takes no more (broken pipe); the work goes on"] if note else []
    assert said == [*first, "line 0", "line 1", "line 2"] and process.wait(60) == 0


@pytest.mark.process
def test_a_command_whose_output_finds_no_room_is_one_sentence(tmp_path: Path) -> None:
    """A file that may hold 1 KiB stands for a full disk; what the interpreter flushes at its end is lost in silence."""
    code = "import sys; from common.command_line import front; sys.exit(front([], None, lambda words: 'x' * 3000))"
    command = ["bash", "-c", 'ulimit -f 1; exec "$0" -c "$1" > "$2"', sys.executable, code, str(tmp_path / "full")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot write standard output: " in done.stderr


@pytest.mark.process
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_leads_nowhere_and_no_file_gets_its_number(closed: str, tmp_path: Path) -> None:
    opens = f"\nopened = open({str(tmp_path / 'x')!r}, 'w')\nopened.write(str(opened.fileno()))"
    command = ["bash", "-c", f'exec "$0" -c "$1" "" {closed}', sys.executable, TALKER + opens]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert int((tmp_path / "x").read_text()) > 2


def test_a_folder_moved_aside_between_opening_and_locking_is_not_taken_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another process with overwrite=true, that then begins the run anew: this one must see that it is held."""
    other, mine, first = RunFolder(tmp_path / "x"), RunFolder(tmp_path / "x"), []
    real = fcntl.flock

    def flock(file: TextIO, operation: int) -> None:
        if not first:
            first.append(1)
            (tmp_path / "x").rename(tmp_path / "x.old")
            other.lock.acquire()
        real(file, operation)

    monkeypatch.setattr("run_files.run_lock.fcntl.flock", flock)
    with pytest.raises(UserError, match="is being trained by another process"):
        mine.lock.acquire()
    other.release()
    mine.lock.acquire()
    mine.release()

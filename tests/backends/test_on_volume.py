"""What a rented machine does with a run in a folder that stands for the Volume, and how runs come home from it."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import launcher
from backends import on_volume
from dev.kill_test import same
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder
from run_files.trackio_tracker import TrackioTracker
from scripts import modal_app, modal_runs
from tests.backends.folder_volume import ODD, PROJECT, WORDS, FolderVolume, below, rows_of, run_twice, without_token

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folders of one run that was carried out twice, and what came of it."""
    return run_twice(tmp_path_factory.mktemp("modal"))


def test_a_killed_and_repeated_call_ends_as_a_run_left_alone(runs: dict[str, Any]) -> None:
    home, volume = runs["home"] / "outputs", runs["volume"] / "outputs"
    assert runs["killed"]["state"] == "running" and 0 < runs["killed"]["step"] < 48
    mine, theirs = (load_checkpoint(folder / "ckpts/mlp/x_last.pt") for folder in (volume, home))
    assert mine["step"] == 48 and all(same(mine[key], theirs[key]) for key in ("network", "ema", "optimizer", "schedule"))
    assert mine["git_commit"] == "abc"
    assert below(volume) == below(home)
    assert [sorted(row) for row in rows_of(volume / "runs/x")] == [sorted(row) for row in rows_of(home / "runs/x")]
    best = min(row["eval/loss"] for row in rows_of(volume / "runs/x") if "eval/loss" in row)
    assert runs["outcome"] | {"commits": 0} == {"status": 0, "why": "", "best": best, "commits": 0}
    assert runs["outcome"]["commits"] >= 3  # on the way, and at the end
    assert (runs["volume"] / f"trackio/x/{PROJECT}.db").is_file()


def test_the_run_is_told_what_was_typed(runs: dict[str, Any]) -> None:
    for place, words in (("home", WORDS), ("volume", [*WORDS, "resume=true"])):
        config = yaml.safe_load((runs[place] / "outputs/runs/x/config.yaml").read_text())
        assert (
            config["overrides"] == words and config["log"]["source"] == ODD and config["optimizer"]["betas"] == [0.8, 0.95]
        )
        assert config["choices"]["backend"] == "local"


def test_a_finished_call_returns_at_once(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(on_volume, "LAUNCHER")
    done = on_volume.carry_out_on(runs["volume"], WORDS, lambda: None, "fc-1")
    assert done["status"] == 0 and done["best"] == runs["outcome"]["best"]


FAKE = """
import json, os, signal, sys
from pathlib import Path
Path("told.json").write_text(json.dumps(sys.argv[1:]))
if "seed=9" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("seed=8" in sys.argv)
"""


@pytest.fixture
def fake_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """told(words, call): what carry_out_on gives the launcher, which here does nothing else."""
    (tmp_path / "launcher.py").write_text(FAKE)
    monkeypatch.setattr(on_volume, "LAUNCHER", tmp_path / "launcher.py")

    def told(words: list[str], call: str = "fc") -> list[str]:
        (tmp_path / "told.json").unlink(missing_ok=True)
        on_volume.carry_out_on(tmp_path, words, lambda: None, call)
        said: list[str] = json.loads((tmp_path / "told.json").read_text())
        return said

    return told


def test_a_repeated_call_goes_on_with_its_own_run_only(fake_launcher: Callable[..., list[str]], tmp_path: Path) -> None:
    folder, words = RunFolder(tmp_path / "outputs/runs/x"), ["run_name=x", "overwrite=true", "init_from=w.pt", "seed=1"]
    folder.write_config("old: 1\n", [])
    folder.status.write("finished", 5, 1, 1.0, started="then")
    assert fake_launcher(words) == words
    assert fake_launcher(words) == words  # killed before the old run was moved aside
    folder.status.path.unlink()
    assert fake_launcher(words) == ["run_name=x", "seed=1", "resume=true"]  # killed between its first two files
    folder.status.write("running", 0, 0, 1.0)
    assert fake_launcher(words) == ["run_name=x", "seed=1", "resume=true"]
    assert fake_launcher(words, "another call") == words
    assert fake_launcher(["run_name=y"]) == ["run_name=y"]
    assert fake_launcher(["run_name=x", "resume=force", "seed=2"], "fc-3")[1] == "resume=force"
    folder.status.write("failed", 0, 0, 1.0, why="rank 1 of 2 was killed by SIGKILL")
    with pytest.raises(ChildProcessError, match="rank 1 of 2 was killed by SIGKILL; carried"):
        fake_launcher(["run_name=x", "seed=8"], "fc-5")
    folder.status.write("failed", 0, 0, 1.0, why="no memory")
    assert fake_launcher(["run_name=x", "seed=8"], "fc-6")  # a mistake is not carried out again
    with pytest.raises(ChildProcessError, match="SIGKILL; carried out again, it goes on"):
        fake_launcher(["run_name=x", "seed=9"], "fc-4")


def test_whoever_interrupts_the_wait_lets_the_run_save(tmp_path: Path) -> None:
    script = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n  open('ready', 'w'); time.sleep(600)\nexcept KeyboardInterrupt:\n  open('saved', 'w')"
    )
    process, saved, interrupts = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path), [], [KeyboardInterrupt]

    def commit() -> None:
        saved.append((tmp_path / "saved").exists())
        if (tmp_path / "ready").exists() and interrupts:
            raise interrupts.pop()

    with pytest.raises(KeyboardInterrupt):
        on_volume.wait_for(process, commit, 0.02)
    assert saved[-1] and process.returncode == 0


def tracked_steps(run: str) -> list[int]:
    path = Path(os.environ["TRACKIO_DIR"]) / f"{PROJECT}.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT step FROM metrics WHERE run_name = ? ORDER BY id", (run,))]


@pytest.fixture
def volume(runs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Volume with the run x and its copy y; the working folder is an empty home."""
    place = tmp_path / "volume"
    shutil.copytree(runs["volume"], place)
    add_run(place, "y")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(modal_runs, "open_volume", lambda name: FolderVolume(place))
    return place


def add_run(volume: Path, name: str) -> RunFolder:
    """Another run on the Volume, with the files of x."""
    folder = RunFolder(volume / "outputs/runs" / name)
    shutil.copytree(volume / "outputs/runs/x", folder.path)
    folder.config_path.write_text(folder.config_path.read_text().replace("run_name: x", f"run_name: {name}"))
    folder.log_path.write_text(folder.log_path.read_text().replace("x: ", f"{name}: ").replace("## x", f"## {name}"))
    shutil.copy(volume / "outputs/ckpts/mlp/x_last.pt", volume / f"outputs/ckpts/mlp/{name}_last.pt")
    return folder


def test_sync_brings_two_runs_home_once_and_they_go_on_there(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, steps = Path("outputs"), [row["step"] for row in rows_of(volume / "outputs/runs/x")]
    for told in (f"{len(steps)} rows in the tracker's project {PROJECT}", "nothing new"):
        assert modal_app.main(["sync"]) == 0
        assert capsys.readouterr().out == f"x: step 48, {told}\ny: step 48, {told}\n"
        assert tracked_steps("x") == tracked_steps("y") == steps
    hidden = {
        file for file in below(volume / "outputs") if file.startswith("cache") or file.endswith((".lock", "mlp/last.pt"))
    }
    assert below(home) - {f"runs/{name}/.lock" for name in "xy"} == below(volume / "outputs") - hidden
    log = Path("EXPERIMENT_LOG.md").read_text()
    assert log.count("## x") == log.count("## y") == 1 and log.count("Expected outcome: less than before") == 2
    launcher.run("run_name=x", "resume=true", "epochs=25", "trackio.enabled=false")
    assert RunFolder(home / "runs/x").status.read()["step"] == 50
    before = {file: (home / file).read_bytes() for file in below(home)}
    assert modal_app.main(["sync"]) == 1
    said = capsys.readouterr()
    assert "run x is newer here (step 50, on the Volume 48)" in said.err and said.err.count("\n") == 1
    assert "y: step 48, nothing new" in said.out and {file: (home / file).read_bytes() for file in below(home)} == before


def test_sync_carries_out_nothing_and_writes_no_log_elsewhere(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = volume / "outputs/runs/y/config.yaml"
    config = yaml.safe_load(path.read_text())
    harm = {"_target_": "distutils.spawn.spawn", "cmd": ["touch", str(Path.cwd() / "HARM")]}
    config["log"]["file"] = "../outside.md"
    path.write_text(json.dumps(config | {"backend": harm, "callbacks": {"x": harm}}))  # JSON is YAML
    assert modal_app.main(["sync", "y"]) == 0
    assert "is not copied to ../outside.md, outside the working folder" in capsys.readouterr().err
    assert not Path("../outside.md").exists() and not Path("HARM").exists() and not Path("EXPERIMENT_LOG.md").exists()


def test_sync_leaves_another_run_of_that_name_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = RunFolder(Path("outputs/runs/x"))
    mine.write_config("command: python launcher.py run_name=x seed=5\n", ["run_name=x", "seed=5"])
    mine.status.write("finished", 3, 1, 1.0)
    Path("outputs/ckpts/mlp").mkdir(parents=True)
    Path("outputs/ckpts/mlp/y_last.pt").write_text("precious")
    before = {file: Path("outputs", file).read_bytes() for file in below(Path("outputs"))}
    assert modal_app.main(["sync"]) == 1
    said = capsys.readouterr().err
    assert "run x here is another one, by `python launcher.py run_name=x seed=5`" in said
    assert "run y has saves here" in said and said.count("\n") == 2
    assert {file: Path("outputs", file).read_bytes() for file in below(Path("outputs"))} == before
    assert modal_app.main(["download", "x", "--to", "far"]) == 0
    assert Path("far/outputs/ckpts/mlp/x_last.pt").is_file() and Path("far/outputs/runs/x/status.json").is_file()
    assert modal_app.main(["download", "x", "--to", "far"]) == 1


def test_a_sync_cut_short_is_done_again(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves, replace = [0], Path.replace

    def third_fails(path: Path, target: Path) -> Path:
        moves[0] += ".sync-" in str(path) and path.suffix != ".tmp"
        if moves[0] == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", third_fails)
        modal_app.main(["sync", "x"])
    assert RunFolder(Path("outputs/runs/x")).config_path.is_file() and not RunFolder(Path("outputs/runs/x")).status.read()
    assert modal_app.main(["sync", "x"]) == 0
    assert RunFolder(Path("outputs/runs/x")).status.read()["step"] == 48


def test_a_tracker_cut_short_is_completed_by_the_next_sync(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of scores carry their provenance, which is no number."""
    place = volume / "outputs/runs/y/metrics.jsonl"
    rows = [row | {"provenance": {"eval/loss": "weights 1a2b"}} for row in rows_of(place.parent)]
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def fails(tracker: TrackioTracker, metrics: dict[str, float], step: int) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(TrackioTracker, "log", fails)
        assert modal_app.main(["sync", "y"]) == 1
    assert "the disk is full; nothing is lost, try again" in capsys.readouterr().err
    assert place.read_bytes() == Path("outputs/runs/y/metrics.jsonl").read_bytes()
    for told in (f"{len(rows)} rows in the tracker's project {PROJECT}", "nothing new"):
        assert modal_app.main(["sync", "y"]) == 0
        assert capsys.readouterr().out == f"y: step 48, {told}\n" and tracked_steps("y") == [row["step"] for row in rows]


def test_broken_runs_get_a_sentence_each_and_the_others_come(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("torn", "headless", "old", "damaged", "halved")
    torn, headless, old, damaged, halved = (add_run(volume, name) for name in names)
    torn.metrics.path.write_bytes(torn.metrics.path.read_bytes()[:-20])
    headless.status.path.unlink()
    old.config_path.write_text("version: 0\nrun_name: old\n")
    damaged.metrics.path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    halved.config_path.write_text("run_name: [halved\n")
    (volume / "jobs").mkdir()
    (volume / "jobs/waiting.json").write_text('{"app": "ap-1"}')
    for command in ("list", "sync"):
        assert modal_app.main([command]) == 1
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 4 and [line.split()[2] for line in lines] == ["damaged", "halved", "headless", "old"]
        assert "was written by another version" in lines[3] and "has no status.json" in lines[2] and "is broken" in lines[0]
        assert all(f"\n{name}" in f"\n{said.out}" for name in ("x", "y", "torn"))
        assert "waiting" not in said.out if command == "sync" else "waiting  submitted" in said.out
    assert sorted(path.name for path in Path("outputs/runs").iterdir()) == ["torn", "x", "y"]
    assert rows_of(Path("outputs/runs/torn")) == rows_of(volume / "outputs/runs/x")[:-1]


BROKEN: dict[str, tuple[str, str, str]] = {
    "b1": ("metrics.jsonl", '{"step": 1, "train/loss": "abc"}\n', "train/loss in line 1 of its metrics.jsonl is no number"),
    "b2": ("metrics.jsonl", '{"step": 1, "eval/loss": {"a": 1}}\n', "eval/loss in line 1"),
    "b3": ("metrics.jsonl", '{"step": "x"}\n', "line 1 of its metrics.jsonl is damaged"),
    "b4": ("config.yaml", "trackio: null", "its config.yaml cannot be read"),
    "b5": ("config.yaml", "log: null", "its config.yaml cannot be read"),
    "b6": ("config.yaml", "[cut", "its config.yaml cannot be read"),
    "b7": ("status.json", '"seconds": "x"', "its status.json has no usable seconds"),
    "b8": ("status.json", '"step": "x"', "no usable step"),
    "b9": ("status.json", '"step": null', "no usable step"),
    "c1": ("status.json", '"updated": "x"', "does not say when it was updated"),
    "c2": ("status.json", '"state": "odd"', "its status.json has the state odd"),
    "c3": ("status.json", '"scores": {"eval/loss": "x"}', "a score in its status.json is no number"),
    "c4": ("status.json", "[]", "its status.json is damaged"),
    "c5": ("config.yaml", "overrides: null", "its config.yaml cannot be read"),
}


def test_every_damage_is_one_plain_sentence_and_nothing_of_it_comes(
    volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (file, words, _) in BROKEN.items():
        path = add_run(volume, name).path / file
        key, _, value = words.partition(": ")
        if file == "metrics.jsonl" or not value:
            path.write_text(words)
        elif file == "status.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | json.loads("{" + words + "}")))
        else:
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {key: None}))
    for command in ("list", "sync"):
        assert modal_app.main([command]) == 1
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert [line.split()[2] for line in lines] == list(BROKEN)
        for line, (name, (_, _, why)) in zip(lines, BROKEN.items(), strict=True):
            told = line.removeprefix(f"modal_app.py: run {name} on the Volume denoising-zoo is broken: ")
            assert told != line and why in told and told.endswith(f"; it stays there, see `modal_app.py download {name}`")
            assert str(Path.cwd().parent) not in line and ".sync-" not in line
        assert "\ny" in said.out
    assert sorted(path.name for path in Path("outputs/runs").iterdir()) == ["x", "y"]


def test_checkpoints_logs_and_stop(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modal.cli.app import app_cli

    assert modal_app.main(["ckpts", "y"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "checkpoint",
        "outputs/ckpts/mlp/y_last.pt",
    ]
    assert modal_app.main(["ckpts", "nobody"]) == 1 and modal_app.main(["stop", "y"]) == 1
    said = capsys.readouterr().err
    assert "there is no run nobody on the Volume" in said and "no run y was sent" in said
    (volume / "jobs").mkdir()
    (volume / "jobs/y.json").write_text('{"app": "ap-1"}')
    commands: list[list[str]] = []

    def called(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, len(commands) // 3, stderr="")

    monkeypatch.setattr(subprocess, "run", called)
    assert [modal_app.main([*words, "y"]) for words in (["logs", "--follow"], ["stop"], ["stop"])] == [0, 0, 1]
    for command in commands:
        assert command[:3] == ["-m", "modal", "app"] and "ap-1" in command
        app_cli.commands[command[3]].make_context(command[3], command[4:])  # the flags are modal's own


def test_the_script_wants_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_token(monkeypatch)
    assert modal_app.main(["list"]) == 1
    assert (
        capsys.readouterr().err
        == "modal_app.py: this machine has no token of Modal; `modal token new` makes one, in a browser\n"
    )

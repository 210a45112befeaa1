"""A run of two processes as a user starts, stops and loses it; and what cannot be started."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from run_files.checkpoint import load_checkpoint
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=64",
    "model.width=16", "model.depth=2", "solver.steps=4", "callbacks=none", "output_dir=.",
]  # fmt: skip


MISTAKES = [
    (["devices=0"], "devices takes a whole number of at least 1"),
    (["devices=3", "batch_size=256"], "use batch_size=255"),
    (["--devices", "2", "--device", "mps"], "one MPS device"),
    (["--devices"], "--devices needs a value, such as --devices 2"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_devices_that_cannot_be_are_refused_in_a_sentence(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["run_name=x", *words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_more_devices_than_the_machine_has_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launcher.main(["run_name=x", "device=cuda", "devices=2"]) == 1
    assert "devices=2, and this machine has 1 CUDA device(s)" in capsys.readouterr().err
    assert launcher.main(["run_name=x", "device=cuda", "devices=2", "--dry-run"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_how_many_processes_share_how_many_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["run_name=x", "--dry-run", "--devices", "2", "device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "2 processes" in said and "1024 rows, 512 on each device" in said
    assert list(tmp_path.iterdir()) == []


def launched(place: Path, *words: str) -> Forked:
    return Forked(ROOT / "launcher.py", "run_name=x", *words, cwd=place, env=os.environ | {"TMPDIR": str(place)})


def wait_for_step(place: Path, process: Forked, step: int) -> None:
    """Until the run has logged a later step."""
    file, deadline = place / "runs/x/metrics.jsonl", time.monotonic() + 300
    while not file.is_file() or not any(json.loads(row)["step"] > step for row in file.read_text().split("\n")[:-1]):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def process_of_rank(agent: int, number: int) -> int:
    """The process that torchrun's agent has started as this rank."""
    for name in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((name / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"\0RANK={number}\0" in (name / "environ").read_text():
                return int(name.name)
        except OSError:
            continue  # it has ended meanwhile
    raise AssertionError(f"no rank {number}")


def status(place: Path) -> dict[str, Any]:
    return json.loads((place / "runs/x/status.json").read_text())


def wait_until_gone(processes):
    """What is killed may stay listed for a moment, without a command line."""
    end = time.monotonic() + 120
    while any(path.exists() and path.read_text() for path in (Path(f"/proc/{number}/cmdline") for number in processes)):
        assert time.monotonic() < end, f"processes {processes} live on"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the processes of ranks in /proc")
def test_a_run_of_two_is_stopped_killed_and_goes_on_with_one_and_with_two(tmp_path, monkeypatch):
    long = [*SMALL, "batch_size=128", "dataloaders.epoch_size=2560", "log_every=10", "max_steps=1000000"]
    process = launched(tmp_path, "--devices", "2", *long)
    wait_for_step(tmp_path, process, 0)
    process.terminate()
    out, err = process.communicate(timeout=300)
    stopped = status(tmp_path)
    assert process.returncode == 143 and "128 rows, 64 on each device; lr 0.005" in out
    assert err == "" and "x interrupted (stopped by SIGTERM)" in out
    assert stopped["state"] == "interrupted" and stopped["step"] > 0
    assert load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")["step"] == stopped["step"]

    process = launched(tmp_path, "resume=true", "output_dir=.")  # on two: the run's own setting
    wait_for_step(tmp_path, process, stopped["step"])
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "rank 1 of 2 was killed by SIGKILL" in err and "resume=true" in err
    assert status(tmp_path)["state"] == "failed" and "rank 1 of 2" in status(tmp_path)["why"]

    process = launched(tmp_path, "resume=true", "output_dir=.")
    wait_for_step(tmp_path, process, status(tmp_path)["step"])
    ranks = [process_of_rank(process.pid, number) for number in (0, 1)]
    os.kill(ranks[1], signal.SIGSTOP)  # as one that hangs, for which the first signal would wait for ever
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        process.terminate()
        time.sleep(0.1)
    assert process.returncode == 143 and list(tmp_path.glob("torchrun-*")) == []
    wait_until_gone(ranks)

    saved = load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")
    assert saved["config"]["devices"] == 2 and not any("module" in key for key in saved["network"])
    monkeypatch.chdir(tmp_path)
    launcher.run("run_name=x", "resume=true", "output_dir=.", "devices=1", f"max_steps={saved['step'] + 20}")
    assert status(tmp_path)["state"] == "finished" and status(tmp_path)["step"] == saved["step"] + 20
    alone = load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")

    process = launched(tmp_path, "resume=true", "output_dir=.", "--devices", "2", f"max_steps={saved['step'] + 40}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "" and "goes on with 2 devices instead of 1" in out, err
    assert status(tmp_path)["state"] == "finished" and status(tmp_path)["step"] == saved["step"] + 40
    both = load_checkpoint(tmp_path / "ckpts/mlp/x_last.pt")
    for key in ("network", "ema", "window"):
        assert alone[key].keys() == both[key].keys()
    rows = [json.loads(row) for row in (tmp_path / "runs/x/metrics.jsonl").open()]
    lives = [[row for row in rows if begun < row["step"] <= begun + 20] for begun in (saved["step"], saved["step"] + 20)]
    one, two = (set().union(*life) for life in lives)
    assert one == two and {"train/loss", "train/samples_per_second", "eval/loss"} <= one
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)

"""What a job of Slurm does with its run, without Slurm: it saves, goes back to the queue, and on."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import slurm_job, torchrun
from common import signals
from common.errors import UserError
from run_files.run_folder import RunFolder
from train import ask_to_stop

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
Path("told.json").write_text(json.dumps({"words": sys.argv[1:], "once": os.environ.get("DENOISING_ZOO_ONE_REQUEST")}))
if "seed=1" in sys.argv:
    sys.exit(0)
if "seed=2" in sys.argv:
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
Path("ready").touch()
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """attempt(seed, restarts, signal_number, step): (status, what the launcher was given, commands to Slurm) of one job,
    whose launcher does nothing but end; the step is what its run has done after it."""
    (tmp_path / "launcher.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_job, "LAUNCHER", tmp_path / "launcher.py")
    monkeypatch.setattr(slurm_job, "POLL", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    commands: list[list[str]] = []
    monkeypatch.setattr(slurm_job, "asked", lambda command: commands.append(command) or "")
    folder = RunFolder(tmp_path / "outputs/runs/x")

    def carry_out(seed: int, restarts: int, number: int | None = None, step: int = 0) -> Any:
        commands.clear()
        for name in ("told.json", "ready"):
            (tmp_path / name).unlink(missing_ok=True)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        job = slurm_job.Job(60, [])

        def poll() -> None:
            if number is not None and (tmp_path / "ready").exists() and not job.came:
                if step:
                    folder.write_config("run_name: x\n", [])
                    folder.status.write("interrupted", step, 1, 1.0)
                signal.raise_signal(number)

        monkeypatch.setattr(slurm_job.time, "sleep", lambda _: poll())
        before = {either: signal.getsignal(either) for either in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            status = job.carry_out(["run_name=x", "overwrite=true", f"seed={seed}"])
        except UserError as error:
            status = str(error)
        finally:
            for either, handler in before.items():
                signal.signal(either, handler)
        told = tmp_path / "told.json"
        return status, json.loads(told.read_text()) if told.exists() else None, list(commands)

    return carry_out


@pytest.mark.process
def test_a_job_saves_requeues_and_goes_on(attempt, tmp_path):
    words = ["run_name=x", "overwrite=true", "seed=0"]
    status, told, commands = attempt(0, 0, signal.SIGUSR1, step=5)
    assert status == 0 and told == {"words": words, "once": "1"} and commands == [["scontrol", "requeue", "8"]]
    status, told, commands = attempt(0, 1, signal.SIGTERM, step=9)
    assert status == 143 and told["words"] == ["run_name=x", "seed=0", "resume=true"] and commands == []  # Slurm requeues
    RunFolder(tmp_path / "outputs/runs/x_teacher").status.write("finished", 7, 1, 1.0)
    status, told, commands = attempt(0, 2, signal.SIGUSR1, step=9)
    assert "before a step was saved" in status and commands == []
    RunFolder(tmp_path / "outputs/runs/x").status.write("finished", 9, 1, 1.0)
    assert attempt(0, 3) == (0, None, [])
    assert attempt(1, 0)[1]["words"] == ["run_name=x", "overwrite=true", "seed=1"]  # another job of that number
    assert attempt(2, 0)[0] == 1


@pytest.mark.process
def test_what_is_busy_when_the_time_is_over_is_requeued(attempt, monkeypatch):
    monkeypatch.setattr(slurm_job.Job, "pass_on", lambda _: None)
    monkeypatch.setattr(slurm_job, "MARGIN", 60)
    popen = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(slurm_job.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    assert attempt(0, 0, signal.SIGUSR1, step=5)[::2] == (0, [["scontrol", "requeue", "8"]])
    started[0].kill()
    started[0].wait()


def test_nodes_meet_at_the_address_of_the_first(monkeypatch):
    shown = {"hostnames": "n0\nn1\n", "n0": "NodeName=n0 NodeAddr=10.0.0.1 X=y", "n1": "NodeName=n1 NodeAddr=10.0.0.2 X=y"}
    monkeypatch.setattr(slurm_job, "asked", lambda command: shown[command[-1]])
    place = slurm_job.meeting_point("7.1")
    assert place["addresses"] == ["10.0.0.1", "10.0.0.2"] and place["port"] > 1023
    monkeypatch.setenv(torchrun.NODES, json.dumps(place))
    monkeypatch.setenv("SLURM_NODEID", "1")
    settings = torchrun.meeting()
    assert settings["rdzv_endpoint"] == f"10.0.0.1:{place['port']}" and settings["local_addr"] == "10.0.0.2"
    assert settings["min_nodes"] == settings["max_nodes"] == torchrun.nodes() == 2
    assert settings["rdzv_configs"] == {"is_host": "false"} and settings["run_id"] == "7.1"
    monkeypatch.delenv(torchrun.NODES)
    assert torchrun.nodes() == 1 and torchrun.meeting()["rdzv_endpoint"] == "localhost:0"


def test_in_a_job_a_request_that_comes_again_changes_nothing(monkeypatch):
    class Asked:
        asked, world, rank = None, 2, 1

    before = {number: signal.getsignal(number) for number in signals.stop_signals()}
    for once, after in ((True, signal.SIG_IGN), (False, signal.SIG_DFL)):
        monkeypatch.setenv(signals.ONCE, "1") if once else monkeypatch.delenv(signals.ONCE)
        try:
            ask_to_stop(Asked(), signal.SIGTERM, None)  # type: ignore[arg-type]
            assert signal.getsignal(signal.SIGTERM) == after
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def test_a_container_stands_before_python(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    command: list[list[str]] = []
    ended = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess.CompletedProcess, "poll", lambda self: self.returncode, raising=False)
    monkeypatch.setattr(slurm_job.subprocess, "Popen", lambda words, **_: command.append(words) or ended)
    assert slurm_job.Job(60, ["apptainer", "exec", "t.sif"]).run(["run_name=x"]) == 0
    assert command[0][:4] == ["apptainer", "exec", "t.sif", "python"] and command[0][-1] == "run_name=x"

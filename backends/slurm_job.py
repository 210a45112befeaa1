"""What a job of Slurm does with a run: the launcher, from the frozen code, asked to save before the job's time is over.

A job that comes back from the queue goes on with the run that it began. On several nodes srun starts a launcher on each,
and their torchrun agents meet at the first node's address.
"""

import argparse
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from backends.on_volume import words_of_attempt
from backends.slurm_queue import asked, jobs_folder
from backends.torchrun import LAUNCHER, NODES
from common.errors import UserError
from common.signals import ONCE
from configuration.compose import compose_config
from run_files.run_folder import RunFolder

POLL = 0.3  # seconds
MARGIN = 10  # seconds before the time limit, to requeue a run that is still busy


class Job:
    """One attempt of a job. seconds: between Slurm's warning, or a little later, and the time limit."""

    def __init__(self, seconds: int, container: list[str]) -> None:
        self.seconds, self.container = seconds, container
        self.number, self.nodes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        self.name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.number
        self.again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        self.came: list[int] = []
        self.deadline = math.inf
        self.process: subprocess.Popen[bytes] | None = None

    def carry_out(self, overrides: list[str]) -> int:
        """Return the exit status of this attempt at the run that `overrides` name."""
        config = compose_config(overrides)
        folder = RunFolder(Path(config["output_dir"]) / "runs" / config["run_name"])
        words = self.words(overrides, folder, Path(config["output_dir"]))
        if words is None:
            print(f"{folder.name} has finished already")
            return 0
        begun_at = steps(folder, own=any(word.startswith("resume=") for word in words))
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.asked_to_end)
        status = self.run(words)
        if signal.SIGUSR1 not in self.came or status in (0, 1):
            return status
        if steps(folder) <= begun_at:
            raise UserError("the time limit came before a step was saved; submit again with a larger backend.time_minutes")
        print(f"{folder.name} goes back to the queue, and on from its newest save", flush=True)
        asked(["scontrol", "requeue", self.number])
        return 0

    def words(self, overrides: list[str], folder: RunFolder, output_dir: Path) -> list[str] | None:
        """Return what the launcher is given, None where the run has finished; see words_of_attempt."""
        note = jobs_folder(output_dir) / f"{self.name}.attempt"
        if not self.again:  # an earlier cluster may have had a job of this number
            note.unlink(missing_ok=True)
        return words_of_attempt(note, overrides, folder)

    def run(self, words: list[str]) -> int:
        """Return the exit status of the launcher, 128 + SIGKILL where its time was over before it ended."""
        python = [*self.container, "python"] if self.container else [sys.executable]
        command, environment = [*python, str(LAUNCHER), *words], os.environ | {ONCE: "1", "PYTHONUNBUFFERED": "1"}
        if self.nodes > 1:
            environment[NODES] = json.dumps(meeting_point(f"{self.name}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"))
            environment["SRUN_CPUS_PER_TASK"] = os.environ.get("SLURM_CPUS_PER_TASK", "1")  # srun does not ask the job
            command = ["srun", f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", *command]
        self.process = subprocess.Popen(command, env=environment)
        if self.came:
            self.pass_on()
        while (status := self.process.poll()) is None and time.monotonic() < self.deadline:
            time.sleep(POLL)
        return 128 + signal.SIGKILL if status is None else status

    def asked_to_end(self, number: int, _: object) -> None:
        """Have the run save and end. At preemption Slurm itself signals every process; each heeds one signal."""
        self.came.append(number)
        if len(self.came) == 1:
            self.deadline = time.monotonic() + self.seconds - MARGIN
            if self.process is not None:
                self.pass_on()

    def pass_on(self) -> None:
        """Signal the launchers: the one of this process, or those that srun has started, which itself would kill them."""
        assert self.process is not None
        if self.nodes == 1:
            self.process.send_signal(signal.SIGTERM)
        elif signal.SIGTERM not in self.came:
            subprocess.run(["scancel", "--signal=TERM", self.number], check=False)


def steps(folder: RunFolder, own: bool = True) -> int:
    """Return the steps done by a run, where they are its `own` and not of one to be moved aside, and by its teacher."""
    folders = [folder] * own + [RunFolder(folder.path.with_name(f"{folder.name}_teacher"))]
    return sum(either.status.read().get("step", 0) for either in folders)


def meeting_point(name: str) -> dict[str, Any]:
    """Return where the agents of the nodes meet: the address of each node in the order of their numbers, and a free port
    of the first, where this process is."""
    names = asked(["scontrol", "show", "hostnames"]).split()
    shown = [asked(["scontrol", "--oneliner", "show", "node", node]) for node in names]
    addresses = [dict(word.partition("=")[::2] for word in node.split())["NodeAddr"] for node in shown]
    with socket.socket() as free:
        free.bind(("", 0))
        return {"addresses": addresses, "port": free.getsockname()[1], "id": name}


def main(arguments: list[str]) -> int:
    """Return the exit status of a job of Slurm, from the words of its script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--container", default="")
    options, overrides = parser.parse_known_args(arguments)
    try:
        return Job(options.seconds, shlex.split(options.container)).carry_out(overrides)
    except UserError as error:
        print(f"launcher.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

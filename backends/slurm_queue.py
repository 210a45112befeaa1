"""Slurm's commands, and which runs of an output folder they know of. No torch here."""

import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.processes import last_line
from common.errors import UserError
from common.files import read_own, write_atomically
from run_files.run_folder import RunFolder, timestamp
from run_files.stored_values import as_object

COLUMNS = "JobArrayID:|,State:|,RestartCnt:|,Name:200|,Comment:64|,STDOUT:4096"  # of squeue, which cuts short
MOST_BYTES = 2**22  # of a note
SECONDS = 60  # that a command of Slurm's may take
LOOK, PATIENCE = 5.0, 600.0  # seconds between two looks at the queue, and that it may give no answer


@dataclass(frozen=True)
class QueuedJob:
    """A job that has not ended. number: as scancel takes it, 12 or 12_3; restarts: how often it went back to the queue."""

    number: str
    state: str
    restarts: int

    def words(self) -> str:
        """Return how the job stands: pending, running, requeued (waiting again), or Slurm's own word."""
        waits_again = self.state == "PENDING" and self.restarts > 0
        return f"{'requeued' if waits_again else self.state.lower()} (job {self.number})"


def lacking_slurm() -> str | None:
    """Return why jobs cannot be submitted from this machine, in a sentence; None where they can."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        return "there is no Slurm here (no sbatch); submit on a cluster's login node, or leave --backend slurm out"
    return None


def asked(command: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> str:
    """Return what a command of Slurm's prints, `sbatch --test-only` on stderr. UserError, one sentence, for what it refuses,
    or when it does not answer."""
    try:
        done = subprocess.run(
            command, input=given, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm's {command[0]} does not answer within {SECONDS} seconds; try again later") from None
    if done.returncode:
        raise UserError(explained(command[0], done.stderr))
    return done.stderr if "--test-only" in command else done.stdout


def explained(command: str, said: str) -> str:
    """Return what an error of Slurm's means for the user."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in said.splitlines() if line.strip()]
    lines = lines or ["no reason given"]
    why = re.sub("Batch job submission failed: |allocation failure: ", "", lines[-1])
    if "munge" in said.lower():
        return f"munge does not answer, so Slurm cannot tell who you are ({why}); have munged started on this machine"
    if re.search(r"Unable to contact slurm controller|configuration source|Connection refused", said):
        return f"Slurm's controller does not answer ({why}); see `scontrol ping`, and try again when it does"
    for words, keys in REFUSED.items():
        if words.lower() in said.lower():
            return f"Slurm refuses the job ({why}); see {keys}"
    return f"Slurm's {command} refuses: {why}"


REFUSED = {
    "invalid partition": "backend.partition; `sinfo` lists the partitions",
    "invalid account": "backend.account; `sacctmgr show associations user=$USER` lists yours",
    "feature": "backend.constraint; `sinfo -o %f` lists what nodes have",
    "time limit": "backend.time_minutes; `sinfo -o '%P %l'` lists the limits",
    "node count": "backend.nodes; `sinfo` lists the nodes",
    "node configuration": "backend.nodes, gpus_per_node, cpus_per_node and memory_gb beside `sinfo -N -o '%N %c %m %G'`",
    "more processors": "backend.nodes and cpus_per_node; `sinfo -N -o '%N %c'` lists what nodes have",
    "memory": "backend.memory_gb; `sinfo -N -o '%N %m'` lists what nodes have",
    "gres": "backend.gpus_per_node; `sinfo -o '%P %G'` lists the GPUs, 0 asks for none",
}


def note_submission(output_dir: Path, number: str, name: str, runs: dict[str, list[str]]) -> None:
    """Keep which runs a job carries out, those of an array in the order of its tasks: name -> what was typed.

    number: of the job; before Slurm has given it one, the comment under which it is submitted.
    """
    note = {"job": number, "name": name, "runs": runs, "array": len(runs) > 1, "submitted": timestamp()}
    write_atomically(jobs_folder(output_dir) / f"{number}.json", json.dumps(note, indent=2) + "\n")


def forget_submission(output_dir: Path, number: str) -> None:
    """Remove what note_submission has kept."""
    (jobs_folder(output_dir) / f"{number}.json").unlink(missing_ok=True)


def jobs_folder(output_dir: Path) -> Path:
    return output_dir / "submitted" / "jobs"


def read_note(path: Path) -> dict[str, Any]:
    """Return what note_submission kept; no runs where the file holds something else. UserError for what read_own refuses."""
    content = read_own(path, path.parent, MOST_BYTES)
    note = as_object((content or b"").decode(errors="replace")) or {}
    whole = isinstance(note.get("runs"), dict) and note.keys() >= {"job", "name", "array"}
    return note if whole else {"runs": {}}


def queued_runs(output_dir: Path) -> dict[str, QueuedJob]:
    """Return your jobs that wait or run, by the runs of this output folder that they carry out; empty where none was ever
    submitted, or this machine has no Slurm.

    A number that Slurm has given again, to a job of another name, is not counted. A job whose submitter was killed before it
    could note its number is known by its comment, a single run also by where its log goes.
    """
    logs = output_dir.absolute() / "submitted"
    if not logs.is_dir() or lacking_slurm():
        return {}
    listed = asked(["squeue", "--me", "--noheader", "--array", f"--Format={COLUMNS}"])
    jobs, found = {}, {}
    for number, state, restarts, name, comment, log in (line.split("|", 5) for line in listed.splitlines()):
        queued, of_array = QueuedJob(number, state, int(restarts or 0)), "".join(number.partition("_")[1:])
        jobs[number, name.strip()] = jobs[comment.strip() + of_array, name.strip()] = queued
        if "_" not in number and Path(log.strip()).parent in (logs, Path(str(logs).replace("%", "%%"))):
            found[name.strip()] = jobs[number, name.strip()]
    for note in map(read_note, sorted(jobs_folder(output_dir).glob("*.json"))):
        for task, run in enumerate(note["runs"]):
            job = jobs.get((f"{note['job']}_{task}" if note["array"] else str(note["job"]), note["name"]))
            if job is not None:
                found[run] = job
    return found


class Queue:
    """The jobs that carry out runs of an output folder, as they stood at the last look."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.known = output_dir, dict[str, QueuedJob]()
        self.looked = self.answered = -math.inf

    def jobs(self) -> dict[str, QueuedJob]:
        """Return them by their runs. UserError once Slurm has not answered for PATIENCE seconds."""
        now = time.monotonic()
        if now >= self.looked + LOOK:
            self.looked = now
            try:
                self.known, self.answered = queued_runs(self.output_dir), now
            except UserError:
                if now > self.answered + PATIENCE:
                    raise
        return self.known

    def run(self, name: str) -> "QueuedRun | None":
        """Return the run of that name where a job waits or runs for it."""
        job = self.jobs().get(name)
        return None if job is None else QueuedRun(self, name, job.number)

    def submitted(self, name: str, number: str) -> "QueuedRun":
        """Return a run whose job has been submitted since the last look."""
        self.known[name] = QueuedJob(number, "PENDING", 0)
        return QueuedRun(self, name, number)


class QueuedRun:
    """A run whose job waits or runs, looked after as a process is. printed: what the job prints."""

    def __init__(self, queue: Queue, name: str, number: str) -> None:
        self.queue, self.name, self.number = queue, name, number
        self.printed = queue.output_dir / "submitted" / f"{number}.log"

    def poll(self) -> int | None:
        """Return None as long as the job is in the queue; then 1 where the run has failed, -1 where it was ended."""
        job = self.queue.jobs().get(self.name)
        if job is not None and job.number == self.number:
            return None
        state = RunFolder(self.queue.output_dir / "runs" / self.name).status.read().get("state")
        return 1 if state == "failed" or last_line(self.printed).startswith("launcher.py: ") else -1

    def terminate(self) -> None:
        """Have the run save and end, which takes until the job has left the queue."""
        subprocess.run(["scancel", self.number], capture_output=True, check=False)

    def wait(self) -> None:
        """Wait for nothing: what `terminate` ends, Slurm sees to."""

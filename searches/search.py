"""The trials of a search, each an ordinary run in a process or a job of its own: chosen, carried out, judged, written down.

What is not in the journal is in the runs: after a kill the same command finds each trial that has not ended, waits for its
process or its job where that lives on, goes on with its run, or reads what it came to.
"""

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from backends.processes import last_line, started, stop_all, threads_each
from backends.slurm_queue import Queue, QueuedRun
from backends.submission import begun_job
from common.errors import UserError
from configuration.compose import compose_config, resolved
from run_files.metrics_file import SIDE
from run_files.result import OF_ANOTHER, RunResult, result_of
from run_files.run_folder import RunFolder, run_folder_of
from run_files.run_lock import RunLock, is_locked
from searches.journal import opened
from searches.plan import Plan
from searches.space import Value
from searches.study import Study, study_in

PAUSE, QUEUE_PAUSE = 0.05, 1.0  # seconds between looks at the runs, here and in a queue
DEATHS = 5  # of a trial's processes without a step forward, after which it has failed
MOST_SAID = 200  # characters of why one has failed
FIRST = 3  # trials: when so many have failed and none has ended well, the search stops


@dataclass
class Trial:
    """A trial that has not ended.

    words: its command line; config: of all trials, under its run_name; held: the file that a process of it has locked from
    its first moment on; printed: what its process, or its job, prints.
    """

    number: int
    words: list[str]
    config: dict[str, Any]
    held: Path
    printed: Path
    process: subprocess.Popen[bytes] | QueuedRun | None = None
    deaths: int = 0
    step: int = 0
    failed: str = ""

    @cached_property
    def folder(self) -> RunFolder:
        return run_folder_of(self.config)

    def is_alive(self) -> bool:
        """Return whether a process of it lives, perhaps one that a killed search has left."""
        return self.process is not None or is_locked(self.held)

    def follow(self, job: QueuedRun | None) -> None:
        """Look after its job, if it has one, in the place of a process."""
        if job is not None:
            self.process, self.printed = job, job.printed

    def start(self, words: list[str], threads: int) -> None:
        """Start its process, which holds the lock until it ends, however it ends."""
        descriptor = os.open(self.held, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            again = any(word.startswith("resume=") for word in words)
            self.process = started(words, self.printed, again, threads, (descriptor,))
        finally:
            os.close(descriptor)


@dataclass
class Search:
    """A search whose folder this process holds. open: its trials that have not ended."""

    plan: Plan
    study: Study
    open: list[Trial] = field(default_factory=list)

    @cached_property
    def queue(self) -> Queue:
        return Queue(Path(self.plan.config["output_dir"]))

    def carry_out(self) -> None:
        """Go on until all trials have ended. UserError where they fail from the first on; a signal has them save first, and
        leaves jobs to their queue."""
        self.open = [self.trial(t.number, t.params) for t in self.study.trials() if t.state == TrialState.RUNNING]
        for trial in self.open:
            trial.follow(self.queue.run(self.plan.trial_name(trial.number)))
        try:
            while self.study.may_ask() or not all(trial.failed for trial in self.open):
                for trial in list(self.open):
                    self.attend(trial)
                while self.study.may_ask() and all(one.is_alive() or one.failed for one in self.open) and self.has_room():
                    self.open.append(self.trial(*self.study.ask()))
                    self.attend(self.open[-1])
                time.sleep(QUEUE_PAUSE if self.plan.backend.queues else PAUSE)
        except BaseException:
            leave([trial.process for trial in self.open if trial.process is not None])
            raise
        if self.open:
            self.stop(self.open[-1])

    def has_room(self) -> bool:
        return sum(trial.is_alive() for trial in self.open) < self.plan.jobs

    def trial(self, number: int, values: dict[str, Value]) -> Trial:
        name, words, folder = self.plan.trial_name(number), self.plan.trial_words(number, values), self.plan.folder
        return Trial(number, words, self.plan.config | {"run_name": name}, folder / f"{name}.lock", folder / f"{name}.log")

    def attend(self, trial: Trial) -> None:
        """Take a trial one step further: begin it, prune it, or tell what it came to."""
        if trial.process is not None:
            status = trial.process.poll()
            if status is None:
                self.watch(trial)
            else:
                trial.process = None
                self.ended(trial, status)
        elif not trial.failed and not trial.is_alive():
            self.begin(trial)

    def begin(self, trial: Trial) -> None:
        """Start the process of a trial, or tell what its run came to. UserError where another run has its name."""
        made = begun_job(trial.words, trial.config)
        if isinstance(made, RunResult):
            if made.state != OF_ANOTHER:
                self.tell(trial, made)
        elif self.has_room():
            own = shlex.join(trial.words[-len(self.plan.space) :])
            self.report(trial, f"{'begins' if made == trial.words else 'goes on'}: {own}")
            if self.plan.backend.queues:
                self.submit(trial, made)
            else:
                trial.start(made, threads_each(self.plan.jobs))

    def submit(self, trial: Trial, words: list[str]) -> None:
        """Hand a trial to the queue; the job itself checks the rest of its words, as a process does."""
        name = self.plan.trial_name(trial.number)
        number = self.plan.backend.hand_in([resolved(compose_config(words)) | {"overrides": words}], name)
        trial.follow(self.queue.submitted(name, number))
        self.report(trial, f"submitted as job {number}")

    def watch(self, trial: Trial) -> None:
        """End a trial early that the pruner finds worse than others were at its step."""
        if self.plan.pruner == "none":
            return
        for row in trial.folder.metrics.read():
            value, step = row.get(self.plan.metric), row["step"]
            if value is not None and self.study.prunes(trial.number, step, value):
                self.report(trial, f"pruned at step {step:,}")
                assert trial.process is not None
                trial.process.terminate()
                trial.process.wait()
                self.close(trial)
                return

    def ended(self, trial: Trial, status: int) -> None:
        """Tell what a trial came to whose process has ended; one that was killed goes on."""
        result = result_of(trial.config)
        if result.state == "finished":
            self.tell(trial, result)
        elif result.state == OF_ANOTHER:
            return
        elif status == 1:
            self.fail(trial, last_line(trial.printed).removeprefix("launcher.py: "))
        else:
            step = int(trial.folder.status.read().get("step") or 0)
            trial.deaths = trial.deaths + 1 if step <= trial.step else 0
            trial.step = step
            if trial.deaths >= DEATHS:
                self.fail(trial, f"{DEATHS} processes of it ended with status {status} without a step forward")

    def tell(self, trial: Trial, result: RunResult) -> None:
        """Give the score of a finished run to the sampler."""
        value = result.scores.get(self.plan.metric)
        if value is None:
            self.fail(trial, f"its last evaluation has no {self.plan.metric}")
            return
        best = self.study.tell(trial.number, value)
        self.report(trial, f"{self.plan.metric} {value:.4g}" + ", the best so far" * best)
        self.close(trial)
        for other in [other for other in self.open if other.failed]:
            self.give_up(other)

    def fail(self, trial: Trial, why: str) -> None:
        """Take note of a failure; told once a trial has ended well, since until then it may be the fault of the command."""
        trial.failed = why if len(why) <= MOST_SAID else f"{why[:MOST_SAID]}..."
        self.report(trial, f"FAILED: {trial.failed}")
        if any(known.state == TrialState.COMPLETE for known in self.study.trials()):
            self.give_up(trial)
            return
        evaluated = [row for row in trial.folder.metrics.read() if "eval/loss" in row]
        if evaluated and self.plan.metric not in evaluated[-1]:
            scores = [name for name in evaluated[-1] if name.startswith(("eval/", "oracle/")) and not name.endswith(SIDE)]
            known = ", ".join(sorted(scores))
            raise UserError(f"metric={self.plan.metric} is not among the scores of these runs; use one of {known}")
        if sum(bool(other.failed) for other in self.open) >= FIRST:
            self.stop(trial)

    def stop(self, trial: Trial) -> None:
        """Raise UserError: no trial has ended well."""
        failed = sum(bool(other.failed) for other in self.open)
        raise UserError(
            f"the first {failed} trial(s) failed, so the search stops, and the same command tries them again; "
            f"{self.plan.trial_name(trial.number)}: {trial.failed} ({trial.printed})"
        )

    def give_up(self, trial: Trial) -> None:
        self.study.give_up(trial.number, trial.failed)
        self.close(trial)

    def close(self, trial: Trial) -> None:
        self.open.remove(trial)
        trial.held.unlink(missing_ok=True)

    def report(self, trial: Trial, words: str) -> None:
        print(f"{trial.number + 1} of {self.plan.count}  {self.plan.trial_name(trial.number)}: {words}", flush=True)


def leave(live: list[subprocess.Popen[bytes] | QueuedRun]) -> None:
    """End a search: its processes save and end, its jobs stay in their queue."""
    jobs = [run for run in live if isinstance(run, QueuedRun)]
    if processes := [run for run in live if not isinstance(run, QueuedRun)]:
        stop_all(processes)
    if jobs:
        print(
            f"{len(jobs)} job(s) stay in the queue, and the same command goes on; to end them: scancel "
            f"{' '.join(job.number for job in jobs)}",
            file=sys.stderr,
        )


@contextmanager
def search_of(plan: Plan) -> Iterator[Search]:
    """Hold the folder of a search in the block, and give the search. UserError where its files are not its own."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = RunLock(plan.folder, "search {} is being carried out")
    try:
        lock.acquire()
        journal = opened(plan.folder / "journal.jsonl", plan.settings(), plan.space)
        yield Search(plan, study_in(journal, plan))
    finally:
        lock.release()

"""Runs side by side, each a process of its own; scripts/leaderboard.py gives the runs."""

import json
import math
import os
import statistics
import subprocess
import time
from importlib.metadata import version

from backends.processes import last_line, started, stop_all, threads_each
from common.files import write_atomically
from evaluation.leaderboard_table import ENERGY, SECONDS
from scripts.leaderboard_runs import Entry


class JobPool:
    """Trains a queue of runs, `jobs` at a time. failed: those that came to nothing."""

    def __init__(self, queue: list[Entry], jobs: int, seconds: list[float]):
        """seconds: what runs of the table have taken so far, for the estimate of the time left."""
        self.queue, self.jobs, self.seconds = queue, jobs, seconds
        self.threads = threads_each(jobs)
        self.waiting = list(queue)
        self.live: dict[Entry, subprocess.Popen[bytes]] = {}
        self.failed: list[Entry] = []

    def carry_out(self) -> None:
        """Train all of them; KeyboardInterrupt after a signal, once the runs at work have saved."""
        for entry in self.queue:
            if entry.folder.lock.is_held():
                self.report(entry, "another process trains it, which is waited for")
        try:
            while self.waiting or self.live:
                for entry in [entry for entry in self.waiting if not self.must_wait(entry)]:
                    if len(self.live) < self.jobs:
                        self.waiting.remove(entry)
                        self.begin(entry)
                for entry in [entry for entry, process in self.live.items() if process.poll() is not None]:
                    self.end(entry, self.live.pop(entry).returncode)
                time.sleep(0.1)
        except KeyboardInterrupt:
            stop_all(self.live.values())
            raise

    def must_wait(self, entry: Entry) -> bool:
        """Whether the run, or one that it needs, is still being trained, perhaps by what a killed command has left."""
        return entry.folder.lock.is_held() or any(need in self.live or need in self.waiting for need in entry.needs)

    def begin(self, entry: Entry) -> None:
        """Start the run's process, or report what it lacks."""
        lacking = [need.name for need in entry.needs if need.condition() != "finished"]
        if lacking:
            self.fail(entry, f"it needs {lacking[0]}, which is not finished")
            return
        state = entry.condition()
        if state == "finished":  # by the process that was waited for
            self.end(entry, 0)
            return
        how = {"begun": ["resume=true"], "missing": []}.get(state, ["overwrite=true"])
        entry.printed.parent.mkdir(parents=True, exist_ok=True)
        if state != "begun":
            write_atomically(entry.facts, json.dumps({"hardware": self.hardware(), "torch": version("torch")}) + "\n")
        self.report(entry, "goes on" if state == "begun" else "begins")
        words = [f"run_name={entry.name}", *entry.words, *how]
        self.live[entry] = started(words, entry.printed, state == "begun", self.threads)

    def hardware(self) -> str:
        cores, threads = os.cpu_count() or 1, self.threads
        return f"{cores} CPU core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)} a run, {self.jobs} at a time"

    def end(self, entry: Entry, exit_status: int) -> None:
        """Report a run whose process has ended."""
        status = entry.folder.status.read()
        if exit_status or status.get("state") != "finished":
            self.fail(entry, f"{last_line(entry.printed) or f'status {exit_status}'} ({entry.printed})")
            return
        self.seconds.append(status["seconds"])
        scores = entry.scores()
        one_step = scores.get(f"{ENERGY}_1nfe")
        shown = "not given" if one_step is None else f"{one_step:.4f}"
        self.report(entry, f"{scores.get(SECONDS, math.nan):.0f} s, one-step energy distance {shown}{self.time_left()}")

    def time_left(self) -> str:
        """Return an estimate in words, after a comma: the runs still to end, each as long as the others took."""
        left = len(self.waiting) + len(self.live)
        if not left or not self.seconds:
            return ""
        from common.progress import duration  # imports torch

        return f", about {duration(statistics.fmean(self.seconds) * left / self.jobs)} left"

    def fail(self, entry: Entry, why: str) -> None:
        self.failed.append(entry)
        self.report(entry, f"FAILED: {why}")

    def report(self, entry: Entry, words: str) -> None:
        print(f"{self.queue.index(entry) + 1} of {len(self.queue)}  {entry.title}: {words}", flush=True)

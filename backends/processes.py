"""Runs as processes of their own, for whoever carries out many side by side: a search, scripts/leaderboard.py."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from backends.torchrun import LAUNCHER


def threads_each(jobs: int) -> int:
    """Return how many threads each of so many runs has."""
    return max(1, (os.cpu_count() or 1) // jobs)


def started(
    words: list[str], printed: Path, again: bool, threads: int, kept: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Return the process of a run, in a session of its own: Ctrl-C reaches this process alone, which asks the run to stop.

    printed: the file of what it prints, added to where it goes on again. kept: files open here that it holds open too.
    """
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("ab" if again else "wb") as output:
        return subprocess.Popen(
            [sys.executable, str(LAUNCHER), *words],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=kept,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip


def last_line(printed: Path) -> str:
    """Return the last line that a run's process has printed, empty where there is none."""
    lines = printed.read_text(encoding="utf-8", errors="replace").strip().splitlines() if printed.is_file() else []
    return lines[-1] if lines else ""


def stop_all(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Ask runs to save, and wait until they have."""
    print(f"waiting for {len(processes)} run(s) to save; the same command goes on", file=sys.stderr, flush=True)
    for process in processes:
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored by children of a background shell until they train
    for process in processes:
        process.wait()

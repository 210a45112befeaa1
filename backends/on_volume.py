"""What a rented machine does with a run: the launcher, in a folder that outlives the machine.

The folder (a Modal Volume there, any folder here) is the working folder of the run, so its paths are those of a local run.
A call that is carried out again, because its machine was taken away or its process killed, goes on with its run.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import write_atomically
from configuration.compose import compose_config, without
from run_files.metrics_file import best_monitored
from run_files.run_folder import RunFolder

LAUNCHER = Path(__file__).resolve().parents[1] / "launcher.py"
GRACE_SECONDS = 25.0  # for a save: an interrupted container has about 30
LOST_RANK = re.compile(r"rank \d+ of \d+ (was killed|lost contact)")  # as backends/torchrun.py says it
DROPPED_WHEN_RESUMED = ("overwrite", "init_from", "resume")  # what began it is in its configuration


def carry_out_on(
    volume: Path, overrides: list[str], commit: Callable[[], None], call: str, commit_seconds: float = 300.0
) -> dict[str, Any]:
    """Carry out the run that `overrides` name, in the folder `volume`.

    call: names this call, the same when it is carried out again: it then goes on with the run it began, or returns at once
    where that has finished. commit: makes what is in the folder last; called every commit_seconds and at the end, however
    that comes. Returns the launcher's exit status, what the run says of its end (why), and its best monitored value (best).
    ChildProcessError when the run was killed or interrupted, for the service to carry the call out again.
    """
    volume, config = volume.absolute(), compose_config(overrides)
    folder = RunFolder(volume / config["output_dir"] / "runs" / config["run_name"])
    words = words_of_attempt(volume / "calls" / f"{call}.json", overrides, folder)
    if words is None:
        return outcome(folder, 0)
    commit()
    environment = os.environ | {"TRACKIO_DIR": str(volume / "trackio" / folder.name), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, str(LAUNCHER), *words], cwd=volume, env=environment)
    status = wait_for(process, commit, commit_seconds)
    if status and LOST_RANK.match(why := str(folder.status.read().get("why", ""))):
        raise ChildProcessError(f"{why}; carried out again, the run goes on from its newest save")
    if status < 0 or status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        number = signal.Signals(-status if status < 0 else status - 128)
        raise ChildProcessError(f"the run was ended by {number.name}; carried out again, it goes on from its newest save")
    return outcome(folder, status)


def words_of_attempt(note: Path, overrides: list[str], folder: RunFolder) -> list[str] | None:
    """Return what the launcher is given this time: to go on with the run that an earlier attempt began, `overrides` where
    none has; None where that run has finished.

    note: a file of this call alone, which its first attempt writes.
    """
    if not note.is_file():
        write_atomically(note, json.dumps({"overrides": overrides, "found": identity(folder)}) + "\n")
        return overrides
    if identity(folder) in (None, json.loads(note.read_text(encoding="utf-8"))["found"]):
        return overrides
    if folder.status.read().get("state") == "finished":
        return None
    return [*without(overrides, DROPPED_WHEN_RESUMED), "resume=true"]


def identity(folder: RunFolder) -> str | None:
    """Return what tells a run from another of its name: when it was started; None where there is no run."""
    return folder.status.read().get("started", "") if folder.config_path.is_file() else None


def wait_for(process: subprocess.Popen[bytes], commit: Callable[[], None], commit_seconds: float) -> int:
    """Return the exit status of the process; commits meanwhile and afterwards. Whoever interrupts the wait lets it save."""
    try:
        while True:
            try:
                return process.wait(commit_seconds)
            except subprocess.TimeoutExpired:
                commit()
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    finally:
        commit()


def outcome(folder: RunFolder, status: int) -> dict[str, Any]:
    """Plain values, which travel home."""
    best = best_monitored(folder.metrics.rows(), folder.read_config()) if folder.config_path.is_file() else None
    return {"status": status, "why": folder.status.read().get("why", ""), "best": best}

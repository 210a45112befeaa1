"""status.json: where a run is, or how it ended."""

import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomically
from run_files.run_lock import RunLock
from run_files.stored_values import as_object, is_number, json_number, note_once, numbers_in, read_text

STATES = ("running", "finished", "failed", "interrupted")
STATUS_KINDS = {
    "state": str, "step": int, "epoch": int, "why": str, "started": str, "updated": str, "seconds": int | float,
    "scores": dict, "pid": int, "host": str,
}  # fmt: skip


class StatusFile:
    """One JSON object, replaced in one step: state, step, epoch, why, started, updated, seconds, scores, pid, host."""

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path, self.lock = path, lock

    def write(
        self,
        state: str,
        step: int,
        epoch: int,
        seconds: float,
        scores: dict[str, float] | None = None,
        why: str = "",
        **details: Any,
    ) -> None:
        """Replace the file.

        Args:
            state: one of STATES.
            step, epoch: optimizer steps and epochs done.
            seconds: wall time of the run so far, earlier sittings included.
            scores: last known scores by metric name; None keeps those already there.
            why: what ended the run, in words.
            details: further keys, as JSON values (checkpoint, device, epochs, ...); those already there are kept.
        """
        assert state in STATES, state
        self.lock.check()
        before, now = self.read(), timestamp()
        known = before.get("scores", {}) if scores is None else scores
        status = {"state": state, "step": step, "epoch": epoch, "why": why, "started": before.get("started", now)}
        status |= {"updated": now, "seconds": seconds, "scores": {name: json_number(value) for name, value in known.items()}}
        status |= {"pid": os.getpid(), "host": platform.node()} | details
        write_atomically(self.path, json.dumps(before | status, indent=2) + "\n")

    def read(self) -> dict[str, Any]:
        """Return the content; empty before the first write, and when it is damaged, which a line on stderr says."""
        try:
            text = read_text(self.path)
        except UserError as error:
            note_once(str(error))
            return {}
        if text is None:
            return {}
        status = as_object(text)
        if status is None or wrong_status(status):
            note_once(f"{self.path} is damaged; what became of the run is unknown until it goes on")
            return {}
        return status | ({"scores": numbers_in(status["scores"])} if "scores" in status else {})


def wrong_status(status: dict[str, Any]) -> str | None:
    """Return the first key of a status whose value no run writes, or None."""
    for key, kind in STATUS_KINDS.items():
        value = status.get(key)
        if key in status and not (isinstance(value, kind) and (isinstance(value, str | dict) or is_number(value))):
            return key
    return None


def timestamp() -> str:
    """Return local time with its offset from UTC, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")

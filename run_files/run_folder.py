"""outputs/runs/<run_name>/: what a run leaves on disk, written so that a crash at any moment leaves it readable."""

import json
import os
import platform
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.files import read_own, remove_temporaries, write_atomically
from run_files.metrics_file import MetricsFile
from run_files.run_lock import RunLock
from run_files.stored_values import (
    CONFIG_REMEDY,
    as_object,
    is_number,
    json_number,
    note_once,
    numbers_in,
    parsed_config,
    read_text,
)

MOST_PICTURE_BYTES = 2**26
STATES = ("running", "finished", "failed", "interrupted")
STATUS_KINDS = {
    "state": str, "step": int, "epoch": int, "epochs": int, "why": str, "started": str, "updated": str,
    "seconds": int | float, "scores": dict, "pid": int, "host": str,
}  # fmt: skip


class RunFolder:
    """The files of one run. Only the first process of a run writes; anyone may read.

    config.yaml      resolved configuration
    overrides.txt    what was typed, one override per line
    status.json      see StatusFile
    metrics.jsonl    see MetricsFile
    samples/*.png    pictures
    averages/*.pt    averages of the weights (ema=power)
    log.md           the run's own section of the experiment log
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.config_path, self.overrides_path, self.log_path = map(path.joinpath, ("config.yaml", "overrides.txt", "log.md"))
        self.lock = RunLock(path)
        self.status = StatusFile(path / "status.json", self.lock)
        self.metrics = MetricsFile(path / "metrics.jsonl", self.lock)

    def sample_picture(self, step: int, kind: str = "") -> Path:
        """Return where the picture of a step goes; kind: "_neighbours" of samples beside their nearest training images."""
        return self.path / "samples" / f"step_{step:08d}{kind}.png"

    def pictures(self) -> list[tuple[str, Path, int]]:
        """Return what was drawn on the way, by step: ("samples" or "neighbours", picture, step)."""
        found = [(re.fullmatch(r"step_(\d+)(_neighbours)?", path.stem), path) for path in self.path.glob("samples/*.png")]
        named = [("neighbours" if match[2] else "samples", path, int(match[1])) for match, path in found if match]
        return sorted(named, key=lambda picture: (picture[2], picture[0]))

    def averages(self) -> list[Path]:
        """Return the stored averages of its weights, by step."""
        named = (path for path in self.path.glob("averages/*.pt") if re.fullmatch(r"step_\d{8,}", path.stem))
        return sorted(named, key=self.step_of)

    @staticmethod
    def step_of(path: Path) -> int:
        """Return the step that a file of `averages` is of."""
        return int(path.stem.removeprefix("step_"))

    def read_picture(self, path: Path) -> bytes:
        """Return the bytes of one of its pictures. UserError for what read_own refuses, or is not a PNG."""
        content = read_own(path, self.path, MOST_PICTURE_BYTES) or b""
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise UserError(f"{path} is not a PNG; remove it, or draw it again")
        return content

    def write_config(self, config: str, overrides: list[str]) -> None:
        """Store the resolved configuration (YAML text) and the overrides as typed."""
        write_atomically(self.config_path, config)
        write_atomically(self.overrides_path, "".join(f"{override}\n" for override in overrides))

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml, nothing worked out or built. UserError when it is missing or damaged."""
        text = read_text(self.config_path)
        if text is None:
            raise UserError(f"there is no {self.config_path}; {CONFIG_REMEDY}")
        return parsed_config(text, str(self.config_path))

    def read_overrides(self) -> str:
        """Return the overrides as typed, one a line; empty where none are stored."""
        return printable(read_text(self.overrides_path) or "").rstrip()

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run left half-written. The folder is locked."""
        for folder in (self.path, self.path / "samples", self.path / "averages"):
            remove_temporaries(folder)

    def clear(self) -> None:
        """Remove what a run that ended before its first step has left. The folder is locked."""
        for path in (self.status.path, self.metrics.path, *self.averages(), *(picture for _, picture, _ in self.pictures())):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Close the files and release the lock: the run has ended."""
        self.metrics.close()
        self.lock.release()


def save_name(run_name: str) -> re.Pattern[str]:
    """Return the pattern of the names of a run's saves, never of those of one whose name merely begins alike."""
    return re.compile(re.escape(run_name) + r"_(?:last|best|epoch_(\d{4,}))\.pt")


def saves_of(output_dir: Path, run_name: str) -> list[Path]:
    """Return every save of the run, of whatever architecture."""
    pattern = save_name(run_name)
    return sorted(path for path in (output_dir / "ckpts").rglob("*.pt") if pattern.fullmatch(path.name))


def run_folder_of(config: dict[str, Any]) -> RunFolder:
    return RunFolder(Path(config["output_dir"]) / "runs" / config["run_name"])


def run_folders(output_dir: Path, holding: str = "status.json") -> dict[str, RunFolder]:
    """Return the runs below an output folder that have this file, by name and in the order of their names."""
    return {path.parent.name: RunFolder(path.parent) for path in sorted((output_dir / "runs").glob(f"*/{holding}"))}


class StatusFile:
    """One JSON object, replaced in one step: state, step, epoch, why, started, updated, seconds, scores, pid, host."""

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path, self.lock = path, lock

    def write(
        self, state: str, step: int, epoch: int, seconds: float, scores: dict[str, float] | None = None, why: str = "",
        **details: Any,
    ) -> None:  # fmt: skip
        """Replace the file.

        state: one of STATES. step, epoch: done. seconds: wall time, earlier sittings included. scores: last known by metric
        name; None keeps those already there. why: what ended the run, in words. details: further keys, as JSON values;
        those already there are kept.
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

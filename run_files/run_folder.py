"""outputs/runs/<run_name>/: what a run leaves on disk, written so that a crash at any moment leaves it readable."""

import errno
import fcntl
import itertools
import json
import math
import os
import platform
import re
import sys
from datetime import datetime
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError, printable
from common.files import own_file, read_own, remove_temporaries, share, write_atomically

STATES = ("running", "finished", "failed", "interrupted")
STATUS_KINDS = {
    "state": str, "step": int, "epoch": int, "why": str, "started": str, "updated": str, "seconds": int | float,
    "scores": dict, "pid": int, "host": str,
}  # fmt: skip
CONFIG_KINDS = {
    "run_name": str, "output_dir": str, "command": str, "overrides": list, "changed": dict, "choices": dict, "log": dict,
    "trackio": dict, "callbacks": dict, "epochs": int, "max_steps": int | None, "seed": int, "monitor": str,
    "dataloaders": dict, "source": dict, "model": dict, "loss": dict, "solver": dict, "optimizer": dict, "schedule": dict,
    "ema": dict, "evaluation": dict, "backend": dict,
}  # fmt: skip
MOST_BYTES = {"config.yaml": 2**19, "status.json": 2**22, "overrides.txt": 2**19, "metrics.jsonl": 2**31}
MOST_PICTURE_BYTES = 2**26
MOST_NUMBER = 1e300  # in size, that a score or a step may be
HIGHER_IS_BETTER = (  # in metric names
    "accuracy", "inception_score", "precision", "recall", "density", "coverage", "class_share_min",
)  # fmt: skip
CONFIG_REMEDY = "put back a copy of it, or start the run anew with overwrite=true, which moves its files aside"


class RunFolder:
    """The files of one run. Only the first process of a run writes; anyone may read.

    config.yaml      resolved configuration
    overrides.txt    what was typed, one override per line
    status.json      state, step, epoch, why, started, updated, seconds, scores, pid, host
    metrics.jsonl    one flat object per log call: step, epoch, elapsed_seconds and the metrics (NaN as null); provenance of
                     scores that have one under that key
    samples/*.png    pictures
    log.md           the run's own section of the experiment log
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file: FileIO | None = None
        self.unwritten = b""  # rows that the disk refused, written with the next that it takes
        self.lock_file: TextIO | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def overrides_path(self) -> Path:
        return self.path / "overrides.txt"

    @property
    def status_path(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "log.md"

    def sample_picture(self, step: int) -> Path:
        """Return where the picture of a step goes; whoever draws it makes the folder."""
        return self.path / "samples" / f"step_{step:08d}.png"

    def neighbours_picture(self, step: int) -> Path:
        """Return where the picture of samples beside their nearest training images goes."""
        return self.path / "samples" / f"step_{step:08d}_neighbours.png"

    def pictures(self) -> list[tuple[str, Path, int]]:
        """Return what was drawn on the way, by step: ("samples" or "neighbours", picture, step)."""
        found = [(re.fullmatch(r"step_(\d+)(_neighbours)?", path.stem), path) for path in self.path.glob("samples/*.png")]
        named = [("neighbours" if match[2] else "samples", path, int(match[1])) for match, path in found if match]
        return sorted(named, key=lambda picture: (picture[2], picture[0]))

    def lock(self) -> None:
        """Make the folder and hold it until this process ends, however it ends.

        UserError when the system refuses it, or another process holds it: a live run is neither doubled nor overwritten.
        """
        self.check_entries()
        try:
            while True:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock_file = (self.path / ".lock").open("a+")
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.holds_its_path():
                    self.lock_file.truncate(0)
                    self.lock_file.write(f"process {os.getpid()} on {platform.node()}")
                    self.lock_file.flush()
                    return
                self.release()  # the folder was moved aside between the two lines above
        except BlockingIOError as error:
            who = (self.path / ".lock").read_text(errors="replace")[:100] or "another process"
            raise UserError(
                f"run {self.name} is being trained by another process right now ({who}); wait for it, or choose another "
                "run_name"
            ) from error
        except OSError as error:
            raise UserError(f"cannot make {self.path}: {error.strerror}; choose another output_dir") from error

    def check_entries(self) -> None:
        """Raise UserError where writing here would write elsewhere: at a link that leads out, a pipe or a device."""
        for path in (self.path, *self.path.rglob("*")):
            wrong = own_file(path, self.path)
            if wrong:
                raise UserError(f"{path} {wrong}; remove it, or choose another run_name")

    def is_held(self) -> bool:
        """Whether a process trains the run right now, on this machine or another that locks the same files."""
        path = self.path / ".lock"
        if not path.is_file():
            return False
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def holds_its_path(self) -> bool:
        """Whether the open lock is still the file at its path."""
        assert self.lock_file is not None
        path, held = self.path / ".lock", os.fstat(self.lock_file.fileno())
        return path.exists() and (path.stat().st_dev, path.stat().st_ino) == (held.st_dev, held.st_ino)

    def require_there(self) -> None:
        """Raise UserError when the folder that this process holds was deleted or moved: nothing is made in its place."""
        if self.lock_file is not None and not self.holds_its_path():
            raise UserError(
                f"{self.path} was deleted or moved while the run wrote there, so the run ends; its saves are untouched: put "
                "the folder back and go on with resume=true, or give one of them to a new run as init_from"
            )

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run left half-written. The folder is locked."""
        for folder in (self.path, self.path / "samples"):
            remove_temporaries(folder)

    def clear(self) -> None:
        """Remove what a run that ended before its first step has left. The folder is locked."""
        for path in (self.status_path, self.metrics_path, *(picture for _, picture, _ in self.pictures())):
            path.unlink(missing_ok=True)

    def write_config(self, config: str, overrides: list[str]) -> None:
        """Store the resolved configuration (YAML text) and the overrides as typed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_path, config)
        write_atomically(self.overrides_path, "".join(f"{override}\n" for override in overrides))

    def write_status(
        self,
        state: str,
        step: int,
        epoch: int,
        seconds: float,
        scores: dict[str, float] | None = None,
        why: str = "",
        **details: Any,
    ) -> None:
        """Replace status.json.

        Args:
            state: one of STATES.
            step, epoch: optimizer steps and epochs done.
            seconds: wall time of the run so far, its earlier lives included.
            scores: last known scores by metric name; None keeps those already there.
            why: what ended the run, in words.
            details: further keys, as JSON values (checkpoint, device, epochs, ...); those already there are kept.
        """
        assert state in STATES, state
        self.require_there()
        before = self.read_status()
        now = timestamp()
        self.path.mkdir(parents=True, exist_ok=True)
        known = before.get("scores", {}) if scores is None else scores
        status = before | {
            "state": state,
            "step": step,
            "epoch": epoch,
            "why": why,
            "started": before.get("started", now),
            "updated": now,
            "seconds": seconds,
            "scores": {name: json_number(value) for name, value in known.items()},
            "pid": os.getpid(),
            "host": platform.node(),
        }
        write_atomically(self.status_path, json.dumps(status | details, indent=2) + "\n")

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json, empty before the first write, and when it is damaged: a
        line on stderr says so.
        """
        try:
            text = self.read(self.status_path)
        except UserError as error:
            tell_once(f"note: {error}")
            return {}
        if text is None:
            return {}
        status = as_object(text)
        if status is None or wrong_status(status):
            tell_once(f"note: {self.status_path} is damaged; what became of the run is unknown until it goes on")
            return {}
        return status | ({"scores": numbers_in(status["scores"])} if "scores" in status else {})

    def read(self, path: Path) -> str | None:
        """Return the text of one of the run's files, None where there is none. UserError for what read_own refuses."""
        content = read_own(path, self.path, MOST_BYTES[path.name])
        return None if content is None else content.decode(errors="replace")

    def read_picture(self, path: Path) -> bytes:
        """Return the bytes of one of its pictures. UserError for what read_own refuses, or is no PNG."""
        content = read_own(path, self.path, MOST_PICTURE_BYTES) or b""
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise UserError(f"{path} is no PNG; remove it, or draw it again")
        return content

    def read_overrides(self) -> str:
        """Return the overrides as typed, one a line; empty where none are stored."""
        return printable(self.read(self.overrides_path) or "").rstrip()

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml. UserError when it is missing, damaged or cut. Nothing in it is worked out or
        built.
        """
        text = self.read(self.config_path)
        if text is None:
            raise UserError(f"there is no {self.config_path}; {CONFIG_REMEDY}")
        return parsed_config(text, str(self.config_path))

    def append_metrics(
        self,
        step: int,
        epoch: int,
        elapsed_seconds: float,
        metrics: dict[str, float],
        provenance: dict[str, str] | None = None,
    ) -> None:
        """Add one row to metrics.jsonl; it is in the file (not only in this process) when the call returns.

        provenance: what scores depend on, by metric name; under that key of the row.
        """
        row: dict[str, Any] = {"step": step, "epoch": epoch, "elapsed_seconds": round(elapsed_seconds, 3)}
        row |= {"provenance": provenance} if provenance else {}
        numbers = {name: json_number(value) for name, value in metrics.items()}
        self.unwritten += json.dumps(row | numbers, allow_nan=False).encode() + b"\n"
        self.write_rows()

    def write_rows(self) -> None:
        """Write the rows that wait, all or none. OSError when the disk refuses them; they go on waiting."""
        self.require_there()
        if self.metrics_file is None:
            self.metrics_file = self.open_metrics()
        before = self.metrics_file.tell()
        try:
            if self.metrics_file.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.metrics_file.truncate(before)
            self.metrics_file.seek(before)
            error.filename = str(self.metrics_path)
            raise
        self.unwritten = b""

    def sync_metrics(self) -> None:
        """Put the rows on the disk, before a save that relies on them. OSError when it refuses."""
        self.require_there()
        if self.unwritten:
            self.write_rows()
        if self.metrics_file is not None:
            os.fsync(self.metrics_file.fileno())

    def open_metrics(self) -> FileIO:
        """Return metrics.jsonl at its end, unbuffered, without the torn line a killed process may have left there."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.metrics_path.is_file():  # `lock` has seen that it is the run's own
            whole = self.metrics_path.read_bytes().rpartition(b"\n")
            os.truncate(self.metrics_path, len(whole[0]) + len(whole[1]))
        return FileIO(self.metrics_path, "a")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl in order, a torn last line left out; none before the first.

        Damaged lines before it are left out too, and a line on stderr says which.
        """
        return [row for _, row in self.numbered_rows()]

    def numbered_rows(self, holding: str = "") -> list[tuple[int, dict[str, Any]]]:
        """Return (line, row) of the rows in whose line a text occurs; as read_metrics."""
        lines = self.metric_lines()
        rows = [(number, as_row(line)) for number, line in enumerate(lines, start=1) if holding in line]
        damaged = [str(number) for number, row in rows if row is None and number < len(lines)]
        if damaged:
            where = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
            tell_once(f"note: {self.metrics_path} is damaged; left out: line {where}")
        return [(number, numbers_in(row, "provenance")) for number, row in rows if row is not None]

    def metric_lines(self) -> list[str]:
        """Return the whole lines of metrics.jsonl: what follows the last line break is torn."""
        return (self.read(self.metrics_path) or "").split("\n")[:-1]

    def trim_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which a run that continues from there will write again, and damaged lines.

        Where a line is damaged that is not the last, the file as it was is kept beside as metrics.jsonl.damaged.
        """
        self.close()
        if not self.metrics_path.is_file():
            return
        lines, rows = self.metric_lines(), self.numbered_rows()
        torn = 1 if lines and as_row(lines[-1]) is None else 0
        if len(rows) + torn < len(lines):
            kept = free_name(self.metrics_path.with_name("metrics.jsonl.damaged"))
            share(self.metrics_path, kept)
            print(f"note: the file as it was is kept as {kept}", file=sys.stderr)
        write_atomically(self.metrics_path, "".join(f"{lines[number - 1]}\n" for number, row in rows if row["step"] <= step))

    def release(self) -> None:
        """Let the folder go: the run has ended."""
        self.close()
        if self.lock_file is not None:
            self.lock_file.close()
            self.lock_file = None

    def close(self) -> None:
        """Close metrics.jsonl; a later append opens it again."""
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.metrics_file = None


class SilentRunFolder(RunFolder):
    """The folder as the other processes of a run see it: they read, and what they would write is dropped."""

    def lock(self) -> None: ...

    def remove_temporaries(self) -> None: ...

    def write_config(self, config: str, overrides: list[str]) -> None: ...

    def write_status(self, *_: Any, **__: Any) -> None: ...

    def append_metrics(self, *_: Any, **__: Any) -> None: ...

    def sync_metrics(self) -> None: ...

    def trim_metrics(self, step: int) -> None: ...


def as_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, its texts printable, or None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return all_printable(value) if "\\u" in text or not text.isascii() else value


def all_printable(node: Any) -> Any:
    """Return the nested value with every key and text printable."""
    if isinstance(node, dict):
        return {all_printable(key): all_printable(value) for key, value in node.items()}
    if isinstance(node, list):
        return [all_printable(value) for value in node]
    return printable(node) if isinstance(node, str) else node


def as_row(line: str) -> dict[str, Any] | None:
    """Return the row of metrics that a line is, or None where it is none. What this project writes is ASCII."""
    row = as_object(line) if line.isascii() else None
    return row if row is not None and isinstance(row.get("step"), int) and is_number(row["step"]) else None


def numbers_in(values: dict[str, Any], *also: str) -> dict[str, Any]:
    """Return the entries that are numbers, or null, and those of the keys `also`."""
    return {key: value for key, value in values.items() if key in also or is_number(value)}


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn, or null for what was none."""
    return value is None or (isinstance(value, int | float) and abs(value) < MOST_NUMBER)


def wrong_status(status: dict[str, Any]) -> str | None:
    """Return the first key of a status.json whose value no run writes, or None."""
    for key, kind in STATUS_KINDS.items():
        value = status.get(key)
        if key in status and not (isinstance(value, kind) and (isinstance(value, str | dict) or is_number(value))):
            return key
    return None


def parsed_config(text: str, where: str) -> dict[str, Any]:
    """Return the plain settings in the text of a config.yaml, no interpolation worked out.

    UserError, naming `where`, for a text that is no such file, or that refers back to its own parts (YAML aliases: a few
    lines of them stand for any number of values).
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UserError(f"{where} has YAML aliases, which no run writes; {CONFIG_REMEDY}")
        config = all_printable(OmegaConf.to_container(OmegaConf.create(text)))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{where} cannot be read ({first}); {CONFIG_REMEDY}") from error
    if not isinstance(config, dict) or not config:
        raise UserError(f"{where} holds no settings; {CONFIG_REMEDY}")
    for key, kind in CONFIG_KINDS.items():
        value = config.get(key)
        typed = key != "overrides" or not isinstance(value, list) or all(isinstance(word, str) for word in value)
        if key in config and not (isinstance(value, kind) and typed):
            raise UserError(f"{where} holds {str(value)[:60]!r} as its {key}, which no run writes; {CONFIG_REMEDY}")
    return {str(key): value for key, value in config.items()}


def free_name(path: Path) -> Path:
    """Return the path, or with the first of .2, .3, ... after it that no file has."""
    names = (path if n == 1 else path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


@cache
def tell_once(note: str) -> None:
    """A line on stderr, once in a process."""
    print(note, file=sys.stderr)


def higher_is_better(metric: str, mode: str = "auto") -> bool:
    """Whether a larger value is the better one; mode: monitor_mode, which may say so whatever the name."""
    return mode == "max" or (mode == "auto" and any(word in metric for word in HIGHER_IS_BETTER))


def best_monitored(rows: list[dict[str, Any]], config: dict[str, Any]) -> float | None:
    """Return the best value of the monitored metric in rows of metrics; None where it is in none."""
    metric = config.get("monitor", "")
    best = max if higher_is_better(metric, config.get("monitor_mode", "min")) else min
    return best((row[metric] for row in rows if row.get(metric) is not None), default=None)


def json_number(value: float | None) -> float | None:
    """Return the value, or None (null in JSON) where it is not a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the last as it comes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def timestamp() -> str:
    """Local time with its offset from UTC, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def run_folder_of(config: dict[str, Any]) -> RunFolder:
    return RunFolder(Path(config["output_dir"]) / "runs" / config["run_name"])

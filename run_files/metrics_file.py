"""metrics.jsonl: the record of a run's numbers, one flat object per line."""

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from common.files import share, write_atomically
from run_files.run_lock import RunLock
from run_files.stored_values import as_object, is_number, json_number, lines_of, note_once, numbers_in

HIGHER_IS_BETTER = (  # in metric names
    "accuracy", "f1_macro", "inception_score", "mcc", "precision", "recall", "density", "coverage", "class_share_min",
    "oracle/copying",
)  # fmt: skip
SCORES = ("eval/", "oracle/")  # how the names of scores begin
BY_TIME = tuple(f"_t{k}" for k in range(8))  # ends of the names of a score's values at eight times
# Ends of the names of what stands beside a score.
BESIDE = (
    "_floor", "_floor_sd", "_floor_q99", "_floor_q01", "_p", "_se", "_train", "_share", "_subsample", "/seconds", *BY_TIME
)  # fmt: skip
SIDE = (*BESIDE, "_exact_field", "_probes", "_median", "/nfe")  # and of what is no score of its own
# Ends of the names of scores of which neither larger nor smaller is better.
UNDIRECTED = ("nearest_distance_ratio", "empirical_excess_loss", *(f"class_share_{k}" for k in range(20)))
DAMAGED_SHOWN = 5  # numbers of damaged lines that are named
COPIES = 0.5  # oracle/copying from which on down a network is said to copy its training rows


class MetricsFile:
    """Rows of step, epoch, elapsed_seconds and metrics (NaN as null); provenance of scores that have one under that key.

    A torn last line, which a killed process may leave, is left out by whoever reads and cut off by whoever appends.
    """

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path, self.lock = path, lock
        self.file: FileIO | None = None
        self.unwritten = b""  # rows that the disk refused, written with the next that it takes

    def append(
        self, step: int, epoch: int, elapsed_seconds: float, metrics: dict[str, float],
        provenance: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Add one row, in the file when the call returns. provenance: what scores depend on, by metric name."""
        row: dict[str, Any] = {"step": step, "epoch": epoch, "elapsed_seconds": round(elapsed_seconds, 3)}
        row |= {"provenance": provenance} if provenance else {}
        numbers = {name: json_number(value) for name, value in metrics.items()}
        self.unwritten += json.dumps(row | numbers, allow_nan=False).encode() + b"\n"
        self.write_rows()

    def write_rows(self) -> None:
        """Write the rows that wait, all or none. OSError when the disk refuses them; they go on waiting."""
        self.lock.check()
        if self.file is None:
            self.file = self.opened()
        before = self.file.tell()
        try:
            if self.file.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(before)
            self.file.seek(before)
            error.filename = str(self.path)
            raise
        self.unwritten = b""

    def sync(self) -> None:
        """Put the rows on the disk, before a save that relies on them. OSError when it refuses."""
        self.lock.check()
        if self.unwritten:
            self.write_rows()
        if self.file is not None:
            os.fsync(self.file.fileno())

    def opened(self) -> FileIO:
        """Return the file, open at its end, unbuffered, without a torn last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():  # the lock has checked that it is the run's own
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        return FileIO(self.path, "a")

    def read(self) -> list[dict[str, Any]]:
        """Return the rows in order, none before the first; damaged lines are left out, which a line on stderr says."""
        return list(self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows one at a time, as `read` returns them: a file may be larger than the memory."""
        return (row for _, row in self.numbered_rows())

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that hold scores; the others are not parsed."""
        return (row for _, row in self.numbered_rows(holding='"eval/'))

    def numbered_rows(self, holding: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, row) of the rows in whose line a text occurs; as `read`."""
        number, damaged = 0, list[int]()
        for number, line in enumerate(self.lines(), start=1):
            if holding in line:
                row = as_row(line)
                if row is not None:
                    yield number, numbers_in(row, "provenance")
                elif len(damaged) <= DAMAGED_SHOWN:
                    damaged.append(number)
        if named := [str(line) for line in damaged if line < number]:  # the last may be torn
            where = ", ".join(named[:DAMAGED_SHOWN]) + (", ..." if len(named) > DAMAGED_SHOWN else "")
            note_once(f"{self.path} is damaged; left out: line {where}")

    def lines(self) -> Iterator[str]:
        """Yield the whole lines, see `lines_of`."""
        return lines_of(self.path)

    def trim(self, step: int) -> None:
        """Drop the rows after `step`, which a run that continues from there will write again, and damaged lines.

        Where a line is damaged that is not the last, the file as it was is kept beside as metrics.jsonl.damaged.
        """
        self.close()
        if not self.path.is_file():
            return
        lines, rows = list(self.lines()), list(self.numbered_rows())
        torn = 1 if lines and as_row(lines[-1]) is None else 0
        if len(rows) + torn < len(lines):
            names = (self.path.with_name("metrics.jsonl.damaged" + (f".{n}" if n > 1 else "")) for n in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            share(self.path, kept)
            print(f"note: the file as it was is kept as {kept}", file=sys.stderr)
        write_atomically(self.path, "".join(f"{lines[number - 1]}\n" for number, row in rows if row["step"] <= step))

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self.file is not None:
            self.file.close()
            self.file = None


def as_row(line: str) -> dict[str, Any] | None:
    """Return the row that a line is, None for anything else. What this project writes is ASCII."""
    row = as_object(line) if line.isascii() else None
    return row if row is not None and isinstance(row.get("step"), int) and is_number(row["step"]) else None


def higher_is_better(metric: str, mode: str = "auto") -> bool:
    """Return whether a larger value is the better one; mode: monitor_mode, which may say so whatever the name."""
    return mode == "max" or (mode == "auto" and any(word in metric for word in HIGHER_IS_BETTER))


def best_monitored(rows: Iterable[dict[str, Any]], config: dict[str, Any]) -> float | None:
    """Return the best value of the monitored metric in rows of metrics; None where it is in none."""
    metric = config.get("monitor", "")
    best = max if higher_is_better(metric, config.get("monitor_mode", "min")) else min
    return best((row[metric] for row in rows if row.get(metric) is not None), default=None)

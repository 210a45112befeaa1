"""The runs on a Modal Volume, read from this machine as what anyone may have changed."""

import json
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from backends.modal_volume import explained, open_volume
from common.errors import UserError
from common.files import replacing, write_atomically
from configuration.values import check_run_name
from run_files.metrics_file import as_row
from run_files.run_folder import STATES, RunFolder, save_name, wrong_status
from run_files.stored_values import as_object, is_number

FIRST = ("config.yaml", "status.json")  # what tells one run from another
STATUS_KEYS = ("state", "step", "started", "updated")
SECTIONS = {"trackio": ("_target_", "enabled", "project"), "log": ("expect", "file")}  # of config.yaml, and what they hold
CONFIG_KEYS = ("run_name", "output_dir", "choices", "overrides", "command", "model", "trackio", "log")


class Remote:
    """The Volume as far as runs are concerned. output_dir: the folder of the runs on it."""

    def __init__(self, name: str, output_dir: Path) -> None:
        self.name, self.volume = name, open_volume(name)
        self.output_dir = PurePosixPath(output_dir.as_posix())

    def files(self, folder: PurePosixPath) -> dict[PurePosixPath, Any]:
        """Return everything below a folder by its path, none where there is no such folder; each has a size and an mtime."""
        from modal.exception import NotFoundError
        from modal.types import FileEntryType

        with explained(f"the Volume {self.name}"):
            try:
                entries = self.volume.listdir(str(folder), recursive=True)
            except NotFoundError:
                return {}
        return {PurePosixPath(e.path.lstrip("/")): e for e in entries if e.type == FileEntryType.FILE}

    def read(self, path: PurePosixPath) -> bytes:
        with explained(f"the Volume {self.name}, {path}"):
            return b"".join(self.volume.read_file(str(path)))

    def fetch(self, path: PurePosixPath, to: Path) -> None:
        """Copy a file; it is there whole or not at all."""
        with explained(f"the Volume {self.name}, {path}"), replacing(to) as file:
            for block in self.volume.read_file(str(path)):
                file.write(block)

    def runs(self) -> dict[str, list[PurePosixPath]]:
        """Return the files of each run's folder, by the run's name; what processes left half-written is no part of it."""
        found: dict[str, list[PurePosixPath]] = {}
        top = self.output_dir / "runs"
        for path in self.files(top):
            parts = path.relative_to(top).parts
            if len(parts) > 1 and not parts[-1].startswith("."):
                found.setdefault(parts[0], []).append(path)
        return found

    def checkpoints(self) -> dict[PurePosixPath, Any]:
        return {path: e for path, e in self.files(self.output_dir / "ckpts").items() if path.suffix == ".pt"}

    def job(self, run: str) -> dict[str, Any]:
        """Return which App carries out the run. UserError when it was not begun by backend=modal."""
        if PurePosixPath("jobs") / f"{run}.json" not in self.files(PurePosixPath("jobs")):
            raise UserError(f"no run {run} was sent to the Volume {self.name}; `scripts/modal_app.py list` shows them")
        job: dict[str, Any] = json.loads(self.read(PurePosixPath("jobs") / f"{run}.json"))
        return job


def chosen(remote: Remote, names: list[str]) -> dict[str, list[PurePosixPath]]:
    """Return the runs of these names, or all. UserError for one there is not."""
    runs = remote.runs()
    for name in names:
        if name not in runs:
            there = f"it has {', '.join(sorted(runs))}" if runs else "it has none"
            raise UserError(f"there is no run {name} on the Volume {remote.name}; {there}")
    return {name: runs[name] for name in names or sorted(runs)}


def read_run(remote: Remote, name: str, paths: list[PurePosixPath], to: RunFolder) -> dict[str, Any]:
    """Copy the small files of a run into `to`, whole rows only of its metrics; the configuration.

    UserError, naming the run, for one that another version wrote or a broken disk left.
    """
    there = {path.name: path for path in paths if len(path.parts) == len(remote.output_dir.parts) + 3}
    check_run_name(name)
    where = f"run {name} on the Volume {remote.name}"
    for file in FIRST:
        if file not in there:
            raise UserError(f"{where} has no {file}; it was only just begun, or is broken: `modal_app.py logs {name}` tells")
    for file in (*FIRST, "metrics.jsonl"):
        if file in there:
            remote.fetch(there[file], to.path / file)
    broken = damage(to)
    if broken is None:
        config, status = to.read_config(), to.status.read()
        lacking = [f"config.yaml lacks {key}" for key in CONFIG_KEYS if key not in config]
        lacking += [f"status.json lacks {key}" for key in STATUS_KEYS if key not in status]
        if lacking:
            what = f"its {', '.join(lacking)}"
            raise UserError(f"{where} was written by another version of the project ({what}); use that version for it")
        broken = oddity(config, status)
    if broken:
        raise UserError(f"{where} is broken: {broken}; it stays there, see `modal_app.py download {name}`")
    write_atomically(to.metrics.path, "".join(f"{line}\n" for line in to.metrics.lines()))  # a torn last line stays there
    return config


def damage(folder: RunFolder) -> str | None:
    """Return what cannot be read of a run's small files, in words."""
    status = as_object(folder.status.path.read_bytes().decode(errors="replace"))
    if status is None:
        return "its status.json is damaged"
    wrong = wrong_status(status)
    if wrong:
        return f"its status.json has no usable {wrong}"
    if not all(map(is_number, status.get("scores", {}).values())):
        return "a score in its status.json is no number"
    try:
        folder.read_config()
    except UserError:
        return "its config.yaml cannot be read"
    for number, line in enumerate(folder.metrics.lines(), start=1):
        row = as_row(line)
        if row is None:
            return f"line {number} of its metrics.jsonl is damaged"
        wrong = next((key for key, value in row.items() if key != "provenance" and not is_number(value)), None)
        if wrong:
            return f"{wrong} in line {number} of its metrics.jsonl is no number"
    return None


def oddity(config: dict[str, Any], status: dict[str, Any]) -> str | None:
    """Return what a run's configuration or status has of another kind than a run writes, in words."""
    for key, inner in SECTIONS.items():
        lacking = [name for name in inner if not isinstance(config[key], dict) or name not in config[key]]
        if lacking:
            return f"{key} in its config.yaml lacks {', '.join(lacking)}"
    if status["state"] not in STATES:
        return f"its status.json has the state {status['state']}"
    return None if moment(status["updated"]) else "its status.json does not say when it was updated"


def moment(text: str) -> datetime | None:
    """Return the time of a time stamp; None for what is none."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        return None


def saves_there(run: str, checkpoints: dict[PurePosixPath, Any]) -> dict[PurePosixPath, Any]:
    return {path: entry for path, entry in checkpoints.items() if save_name(run).fullmatch(path.name)}

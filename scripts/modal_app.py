#!/usr/bin/env python
"""The runs on the Modal Volume: what they are, and how they come home.

python scripts/modal_app.py list                 # every run there: state, step, minutes, best scores
python scripts/modal_app.py sync                 # bring them home: runs, checkpoints, tracker; again: what is new
python scripts/modal_app.py sync x y             # these only
python scripts/modal_app.py ckpts                # the checkpoints there
python scripts/modal_app.py download x --to far  # one run with its checkpoints, as it stands there, to far/outputs
python scripts/modal_app.py logs x --follow      # what it prints
python scripts/modal_app.py stop x               # end it; resume=true goes on from its newest save

sync overwrites no run of another start and none that is newer here; both get a sentence, and the others come.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.modal import explained, note_job, open_volume
from common.errors import UserError
from common.files import in_working_folder, replacing, write_atomically
from configuration.values import check_run_name
from run_files.experiment_log import PARTS, ExperimentLog, Section
from run_files.metrics_file import as_row
from run_files.result import table
from run_files.run_folder import RunFolder
from run_files.status_file import STATES, timestamp, wrong_status
from run_files.stored_values import as_object, is_number
from scripts.runs import list_row
from scripts.trackio_rebuild import rebuild

MODAL_APP = (sys.executable, "-m", "modal", "app")
FIRST = ("config.yaml", "status.json")  # what tells one run from another
STATUS_KEYS = {"state", "step", "started", "updated"}
SECTIONS = {"trackio": ("_target_", "enabled", "project"), "log": ("expect", "file")}  # of config.yaml, and what they hold
CONFIG_KEYS = ("run_name", "output_dir", "choices", "overrides", "command", "model", "trackio", "log")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        complaints = options.action(options)
    except UserError as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"modal_app.py: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--volume", default="denoising-zoo", help="name of the Volume (default: denoising-zoo)")
    shared.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder of the runs, there and here")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="list | sync | ckpts | download | logs | stop")
    for name, action, words in (
        ("list", list_runs, "every run on the Volume in a line"),
        ("sync", sync, "bring runs, checkpoints and tracker history home"),
        ("ckpts", list_checkpoints, "the checkpoints on the Volume"),
        ("download", download, "copy one run somewhere"),
        ("logs", show_logs, "what a run printed"),
        ("stop", stop, "end a run"),
    ):
        command = commands.add_parser(name, help=words, parents=[shared])
        command.set_defaults(action=action)
        if name in ("sync", "ckpts"):
            command.add_argument("runs", nargs="*", metavar="RUN", help="names of runs (default: all)")
        if name in ("download", "logs", "stop"):
            command.add_argument("run", metavar="RUN")
        if name == "download":
            command.add_argument("--to", type=Path, default=Path("from_modal"), help="folder (default: from_modal)")
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="go on until the run ends")
    return parser.parse_args(arguments)


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
            raise UserError(
                f"no run {run} was sent to the Volume {self.name}; `python scripts/modal_app.py list` shows them"
            )
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
    if broken:
        raise UserError(f"{where} is broken: {broken}; it stays there, see `modal_app.py download {name}`")
    config, status = to.read_config(), to.status.read()
    lacking = [key for key in CONFIG_KEYS if key not in config]
    if lacking or STATUS_KEYS - set(status):
        what = f"its config.yaml lacks {', '.join(lacking)}" if lacking else "its status.json lacks keys"
        raise UserError(f"{where} was written by another version of the project ({what}); use that version for it")
    odd = oddity(config, status)
    if odd:
        raise UserError(f"{where} is broken: {odd}; it stays there, see `modal_app.py download {name}`")
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


def list_runs(options: argparse.Namespace) -> list[str]:
    """Print a line for each run; returns sentences about those that cannot be read."""
    remote = Remote(options.volume, options.output_dir)
    rows, complaints = [], []
    with tempfile.TemporaryDirectory() as place:
        for name, paths in chosen(remote, []).items():
            folder = RunFolder(Path(place) / name)
            try:
                read_run(remote, name, paths, folder)
                rows.append(list_row(folder))
            except UserError as error:
                complaints.append(str(error))
    begun = {row[0] for row in rows}
    for path in sorted(remote.files(PurePosixPath("jobs"))):
        if path.stem not in begun and not any(f"run {path.stem} " in told for told in complaints):
            rows.append([path.stem, "submitted", "-", "-", "-", f"nothing written yet: modal_app.py logs {path.stem}"])
    header = ["run", "state", "step", "epochs", "minutes", "best scores"]
    print(table([header, *rows]) if rows else f"no runs on the Volume {options.volume}")
    return complaints


def sync(options: argparse.Namespace) -> list[str]:
    """Bring runs home; returns a sentence about each that stayed there."""
    remote = Remote(options.volume, options.output_dir)
    complaints = []
    for name, paths in chosen(remote, options.runs).items():
        try:
            print(f"{name}: {bring(remote, name, paths, options.output_dir)}")
        except UserError as error:
            complaints.append(str(error))
    return complaints


def bring(remote: Remote, name: str, paths: list[PurePosixPath], output_dir: Path) -> str:
    """Bring one run home: what was done, in words. UserError where nothing may be; then nothing here has changed."""
    here = RunFolder(output_dir / "runs" / name)
    pending = here.path / ".untracked"  # there until tracker and log have what came, so that the next sync completes it
    with staging(output_dir) as place:
        fetched = RunFolder(place / "runs" / name)
        config = read_run(remote, name, paths, fetched)
        if is_newer(fetched, here):
            for path, entry in {**dict.fromkeys(paths), **saves_of(name, remote.checkpoints())}.items():
                target = path.relative_to(remote.output_dir)
                kept = "archive" in path.parts and same_size(output_dir / target, entry)  # an epoch's save never changes
                if not kept and not (place / target).exists():
                    remote.fetch(path, place / target)
            read_run(remote, name, paths, fetched)  # again: rows newer than the saves are redone, missing ones are not
            here.lock.acquire()
            try:
                pending.touch()
                move_home(fetched, here, place, output_dir)
            finally:
                here.release()
    return f"step {here.status.read()['step']}, {track(here, config, pending)}"


def same_size(path: Path, entry: Any) -> bool:
    return path.is_file() and path.stat().st_size == entry.size


def move_home(fetched: RunFolder, here: RunFolder, place: Path, output_dir: Path) -> None:
    """Put what was fetched in its place: the configuration first, so that saves are never without it; the status last, so
    that what is cut short is done again."""
    files = [path for path in place.rglob("*") if path.is_file()]
    order = {fetched.config_path: 0, fetched.status.path: 2}
    for path in sorted(files, key=lambda path: order.get(path, 1)):
        target = output_dir / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


@contextmanager
def staging(output_dir: Path) -> Iterator[Path]:
    """A folder on the disk of the runs, gone afterwards."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".sync-") as place:
        yield Path(place)


def is_save(run: str, file: str) -> bool:
    """Whether a file is a checkpoint of that run, not of one whose name merely begins alike."""
    return re.fullmatch(re.escape(run) + r"_(last|best|epoch_\d{4,})\.pt", file) is not None


def saves_of(run: str, checkpoints: dict[PurePosixPath, Any]) -> dict[PurePosixPath, Any]:
    return {path: entry for path, entry in checkpoints.items() if is_save(run, path.name)}


def is_newer(fetched: RunFolder, here: RunFolder) -> bool:
    """Whether what came is to replace what is here. UserError where that is another run, or a newer state of it."""
    name, ours, theirs = here.name, here.status.read(), fetched.status.read()
    if not here.config_path.is_file():
        saves = (here.path.parents[1] / "ckpts").rglob("*.pt")
        left = next((path for path in saves if is_save(name, path.name)), None)
        if left is not None:
            raise UserError(f"run {name} has saves here, such as {left}, and no run folder; move them away, then sync again")
        return True
    if not ours and here.config_path.read_bytes() == fetched.config_path.read_bytes():
        return True  # the sync before was cut short
    if ours.get("started") != theirs["started"]:
        command = here.read_config().get("command", "another command")
        raise UserError(
            f"run {name} here is another one, by `{command}`, and was left alone with all its files; "
            f"`modal_app.py download {name}` copies that of the Volume elsewhere"
        )
    then, now = moment(ours["updated"]), moment(theirs["updated"])
    if then is None or now is None:
        raise UserError(
            f"{here.status.path} does not say when the run {name} was updated, and it was left alone; mend or move it"
        )
    if then > now:
        raise UserError(
            f"run {name} is newer here (step {ours['step']}, on the Volume {theirs['step']}) and was left alone; "
            f"`modal_app.py download {name}` copies that of the Volume elsewhere"
        )
    return then < now


def track(folder: RunFolder, config: dict[str, Any], pending: Path) -> str:
    """Give the tracker and EXPERIMENT_LOG.md here what the run gave those there, while that is pending; says so in words."""
    if not pending.exists():
        return "nothing new"
    log, settings, done = config["log"], config["trackio"], "brought"
    if log.get("expect") and not in_working_folder(Path(str(log["file"]))):
        print(f"note: {folder.log_path} is not copied to {log['file']}, outside the working folder", file=sys.stderr)
    elif log.get("expect") and folder.log_path.is_file():
        came = Section(folder.log_path.read_text(encoding="utf-8", errors="replace"), folder.name)
        with ExperimentLog(Path(log["file"])).section(folder.name) as section:
            for part in PARTS:
                section.replace(part, came.read(part))
    if settings["enabled"] and settings["_target_"].endswith("TrackioTracker"):
        project, rows = rebuild(folder, None)
        done = f"{rows} rows in the tracker's project {project}"
    pending.unlink()
    return done


def list_checkpoints(options: argparse.Namespace) -> list[str]:
    """Print every checkpoint on the Volume, or those of the runs named."""
    remote = Remote(options.volume, options.output_dir)
    there = remote.checkpoints()
    if options.runs:
        there = {path: entry for name in chosen(remote, options.runs) for path, entry in saves_of(name, there).items()}
    rows = [[str(p), f"{e.size / 2**20:,.1f} MiB", f"{datetime.fromtimestamp(e.mtime):%F %T}"] for p, e in there.items()]
    print(table([["checkpoint", "size", "saved"], *sorted(rows)]) if rows else f"no checkpoints on the Volume {remote.name}")
    return []


def download(options: argparse.Namespace) -> list[str]:
    """Copy a run with its checkpoints as it stands on the Volume, broken or not, to a folder that has none of that name."""
    remote = Remote(options.volume, options.output_dir)
    paths = [*chosen(remote, [options.run])[options.run], *saves_of(options.run, remote.checkpoints())]
    taken = next((options.to / path for path in paths if (options.to / path).exists()), None)
    if taken is not None:
        raise UserError(f"{taken} exists already; give another folder by --to")
    for path in paths:
        remote.fetch(path, options.to / path)
    print(f"{len(paths)} files of {options.run} are in {options.to / options.output_dir}")
    return []


def show_logs(options: argparse.Namespace) -> list[str]:
    app = Remote(options.volume, options.output_dir).job(options.run)["app"]
    words = ["logs", app, *(["--follow"] if options.follow else [])]
    return complaint_of(words, subprocess.run([*MODAL_APP, *words], check=False).returncode)


def stop(options: argparse.Namespace) -> list[str]:
    """End a run, and note on the Volume that it has ended: its name is free for resume=true then."""
    remote = Remote(options.volume, options.output_dir)
    job = remote.job(options.run)
    words = ["stop", job["app"], "--yes"]
    done = subprocess.run([*MODAL_APP, *words], check=False, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode and "already stopped" not in " ".join(done.stderr.split()):
        return complaint_of(words, done.returncode)
    with explained(f"the run {options.run}"):
        note_job(remote.volume, options.run, job | {"stopped": timestamp()})
    return []


def complaint_of(words: list[str], status: int) -> list[str]:
    """Return modal says itself what is wrong."""
    return [f"modal app {' '.join(words)} ended with status {status}"] if status else []


if __name__ == "__main__":
    sys.exit(main())

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
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.modal_volume import explained, note_job
from common.command_line import Parser
from common.errors import UserError
from common.files import in_working_folder
from run_files.experiment_log import PARTS, ExperimentLog, Section
from run_files.result import table
from run_files.run_folder import RunFolder, saves_of, timestamp
from scripts.modal_runs import Remote, chosen, moment, read_run, saves_there
from scripts.runs import list_row
from scripts.trackio_rebuild import rebuild

MODAL_APP = (sys.executable, "-m", "modal", "app")
ENDED = "modal app {} ended with status {}"  # modal says itself what is wrong


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        complaints = options.action(options) or []
    except UserError as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"modal_app.py: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = Parser(add_help=False)
    shared.add_argument("--volume", default="denoising-zoo", help="name of the Volume (default: denoising-zoo)")
    shared.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder of the runs, there and here")
    parser = Parser(description=__doc__)
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
        if path.stem not in begun and not any(f"run {path.stem} " in complaint for complaint in complaints):
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
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".sync-") as temporary:
        place = Path(temporary)
        fetched = RunFolder(place / "runs" / name)
        config = read_run(remote, name, paths, fetched)
        if is_newer(fetched, here):
            for path, entry in {**dict.fromkeys(paths), **saves_there(name, remote.checkpoints())}.items():
                target = path.relative_to(remote.output_dir)
                local, epochs_own = output_dir / target, "archive" in path.parts  # which never changes
                kept = epochs_own and local.is_file() and local.stat().st_size == entry.size
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


def move_home(fetched: RunFolder, here: RunFolder, place: Path, output_dir: Path) -> None:
    """Put what was fetched in its place: the configuration first, so that saves are never without it; the status last, so
    that what is cut short is done again."""
    files = [path for path in place.rglob("*") if path.is_file()]
    order = {fetched.config_path: 0, fetched.status.path: 2}
    for path in sorted(files, key=lambda path: order.get(path, 1)):
        target = output_dir / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def is_newer(fetched: RunFolder, here: RunFolder) -> bool:
    """Whether what came is to replace what is here. UserError where that is another run, or a newer state of it."""
    name, ours, theirs = here.name, here.status.read(), fetched.status.read()
    if not here.config_path.is_file():
        if left := saves_of(here.path.parents[1], name):
            raise UserError(f"run {name} has saves here, such as {left[0]}, and no folder; move them away, then sync again")
        return True
    if not ours and here.config_path.read_bytes() == fetched.config_path.read_bytes():
        return True  # the sync before was cut short
    remedy = f"`modal_app.py download {name}` copies that of the Volume elsewhere"
    if ours.get("started") != theirs["started"]:
        command = here.read_config().get("command", "another command")
        raise UserError(f"run {name} here is another one, by `{command}`, and was left alone with all its files; {remedy}")
    then, now = moment(ours["updated"]), moment(theirs["updated"])
    if then is None or now is None:
        raise UserError(f"{here.status.path} does not say when {name} was updated, which was left alone; correct or move it")
    if then > now:
        steps = f"step {ours['step']}, on the Volume {theirs['step']}"
        raise UserError(f"run {name} is newer here ({steps}) and was left alone; {remedy}")
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


def list_checkpoints(options: argparse.Namespace) -> None:
    """Print every checkpoint on the Volume, or those of the runs named."""
    remote = Remote(options.volume, options.output_dir)
    there = remote.checkpoints()
    if options.runs:
        there = {path: entry for name in chosen(remote, options.runs) for path, entry in saves_there(name, there).items()}
    rows = [[str(p), f"{e.size / 2**20:,.1f} MiB", f"{datetime.fromtimestamp(e.mtime):%F %T}"] for p, e in there.items()]
    print(table([["checkpoint", "size", "saved"], *sorted(rows)]) if rows else f"no checkpoints on the Volume {remote.name}")


def download(options: argparse.Namespace) -> None:
    """Copy a run with its checkpoints as it stands on the Volume, broken or not, to a folder that has none of that name."""
    remote = Remote(options.volume, options.output_dir)
    paths = [*chosen(remote, [options.run])[options.run], *saves_there(options.run, remote.checkpoints())]
    taken = next((options.to / path for path in paths if (options.to / path).exists()), None)
    if taken is not None:
        raise UserError(f"{taken} exists already; give another folder by --to")
    for path in paths:
        remote.fetch(path, options.to / path)
    print(f"{len(paths)} files of {options.run} are in {options.to / options.output_dir}")


def show_logs(options: argparse.Namespace) -> None:
    app = Remote(options.volume, options.output_dir).job(options.run)["app"]
    words = ["logs", app, *(["--follow"] if options.follow else [])]
    if status := subprocess.run([*MODAL_APP, *words], check=False).returncode:
        raise UserError(ENDED.format(" ".join(words), status))


def stop(options: argparse.Namespace) -> None:
    """End a run, and note on the Volume that it has ended: its name is free for resume=true then."""
    remote = Remote(options.volume, options.output_dir)
    job = remote.job(options.run)
    words = ["stop", job["app"], "--yes"]
    done = subprocess.run([*MODAL_APP, *words], check=False, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode and "already stopped" not in " ".join(done.stderr.split()):
        raise UserError(ENDED.format(" ".join(words), done.returncode))
    with explained(f"the run {options.run}"):
        note_job(remote.volume, options.run, job | {"stopped": timestamp()})


if __name__ == "__main__":
    sys.exit(main())

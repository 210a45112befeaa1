"""What the runs under outputs/ are and how they did.

python scripts/runs.py list                      # every run: state, step, epoch, minutes, best scores
python scripts/runs.py show my_experiment        # what it changed, how it stands, its last numbers, its files
python scripts/runs.py show my_experiment csv=metrics.csv   # all its numbers, a row for each step that has some
python scripts/runs.py compare first second      # the settings that differ and the last scores side by side
python scripts/runs.py compare 'a_.*' 'b_.*'     # two sets of seeds: which scores differ by more than luck
python scripts/runs.py table 'lr_.*'              # the best first, seeds of one configuration in one row, verdicts
python scripts/runs.py delete old_one --dry-run  # what would go: its folder, its saves, its run of the dashboard
"""

import argparse
import csv
import difflib
import io
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import indent
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import Parser, check_ends, check_place, front, matching, outputs
from common.errors import UserError
from common.files import replacing
from configuration.nodes import flat
from configuration.settings import read_settings
from run_files.metrics_file import higher_is_better
from run_files.result import table
from run_files.run_folder import RunFolder, run_folders, saves_of
from run_files.stored_values import note_once

NO_SCORE = re.compile(r"_floor\w*$|_se$|_p$|_ratio$|^eval/(nfe|seconds)$")  # of these none is the best
HEADLINES = ("eval/energy_distance", "eval/fid", "eval/accuracy", "eval/kid", "eval/loss")  # in order of preference
HEADLINES_SHOWN = 2
OUTPUT_WORD = re.compile(r"^output_dir=")  # as the other scripts and the launcher take it
NO_METRICS = ("step", "epoch", "elapsed_seconds", "provenance")  # keys of a row of metrics.jsonl


def parse(arguments: list[str]) -> argparse.Namespace:
    place: dict[str, Any] = {"type": Path, "metavar": "FOLDER", "help": "of the runs (outputs/ here or the repository's)"}
    parser = Parser(
        usage="runs.py [-h] [output_dir=FOLDER] "
        "(list | show NAME [csv=FILE] | compare A B ... | table NAMES | delete NAME ...)",
        description=__doc__,
    )
    parser.add_argument("--output-dir", default=outputs(), **place)
    commands = parser.add_subparsers(required=True, metavar="list, show, compare, table or delete", prog="runs.py")
    reports: list[tuple[str, Callable[[argparse.Namespace], str], int | str | None, str]] = [
        ("list", list_runs, None, "every run in a line"),
        ("show", show_run, 1, "one run in full"),
        ("compare", compare_runs, "+", "two runs or more side by side, or two sets of seeds by expressions for their names"),
        ("table", table_of_runs, 1, "runs by an expression for their names, the best first, their seeds together"),
        ("delete", delete_runs, "+", "runs, with their saves and their dashboard rows"),
    ]
    for name, report, names, what in reports:
        command = commands.add_parser(name, help=what)
        command.add_argument("--output-dir", default=argparse.SUPPRESS, **place)
        command.set_defaults(report=report)
        if names:
            command.add_argument("names", nargs=names, metavar="NAME")
        if name == "show":
            command.add_argument("words", nargs="*", metavar="csv=FILE", help="write all its metrics to this file")
        if name == "compare":
            command.add_argument("--best", action="store_true", help="of sets: the evaluation of the best monitored value")
            command.add_argument("--score", metavar="SCORE", help="of sets: this score alone, decided on beforehand")
        if name == "delete":
            command.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    places = [OUTPUT_WORD.sub("--output-dir=", word) for word in arguments if OUTPUT_WORD.match(word)]
    return parser.parse_args([*places, *(word for word in arguments if not OUTPUT_WORD.match(word))])  # names stay together


def carry_out(words: list[str]) -> str:
    options = parse(words)
    return str(options.report(options))


def main(words: list[str]) -> int:
    return front(words, None, carry_out)


def list_runs(options: argparse.Namespace) -> str:
    """Return one line a run, the latest last."""
    folders = sorted(run_folders(options.output_dir).values(), key=lambda folder: folder.status.read().get("started", ""))
    queued = queued_states(options.output_dir)
    if not folders and not queued:
        return f"no runs under {options.output_dir}: python launcher.py run_name=my_experiment makes one"
    header = ["run", "state", "step", "epochs", "minutes", "best scores"]
    rows = [list_row_or_why(folder) for folder in folders]
    rows = [[name, queued.pop(name, state), *rest] for name, state, *rest in rows]
    return table([header, *rows, *([name, state, "-", "-", "-", "-"] for name, state in queued.items())])


def queued_states(output_dir: Path) -> dict[str, str]:
    """Return how the runs stand that wait or run on Slurm; where it does not answer, a line says so, and runs are listed."""
    from backends.slurm_queue import queued_runs

    try:
        return {name: job.words() for name, job in queued_runs(output_dir).items()}
    except UserError as error:
        note_once(f"jobs are not shown: {error}")
        return {}


def list_row_or_why(folder: RunFolder) -> list[str]:
    """Return a run's line; of one that cannot be read, the rest of it is why: the other runs are listed all the same."""
    try:
        return list_row(folder)
    except UserError as error:
        return [folder.name, "-", "-", "-", "-", str(error)]


def list_row(folder: RunFolder) -> list[str]:
    status = folder.status.read()
    minutes = f"{status.get('seconds', 0) / 60:.1f}"
    scores = best_scores(folder)
    headlines = [name for name in HEADLINES if name in scores][:HEADLINES_SHOWN]
    shown = ", ".join(f"{name.removeprefix('eval/')} {number(scores[name])}" for name in headlines)
    return [folder.name, state(folder, status), str(status.get("step", "-")), epochs(status), minutes, shown or "-"]


def show_run(options: argparse.Namespace) -> str:
    """Overrides, status, last metrics and files of one run; where it is to write a table of them, what it wrote."""
    folder = find_run(options.output_dir, options.names[0])
    if options.words:
        return write_csv(folder, read_settings(options.words, Table)[0].csv)
    status = folder.status.read()
    best, last = best_scores(folder), last_metrics(folder)
    files = sorted(path for path in folder.path.rglob("*") if path.is_file() and not path.name.startswith("."))
    rows = [[name, number(value), number(best[name]) if name in best else ""] for name, value in sorted(last.items())]
    parts = {
        "": f"{folder.name}: {state(folder, status)} at step {status.get('step', '-')}, epoch {epochs(status)}, "
        f"{status.get('seconds', 0) / 60:.1f} minutes" + (f"\n{status['why']}" if status.get("why") else ""),
        "started, updated": f"{status.get('started', '-')}, {status.get('updated', '-')}",
        "overrides": folder.read_overrides() or "none, or not stored",
        "metrics": table([["metric", "last", "best"], *rows]) if last else "none yet",
        "files": "\n".join(f"{path}  ({path.stat().st_size / 1024:,.1f} KiB)" for path in files),
    }
    return "\n\n".join(f"{title}\n{indent(text, '  ')}" if title else text for title, text in parts.items())


@dataclass(frozen=True)
class Table:
    """What is written of one run: all its metrics."""

    csv: Path = Path("metrics.csv")


def write_csv(folder: RunFolder, path: Path) -> str:
    """Write every row of a run's metrics as comma-separated values, whole or not at all; return what was written, in words.

    A number that was not finite is nan, one that a row does not have is empty. UserError for a path that is no .csv in a
    folder that exists, and for a run without metrics.
    """
    check_ends("csv", path, ".csv")
    check_place("csv", path)
    rows, found = 0, set[str]()
    for row in folder.metrics.rows():
        rows, found = rows + 1, found | row.keys()
    if not rows:
        raise UserError(f"the run {folder.name} has no metrics yet, so there is nothing to write to {path}")
    first = [name for name in NO_METRICS if name != "provenance"]
    names = [*first, *sorted(found - {*NO_METRICS})]
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(map(cell, names))
        for row in folder.metrics.rows():
            table.writerow(["nan" if row.get(name, 0) is None else row.get(name, "") for name in names])
        text.detach()
    return f"{path}: {rows} rows of {len(names)} columns"


def cell(name: str) -> str:
    """Return a name as a cell that no spreadsheet takes for a formula."""
    name = " ".join(name.split())
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


def compare_runs(options: argparse.Namespace) -> str:
    """Return settings that differ between the runs, then their last scores; of two sets of seeds, verdicts."""
    names = list(dict.fromkeys(options.names))
    if len(names) < 2:
        raise UserError("compare needs at least two different runs: python scripts/runs.py compare A B")
    known = run_folders(options.output_dir)
    if len(names) == 2 and not {*names} <= {*known}:
        from scripts.run_sets import compare_sets

        for name in names:
            if not matching(name, known):
                find_run(options.output_dir, name)  # says which is the nearest
        return compare_sets(known, names, options.best, options.score)
    if options.best or options.score:
        raise UserError("--best and --score are for two sets of seeds: python scripts/runs.py compare 'a_.*' 'b_.*' --best")
    folders = [find_run(options.output_dir, name) for name in names]
    configs = [flat(read_config(folder)) for folder in folders]
    metrics = [last_metrics(folder) for folder in folders]
    settings = rows_that_differ(configs, str, ignored=("run_name",))
    scores = rows_of(metrics, number, [name for name in sorted(set().union(*metrics)) if not name.startswith("gpu/")])
    parts = [
        table([["setting", *names], *settings]) if settings else "the settings are the same",
        table([["last value", *names], *scores]) if scores else "no metrics yet",
    ]
    return "\n\n".join(parts)


def table_of_runs(options: argparse.Namespace) -> str:
    """Return the table that closes a sweep, of the runs whose names an expression matches."""
    from scripts.run_sets import table_of

    known = run_folders(options.output_dir)
    if not matching(options.names[0], known):
        find_run(options.output_dir, options.names[0])  # says which is the nearest
    return table_of([known[name] for name in matching(options.names[0], known)])


def delete_runs(options: argparse.Namespace) -> str:
    """Delete runs, their saves and dashboard rows. UserError, and nothing goes, if one is held, or a folder unreadable."""
    left = ("metrics.jsonl", "config.yaml", "status.json")  # by a deletion that was killed, one of them
    folders = [find_run(options.output_dir, name, left) for name in dict.fromkeys(options.names)]
    saves = options.output_dir / "ckpts"
    folders_of_saves = (path for path in (saves, *saves.rglob("*")) if path.is_dir())
    shut = next((path for path in folders_of_saves if not os.access(path, os.R_OK | os.X_OK)), None)
    if shut is not None:
        raise UserError(f"{shut} may not be read by this user, and saves may lie there; nothing was deleted")
    if not options.dry_run:
        for folder in folders:
            folder.lock.acquire()
    elif held := [folder.name for folder in folders if folder.lock.is_held()]:
        raise UserError(f"run {held[0]} is being trained by another process right now; wait for it, or leave it out")
    lines = []
    for folder in folders:
        saves, tracked = saves_of(options.output_dir, folder.name), delete_tracked(folder, options.dry_run)
        lines.append(f"{folder.name}: {folder.path}, {len(saves)} saves, {tracked} dashboard runs")
        if not options.dry_run:
            for path in saves:
                path.unlink()
            folder.release()
            shutil.rmtree(folder.path)
    return "\n".join(["would delete" if options.dry_run else "deleted", *(f"  {line}" for line in lines)])


def delete_tracked(folder: RunFolder, dry_run: bool) -> int:
    """Return how many runs of that name the dashboard has, or had."""
    tracker = read_config(folder).get("trackio") or {}
    if not tracker.get("enabled") or not str(tracker.get("_target_")).endswith("TrackioTracker"):
        return 0
    from run_files.trackio_tracker import delete_run, run_names

    project = str(tracker["project"])
    found = run_names(project).count(folder.name)
    if found and not dry_run:
        delete_run(project, folder.name)
    return found


def find_run(output_dir: Path, name: str, holding: Sequence[str] = ("status.json",)) -> RunFolder:
    """Return the run of that name, which has one of these files. UserError, which names the nearest, where there is none."""
    folders = {key: folder for file in holding for key, folder in run_folders(output_dir, file).items()}
    if name in folders:
        return folders[name]
    place = output_dir / "runs" / name
    if place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
        raise UserError(f"{place} may not be read by this user; ask its owner, or run this as they do")
    near = difflib.get_close_matches(name, folders, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "python scripts/runs.py list shows what there is."
    raise UserError(f"no run named {name} under {output_dir / 'runs'}: {hint}")


def state(folder: RunFolder, status: dict[str, Any]) -> str:
    """Return the state as stored, or `lost` where a run of this machine says running and no process holds its folder."""
    stored = str(status.get("state", "-"))
    here = status.get("host") == platform.node()
    return "lost" if stored == "running" and here and not folder.lock.is_held() else stored


def epochs(status: dict[str, Any]) -> str:
    """Epochs done, of how many where that is stored."""
    total = status.get("epochs")
    return f"{status.get('epoch', '-')}" + (f"/{total}" if total else "")


def best_scores(folder: RunFolder) -> dict[str, float]:
    """Return the best value of each eval metric, over metrics.jsonl and the status."""
    best: dict[str, float] = {}
    for scores in chain([folder.status.read().get("scores", {})], folder.metrics.evaluations()):
        for name, value in scores.items():
            if name.startswith("eval/") and not NO_SCORE.search(name) and isinstance(value, int | float):
                pick = max if higher_is_better(name) else min
                best[name] = pick(best.get(name, value), value)
    return best


def last_metrics(folder: RunFolder) -> dict[str, float | None]:
    """Return the last value of each metric, the status's scores included."""
    last: dict[str, float | None] = {}
    for row in folder.metrics.rows():
        last |= row
    last |= folder.status.read().get("scores", {})
    return {name: v for name, v in last.items() if name not in NO_METRICS and (v is None or isinstance(v, int | float))}


def read_config(folder: RunFolder) -> dict[str, Any]:
    """Return the resolved configuration, empty where the run stored none."""
    return folder.read_config() if folder.config_path.is_file() else {}


def rows_that_differ(columns: list[dict[str, Any]], show: Callable[[Any], str], ignored: tuple[str, ...]) -> list[list[str]]:
    """Return a row for each key whose values are not all the same."""
    rows = rows_of(columns, show, [key for key in sorted(set().union(*columns)) if key not in ignored])
    return [row for row in rows if len(set(row[1:])) > 1]


def rows_of(columns: list[dict[str, Any]], show: Callable[[Any], str], keys: list[str]) -> list[list[str]]:
    """[key, value in each column], "-" where a column lacks the key."""
    return [[key, *(show(column[key]) if key in column else "-" for column in columns)] for key in keys]


def number(value: float | None) -> str:
    """Four significant digits, whole numbers in full; null was not a number."""
    if value is None:
        return "nan"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Rebuild runs in the local trackio dashboard from their metrics.jsonl, the record that is always whole.

python scripts/trackio_rebuild.py my_run other_run
python scripts/trackio_rebuild.py --all --output-dir outputs
TRACKIO_DIR=/elsewhere python scripts/trackio_rebuild.py my_run

What the dashboard has under a run's name is replaced once the new rows are all there, so doing it twice changes nothing, and
whatever interrupts it loses nothing; pictures come from samples/.
"""

import argparse
import contextlib
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import UserError
from training.run_folder import RunFolder
from training.trackio_tracker import TrackioTracker, open_database, require_readable, run_names

OWN = ("step", "elapsed_seconds", "provenance")  # columns that metrics.jsonl has for itself


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"trackio_rebuild.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs")
    parser.add_argument("--all", action="store_true", help="every run there is")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the runs are (default: outputs)")
    parser.add_argument("--project", help="trackio project (default: the run's own)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """UserError for a run that has no metrics, before any is rebuilt."""
    place = options.output_dir / "runs"
    names = sorted(path.parent.name for path in place.glob("*/metrics.jsonl")) if options.all else options.runs
    if not names:
        raise UserError(f"say which runs of {place}: their names, or --all for those that have a metrics.jsonl")
    folders = [RunFolder(place / name) for name in names]
    for folder in folders:
        if not folder.metrics_path.is_file():
            raise UserError(f"there is no {folder.metrics_path}; --output-dir names another place")
    for folder in folders:
        project, rows = rebuild(folder, options.project)
        print(f"{folder.name}: {rows} rows in the project {project}")


def rebuild(folder: RunFolder, project: str | None) -> tuple[str, int]:
    """Write the run's rows and pictures anew, then remove what was there before; the project and the number of rows.

    UserError when trackio cannot; what was there before is then there still.
    """
    config = folder.read_config() if folder.config_path.is_file() else {}
    project = project or project_of(config)
    tracker, rows, drawn = TrackioTracker(project), numbers_of(folder), pictures_of(folder)
    try:
        require_readable(project)
        earlier, files = runs_named(project, folder.name), media_of(project, folder.name)
        tracker.start(folder.name, config, folder.path, None)
        for numbers, step in rows:
            tracker.log(numbers, step)
        for name, picture, step in drawn:
            tracker.log_image(name, picture, step)
        tracker.finish()
        for run in earlier:
            if not run.delete():
                raise RuntimeError("the rows of before could not be removed")
        for file in files:
            file.unlink()
        if not is_whole(folder, project):
            raise RuntimeError("it did not keep every row")
    except (RuntimeError, OSError, sqlite3.Error) as error:
        tracker.abandon()
        raise UserError(
            f"trackio did not take {folder.name}: {str(error).splitlines()[0]}; nothing is lost, try again"
        ) from error
    return project, len(rows)


def project_of(config: dict[str, Any]) -> str:
    """The run's own project."""
    settings = config.get("trackio")
    return str(settings.get("project", "denoising-zoo") if isinstance(settings, dict) else "denoising-zoo")


def numbers_of(folder: RunFolder) -> list[tuple[dict[str, float], int]]:
    """(metrics, step) of each row; what is no number, such as the provenance of scores, is left out."""
    rows = folder.read_metrics()
    return [({k: v for k, v in row.items() if k not in OWN and isinstance(v, int | float)}, row["step"]) for row in rows]


def pictures_of(folder: RunFolder) -> list[tuple[str, Path, int]]:
    """(name, picture, step) of the pictures that a run logs: those of its beginning it does not."""
    return [(name, path, step) for name, path, step in folder.pictures() if step]


def runs_named(project: str, name: str) -> list[Any]:
    """What the project has under the name, each with a method that deletes it."""
    import trackio

    return [run for run in trackio.Api().runs(project) if run.name == name] if name in run_names(project) else []


def media_of(project: str, name: str) -> list[Path]:
    """The files of the run's pictures in the dashboard."""
    import trackio

    return [path for path in (trackio.utils.project_media_dir(project) / name).rglob("*") if path.is_file()]


def is_whole(folder: RunFolder, project: str) -> bool:
    """Whether the dashboard has exactly the rows and pictures of the run, by their steps."""
    if folder.name not in run_names(project):
        return False
    with contextlib.closing(open_database(project)) as database:
        found = database.execute("SELECT step FROM metrics WHERE run_name = ?", (folder.name,)).fetchall()
    wanted = [step for _, step in numbers_of(folder)] + [step for *_, step in pictures_of(folder)]
    return sorted(step for (step,) in found) == sorted(wanted)


if __name__ == "__main__":
    sys.exit(main())

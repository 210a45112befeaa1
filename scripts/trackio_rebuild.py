#!/usr/bin/env python
"""Rebuild runs in the local trackio dashboard from their metrics.jsonl, the record that is always whole.

python scripts/trackio_rebuild.py my_run other_run
python scripts/trackio_rebuild.py --all --output-dir outputs
TRACKIO_DIR=/elsewhere python scripts/trackio_rebuild.py my_run

What the dashboard has under a run's name is replaced, so doing it twice changes nothing; pictures come from samples/.
"""

import argparse
import sqlite3
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import Parser, front
from common.errors import UserError, first_line
from common.files import require
from run_files.run_folder import RunFolder, run_folders
from run_files.trackio_tracker import TrackioTracker


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs")
    parser.add_argument("--all", action="store_true", help="every run there is")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the runs are (default: outputs)")
    parser.add_argument("--project", help="trackio project (default: the run's own)")
    return parser.parse_args(arguments)


def carry_out(words: list[str]) -> str:
    """Rebuild the runs and return a line for each. UserError for a run without metrics, before any is rebuilt."""
    options = parse(words)
    place = options.output_dir / "runs"
    names = list(run_folders(options.output_dir, "metrics.jsonl")) if options.all else options.runs
    if not names:
        raise UserError(f"say which runs of {place}: their names, or --all for those that have a metrics.jsonl")
    folders = [RunFolder(place / name) for name in names]
    for folder in folders:
        require(folder.metrics.path, "--output-dir names another place")
    lines = []
    for folder in folders:
        project, rows = rebuild(folder, options.project)
        lines.append(f"{folder.name}: {rows} rows in the project {project}")
    return "\n".join(lines)


def rebuild(folder: RunFolder, project: str | None) -> tuple[str, int]:
    """Write a run's rows and pictures again; return its project and the number of rows. UserError when trackio cannot."""
    config = folder.read_config() if folder.config_path.is_file() else {}
    settings = config.get("trackio")
    project = project or str(settings.get("project", "denoising-zoo") if isinstance(settings, dict) else "denoising-zoo")
    steps = [row["step"] for row in folder.metrics.rows()]
    tracker = TrackioTracker(project)
    try:
        tracker.start(folder.name, config, folder.path, max(steps, default=0), overwrite=True)
        tracker.finish()
    except (RuntimeError, ValueError, OSError, sqlite3.Error) as error:
        raise UserError(f"trackio did not take {folder.name}: {first_line(error)}; nothing is lost, try again") from error
    return project, len(steps)


def main(words: list[str]) -> int:
    return front(words, None, carry_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The local trackio dashboard: a view of metrics.jsonl and samples/, which are the record, so that it can always be rebuilt.

trackio never raises on a failing disk or a locked database: it warns, also from a thread of its own, after half a minute of
trying. Its warnings are exceptions here, so that the guard around the tracker can say one line and carry on.
"""

import contextlib
import contextvars
import io
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from run_files.metrics_file import BY_TIME
from run_files.run_folder import RunFolder
from run_files.trackers import Tracker

NOT_METRICS = ("step", "elapsed_seconds", "provenance")  # columns that metrics.jsonl has for itself


class TrackioTracker(Tracker):
    """Rows in $TRACKIO_DIR/<project>.db, shown by `trackio show --project <project>`.

    A resumed run replaces what the dashboard has of it by what its folder has.

    Raises (from every method): RuntimeError or OSError or sqlite3.Error when the run's rows cannot be written.
    """

    failure: str | None = None

    def start(
        self, run_name: str, config: dict[str, Any], folder: Path, resume_step: int | None, overwrite: bool = False
    ) -> None:
        import trackio

        self.image_type = trackio.Image
        self.take_warnings(Path(trackio.__file__).parent)
        if overwrite or resume_step is not None:
            delete_run(self.project, run_name, newest_alone=not overwrite)
        shown = {name.lstrip("_"): value for name, value in config.items()}  # trackio keeps a leading underscore to itself
        with contextlib.redirect_stdout(io.StringIO()):
            # In a context of its own: trackio finishes the run of the main one again, and waits, when the interpreter exits.
            self.run = contextvars.copy_context().run(trackio.init, self.project, name=run_name, config=shown, embed=False)
        if resume_step is not None:
            self.log_history(RunFolder(folder), resume_step)
        self.raise_failure()

    def log_history(self, folder: RunFolder, last: int) -> None:
        """Log the rows and pictures that the run has left, up to the step `last`; it logs no picture of its beginning."""
        for row in folder.metrics.read():
            if row["step"] <= last:
                numbers = {k: v for k, v in row.items() if k not in NOT_METRICS and isinstance(v, int | float)}
                self.log(numbers, row["step"])
        for name, picture, step in folder.pictures():
            if 0 < step <= last:
                self.log_image(name, picture, step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.raise_failure()
        shown = {name: float(value) for name, value in metrics.items() if not name.endswith(BY_TIME)}  # else 48 more plots
        self.run.log(shown, step=step)

    def log_image(self, name: str, picture: Path, step: int) -> None:
        self.raise_failure()
        self.run.log({name: self.image_type(str(picture))}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()
        warnings.showwarning = self.show_warning
        self.raise_failure()

    def take_warnings(self, home: Path) -> None:
        """Keep the first warning from trackio's source in `home`, of any thread, until finish; show only those of others."""

        def take(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **keys: Any) -> None:
            if Path(filename).parent == home and issubclass(category, UserWarning):
                self.failure = self.failure or str(message)
            else:
                self.show_warning(message, category, filename, *rest, **keys)

        warnings.filterwarnings("always", module=r"trackio\.")
        self.show_warning, warnings.showwarning = warnings.showwarning, take

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)


def runs_of(project: str) -> list[Any]:
    """Return the runs of the project, oldest first, each with its `name` and `delete`; an unknown project has none."""
    import trackio

    try:
        return list(trackio.Api().runs(project))
    except ValueError:  # what trackio raises for an unknown project
        return []


def run_names(project: str) -> list[str]:
    """Return names of the runs in the project, each once, sorted."""
    return sorted({run.name for run in runs_of(project)})


def delete_run(project: str, run_name: str, newest_alone: bool = False) -> None:
    """Delete every run of that name or only the newest, and, when none is left, their pictures.

    Pictures of a run whose name is a path, which another program gave, stay, and a line on stderr says so. RuntimeError when
    the database refuses, as while another process holds it.
    """
    from trackio.media import get_project_media_path

    runs = [run for run in runs_of(project) if run.name == run_name]
    leaving = runs[-1:] if newest_alone else runs
    for run in leaving:
        if not run.delete():
            raise RuntimeError(f"trackio could not delete the run {run_name}")
    if not runs or len(leaving) < len(runs):
        return
    if run_name in ("", ".", "..") or Path(run_name).name != run_name:
        print(f"note: {run_name!r} names no folder of its own; its pictures, if any, stay", file=sys.stderr)
    else:
        shutil.rmtree(get_project_media_path(project, run_name), ignore_errors=True)

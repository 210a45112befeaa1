"""The local trackio dashboard: a view of metrics.jsonl and samples/, which are the record, so that it can always be rebuilt.

trackio never raises on a failing disk or a locked database: it warns, also from a thread of its own, after half a minute of
trying. Its warnings are exceptions here, so that the guard around the tracker can say one line and carry on.
"""

import contextlib
import contextvars
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_files.metrics_file import BY_TIME
from run_files.run_folder import RunFolder
from run_files.trackers import Tracker

LEAVING = ".leaving-"  # begins the names of folders of pictures whose runs are being deleted
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
        for row in folder.metrics.rows():
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
    the database refuses, as while another process holds it; then they all stay.
    """
    runs = [run for run in runs_of(project) if run.name == run_name]
    leaving = runs[-1:] if newest_alone else runs
    with pictures_aside(project, run_name) if leaving and len(leaving) == len(runs) else contextlib.nullcontext():
        for run in leaving:
            if not run.delete():
                raise RuntimeError(f"trackio could not delete the run {run_name}")


@contextlib.contextmanager
def pictures_aside(project: str, run_name: str) -> Iterator[None]:
    """Move a run's pictures aside for the block that deletes its rows; delete them after it, or move them back if it fails.

    A process that is killed in between leaves them aside, where `finish_deletions` finds them.
    """
    from trackio.media import get_project_media_path

    if run_name in ("", ".", "..", "files") or Path(run_name).name != run_name:  # files/ has those of the whole project
        print(f"note: {run_name!r} names no folder of its own; its pictures, if any, stay", file=sys.stderr)
        yield
        return
    pictures = get_project_media_path(project, run_name)
    aside = pictures.rename(pictures.with_name(f"{LEAVING}{os.getpid()}-{run_name}"[:255]))
    try:
        yield
    except BaseException:
        aside.rename(pictures)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def finish_deletions(project: str) -> list[str]:
    """Finish what killed processes have begun: return the names of the runs without rows, whose pictures now go.

    Pictures of a run that still has its rows return to their place.
    """
    import trackio
    from trackio.media import get_project_media_path

    finished = list[str]()
    with contextlib.suppress(ValueError):  # an unknown project
        names = {run.name for run in trackio.Api().runs(project)}
        for left in sorted(get_project_media_path(project, LEAVING).parent.glob(f"{LEAVING}*")):
            name = left.name.removeprefix(LEAVING).partition("-")[2]
            if name in names and not any(get_project_media_path(project, name).iterdir()):
                left.rename(left.with_name(name))
                continue
            shutil.rmtree(left, ignore_errors=True)
            finished += [name] if name and name not in names else []
    return finished

"""The local trackio dashboard, its history kept true when a run is resumed or replaced.

trackio never raises on a failing disk or a locked database: it warns, retries for minutes and drops. Its warnings are
exceptions here, so that the guard around the tracker can say one line and carry on.
"""

import contextlib
import io
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.trackers import Tracker

LOCK_SECONDS = 5.0  # how long the start of a run waits for another process that holds the database


class TrackioTracker(Tracker):
    """Rows in $TRACKIO_DIR/<project>.db, shown by `trackio show --project <project>`.

    Raises (from every method): RuntimeError or OSError or sqlite3.Error when the run's rows cannot be written.
    """

    def __init__(self, project: str = "denoising-zoo") -> None:
        self.project = project
        self.failure: str | None = None

    def start(
        self, run_name: str, config: dict[str, Any], folder: Path, resume_step: int | None, overwrite: bool = False
    ) -> None:
        with quiet():
            import trackio

            require_writable(self.project)
            if resume_step is not None:
                forget_after(self.project, run_name, resume_step)
            elif overwrite:
                delete_run(self.project, run_name)
            self.run = trackio.init(
                self.project,
                name=run_name,
                config=without_reserved_keys(config),
                resume="never" if resume_step is None else "allow",
                embed=False,
            )
        self.image_type = trackio.Image
        # The background writer reports here, from its own thread; the next call of ours raises it.
        self.run._warn_once = self.note_failure  # type: ignore[method-assign]

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.raise_failure()
        self.run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def log_image(self, name: str, picture: Path, step: int) -> None:
        self.raise_failure()
        with quiet():
            self.run.log({name: self.image_type(str(picture))}, step=step)

    def finish(self) -> None:
        with quiet():
            self.run.finish()
        self.abandon()
        self.raise_failure()

    def abandon(self) -> None:
        from trackio import context_vars

        context_vars.current_run.set(None)  # else trackio finishes the run once more when the interpreter exits

    def note_failure(self, key: str, message: str) -> None:
        self.failure = self.failure or message

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)


def run_names(project: str) -> list[str]:
    """Names of the runs in the project, each once, sorted; an unknown project has none."""
    from trackio.sqlite_storage import SQLiteStorage

    if not SQLiteStorage.get_project_db_path(project).exists():
        return []
    return sorted({str(record["name"]) for record in SQLiteStorage.get_run_records(project)})


def delete_run(project: str, run_name: str) -> int:
    """Delete every run of that name, rows and pictures; returns how many there were.

    Only a folder of the project's own pictures is removed. Those of a run whose name is a path, which another program gave,
    stay, and a line on stderr says so.

    Raises:
        RuntimeError: the database refused (another process holds it).
    """
    import trackio

    if run_name not in run_names(project):
        return 0
    runs = [run for run in trackio.Api().runs(project) if run.name == run_name]
    for run in runs:
        if not run.delete():
            raise RuntimeError(f"trackio could not delete the run {run_name} of the project {project}")
    media = trackio.utils.project_media_dir(project)
    if run_name in ("", ".", "..") or Path(run_name).name != run_name:
        print(f"note: {run_name!r} names no folder of its own in {media}; its pictures, if any, stay", file=sys.stderr)
    else:
        shutil.rmtree(media / run_name, ignore_errors=True)
    return len(runs)


def forget_after(project: str, run_name: str, step: int) -> None:
    """Delete the rows after `step` of the newest run of that name: the run that a resume continues."""
    from trackio.sqlite_storage import SQLiteStorage

    latest = SQLiteStorage.get_latest_run_record_by_name(project, run_name)
    if latest is None:
        return
    with SQLiteStorage._get_process_lock(project), contextlib.closing(open_database(project)) as database, database:
        database.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (latest["id"], step))


def require_writable(project: str) -> None:
    """Raise now what trackio would retry for minutes: a folder or a database that cannot be written.

    In trackio's jsonl mode (a network volume) there is no database to open: only the folder is made.
    """
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    utils.TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
    if utils.get_storage_mode() == "jsonl":
        return
    with contextlib.closing(open_database(project)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.rollback()
    SQLiteStorage.init_db(project)


def require_readable(project: str) -> None:
    """Raise sqlite3.Error now for a project whose database is held by another process, or damaged; none is fine."""
    from trackio.sqlite_storage import SQLiteStorage

    if SQLiteStorage.get_project_db_path(project).is_file():
        with contextlib.closing(open_database(project)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()


def open_database(project: str) -> sqlite3.Connection:
    """The project's SQLite file, waiting at most LOCK_SECONDS for its lock."""
    from trackio.sqlite_storage import SQLiteStorage

    return sqlite3.connect(SQLiteStorage.get_project_db_path(project), timeout=LOCK_SECONDS)


def without_reserved_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration under names trackio accepts: it keeps a leading underscore at the top level to itself."""
    return {str(name).lstrip("_"): value for name, value in config.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep trackio's banners off the console and raise its warnings as RuntimeError."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always", UserWarning)
        yield
    told = [str(warning.message) for warning in caught if "trackio" in str(warning.message)]
    if told:
        raise RuntimeError(told[0])

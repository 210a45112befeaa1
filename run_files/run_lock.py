"""A run's folder belongs to one process at a time."""

import fcntl
import os
import platform
from os.path import samestat
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import own_file


class RunLock:
    """A lock on <folder>/.lock, which ends with its process.

    doing: what its holder does, {} being the folder's name. chosen_by: the word that names the folder.
    """

    def __init__(self, folder: Path, doing: str = "run {} is being trained", chosen_by: str = "run_name") -> None:
        self.folder, self.path, self.doing, self.chosen_by = folder, folder / ".lock", doing, chosen_by
        self.file: TextIO | None = None

    def acquire(self) -> None:
        """Make the folder and hold it until `release`. UserError when the system refuses it, or another process holds it."""
        check_entries(self.folder)
        try:
            while not self.is_own():  # the folder may be moved aside between opening the file and locking it
                self.release()
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.file = file
            assert self.file is not None
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {platform.node()}")
            self.file.flush()
        except BlockingIOError as error:
            who = self.path.read_text(errors="replace")[:100] or "another process"
            raise UserError(
                f"{self.doing.format(self.folder.name)} by another process right now ({who}); wait for it, or choose "
                f"another {self.chosen_by}"
            ) from error
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}; choose another output_dir") from error

    def is_held(self) -> bool:
        """Return whether a process trains the run right now, on this machine or another that locks the same files."""
        return is_locked(self.path)

    def is_own(self) -> bool:
        """Return whether this object holds the file that is at the path now."""
        if self.file is None or not self.path.exists():
            return False
        return samestat(self.path.stat(), os.fstat(self.file.fileno()))

    def check(self) -> None:
        """Raise UserError when the folder held was deleted or moved: nothing is made in its place."""
        if self.file is not None and not self.is_own():
            raise UserError(
                f"{self.folder} was deleted or moved while the run wrote there, so the run ends; its saves are untouched: "
                "put the folder back and go on with resume=true, or give one of them to a new run as init_from"
            )

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file, where there is one."""
    if not path.is_file():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_entries(folder: Path) -> None:
    """Raise UserError where writing in the folder would write elsewhere: at a link that leads out, a pipe or a device."""
    for path in (folder, *folder.rglob("*")):
        wrong = own_file(path, folder)
        if wrong:
            raise UserError(f"{path} {wrong}; remove it, or choose another run_name")

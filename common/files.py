"""Writing files so that a kill, a crash or a full disk leaves the old content or the new, never a part and nothing else;
and reading those that anyone may have put into a folder.

No torch here: the launcher's checks and the scripts use it too.
"""

import errno
import fcntl
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import realpath, samestat
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

# What a disk may say to a write through no fault of the program: full, over quota, read-only, not ours, too large, broken.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
)  # fmt: skip
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # a file system without hard links
NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)
TEMPORARY = ".tmp"


def require(path: Path, remedy: str, kind: str = "file") -> None:
    """Raise UserError, with what to do about it, where a file or a folder is not there."""
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        wrong = f"{path.absolute()} is not a {kind}" if path.exists() else f"there is no {kind} {path.absolute()}"
        raise UserError(f"{wrong}; {remedy}")


@contextmanager
def replacing(path: Path, owner: str = "") -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; at the end of the block it is on the disk and in the path's place.

    A symbolic link is followed to its end; a file that stands there keeps its mode and, as far as the system allows, its
    owner. owner: distinguishes the temporary files of those who write one path. A block that fails leaves `path` as it was
    and nothing beside it; what a killed writer of it left goes. OSError, naming `path`, when the disk refuses; UserError
    when `path` is no regular file.
    """
    path = end_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{owner}{path.name}.{os.getpid()}{TEMPORARY}")
    discard(temporary)
    try:
        remove_abandoned(path.parent, f"{re.escape(owner)}{re.escape(path.name)}")
        with held(temporary) as file:
            keep_access(path, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # before its lock goes, by which others see that it is not abandoned
        sync_folder(path.parent)
    except BaseException as error:
        discard(temporary)
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)
        raise


def held(path: Path) -> BinaryIO:
    """Return a new file, open for writing, locked until it is closed: by its lock others see that its writer lives."""
    while True:
        file = path.open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and samestat(path.stat(), os.fstat(file.fileno())):  # else others removed it before it was locked
            return file
        file.close()


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove the temporary files of `names`, an expression, that no process holds."""
    for path in temporaries(folder, names):
        with suppress(OSError), open(path, "rb", opener=no_waiting) as file:  # a pipe or a link stays
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def no_waiting(path: str, flags: int) -> int:
    """Open a file without waiting for a writer of a pipe, and through no link."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def end_of(path: Path) -> Path:
    """Return where a path leads, every symbolic link followed. UserError for a folder, device, pipe, socket or circle."""
    end = Path(realpath(path))
    if end.is_symlink() or (end.exists() and not end.is_file()):
        raise UserError(f"{path} is not a regular file, so nothing is written there; give the path of a file")
    return end


def keep_access(path: Path, descriptor: int) -> None:
    """Give an open file the mode and owner of the one at `path`, if there is one; the owner where the system allows it."""
    if path.exists():
        before, now = path.stat(), os.fstat(descriptor)
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            with suppress(PermissionError):
                os.fchown(descriptor, before.st_uid, before.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`, the end of its links, against others who write it here, and remove what those who were killed left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_temporaries(path.parent, re.escape(path.name))
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace the file in one step: a reader, or a crash, sees the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def share(source: Path, target: Path, owner: str = "") -> None:
    """Make `target` a further name of the file `source` in one step; a copy where the file system has no hard links.

    A link costs no space and no time, so it cannot fail for want of either; our files are replaced, never changed in place.
    """
    source, target = end_of(source), end_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{owner}{target.name}.{os.getpid()}{TEMPORARY}")
    discard(temporary)
    try:
        temporary.hardlink_to(source)
        temporary.replace(target)  # does nothing, by POSIX, where both are one file already
        sync_folder(target.parent)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with source.open("rb") as content, replacing(target, owner) as file:
            shutil.copyfileobj(content, file, 2**20)
    finally:
        discard(temporary)


def discard(temporary: Path) -> None:
    """Remove a temporary file if there is one, and if the disk lets us: what failed before is what the user must hear."""
    with suppress(OSError):
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a rename is lost by a power cut until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path, names: str = ".*") -> None:
    """Remove what killed processes left half-written beside the files whose names match; the caller holds their lock."""
    for path in temporaries(folder, names):
        path.unlink(missing_ok=True)


def temporaries(folder: Path, names: str) -> list[Path]:
    """Return the temporary files beside the files of a folder whose names match an expression."""
    pattern = re.compile(rf"\.(?:{names})\.\d+{re.escape(TEMPORARY)}")
    return [path for path in folder.glob(f".*{TEMPORARY}") if pattern.fullmatch(path.name)]


class LastingStream(io.FileIO):
    """A standard stream whose first refused write costs a line on the other one; what follows goes nowhere.

    note: that line; without one a reader that has left (as `| head` does) is passed over in silence, and anything else
    raises OSError, once.
    """

    def __init__(self, number: int, note: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.note = note

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            here, other = ("standard output", 2) if self.fileno() == 1 else ("standard error", 1)
            if not self.note and error.errno != errno.EPIPE:
                error.filename = here
                raise
            line = f"note: {here} takes no more ({(error.strerror or str(error)).lower()}); {self.note}\n"
            with suppress(OSError):
                os.write(other, line.encode() if self.note else b"")
            return len(content)


def outlive_readers(note: str = "") -> None:
    """Have this process outlive whoever reads what it prints: see LastingStream. Streams that are closed lead nowhere."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which no file of a run may have
    for name, number, own in (("stdout", 1, sys.__stdout__), ("stderr", 2, sys.__stderr__)):
        before = getattr(sys, name)
        if before is own:  # else it is no stream of the system's, but a test's or a notebook's
            encoding, errors = (before.encoding, before.errors) if before else ("utf-8", "replace")
            lines = number == 2 or before is None or before.line_buffering or before.write_through
            raw = io.BufferedWriter(LastingStream(number, note))
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=lines))


def disk_sentence(error: OSError) -> str:
    """Return what the disk refused, in words."""
    return f"cannot write {error.filename or 'to the disk'}: {(error.strerror or str(error)).lower()}"


def in_working_folder(path: Path) -> bool:
    """Return whether a path, its links followed, lies below the working folder."""
    return Path(realpath(path)).is_relative_to(Path.cwd().resolve())


def own_file(path: Path, folder: Path) -> str | None:
    """Return what forbids the use of an entry of `folder`, in words; None for a folder, a file, or nothing at all.

    Followed to their ends are links that stay in the folder; the folder must not be a link that leaves its parent itself.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return "is a link that leads nowhere" if path.is_symlink() else None
    if not real.is_relative_to(folder.parent.resolve() / folder.name):
        return "is a link that leads out of its folder"
    if not (real.is_file() or real.is_dir()):
        return "is neither a file nor a folder"
    return None if os.access(real, os.R_OK) else "may not be read by this user"


def read_own(path: Path, folder: Path, most: int) -> bytes | None:
    """Return the content of a file of `folder`, None where there is none. UserError for what `check_own` refuses."""
    check_own(path, folder, most)
    return path.read_bytes() if path.exists() else None


def check_own(path: Path, folder: Path, most: int) -> None:
    """Raise UserError, before it is opened, for a link out of `folder`, a pipe, a device, and more than `most` bytes."""
    wrong = own_file(path, folder)
    if wrong is None and path.is_dir():
        wrong = "is a folder"
    if wrong is None and path.exists() and path.stat().st_size > most:
        wrong = f"is larger than the {most:,} bytes that are read of such a file"
    if wrong:
        raise UserError(f"{path} {wrong}; remove it, or put the file itself there")

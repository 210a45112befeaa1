"""Writing files so that a kill, a crash or a full disk leaves the old content or the new, never a part and nothing else.

No torch here: the launcher's checks and the scripts use it too.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# What a disk may say to a write through no fault of the program: full, over quota, read-only, not ours, too large, broken.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
)  # fmt: skip
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # a file system without hard links
NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)
TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path, owner: str = "") -> Iterator[BinaryIO]:
    """A temporary file beside `path`, open for writing; at the end of the block it is on the disk and in the path's place.

    owner: distinguishes the temporary files of those who write one path. A block that fails leaves `path` as it was and
    nothing beside it. OSError, naming `path`, when the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{owner}{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        discard(temporary)
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace the file in one step: a reader, or a crash, sees the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def share(source: Path, target: Path, owner: str = "") -> None:
    """Make `target` a further name of the file `source` in one step; a copy where the file system has no hard links.

    A link costs no space and no time, so it cannot fail for want of either; our files are replaced, never changed in place.
    """
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
    pattern = re.compile(rf"\.(?:{names})\.\d+{re.escape(TEMPORARY)}")
    for path in folder.glob(f".*{TEMPORARY}"):
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def disk_sentence(error: OSError) -> str:
    """What the disk refused, in words."""
    return f"cannot write {error.filename or 'to the disk'}: {(error.strerror or str(error)).lower()}"

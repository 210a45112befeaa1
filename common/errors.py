"""The user-facing error, printed without a traceback; of any other exception, a bug, the lines that are of no library."""

import errno
import re
import sysconfig
import tokenize
import traceback
import zipfile
import zlib
from importlib.util import find_spec

# Control characters but the line break and the tab, and marks that reverse the direction of what follows.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return the text with every character that would steer a terminal written as its escape, such as \\x1b."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do instead.

    Raised anywhere, caught once at the process boundary (launcher.py and the fronts in scripts/), which prints the
    message without a traceback and exits with status 1. What it quotes of a file or a command steers no terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of it: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


def require_package(name: str, needs: str, extra: str, otherwise: str = "") -> None:
    """Raise UserError where a package is not installed. extra: of pyproject.toml, that brings it."""
    if find_spec(name) is None:
        remedy = f"install it by `uv sync --extra {extra}` or `pip install -e '.[{extra}]'`"
        raise UserError(f"{needs} needs {name}, which is not installed; {remedy}{otherwise}")


def first_line(error: BaseException) -> str:
    """Return what an error says, its first line; its class where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


# What NumPy and zipfile raise at a file that is cut, garbled or made by hand.
BROKEN_ARRAYS = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def numpy_fault(error: BaseException) -> str:
    """Return what NumPy says of a file, but for its advice to read objects from it."""
    said = first_line(error)
    return "it holds no plain arrays" if "allow_pickle" in said else said[:120]


# What the system says of a path that was given, whatever is done with it.
OF_PATHS = {
    errno.ENAMETOOLONG: "is too long for this file system; give a shorter one",
    errno.EACCES: "may not be reached by this user; change the mode of its folder, or give another path",
    errno.EPERM: "may not be reached by this user; change the mode of its folder, or give another path",
    errno.ELOOP: "is a link in a circle; give another path",
}
PATH_SHOWN = 80  # characters of such a path that are quoted


def path_in_words(error: BaseException | None) -> str | None:
    """Return in a sentence which path the system refused, where an error is that or was caused by it; None for another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OF_PATHS and error.filename:
            path = printable(str(error.filename))
            return f"{path[:PATH_SHOWN]}{'...' * (len(path) > PATH_SHOWN)} {OF_PATHS[error.errno]}"
        error = error.__cause__
    return None


LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
FRAMES = 6  # of a bug that are shown


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the lines that an error came through, the innermost last, without those of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))]


def bug_in_words(error: BaseException) -> str:
    """Return a short traceback that ends with the file and the line an error came from."""
    frames = own_frames(error)[-FRAMES:]
    lines = ["Traceback, without the lines of libraries (python -X dev launcher.py ... shows all):\n"]
    lines += [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    place = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return printable("".join(lines) + f"{type(error).__name__}{place}")

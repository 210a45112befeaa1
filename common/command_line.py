"""What the scripts share: their files, and the process boundary."""

import argparse
import errno
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, path_in_words, printable
from common.files import DISK_ERRORS, disk_sentence, outlive_readers

ROOT = Path(__file__).resolve().parents[1]
MATCH_SECONDS = 3  # that comparing names with a typed regular expression may take


class Parser(argparse.ArgumentParser):
    """A parser of words and flags whose mistakes are UserErrors; its --help shows the text of the script as it is."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | given)

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise UserError(f"{message}; {usage}; --help says what each is")


def count(text: str) -> int:
    """Return the whole number of at least 1 that a word is, as the type of a parser's argument."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, not {text!r}")
    return int(text)


def outputs() -> Path:
    """Return where runs, checkpoints and pictures are looked for: outputs/ of the working folder, else the repository's."""
    return Path("outputs") if Path("outputs").is_dir() else ROOT / "outputs"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a regular expression matches as a whole. UserError for one that is none, or takes seconds."""
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{pattern!r} is not a regular expression ({error}): write old_.* for old_1, old_2, ...") from None

    def give_up(*_: object) -> None:
        raise UserError(f"{pattern!r} takes too long to compare with the names; write it without repeats inside repeats")

    before = signal.signal(signal.SIGALRM, give_up)  # which a search for a match lets in
    signal.alarm(MATCH_SECONDS)
    try:
        return [name for name in names if expression.fullmatch(name)]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_ends(key: str, path: Path, *suffixes: str, others: str = "") -> None:
    """Raise UserError for a path of another ending; others: what else it may be, in words."""
    if path.suffix not in suffixes:
        raise UserError(f"{key}={path} must end in {' or '.join(suffixes)}{others}")


def check_place(key: str, path: Path) -> None:
    """Raise UserError for a file in a folder that is not there."""
    folder = path.absolute().parent
    if not folder.is_dir():
        wrong = "below a file" if folder.is_file() else "in a folder that does not exist"
        raise UserError(f"{key}={path} lies {wrong}; choose a folder that is there, or make one")


def place_sentence(error: OSError) -> str:
    """Return what is wrong with a place that cannot be written. Raises the error where it is another."""
    if said := path_in_words(error):
        return said
    if error.errno not in (*DISK_ERRORS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST):
        raise error
    room = "make room there, or " if error.errno in DISK_ERRORS else ""
    return f"{printable(disk_sentence(error))}; {room}choose another place (most often by out=)"


def front(words: list[str], doc: str | None, carry_out: Callable[[list[str]], object]) -> int:
    """Carry out a command line; the exit status. A text or path that it returns is printed, a whole number is the status.

    A mistake of the user is one sentence. So is a path that cannot be written, such as one below a file, or a full disk.
    doc: printed on --help; None where the command has a parser of its own.
    """
    if doc and {"--help", "-h"} & set(words):
        print(doc)
        return 0
    outlive_readers()
    try:
        outcome = carry_out(words)
        if isinstance(outcome, str | Path):
            print(printable(str(outcome)))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sentence, status = "stopped", 130
    except UserError as error:
        sentence, status = str(error), 1
    except OSError as error:
        sentence, status = place_sentence(error), 1
    except Exception as error:
        if (said := path_in_words(error)) is None:
            raise
        sentence, status = said, 1
    else:
        return outcome if isinstance(outcome, int) else 0
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    return status

"""The user-facing error, printed without a traceback; any other exception that escapes is a bug and keeps its traceback."""

import re

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

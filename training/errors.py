"""The one exception that is the user's to mend; everything else that escapes is a bug of ours and keeps its traceback."""


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence: what is wrong, where, and what to do instead.

    Raised anywhere, caught once at the process boundary (launcher.py and the fronts in scripts/), which prints the
    message without a traceback and exits with status 1.
    """

"""Delete runs from the local trackio dashboard, by name. The runs' own folders under outputs/ stay.

python scripts/trackio_delete.py --list
python scripts/trackio_delete.py "old_.*" --dry-run      # says what would go
python scripts/trackio_delete.py "test_.*"               # asks, then deletes; --yes does not ask

The pattern is a regular expression that must match a run's whole name.
"""

import argparse
import sqlite3
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import Parser, front
from common.command_line import matching as names_that_match
from common.errors import UserError, first_line, printable
from run_files.trackio_tracker import delete_run, finish_deletions, run_names


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("pattern", nargs="?", help="regular expression for the whole name of a run")
    parser.add_argument("--list", action="store_true", help="list the runs (those that match, with a pattern)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--project", default="denoising-zoo", help="trackio project (default: denoising-zoo)")
    return parser.parse_args(arguments)


def carry_out(words: list[str]) -> str:
    """Carry out the command. UserError also where another process holds the database, or it is damaged."""
    options = parse(words)
    try:
        return run(options)
    except (RuntimeError, OSError, sqlite3.Error) as error:
        raise UserError(
            f"trackio refuses the project {options.project}: {first_line(error)}; --list shows what is left, try again "
            "when no other program uses it"
        ) from error


def run(options: argparse.Namespace) -> str:
    """List or delete, and return what to print of it."""
    if options.pattern is None and not options.list:
        raise UserError('say which runs: python scripts/trackio_delete.py "old_.*" --dry-run, or --list for their names.')
    finished = [] if options.list or options.dry_run else finish_deletions(options.project)
    if finished:
        said = f"finished an earlier deletion, which was interrupted: {printable(', '.join(finished))}"
        if not names_that_match(options.pattern, run_names(options.project)):
            return said
        print(said)
    names = matching(options.project, options.pattern)
    listed = "\n".join(f"  {printable(name)}" for name in names)
    if options.list:
        return "\n".join(names)
    if options.dry_run:
        return f"would delete:\n{listed}"
    if not options.yes and not confirmed(f"about to delete {len(names)} run(s):\n{listed}"):
        raise UserError("nothing was deleted.")
    for name in names:
        delete_run(options.project, name)
    return f"deleted {len(names)} of the project {options.project}:\n{listed}"


def matching(project: str, pattern: str | None) -> list[str]:
    """Return the names of the project's runs that the pattern matches as a whole, all of them without one.

    Raises:
        UserError: the pattern is no regular expression, or nothing matches it.
    """
    names = run_names(project)
    if not names:
        raise UserError(f"the trackio project {project} has no runs here: --project names another.")
    found = names if pattern is None else names_that_match(pattern, names)
    if not found:
        raise UserError(f"no run of the project {project} has a name that is {pattern} as a whole: --list shows them.")
    return found


def confirmed(what: str) -> bool:
    """Ask on the terminal; anything but yes is no."""
    print(f"{what}\ndelete them? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def main(words: list[str]) -> int:
    return front(words, None, carry_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

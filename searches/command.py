"""launcher.py --search optuna ...: a search from its words to its table, pictures and best command."""

import signal

from common.errors import UserError, require_package
from common.files import DISK_ERRORS, disk_sentence
from common.signals import handled_by

KINDS = ("optuna", "golden")


def command(kind: str, words: list[str], dry_run: bool) -> int:
    """Carry out a search; returns the exit status. UserError for a mistake, SystemExit 128 + its number after a signal."""
    if kind not in KINDS:
        raise UserError(f"--search takes {' or '.join(KINDS)}, not {kind or 'nothing'}, as in --search optuna n=40 ...")
    return by_optuna(words, dry_run) if kind == "optuna" else by_golden_section(words, dry_run)


def by_golden_section(words: list[str], dry_run: bool) -> int:
    from searches import golden

    if dry_run:
        raise UserError("--dry-run goes with --search optuna; a search over sampling settings starts and stores no run")
    print(golden.command(words))
    return 0


def by_optuna(words: list[str], dry_run: bool) -> int:
    for package in ("optuna", "cmaes"):
        require_package(package, "a search", "search")
    from searches.plan import plan_of

    plan = plan_of(words)
    from searches.report import described, outcome
    from searches.search import search_of

    if dry_run:
        print(described(plan))
        return 0
    if lacking := plan.backend.lacking():
        raise UserError(lacking)
    try:
        with search_of(plan) as search, handled_by(stop):
            print(described(plan), flush=True)
            search.carry_out()
            print(outcome(plan, search.study.optuna))
    except Stopped as stopped:
        raise SystemExit(128 + stopped.number) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{disk_sentence(error)}; make room, and give the same command again, which goes on") from error
    return 0


class Stopped(BaseException):
    """A signal asked the search to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def stop(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends this process at once; the runs save by themselves
    raise Stopped(number)

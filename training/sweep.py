"""A sweep is checked whole before its first job, and its jobs fail one by one without ending it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import CompactHydraException

from training.config import parse_overrides
from training.errors import UserError
from training.launch import prepare, sweep_job


class JobFailedError(CompactHydraException):
    """One job of a sweep failed; Hydra goes on with the others and exits with status 1 at the end."""

    @staticmethod
    @contextmanager
    def from_user_errors() -> Iterator[None]:
        """Say at once what is wrong with the job."""
        try:
            yield
        except UserError as error:
            print(f"launcher.py: {error}", file=sys.stderr)
            raise JobFailedError("a job of the sweep failed, see above; the same command runs it again") from error


def check_sweep(words: list[str], swept: set[str]) -> None:
    """UserError for the first job that could not start. A sweeper that chooses its own values is left to itself."""
    if any(word.startswith("hydra/sweeper") for word in words):
        return
    (jobs,) = BasicSweeper.split_arguments(parse_overrides(words), max_batch_size=None)
    for job in jobs:
        overrides = sweep_job(list(job), swept)
        if overrides is not None:
            prepare(overrides)

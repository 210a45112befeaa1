"""A sweep is checked whole before its first job, and its jobs fail one by one without ending it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import CompactHydraException

from training.config import parse_overrides
from training.errors import UserError
from training.launch import describe, prepare, submit, sweep_job


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


class Sweep:
    """The jobs of -m, composed whole before the first begins: a file edited meanwhile changes none of them.

    swept: the keys that vary; they name the jobs. A sweeper that chooses values as it goes (hydra/sweeper=...) has its jobs
    composed when they come. UserError for the first job that could not start.
    """

    def __init__(self, words: list[str]) -> None:
        overrides = parse_overrides(words)
        self.swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        self.prepared: dict[tuple[str, ...], dict[str, Any] | None] = {}
        if not any(word.startswith("hydra/sweeper") for word in words):
            (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
            self.prepared = {tuple(job): self.prepare(job) for job in jobs}

    def prepare(self, job: Sequence[str]) -> dict[str, Any] | None:
        """The checked configuration of a job, or None when it has finished."""
        overrides = sweep_job(list(job), self.swept)
        return None if overrides is None else prepare(overrides)

    def describe(self) -> str:
        """What the sweep would do, job by job. UserError for a sweeper that chooses its jobs as it goes."""
        if not self.prepared:
            raise UserError("--dry-run lists a sweep's jobs, and this hydra/sweeper chooses them as it goes; leave it out")
        return "\n".join(
            f"{' '.join(job)}: has finished, would be skipped" if config is None else describe(config)
            for job, config in self.prepared.items()
        )

    def run(self, job: Sequence[str]) -> float | None:
        """Carry out a job unless it has finished; its failure is said at once and reported to Hydra."""
        key = tuple(job)
        config = self.prepared[key] if key in self.prepared else self.prepare(job)
        if config is None:
            print(f"{' '.join(job)}: has finished, skipped")
            return None
        with JobFailedError.from_user_errors():
            return submit(config)

"""A sweep is checked whole before its first job, and its jobs fail one by one without ending it."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Glob
from hydra.errors import CompactHydraException

from backends.base_backend import Backend
from backends.submission import begun_job, describe, prepare, submit, sweep_job
from common.errors import UserError
from configuration.build import build
from configuration.compose import parse_overrides
from run_files.result import OF_ANOTHER, RunResult, result_of

if TYPE_CHECKING:
    from evaluation.run_table import RunOfTable


class JobFailedError(CompactHydraException):
    """One job of a sweep failed; Hydra goes on with the others and exits with status 1 at the end."""


class Sweep:
    """The jobs of -m, composed whole before the first begins: a file edited meanwhile changes none of them.

    swept: the keys that vary; they name the jobs. A sweeper that chooses values as it goes (hydra/sweeper=...) has its jobs
    composed when they come. brings: as in `begun_job`. UserError for the first job that could not start.
    """

    def __init__(self, words: list[str], brings: bool = True) -> None:
        overrides, self.brings = parse_overrides(words), brings
        named = [str(o.value()) for o in overrides if o.key_or_group == "run_name" and not o.is_sweep_override()]
        self.name = named[-1] if named else "sweep"
        self.results: dict[tuple[str, ...], RunResult] = {}
        self.swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        self.prepared: dict[tuple[str, ...], dict[str, Any] | RunResult] = {}
        if not any(word.startswith("hydra/sweeper") for word in words):
            for override in overrides:
                if override.is_interval_sweep() or isinstance(override.value(), Glob):
                    search = f", and `--search optuna {override.input_line}` searches" * override.is_interval_sweep()
                    raise UserError(
                        f"{override.input_line} lists no values; a sweep tries those it is given, as in -m "
                        f"{override.key_or_group}=FIRST,SECOND{search}"
                    )
            (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
            self.prepared = {tuple(job): self.prepare(job) for job in jobs}
            made = [self.prepared[tuple(job)] for job in jobs]
            names = [job.name if isinstance(job, RunResult) else str(job["run_name"]) for job in made]
            lower = [name.lower() for name in names]
            twice = next((name for name in names if lower.count(name.lower()) > 1), None)
            if twice is not None:
                raise UserError(f"two jobs of the sweep would be called {twice}, capitals aside; give each value once")

    def prepare(self, job: Sequence[str]) -> dict[str, Any] | RunResult:
        """Return the checked configuration of a job, or its result when it has finished."""
        made = sweep_job(list(job), self.swept, self.brings)
        return made if isinstance(made, RunResult) else prepare(made)

    def describe(self) -> str:
        """Return what the sweep would do, job by job. UserError for a sweeper that chooses its jobs as it goes."""
        if not self.prepared:
            raise UserError("--dry-run lists a sweep's jobs, and this hydra/sweeper chooses them as it goes; leave it out")
        done = ((job, made) for job, made in self.prepared.items() if isinstance(made, RunResult))
        skipped = [f"{' '.join(job)}: {in_words(made)}, would be skipped" for job, made in done]
        return "\n".join([*skipped, *([describe(self.left(), self.name)] if self.left() else [])])

    def left(self) -> list[dict[str, Any]]:
        """Return the jobs that are this sweep's to do. UserError where a backend that takes them at once cannot."""
        configs = [made for made in self.prepared.values() if isinstance(made, dict)]
        varied = next((key for key in sorted(self.swept) if key.split(".")[0] in ("backend", "output_dir")), None)
        if varied is not None and configs and build(configs[0]["backend"]).queues:
            raise UserError(f"the runs of an array share their place, and {varied} varies; submit a sweep for each value")
        return configs

    def submit_all(self) -> bool:
        """Hand all jobs at once to a backend that takes them so; returns whether it has."""
        configs = self.left()
        backend: Backend | None = build(configs[0]["backend"]) if configs else None
        if backend is None or not backend.queues:
            return False
        for job, made in self.prepared.items():
            if isinstance(made, RunResult):
                self.skip(job, made)
        self.results.clear()  # no closing table
        backend.submit_all(configs, self.name)
        return True

    def as_it_stands(self, job: Sequence[str]) -> dict[str, Any] | RunResult:
        """Return a job as it was prepared, or prepared again where another process has begun or finished it since."""
        made = self.prepared.get(tuple(job))
        if isinstance(made, RunResult) and made.state == "finished":
            return made
        if not isinstance(made, dict):
            return self.prepare(job)
        now = begun_job(made["overrides"], made)
        if isinstance(now, RunResult):
            return now
        return made if now == made["overrides"] else prepare(now)

    def run(self, job: Sequence[str]) -> RunResult:
        """Carry out a job that is this sweep's to do; its failure is said at once and reported to Hydra."""
        key, config = tuple(job), self.as_it_stands(job)
        if isinstance(config, RunResult):
            return self.skip(key, config)
        try:
            self.results[key] = submit(config)
        except BaseException as error:
            self.results[key] = result = result_of(config)
            trains = isinstance(error, UserError) and not config["eval_checkpoint"]
            if trains and result.state in ("finished", OF_ANOTHER):  # another process was quicker
                return self.skip(key, result)
            result.state = result.state if result.state == "interrupted" else "failed"
            if not isinstance(error, UserError):
                raise
            print(f"launcher.py: {error}", file=sys.stderr)
            raise JobFailedError("a job of the sweep failed, see above; the same command runs it again") from error
        return self.results[key]

    def skip(self, job: tuple[str, ...], result: RunResult) -> RunResult:
        print(f"{result.name}: {in_words(result)}, skipped")
        self.results[job] = result
        return result

    def closing_table(self) -> str:
        """Return a row for each configuration begun or skipped, its seeds together; see evaluation/run_table.py."""
        from evaluation.run_table import closing_table

        runs = [self.of_table(job, result) for job, result in self.results.items()]
        return closing_table(runs, f"sweep: {len(runs)} jobs", f"{self.name}_best")

    def of_table(self, job: tuple[str, ...], result: RunResult) -> "RunOfTable":
        from evaluation.run_table import RunOfTable

        values = dict(word.partition("=")[::2] for word in job)
        seed = values.get("seed", "")
        return RunOfTable(
            result, {key: values.get(key, "-") for key in sorted(self.swept - {"seed"})},
            int(seed) if seed.isdecimal() else 0, job,
        )  # fmt: skip


def in_words(result: RunResult) -> str:
    """Return why a job is skipped."""
    return "has finished" if result.state == "finished" else f"is {result.state}"

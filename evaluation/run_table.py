"""Runs as a table, the best first: the seeds of one configuration are one row, with a verdict against the best one."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from evaluation.seed_comparison import LEVEL, compared, half_width_of_mean, least_p
from run_files.result import RunResult, table

SHOWN = 3  # scores beside the monitored one
HEADLINES = (
    "eval/energy_distance_1nfe", "eval/energy_distance", "eval/fid", "eval/accuracy", "oracle/velocity_error",
    "eval/nearest_distance_ratio", "eval/loss",
)  # fmt: skip
NOT_AGAIN = re.compile(r"(run_name|resume|overwrite|seed)=")


@dataclass(frozen=True)
class RunOfTable:
    """A run with what sets it apart from the others of the table, its seed aside.

    settings: what is shown of that; words: its command; group: the same for runs of one configuration, where the settings
    that are shown do not say it.
    """

    result: RunResult
    settings: dict[str, str]
    seed: int
    words: Sequence[str]
    group: str = ""

    @property
    def value(self) -> float:
        """Return its best monitored value, NaN before it has finished."""
        return float(self.result) if self.result.state == "finished" and math.isfinite(self.result) else math.nan


@dataclass(frozen=True)
class Configuration:
    """The runs of one configuration, by seed."""

    runs: list[RunOfTable]

    @property
    def finished(self) -> list[RunOfTable]:
        return [run for run in self.runs if not math.isnan(run.value)]

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.finished]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def name(self) -> str:
        """Return the name its runs share, their seed left open."""
        names = {re.sub(r"seed=\d+", "seed=*", run.result.name) for run in self.runs} if len(self.runs) > 1 else set[str]()
        return names.pop() if len(names) == 1 else ", ".join(run.result.name for run in self.runs)

    @property
    def state(self) -> str:
        states = [run.result.state for run in self.runs]
        each = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return states[0] if len(each) == 1 else ", ".join(each)

    def setting(self, key: str) -> str:
        return self.runs[0].settings.get(key, "-")

    def score(self, name: str) -> str:
        """Return the mean of a score over the runs that have finished."""
        values = [run.result.scores.get(name) for run in self.finished or self.runs]
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.4g}" if known else "-"

    def monitored(self) -> str:
        """Return the mean of the monitored value, of several seeds with its 95 % interval."""
        if not self.values:
            return "-"
        return f"{self.mean:.4g}" + (f" ± {interval(self.values):.2g}" if len(self.values) > 1 else "")


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean over seeds (Student's t)."""
    return float(half_width_of_mean(np.array(values)[:, None])[0])


def configurations(runs: Sequence[RunOfTable]) -> list[Configuration]:
    """Return the runs by configuration, that with the best mean first, those without a finished run last."""
    groups: dict[object, list[RunOfTable]] = {}
    for run in runs:
        groups.setdefault(run.group or tuple(run.settings.items()), []).append(run)
    made = [Configuration(sorted(group, key=lambda run: run.seed)) for group in groups.values()]
    sign = -1 if runs[0].result.higher else 1
    return sorted(made, key=lambda one: (math.isnan(one.mean), 0 if math.isnan(one.mean) else sign * one.mean))


def closing_table(runs: Sequence[RunOfTable], what: str, name: str) -> str:
    """Return a row for each configuration, the best marked, the verdicts of those with seeds, and the best command.

    what: begins the first line; name: the run_name in that command.
    """
    made = configurations(runs)
    keys, monitor = list(dict.fromkeys(key for run in runs for key in run.settings)), runs[0].result.monitor
    shown = [score for score in HEADLINES if any(score in run.result.scores for run in runs)][:SHOWN]
    columns: dict[str, Callable[[Configuration], str]] = {
        "": lambda one: "*" * (one is made[0] and bool(one.values)),
        "run": lambda one: one.name,
        **{key: partial(Configuration.setting, key=key) for key in keys},
        "seeds": lambda one: ", ".join(str(run.seed) for run in one.runs),
        "state": lambda one: one.state,
        f"best {monitor}": lambda one: one.monitored(),
        **{score: partial(Configuration.score, name=score) for score in shown},
    }  # fmt: skip
    several, verdicts = len(made) < len(runs), dict[str, str]()
    if not several:
        del columns["seeds"]
    elif not (monitor == "eval/loss" and any(re.split("[./]", key)[0] == "loss" for key in keys)):
        verdicts = against_best(made)
        columns |= {"against the best": lambda one: verdicts.get(one.name, "")} if verdicts else {}
    rows = [list(columns), *([cell(one) for cell in columns.values()] for one in made)]
    which = "highest" if runs[0].result.higher else "lowest"
    first = f"{what}, * the {which} {monitor} {'in the mean ' * several}of those that finished"
    return "\n".join([first, table(rows), *([limits(made)] if verdicts else []), *command(made, name)])


def against_best(made: Sequence[Configuration]) -> dict[str, str]:
    """Return a verdict on each configuration but the best, by name; empty where the best or all others have one seed."""
    best, seeded = made[0], [one for one in made if len(one.values) > 1]
    if len(seeded) < 2 or seeded[0] is not best:
        return {}
    said = {}
    for one in seeded[1:]:
        paired = [run.seed for run in one.finished] == [run.seed for run in best.finished]
        paired &= not any(re.split("[./]", key)[0] == "source" for key in one.runs[0].settings)
        (found,) = compared(np.array(one.values)[:, None], np.array(best.values)[:, None], paired)
        differs = found.p <= level(len(seeded))
        said[one.name] = f"{f'worse by {abs(found.difference):.2g}' if differs else 'inconclusive'} (p = {found.p:.2g})"
    return said


def level(count: int) -> float:
    """Return the p up to which two configurations differ, so that all pairs of so many hold together (Bonferroni)."""
    return LEVEL / math.comb(count, 2)


def limits(made: Sequence[Configuration]) -> str:
    """Return how it was tested, and what so many seeds can show at all."""
    seeded = [len(one.values) for one in made if len(one.values) > 1]
    needed = level(len(seeded))
    least = min(least_p(seeded[0], count, paired=seeded[0] == count) for count in seeded[1:])
    few = f"; these seeds cannot reach it (least possible p = {least:.2g}): train more" if least > needed else ""
    return (
        f"±: 95 % interval of the mean; p: share of all splits of the seeds that differ as much, worse at p <= {needed:.2g} "
        f"({LEVEL:g} over all pairs of {len(seeded)} configurations){few}"
    )


def command(made: Sequence[Configuration], name: str) -> list[str]:
    """Return the line with the best configuration's command under another run_name; none where no run has finished."""
    if not made[0].values:
        return []
    words = [word for word in made[0].finished[0].words if not NOT_AGAIN.match(word)]
    return [f"best: python launcher.py {shlex.join([f'run_name={name}', *words])}"]

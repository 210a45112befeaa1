"""What a search is to do, from its words: `n=40 jobs=2 metric=eval/energy_distance optimizer.lr=interval(1e-4,1e-2)`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from backends.base_backend import Backend
from backends.submission import prepare, settings_of
from common.errors import UserError
from configuration.build import build
from configuration.checks import check_contradictions, check_values
from configuration.compose import compose_config, is_group, resolved, typed_keys
from configuration.nodes import lookup
from configuration.settings import known_settings
from configuration.values import Count, declared
from run_files.metrics_file import higher_is_better
from searches.space import Value, Varied, divided, varied_by

TRIALS = 20  # where n is not given
NOT_ITS_OWN = ("resume", "overwrite", "eval_checkpoint")
SCORE = re.compile(r"(eval|oracle)/[\w./-]+")


@dataclass(frozen=True)
class Settings:
    """The words of a search that are none of its runs."""

    n: Count | None = None
    jobs: Count = 1
    metric: str | None = None
    sampler: Literal["random", "tpe", "grid", "cmaes"] = "tpe"
    pruner: Literal["none", "median", "halving"] = "none"


@dataclass(frozen=True)
class Plan:
    """A search as it was typed. words: what all trials have; config: what those compose to, the first value of each key."""

    name: str
    words: tuple[str, ...]
    space: tuple[Varied, ...]
    count: int
    jobs: int
    metric: str
    sampler: str
    pruner: str
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config["output_dir"]) / "searches" / self.name

    @cached_property
    def backend(self) -> Backend:
        """Return where the trials are carried out."""
        return build(self.config["backend"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @cached_property
    def higher(self) -> bool:
        mode = self.config["monitor_mode"] if self.metric == self.config["monitor"] else "auto"
        return higher_is_better(self.metric, mode)

    def settings(self) -> dict[str, Any]:
        """Return what makes it this search and no other, as its journal holds it; it may have more trials or jobs later."""
        return {
            "name": self.name, "space": [varied.typed for varied in self.space], "metric": self.metric,
            "higher": self.higher, "sampler": self.sampler, "pruner": self.pruner, "seed": self.seed,
            "words": settings_of(list(self.words)),
        }  # fmt: skip

    def trial_name(self, number: int) -> str:
        return f"{self.name}_{number:04d}"

    def trial_words(self, number: int, values: dict[str, Value]) -> list[str]:
        """Return the command line of a trial."""
        own = [varied.word(values[varied.key]) for varied in self.space]
        return [f"run_name={self.trial_name(number)}", *self.words, *own]


def plan_of(words: list[str]) -> Plan:
    """Return the search that words ask for, each of its values tried on the configuration. UserError for a mistake."""
    own, rest = known_settings(words, Settings)
    fixed, overrides = divided(rest)
    if taken := [key for key in typed_keys(fixed) if key in NOT_ITS_OWN]:
        raise UserError(f"leave {taken[0]} out: the same command goes on with a search, and another run_name begins another")
    if not overrides:
        raise UserError("a search needs a key to vary, such as optimizer.lr=interval(1e-4,1e-2) or model.width=choice(8,16)")
    if own.metric and "monitor" not in typed_keys(fixed):
        fixed.append(f"monitor={own.metric}")
    chosen = [varied_by(o, None) for o in overrides if is_group(o)]
    config = resolved(compose_config([*fixed, *(varied.word(varied.ends[0]) for varied in chosen)]))
    space = tuple(varied_by(o, declared_at(config, o.key_or_group)) for o in overrides)
    name, fixed = str(config["run_name"]), [w for w, k in zip(fixed, typed_keys(fixed), strict=True) if k != "run_name"]
    plan = Plan(
        name, tuple(fixed), space, counted(own.n, own.sampler, space), own.jobs, own.metric or str(config["monitor"]),
        own.sampler, own.pruner, config,
    )  # fmt: skip
    check(plan)
    return plan


def declared_at(config: dict[str, Any], key: str) -> Any:
    return declared(key, lookup(config, f"{key.rpartition('.')[0]}._target_"))


def counted(typed: int | None, sampler: str, space: tuple[Varied, ...]) -> int:
    """Return the number of trials. UserError where the sampler has not so many, or cannot search this space."""
    from searches.samplers import grid_size, numbers_in

    open_ended = next((varied.typed for varied in numbers_in(space)), None)
    if sampler == "grid" and open_ended is not None:
        raise UserError(f"sampler=grid tries listed values, and {open_ended} lists none; write choice(A,B,C)")
    if sampler == "cmaes" and len(numbers_in(space)) < 2:
        raise UserError("sampler=cmaes searches two intervals or more; use sampler=tpe, or write key=interval(LOW,HIGH)")
    size = grid_size(space) if sampler == "grid" else None
    count = typed or size or TRIALS
    if size is not None and count > size:
        raise UserError(f"n={count} is more than the {size} combinations of this grid; leave n out")
    return count


def check(plan: Plan) -> None:
    """Raise UserError for a metric that no evaluation gives, a place where trials cannot run, or a value that may not be."""
    if not SCORE.fullmatch(plan.metric):
        raise UserError(f"metric={plan.metric} is not the name of a score; give one such as metric=eval/energy_distance")
    if plan.backend.elsewhere:
        raise UserError(
            f"a search reads what its trials write, and those of backend={plan.config['choices']['backend']} are on other "
            "files; leave it out, use backend=slurm, or start the search itself where the trials are to run"
        )
    for words in corners(plan):
        config = resolved(compose_config([f"run_name={plan.trial_name(plan.count)}", *words]))
        check_values(config)
        check_contradictions(config)
        plan.backend.check(words, config)
    if not (plan.folder / "journal.jsonl").exists():
        first = prepare(plan.trial_words(0, {varied.key: varied.ends[0] for varied in plan.space}))
        plan.backend.script([first], first["run_name"])


def corners(plan: Plan) -> Iterator[list[str]]:
    """Yield the words of trials that have each value of a choice, and each end of an interval, once."""
    firsts = [varied.word(varied.ends[0]) for varied in plan.space]
    for place, varied in enumerate(plan.space):
        for value in varied.ends:
            yield [*plan.words, *firsts[:place], varied.word(value), *firsts[place + 1 :]]

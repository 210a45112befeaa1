"""The runs of scripts/leaderboard.py: which ones configs/leaderboard.yaml asks for, and how each of them stands."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, first_line
from common.files import require
from configuration.build import build
from configuration.compose import compose_config, groups, resolved
from configuration.nodes import check_known, flat
from configuration.overrides import differences
from configuration.values import NEUTRAL
from evaluation.leaderboard_table import SECONDS, TAUGHT
from run_files.run_folder import RunFolder
from run_files.stored_values import yaml_fault

# Settings that neither change what a run learns nor how it is scored.
MEANINGLESS = {*NEUTRAL, "run_name", "seed", "evaluation.samples"}


@dataclass(frozen=True)
class Entry:
    """One run of the table. words: all its launcher words; needs: the runs whose checkpoints are among them."""

    objective: str
    dataset: str
    seed: int
    words: tuple[str, ...]
    needs: tuple["Entry", ...]
    output_dir: Path

    @property
    def name(self) -> str:
        return f"leaderboard_{self.objective}_{self.dataset}_seed={self.seed}"

    @property
    def title(self) -> str:
        return f"{self.objective} {self.dataset} seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.output_dir / "runs" / self.name)

    @property
    def printed(self) -> Path:
        """Return the file of what its process prints."""
        return self.output_dir / "leaderboard" / f"{self.name}.log"

    @property
    def facts(self) -> Path:
        """Return the file that says where and with what it was trained."""
        return self.printed.with_suffix(".json")

    @property
    def checkpoint(self) -> Path:
        return self.output_dir / "ckpts" / self.settings()["choices"]["model"] / f"{self.name}_last.pt"

    def settings(self) -> dict[str, Any]:
        """Return what the words compose to, the seed aside. UserError for words that compose to nothing."""
        try:
            return composed(tuple(word for word in self.words if not word.startswith("seed=")))
        except UserError as error:
            raise UserError(f"{self.objective} on {self.dataset}: {error}") from error

    def why_stale(self) -> str | None:
        """Return why the run that bears this name is not the one the table asks for; None when it is."""
        stored = self.folder.read_config()
        before, now = by_key(stored.get("overrides", [])), by_key(self.words)
        for key, (old, new) in differences(before, now).items():
            return f"{key} was {old or 'not given'} and is now {new or 'not given'}"
        old_leaves, new_leaves = flat(stored), flat(self.settings())
        for key in old_leaves:
            matters = not MEANINGLESS & {key, key.split(".")[0]} and key not in now
            if matters and key in new_leaves and old_leaves[key] != new_leaves[key]:
                return f"{key}, not among its words, was {old_leaves[key]!r} and is now {new_leaves[key]!r}"
        for need in self.needs:
            made = need.folder.status.read().get("updated")
            if made and datetime.fromisoformat(made) > datetime.fromisoformat(self.folder.status.read()["started"]):
                return f"{need.name}, which it starts from, was trained again since"
        return None

    def condition(self) -> str:
        """Return missing, begun, failed, finished, or stale."""
        status = self.folder.status.read()
        if not self.folder.config_path.is_file() or not status:
            return "missing"
        if self.why_stale() is not None:
            return "stale"
        return status["state"] if status["state"] in ("finished", "failed") else "begun"

    def scores(self) -> dict[str, float]:
        """Return the last scores of a finished run, what was not a number left out, and the seconds it trained."""
        known = self.folder.status.read().get("scores", {})
        rows = self.folder.metrics.read()
        judged = sum(row.get("eval/seconds") or 0.0 for row in rows)
        seconds = {SECONDS: rows[-1]["elapsed_seconds"] - judged} if rows else {}
        return {name: float(value) for name, value in known.items() if value is not None} | seconds


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    return resolved(compose_config(["run_name=x", *words]))


def by_key(words: Sequence[str]) -> dict[str, str]:
    """Return words by what they set, without those on how a run was begun, its name and where it lies."""
    pairs = (word.replace("'", "").partition("=") for word in words)
    return {key: value for key, _, value in pairs if key not in ("run_name", "resume", "overwrite", "output_dir")}


@dataclass(frozen=True)
class Board:
    """configs/leaderboard.yaml, read and checked. seeds: those of each data set; objectives: name -> launcher words."""

    jobs: int
    seeds: dict[str, list[int]]
    common: list[str]
    objectives: dict[str, list[str]]

    @property
    def datasets(self) -> list[str]:
        return list(self.seeds)

    @property
    def every_seed(self) -> list[int]:
        return list(dict.fromkeys(seed for seeds in self.seeds.values() for seed in seeds))

    def entries(self, output_dir: Path, extra: Sequence[str] = ()) -> list[Entry]:
        """Return every run, in the order they are trained: all of one seed first, what others need before them.

        extra: launcher words for every run. UserError when a placeholder names no objective higher up.
        """
        entries: list[Entry] = []
        for seed in self.every_seed:
            for dataset in (name for name, seeds in self.seeds.items() if seed in seeds):
                higher: dict[str, Entry] = {}
                for objective, words in self.objectives.items():
                    needs = [name for word in words for name in re.findall(r"\{(\w+)\}", word)]
                    for need in needs:
                        if need not in higher:
                            raise UserError(f"{{{need}}} in the words of {objective} names no objective above it")
                    places = {need: f"'{higher[need].checkpoint}'" for need in needs}
                    own = [re.sub(r"\{(\w+)\}", lambda found: places[found[1]], word) for word in words]  # noqa: B023
                    place = [f"dataloaders={dataset}", f"seed={seed}", f"output_dir={output_dir}"]
                    all_words = (*self.common, *own, *place, *extra)
                    teachers = tuple(higher[need] for need in needs)
                    higher[objective] = Entry(objective, dataset, seed, all_words, teachers, output_dir)
                entries += higher.values()
        return entries


def with_teachers(board: Board, objectives: list[str], datasets: list[str], seeds: list[int]) -> Board:
    """Return the runs of what learns a map, each a second time with the exact teacher, on the data whose flow is known.

    objectives, datasets, seeds: those that were asked for, [] for all. UserError for one that has no exact teacher.
    """
    known = [dataset for dataset in board.datasets if build(composed((f"dataloaders={dataset}",))["dataloaders"]).mixture]
    alone = {name: words for name, words in board.objectives.items() if not any("{" in word for word in words)}
    learning = [name for name, words in alone.items() if composed(tuple(words))["loss"].get("teacher", "") is None]
    for key, asked, there in (("data", datasets, known), ("only", objectives, learning)):
        wrong = next((word for word in asked if word not in there), None if there else "anything")
        if wrong is not None:
            raise UserError(f"{key}={wrong} has no exact teacher; teacher=exact is for {', '.join(there) or 'none of this'}")
    doubled: dict[str, list[str]] = {}
    for name in objectives or learning:
        doubled |= {name: board.objectives[name], name + TAUGHT: [*board.objectives[name], "loss.teacher=exact"]}
    return replace(board, seeds={name: seeds or board.seeds[name] for name in datasets or known}, objectives=doubled)


def read_board(path: Path) -> Board:
    """Return the table of runs. UserError for a file that is not there or not such a table."""
    require(path, "leave config= out for configs/leaderboard.yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {yaml_fault(error)}") from error
    if isinstance(found, dict) and isinstance(found.get("datasets"), list):  # the older form: one list of seeds for all
        found["seeds"] = dict.fromkeys(found["datasets"], found.get("seeds"))
    kinds = {"jobs": int, "seeds": dict, "common": str, "objectives": dict}
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind) or not found[key]:
            raise UserError(f"{path} needs {', '.join(kinds)}; {key} is missing, empty or not of its kind")
    if not all(isinstance(seeds, list) and seeds for seeds in found["seeds"].values()):
        raise UserError(f"{path}: seeds names the seeds of each data set, such as seeds: {{kmeans: [0, 1]}}")
    if found["jobs"] < 1 or not all(isinstance(seed, int) for seeds in found["seeds"].values() for seed in seeds):
        raise UserError(f"{path}: jobs takes 1 or more, and seeds whole numbers, such as seeds: {{kmeans: [0, 1]}}")
    try:
        objectives = {str(name): shlex.split(str(words)) for name, words in found["objectives"].items()}
        common = shlex.split(found["common"])
    except ValueError as error:  # a quotation that does not end
        raise UserError(f"{path}: launcher words that cannot be read ({first_line(error).lower()}); correct them") from error
    board = Board(found["jobs"], found["seeds"], common, objectives)
    for dataset in board.datasets:
        chosen("dataloaders", [str(dataset)], groups()["dataloaders"])
    return board


def chosen(key: str, asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return what was asked for, all that is known when nothing was. UserError for a word that is not known."""
    for word in asked:
        check_known(key, word, known)
    return list(asked or known)

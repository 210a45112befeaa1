"""Runs as sets, each one configuration under several seeds: two side by side, or many in a table; for scripts/runs.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.command_line import matching
from common.errors import UserError
from configuration.compose import without
from configuration.nodes import check_known
from configuration.overrides import meaningful
from configuration.values import NEUTRAL
from evaluation.run_table import RunOfTable, closing_table
from evaluation.seed_comparison import LEVEL, PAIRS, Difference, compared, least_p, least_seeds
from run_files.metrics_file import SCORES, SIDE, UNDIRECTED, higher_is_better
from run_files.result import result_of, table
from run_files.run_folder import RunFolder
from run_files.stored_values import CONFIG_REMEDY, note_once

OF_TRAINING = ("training", "flip", "crop_padding", "augment", "balanced", "epoch_size")  # keys of data that no score sees
OF_EVALUATION = ("dataloaders.", "evaluation.", "vae.", "conditional")
ASIDE = ("evaluation.samples", "evaluation.batch_size", "evaluation.loss_weights")  # of which the last scores are free


@dataclass(frozen=True)
class RunSet:
    """Runs of one configuration, by seed. label: a or b."""

    label: str
    pattern: str
    configs: list[dict[str, Any]]
    scores: list[dict[str, float]]

    @property
    def seeds(self) -> list[int]:
        return [config["seed"] for config in self.configs]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return what the runs share and results hang on, by dotted key. UserError where they share it not."""
        first, *others = [meaningful(config) for config in self.configs]
        for other in others:
            for key in dict.fromkeys([*first, *other]):
                if first.get(key) != other.get(key):
                    values = " and ".join(sorted({str(first.get(key)), str(other.get(key))}))
                    raise UserError(
                        f"the runs of {self.pattern!r} differ in {key} ({values}), and a set is one configuration under "
                        "several seeds; write an expression that matches fewer names"
                    )
        return first

    def values(self, score: str) -> list[float]:
        return [scores[score] for scores in self.scores if score in scores]


def run_set(label: str, pattern: str, folders: dict[str, RunFolder], best: bool) -> RunSet:
    """Return the runs whose names the expression matches. UserError for fewer than two, unfinished ones, a seed twice."""
    names = matching(pattern, folders)
    if len(names) < 2:
        raise UserError(
            f"{pattern!r} matches {'one run' if names else 'no run'}, and a set takes two seeds or more; "
            "`python scripts/runs.py list` shows the names, '.*' stands for any letters"
        )
    unfinished = [name for name in names if folders[name].status.read().get("state") != "finished"]
    if unfinished:
        raise UserError(f"run {unfinished[0]} of {pattern!r} is not finished; finish it with resume=true, or leave it out")
    chosen = [folders[name] for name in names]
    configs = [folder.read_config() for folder in chosen]
    found = sorted(zip(configs, chosen, strict=True), key=lambda pair: pair[0]["seed"])
    same = RunSet(label, pattern, [config for config, _ in found], [last_scores(f, c, best) for c, f in found])
    twice = [seed for seed in same.seeds if same.seeds.count(seed) > 1]
    if twice:
        raise UserError(f"two runs of {pattern!r} have the seed {twice[0]}, which makes them one run twice; leave one out")
    return same


def last_scores(folder: RunFolder, config: dict[str, Any], best: bool) -> dict[str, float]:
    """Return the scores of a run's last evaluation, or of that with the best monitored value; floors among them."""
    rows = list(folder.metrics.evaluations())
    if not rows:
        raise UserError(f"run {folder.name} has no evaluation in {folder.metrics.path}; leave it out")
    metric = config["monitor"]
    monitored = [row for row in rows if row.get(metric) is not None]
    if best and not monitored:
        raise UserError(f"run {folder.name} never logged what it monitors, {metric}; leave out --best")
    pick = max if higher_is_better(metric, config.get("monitor_mode", "auto")) else min
    row = pick(monitored, key=lambda row: row[metric]) if best else rows[-1]
    return {name: value for name, value in row.items() if name.startswith(SCORES) and value is not None}


def check_comparable(a: RunSet, b: RunSet, best: bool) -> None:
    """Raise UserError where scores of the two sets are not of the same thing."""
    for key in dict.fromkeys([*a.settings, *b.settings]):
        of_training = {*key.split(".")} & {*OF_TRAINING} or (key in ASIDE and not (best and key == ASIDE[0]))
        if key.startswith(OF_EVALUATION) and not of_training and a.settings.get(key) != b.settings.get(key):
            raise UserError(
                f"the scores of these sets are not of the same thing: {key} is {a.settings.get(key)} in {a.pattern!r} and "
                f"{b.settings.get(key)} in {b.pattern!r}; train or score both with one"
            )


def other_floor(runs: list[dict[str, float]], score: str) -> bool:
    """Return whether a score stands beside different noise floors in different runs: other counts, or other data."""
    floors = [(run[f"{score}_floor"], run[f"{score}_floor_sd"]) for run in runs if f"{score}_floor_sd" in run]
    far = [abs(floor - floors[0][0]) > sd / 2 or not 0.5 * sd <= floors[0][1] <= 2 * sd for floor, sd in floors]
    return any(far) or len(floors) not in (0, len(runs))


def comparable_scores(a: RunSet, b: RunSet) -> tuple[list[str], dict[str, str]]:
    """Return the scores to compare, and of others why not."""
    runs, scores = [*a.scores, *b.scores], list[str]()
    left_out: dict[str, str] = {}
    same_loss = same(a, b, "loss.")
    same_states = same_loss or same(a, b, "loss.path.", "loss.coupling.", "loss.time_sampler.")
    for name in dict.fromkeys(name for run in runs for name in run if not name.endswith(SIDE) and "/budget_" not in name):
        lacking = sum(name not in run for run in runs)
        if lacking:
            left_out[name] = f"{lacking} of the runs lack it"
        elif (name == "eval/loss" and not same_loss) or (name == "eval/squared_error" and not same_states):
            left_out[name] = "the losses differ"
        elif other_floor(runs, name):
            left_out[name] = "the noise floors differ: other counts of samples"
        else:
            scores.append(name)
    return scores, left_out


def same(a: RunSet, b: RunSet, *groups: str) -> bool:
    """Return whether every setting whose key begins so is the same in both sets."""
    parts = [{key: value for key, value in part.settings.items() if key.startswith(groups)} for part in (a, b)]
    return parts[0] == parts[1]


def direction(score: str, config: dict[str, Any]) -> str:
    """Return what a larger value of the score is: better, worse, or merely larger."""
    if score.endswith(UNDIRECTED):
        return "larger"
    return "better" if higher_is_better(score, config["monitor_mode"] if score == config["monitor"] else "auto") else "worse"


def compare_sets(folders: dict[str, RunFolder], patterns: list[str], best: bool, chosen: str | None) -> str:
    """Return the two sets side by side: settings that differ, every score with its verdict, what the seeds allow.

    chosen: the one score decided on beforehand. UserError for sets whose scores are not of the same thing.
    """
    a, b = (run_set(label, pattern, folders, best) for label, pattern in zip("ab", patterns, strict=True))
    both = [name for name in matching(patterns[0], folders) if name in matching(patterns[1], folders)]
    if both:
        raise UserError(f"run {both[0]} is in both sets; write expressions that share no name")
    check_comparable(a, b, best)
    scores, left_out = comparable_scores(a, b)
    if chosen:
        check_known("--score", chosen, scores)
    scores = [chosen] if chosen else scores
    if not scores:
        raise UserError("the two sets share no score: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    paired = a.seeds == b.seeds and same(a, b, "source.")
    first, second = (np.array([part.values(name) for name in scores]).T for part in (a, b))
    found = compared(first, second, paired)
    rows = [["score", "a", "b", "a - b, 95 % interval", "verdict"]]
    for name, one in zip(scores, found, strict=True):
        low, high = one.interval
        cells = [f"{mean:.4g} ± {sd:.2g}" for mean, sd in zip(one.means, one.deviations, strict=True)]
        gap = f"{one.difference:+.3g} ({low:+.3g} to {high:+.3g})"
        rows.append([name, *cells, gap, verdict(one, direction(name, a.configs[0]), len(scores))])
    parts = [heading(a, b), differing(a, b), table(rows), limits(a, b, paired, len(scores))]
    left = {} if chosen else left_out
    return "\n\n".join(parts + [f"not compared: {'; '.join(f'{k} ({why})' for k, why in left.items())}"] * bool(left))


def heading(a: RunSet, b: RunSet) -> str:
    return "\n".join(f"{part.label}: {part.pattern}, seeds {', '.join(map(str, part.seeds))}" for part in (a, b))


def differing(a: RunSet, b: RunSet) -> str:
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if a.settings.get(key) != b.settings.get(key)]
    rows = [[key, *(str(part.settings.get(key, "-")) for part in (a, b))] for key in keys]
    return table([["setting", "a", "b"], *rows]) if rows else "the settings are the same, seeds aside"


def verdict(found: Difference, larger: str, count: int) -> str:
    """Return what one score says, in words; larger: what a larger value is."""
    if not found.significant:
        alone = f"{found.p:.2g} alone, {found.p_all:.2g} among {count} scores" if count > 1 else f"{found.p:.2g}"
        return f"inconclusive (p = {alone if found.significant_alone else f'{found.p:.2g}'})"
    better = "a" if (found.difference > 0) == (larger != "worse") else "b"
    what = "larger" if larger == "larger" else "better"
    return f"{better} is {what} by {abs(found.difference):.2g} (p = {found.p_all:.2g})"


def limits(a: RunSet, b: RunSet, paired: bool, count: int) -> str:
    """Return what so many seeds can show at all, and how it was tested."""
    n, m = len(a.seeds), len(b.seeds)
    least = least_p(n, m, paired)
    lines = [f"{n} + {m} seeds: least possible p = {least:.2g}"]
    if least > LEVEL:
        lines[0] += f", so that no difference can be significant; {least_seeds()} + {least_seeds()} are the fewest that can"
    flips = paired and n >= PAIRS
    how = "signs of the differences within pairs of a seed" if flips else "splits of the seeds into two such sets"
    held = f", for all {count} scores together (--score NAME for the one you decided on beforehand)" if count > 1 else ""
    lines.append(f"p: share of all {how} that differ as much{held}; significant at p <= {LEVEL:g}")
    if paired:
        lines.append("the seeds, and so the evaluations' noise, are the same: intervals are of differences within pairs")
    return "\n".join(lines)


def table_of(folders: list[RunFolder]) -> str:
    """Return the runs as a table, see evaluation/run_table.py; what cannot be read is left out, with a line that says why.

    UserError for runs that do not monitor one score, and where none can be read.
    """
    configs: list[dict[str, Any]] = []
    for folder in folders:
        try:
            configs.append(whole_config(folder))
        except UserError as error:
            if folder is folders[-1] and not configs:
                raise
            note_once(f"{folder.name} is left out: {error}")
    monitors = sorted({config["monitor"] for config in configs})
    if len(monitors) > 1:
        raise UserError(f"these runs monitor {' and '.join(monitors)}; write an expression that matches runs of one")
    typed = [settings_by_key(config) for config in configs]
    keys = [key for key in dict.fromkeys(key for words in typed for key in words) if len({w.get(key) for w in typed}) > 1]
    runs = [
        RunOfTable(
            result_of(config), {key: words.get(key, "-") for key in keys}, config["seed"], config["overrides"],
            str(sorted(meaningful(config).items())),
        )
        for config, words in zip(configs, typed, strict=True)
    ]  # fmt: skip
    return closing_table(runs, f"{len(runs)} runs", "best")


def whole_config(folder: RunFolder) -> dict[str, Any]:
    """Return what a run was made with, in the folder where it is now. UserError where that is cut."""
    config = folder.read_config()
    lacking = [key for key in ("monitor", "choices", "seed", "overrides") if key not in config]
    if lacking or "model" not in config["choices"]:
        raise UserError(f"{folder.config_path} is cut: it lacks {', '.join(lacking) or 'choices.model'}; {CONFIG_REMEDY}")
    place = str(folder.path.parents[1])
    return config | {"output_dir": place, "run_name": folder.name, "eval_checkpoint": None}


def settings_by_key(config: dict[str, Any]) -> dict[str, str]:
    """Return what was typed and results hang on, by key, the seed aside."""
    words = without(config["overrides"], {*(NEUTRAL - {"guidance"}), "run_name", "seed"})
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}

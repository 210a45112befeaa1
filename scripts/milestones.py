#!/usr/bin/env python
"""Milestones of a recipe: train several seeds of it, and write beside it what they scored at each evaluation.

    python scripts/milestones.py                                  # of the default run: configs/train.milestones.json
    python scripts/milestones.py experiment=digits_classifier     # configs/experiment/digits_classifier.milestones.json
    python scripts/milestones.py experiment=digits seeds=5 output_dir=/tmp/milestones

Words: experiment (a recipe; none: the default run), seeds (5: 0 to 4), output_dir (outputs: the runs are kept there, as
milestones_<recipe>_seed=<k>). The same command goes on where it was stopped: finished runs are not trained again. From
then on a run of the recipe says whether it is on track, and its report draws the milestones.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, front
from common.errors import UserError
from common.ranges import CountFrom2
from configuration.nodes import check_known, groups
from configuration.overrides import meaningful
from configuration.settings import read_settings
from evaluation.milestones import Milestone, Milestones, path_of, plain
from run_files.metrics_file import SCORES, SIDE
from run_files.provenance import made_with
from run_files.run_folder import RunFolder


@dataclass(frozen=True)
class Settings:
    """The command line."""

    experiment: str | None = None
    seeds: CountFrom2 = 5
    output_dir: Path = Path("outputs")


def make(words: list[str]) -> Path:
    """Carry out the command; return the file written."""
    settings, _ = read_settings(words, Settings)
    recipe = settings.experiment
    if recipe:
        check_known("experiment", recipe, groups()["experiment"])
    name = f"milestones_{recipe or 'default'}"
    train(name, settings)
    folders = [RunFolder(settings.output_dir / "runs" / f"{name}_seed={seed}") for seed in range(settings.seeds)]
    words = [f"experiment={recipe}"] * bool(recipe) + [f"seeds={settings.seeds}"]
    command = " ".join(["python scripts/milestones.py", *words])
    path = path_of(recipe)
    collected(folders, command).write(path)
    return path


def train(name: str, settings: Settings) -> None:
    """Train the runs that have not finished, one after the other. UserError when one fails."""
    recipe = [f"experiment={settings.experiment}"] if settings.experiment else []
    seeds = ",".join(map(str, range(settings.seeds)))
    output = settings.output_dir.resolve()
    words = [f"run_name={name}", *recipe, f"seed={seeds}", f"'output_dir={output}'", f"'log.file={output / name}.md'"]
    words = [word.strip("'") if " " not in word else word for word in words]
    done = subprocess.run([sys.executable, str(ROOT / "launcher.py"), "-m", *words, "trackio.enabled=false"], check=False)
    if done.returncode:
        raise UserError("a run did not finish, as is said above; the same command goes on")


def collected(folders: list[RunFolder], command: str) -> Milestones:
    """Return the milestones of finished runs of one recipe. UserError where their settings differ."""
    configs = [folder.read_config() for folder in folders]
    settings = plain(meaningful(configs[0]))
    for folder, config in zip(folders, configs, strict=True):
        other = plain(meaningful(config))
        key = next((key for key in {**settings, **other} if settings.get(key) != other.get(key)), None)
        if key is not None:
            raise UserError(
                f"run {folder.name} was trained with another {key} than {folders[0].name}; "
                f"`python scripts/runs.py delete` it, and run this again"
            )
    scores = [scored(folder) for folder in folders]
    names = [name for name in scores[0] if not name.endswith(SIDE) and all(name in run for run in scores)]
    made = made_with(str(folders[0].status.read().get("device", "")))
    found = {name: over_seeds([run[name] for run in scores]) for name in names}
    return Milestones(f"{command}, {date.today().isoformat()}", [c["seed"] for c in configs], made, settings, found)


def scored(folder: RunFolder) -> dict[str, dict[int, float]]:
    """Return the scores of a run by name and step."""
    found: dict[str, dict[int, float]] = {}
    for row in folder.metrics.evaluations():
        for name, value in row.items():
            if name.startswith(SCORES) and isinstance(value, int | float):
                found.setdefault(name, {})[row["step"]] = value
    return found


def over_seeds(runs: list[dict[int, float]]) -> list[Milestone]:
    """Return mean and standard deviation at each step that all runs have, to six digits."""
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    values: list[tuple[int, list[Any]]] = [(step, [run[step] for run in runs]) for step in steps]
    return [Milestone(step, rounded(statistics.fmean(of)), rounded(statistics.stdev(of))) for step, of in values]


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def main(words: list[str]) -> int:
    return front(words, __doc__, make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

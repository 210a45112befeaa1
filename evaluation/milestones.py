"""Milestones: what several seeds of a recipe scored at each evaluation, and where a run of it stands beside them."""

import json
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from scipy.special import stdtr

from common.errors import UserError
from common.files import write_atomically
from configuration.compose import CONFIG_DIR, compose_config, resolved
from configuration.overrides import meaningful
from evaluation.metrics.base_metric import number
from run_files.metrics_file import higher_is_better

LEVEL = 0.01  # share of the recipe's own runs that may be called behind at an evaluation
JUDGED = ("eval/energy_distance_1nfe", "eval/energy_distance", "eval/accuracy", "eval/loss")  # those of them that there are
OF_ONE_DEVICE = "eval/loss"  # its draws are those of every seed, but not those of another kind of device
FEW = 2  # settings in which a run without a recipe may differ from the default run and hear of it


@dataclass(frozen=True)
class Milestone:
    """A score at a step: mean and standard deviation over seeds."""

    step: int
    mean: float
    sd: float


@dataclass(frozen=True)
class Milestones:
    """What seeds of a recipe scored, by score in order of steps. settings: those that results hang on; made: with what."""

    command: str
    seeds: list[int]
    made: dict[str, str]
    settings: dict[str, Any]
    scores: dict[str, list[Milestone]]

    @cached_property
    def by_step(self) -> dict[int, dict[str, Milestone]]:
        """Return the scores that runs are judged by, at each step."""
        found: dict[int, dict[str, Milestone]] = {}
        for name in JUDGED:
            for at in self.scores.get(name, ()):
                found.setdefault(at.step, {})[name] = at
        return found

    def differing(self, config: dict[str, Any]) -> list[str]:
        """Return the settings in which a run differs, in words; of a setting that is newer, from the recipe as it is now."""
        own, known = plain(meaningful(config)), self.settings
        if not {*own} <= {*known}:
            known = settings_now(config["choices"].get("experiment")) | known
        return [
            f"{key} is {value}, that of the milestones {known.get(key, 'not given')}"
            for key, value in own.items() if known.get(key) != value and (key in known or value not in (None, {}))
        ]  # fmt: skip

    def behind(self, step: int, values: dict[str, Any], here: dict[str, str]) -> dict[str, tuple[float, float]]:
        """Return of each judged score how many standard deviations it is behind at a step, negative where ahead, and how
        often a run of the recipe is (Student's t of a further value beside n). A score without a spread is left out, and
        one that hangs on a device's draws where the run has another.
        """
        found, count = {}, len(self.seeds)
        other = here.get("device") != self.made.get("device")
        for name, at in self.by_step.get(step, {}).items():
            if values.get(name) is not None and at.sd > 0 and not (other and name == OF_ONE_DEVICE):
                far = (values[name] - at.mean) / at.sd * (-1 if higher_is_better(name) else 1)
                found[name] = far, float(stdtr(count - 1, -far / (1 + 1 / count) ** 0.5))
        return found

    def said(self, step: int, values: dict[str, Any], here: dict[str, str]) -> str | None:
        """Return what there is to say of a run that is behind at a step, None of one on track. here: see `made`."""
        found = self.behind(step, values, here)
        name = min(found, key=lambda name: found[name][1], default="")
        if not found or found[name][1] >= LEVEL / len(found):
            return None
        at = self.by_step[step][name]
        had = f"{number(values[name])}, where {len(self.seeds)} seeds had {number(at.mean)} ± {number(at.sd)}"
        return f"{found[name][0]:.1f} sd behind at step {step:,}: {name} {had}; {self.explained(here)}"

    def explained(self, here: dict[str, str]) -> str:
        """Return what usually explains a run behind its milestones, all settings being the same."""
        others = [f"{what} {here[what]} instead of {old}" for what, old in self.made.items() if here.get(what, old) != old]
        return f"usual reasons: {'; '.join([*others, 'code or data changed since'])}; chance, in 1 run of {1 / LEVEL:.0f}"

    def verdict(self, rows: list[dict[str, Any]], here: dict[str, str]) -> str:
        """Return where a run stands by all its rows of metrics: on track, or the last step at which it was behind."""
        judged = [row for row in rows if self.behind(row["step"], row, here)]
        if not judged:
            return "not judged: no evaluation at a step of the milestones yet"
        said = [words for row in judged if (words := self.said(row["step"], row, here))]
        if said:
            return f"{said[-1]} ({len(said)} of {len(judged)} evaluations behind)"
        found = self.behind(judged[-1]["step"], judged[-1], here).items()
        last = ", ".join(f"{name} {abs(far):.1f} sd {'behind' if far > 0 else 'ahead'}" for name, (far, _) in found)
        return f"on track at all {len(judged)} evaluations; at the last, {last} (of the mean of {len(self.seeds)} seeds)"

    def write(self, path: Path) -> None:
        """Write the file: a setting in a line, and a score."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        parts["scores"] = {name: [[at.step, at.mean, at.sd] for at in found] for name, found in self.scores.items()}
        lines = ",\n".join(f" {json.dumps(key)}: {in_lines(value)}" for key, value in parts.items())
        write_atomically(path, f"{{\n{lines}\n}}\n")


def in_lines(value: Any) -> str:
    """Return a value as JSON, a dict with each of its keys in a line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(each)}" for key, each in value.items()) + "\n }"


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as a file gives them back."""
    return dict(json.loads(json.dumps(settings)))


@cache
def settings_now(experiment: str | None) -> dict[str, Any]:
    """Return the settings that results hang on of a recipe as it is now, or of the default run."""
    now = compose_config(["run_name=x", *([f"experiment={experiment}"] if experiment else [])])
    return plain(meaningful(resolved(now)))


def path_of(experiment: str | None) -> Path:
    """Return where the milestones of a recipe lie, or those of the default run."""
    return CONFIG_DIR / (f"experiment/{experiment}.milestones.json" if experiment else "train.milestones.json")


def read(path: Path) -> Milestones:
    """Return the milestones in a file. UserError for one that is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: [Milestone(*row) for row in rows] for name, rows in stored["scores"].items()}
        return Milestones(**{**stored, "scores": scores})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; scripts/milestones.py makes it again") from error


def milestones_for(config: dict[str, Any]) -> tuple[Milestones | None, str]:
    """Return what a run of this configuration is held against, or None and why not; "" where there is nothing to say."""
    choices = config.get("choices")
    experiment = choices and choices.get("experiment")
    path = path_of(experiment)
    if not choices or not path.is_file():
        return None, ""
    found = read(path)
    differing = found.differing(config)
    if not differing:
        return found, ""
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return None, f"not judged: {differing[0]}{more}" if experiment or len(differing) <= FEW else ""


def standing(config: dict[str, Any], rows: list[dict[str, Any]], here: dict[str, str]) -> str:
    """Return where a run stands beside its recipe's milestones, or why it is not judged; "" where nothing is to be said."""
    found, why = milestones_for(config)
    return why if found is None else found.verdict(rows, here)

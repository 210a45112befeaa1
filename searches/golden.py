"""The setting of a sampler that suits a trained model best: golden section for a number, a grid for a few choices.

Each setting is scored on the same noise and the same real states, several times over: the score is a smooth function of the
setting, and its spread over the repeats is that of the noise.
"""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.command_line import check_ends, outputs
from common.errors import UserError
from common.files import end_of
from common.ranges import CountFrom2, Range, Seed
from configuration.compose import compose_config, parse_overrides, resolved
from configuration.nodes import check_known, lookup
from configuration.overrides import settings_from_overrides
from configuration.settings import read_settings
from configuration.values import declared, kinds_in
from run_files.checks import check_writable
from run_files.result import table

if TYPE_CHECKING:
    from evaluation.metrics.two_sample import TwoSampleMetric
    from evaluation.sample import TrainedModel

RATIO = (math.sqrt(5) - 1) / 2
FINEST = 1e-3  # of the interval, where the section stops
FEW = 5  # whole numbers, where it stops: two points inside could be one
MOST_VALUES = 100


@dataclass(frozen=True)
class Settings:
    """The words of a search over sampling settings, solver and guidance settings aside."""

    ckpt: Path = field(metadata={"example": "ckpt=outputs/ckpts/mlp/last.pt"})
    key: str = field(metadata={"example": "key=guidance.scale"})
    low: float | None = None
    high: float | None = None
    values: str | None = None
    evaluations: Annotated[int, Range(5, most=1000)] = 12
    n: CountFrom2 = 500
    repeats: CountFrom2 = 4
    seed: Seed = 0
    metric: str = "eval/energy_distance"
    device: str = "auto"
    out: Path | None = None
    trust: str | None = None


@dataclass(frozen=True)
class SamplingSearch:
    """What to search. texts: the values of a grid, empty where low to high is searched; whole: numbers are."""

    own: Settings
    words: list[str]
    texts: tuple[str, ...]
    low: float
    high: float
    whole: bool

    @property
    def key(self) -> str:
        return self.own.key

    def override(self, value: float | str) -> str:
        return f"{self.key}={value if isinstance(value, str) else int(value) if self.whole else float(value)}"


def search_of(words: list[str]) -> SamplingSearch:
    """Return the search that words ask for. UserError for a mistake."""
    own, rest = read_settings(words, Settings, ("solver", "guidance"))
    key = own.key
    if re.split("[./]", key)[0] not in ("solver", "guidance"):
        raise UserError(f"key={key} is no setting of sampling; give one such as key=guidance.scale or key=solver.steps")
    if bool(own.values) == (own.low is not None and own.high is not None):
        raise UserError("give low= and high=, between which the best number is searched, or the few values=A,B,C to try")
    if key.startswith("guidance.") and not any(word.startswith("guidance=") for word in rest):
        rest = ["guidance=cfg", *rest]
    texts, low, high = listed(key, own.values) if own.values else (), float(own.low or 0), float(own.high or 0)
    if not texts and not low < high:
        raise UserError(f"low={low:g} must be below high={high:g}")
    search = SamplingSearch(own, rest, texts, low, high, not texts and is_whole(key, rest, low, high))
    for value in texts or (low, high):
        settings_from_overrides([*rest, search.override(value)])
    return search


def listed(key: str, text: str) -> tuple[str, ...]:
    """Return the values of a grid as they are typed. UserError for fewer than two, or one twice."""
    (override,) = parse_overrides([f"{key}={text}"])
    texts = tuple(override.sweep_string_iterator()) if override.is_discrete_sweep() else ()
    if not 2 <= len(set(texts)) == len(texts) <= MOST_VALUES:
        raise UserError(f"values={text} must list 2 to {MOST_VALUES} different values, as in values=4,8,16")
    return texts


def is_whole(key: str, words: list[str], low: float, high: float) -> bool:
    """Return whether the key takes whole numbers alone. UserError where its ends are none, or it takes no number."""
    config = resolved(compose_config(["run_name=sample", *words]))
    setting = declared(key, lookup(config, f"{key.rpartition('.')[0]}._target_"))
    kinds = kinds_in(setting.kind) if setting is not None else {float}
    if not kinds & {int, float}:
        raise UserError(f"{key} takes no number, and golden section searches one; write values=A,B,C")
    if float not in kinds and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{key} takes whole numbers; give low= and high= as such")
    return float not in kinds


def golden_section(score: Callable[[float], float], low: float, high: float, evaluations: int, whole: bool) -> None:
    """Score at most so many points of [low, high], among them the least of a function with one minimum (Kiefer 1953).

    The two ends come first. Each further one cuts the interval by 0.618; whole: only whole numbers are scored, in the end
    all that are left; other numbers are rounded to 1e-4 of the interval or finer.
    """
    known, width = dict[float, float](), high - low
    digits = 0 if whole else 4 - math.floor(math.log10(width))

    def value(x: float) -> float:
        if x not in known and len(known) < evaluations:
            known[x] = score(x)
        return known.get(x, math.inf)

    value(low), value(high)
    c, d = inside(high, low, digits), inside(low, high, digits)
    while len(known) < evaluations and high - low > (FEW if whole else FINEST * width):
        if value(c) <= value(d):
            high, d = d, c
            c = inside(high, low, digits)
        else:
            low, c = c, d
            d = inside(low, high, digits)
    for x in range(math.ceil(low), math.floor(high) + 1) if whole else ():
        value(float(x))


def inside(start: float, end: float, digits: int) -> float:
    """Return the point that lies 0.618 of the way from start to end, rounded."""
    return round(start + RATIO * (end - start), digits)


def command(words: list[str]) -> str:
    """Carry out the search; returns its table, the picture's path and the best command. UserError for a mistake."""
    search = search_of(words)
    clean = re.sub(r"[^a-z_]+", "_", search.key)
    path = search.own.out or outputs() / "searches" / f"{search.own.ckpt.stem}_{clean}.png"
    check_ends("out", path, ".png")
    check_writable("out", end_of(path).parent)
    from evaluation.sample import load

    model = load(search.own.ckpt, search.own.device, trust=search.own.trust or "")
    return outcome(search, scored(search, model), path)


def scored(search: SamplingSearch, model: "TrainedModel") -> dict[float | str, list[float]]:
    """Return the scores of every setting that was tried, one for each repeat."""
    import torch

    metric, found = metric_of(search, model), dict[float | str, list[float]]()
    count, repeats, seed = search.own.n, search.own.repeats, search.own.seed
    real = model.real(count, seed)[0].flatten(1)

    def score(value: float | str) -> float:
        own = copy(model)
        own.config = model.config | settings_from_overrides([*search.words, search.override(value)])
        samples = (own.sample(count, seed + repeat).flatten(1) for repeat in range(repeats))
        found[value] = [metric.distance(x, real) if bool(torch.isfinite(x).all()) else math.inf for x in samples]
        print(f"{search.override(value)}: {shown(found[value])}", flush=True)
        return mean(found[value])

    if search.texts:
        for text in search.texts:
            score(text)
    else:
        golden_section(score, search.low, search.high, search.own.evaluations, search.whole)
    return found


def metric_of(search: SamplingSearch, model: "TrainedModel") -> "TwoSampleMetric":
    """Return the distance to score by, one of those that the run's own evaluations have. UserError for another."""
    from configuration.build import build
    from configuration.signatures import derives
    from evaluation.metrics.energy_distance import EnergyDistance

    nodes = model.config["evaluation"].get("metrics") or {}
    kind = "evaluation.metrics.two_sample.TwoSampleMetric"
    parts: list[TwoSampleMetric] = [build(node) for node in nodes.values() if derives(str(node.get("_target_")), kind)]
    known = {part.name: part for part in (EnergyDistance(), *parts)}
    name = search.own.metric
    check_known("metric", name, list(known))
    return known[name]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    middle, count = mean(values), len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (count * (count - 1))) if count > 1 else math.nan


def shown(values: Sequence[float]) -> str:
    return f"{mean(values):.4g} ± {error(values):.2g}"


def equal_to_best(found: dict[float | str, list[float]]) -> list[float | str]:
    """Return the settings that the repeats do not tell from the best: 95 % interval of the difference on the same noise."""
    from scipy.special import stdtrit

    best = min(found, key=lambda value: mean(found[value]))
    equal = []
    for value, scores in found.items():
        gaps = [mine - theirs for mine, theirs in zip(scores, found[best], strict=True)]
        if value == best or (math.isfinite(mean(gaps)) and mean(gaps) <= stdtrit(len(gaps) - 1, 0.975) * error(gaps)):
            equal.append(value)
    return equal


def outcome(search: SamplingSearch, found: dict[float | str, list[float]], path: Path) -> str:
    """Draw the picture, and return the table, what is as good as the best, and the command."""
    best, equal = min(found, key=lambda value: mean(found[value])), equal_to_best(found)
    order = sorted(found) if not search.texts else list(found)
    rows = [["*" * (value == best), search.override(value).partition("=")[2], shown(found[value])] for value in order]
    draw(search, found, best, path)
    names = [search.override(value).partition("=")[2] for value in order if value in equal]
    same = f"between {names[0]} and {names[-1]}" if not search.texts and len(names) > 1 else ", ".join(names)
    at_end = not search.texts and best in (search.low, search.high)
    words = [f"ckpt={search.own.ckpt}", *search.words, search.override(best)]
    return "\n".join([
        table([["", search.key, f"{search.own.metric} ± standard error of {search.own.repeats} repeats"], *rows]),
        f"best: {search.override(best)}; no worse within the error: {same}" + "; best at an end: widen low, high" * at_end,
        f"picture: {path}",
        f"sample: python scripts/sample.py {shlex.join(words)}",
    ])  # fmt: skip


def draw(search: SamplingSearch, found: dict[float | str, list[float]], best: float | str, path: Path) -> None:
    """Draw the score of each setting with its standard error, the best one marked."""
    from evaluation.pictures import GENERATED_COLOR, REAL_COLOR, new_figure, save_figure

    values = [value for value in found if math.isfinite(mean(found[value]))]
    values = values if search.texts else sorted(values)
    title = f"{search.key} of {search.own.ckpt.stem}"
    figure = new_figure(420, title, f"{search.own.repeats} x {search.own.n} samples on the same noise, one checkpoint")
    axes = figure.subplots()
    heights, errors = [mean(found[value]) for value in values], [error(found[value]) for value in values]
    line = "" if search.texts else "-"
    axes.errorbar(values, heights, yerr=errors, fmt=f"o{line}", color=GENERATED_COLOR, markersize=4, linewidth=1, capsize=3)
    if values:
        axes.plot([best], [mean(found[best])], "o", color=REAL_COLOR, label=f"best: {search.override(best)}")
        axes.legend(fontsize=9)
    axes.set_xlabel(search.key)
    axes.set_ylabel(search.own.metric)
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.14, top=0.82)
    save_figure(figure, path)

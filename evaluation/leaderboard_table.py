"""The tables of scripts/leaderboard.py: from scores of runs to Markdown, and into the files that show it."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import end_of, locked, write_atomically

START, STOP = "<!-- leaderboard -->", "<!-- end of leaderboard -->"
COUNTS = (1, 2, 4)
ENERGY, W2, FLOW_MAP = "eval/energy_distance", "eval/w2", "oracle/flow_map_error"
SHORT = {ENERGY: "energy distance", W2: "W2", FLOW_MAP: "flow-map error"}
SECONDS = "training seconds"
FLOOR = "floor (real against real)"
VELOCITY = "oracle/velocity_error"
TAUGHT, WITH_TEACHER = "_exact_teacher", "with the exact teacher"  # of an objective's name, and of its columns
TAUGHT_MARKS = ("<!-- exact teacher -->", "<!-- end of exact teacher -->")


@dataclass
class Row:
    """What is known of one objective on one data set: scores of each finished seed; planned, failed, stale: seeds.

    learns: see FlowObjective; the solver's samples are of those that have a velocity.
    """

    scores: list[dict[str, float]]
    planned: int
    failed: int = 0
    stale: int = 0
    learns: str = "flow_map"

    @property
    def remark(self) -> str:
        """Return what is not as planned, for the name of the row."""
        if not self.scores:
            return ""
        count = "one" if len(self.scores) == 1 else len(self.scores)
        parts = [f"{count} of {self.planned} seeds"] * (len(self.scores) < self.planned)
        parts += [f"{count} {word}" for count, word in ((self.failed, "failed"), (self.stale, "stale")) if count]
        return f" ({', '.join(parts)})" if parts else ""

    def values(self, metric: str) -> list[float]:
        return [scores[metric] for scores in self.scores if metric in scores]


Results = dict[str, dict[str, Row]]  # dataset -> objective -> row


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation over seeds, None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def seeds_in_words(counts: dict[str, int]) -> str:
    """Return over how many seeds the tables of each data set are, and what stands in their cells."""
    if max(counts.values()) == 1:
        return "one seed"
    groups = {count: [name for name, own in counts.items() if own == count] for count in dict.fromkeys(counts.values())}
    parts = [f"{count} seed{'s' * (count > 1)} of {', '.join(names)}" for count, names in groups.items()]
    return f"{parts[0].split(' of ')[0] if len(parts) == 1 else '; '.join(parts)}: mean ± standard deviation over them"


def rounded(value: float, spread: float | None) -> str:
    """Return value ± spread to the spread's first digit (two digits where that is a 1); alone, to about three digits."""
    if spread:
        exponent = math.floor(math.log10(spread))
        decimals = min(max(0, -exponent + (spread / 10**exponent < 1.95)), 6)
        return f"{value:z.{decimals}f} ± {spread:.{decimals}f}"
    size = abs(value)
    return f"{value:z.{0 if size >= 100 else 1 if size >= 10 else 4 if size >= 1e-3 else 5}f}"


def cell(row: Row, metric: str, best: bool = False) -> str:
    """Return mean ± standard deviation over seeds, of the seconds the least, or in a word why there is none."""
    if not row.scores:
        return "failed" if row.failed else "stale" if row.stale else "not run"
    values, has_velocity = row.values(metric), row.learns in ("velocity", "flow_map")
    if metric in SHORT and not has_velocity:
        return "-"
    if not values:
        known = not metric.startswith("oracle/") or row.values("oracle/velocity_error")
        return "not finite" if known and (has_velocity or metric.endswith("_1nfe")) else "-"
    least = metric == SECONDS  # other work can only slow a run
    text = f"{min(values):.0f}" if least else rounded(*mean_and_deviation(values))
    part = f" ({len(values)} of {len(row.scores)})" if len(values) < len(row.scores) else ""
    return (f"**{text}**" if best else text) + part


def best_of(rows: dict[str, Row], metric: str) -> str | None:
    """Return the objective with the least mean; None where no run knows the metric."""
    means = {objective: statistics.fmean(row.values(metric)) for objective, row in rows.items() if row.values(metric)}
    return min(means, key=lambda objective: means[objective]) if means else None


def keys(metric: str) -> list[str]:
    """Return the metric at 1, 2 and 4 evaluations and by the solver."""
    return [*(f"{metric}_{n}nfe" for n in COUNTS), metric]


def floor_cell(rows: dict[str, Row], metric: str) -> str:
    """Return the score of real against real, mean ± sd; of the flow-map error, the solver's own on the exact field."""
    scores = [scores for row in rows.values() for scores in row.scores]
    if metric == FLOW_MAP:
        exact = [found[f"{FLOW_MAP}_exact_field"] for found in scores if f"{FLOW_MAP}_exact_field" in found]
        return f"{rounded(statistics.fmean(exact), None)} (exact field)" if exact else "-"
    floor = next((found for found in scores if f"{metric}_floor" in found), None)
    return rounded(floor[f"{metric}_floor"], floor[f"{metric}_floor_sd"]) if floor else "-"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines])


def dataset_table(rows: dict[str, Row], metrics: list[str], solver: int) -> str:
    """Return one line per objective under the floor; the best one-step values in bold."""
    best = {metric: best_of(rows, metric) for metric in metrics if metric.endswith("_1nfe")}
    cells = lambda name, row: (cell(row, metric, best.get(metric) == name) for metric in metrics)  # noqa: E731
    lines = [[objective + row.remark, *cells(objective, row)] for objective, row in rows.items()]
    header = ["objective", *(heading(metric, solver) for metric in metrics)]
    return markdown(header, [[FLOOR, *(floor_cell(rows, metric) for metric in metrics)], *lines])


def heading(metric: str, solver: int) -> str:
    """Return a column's title: the score and the evaluations a sample costs."""
    found = re.fullmatch(r"(.+)_(\d+)nfe", metric)
    name, steps = (found[1], found[2]) if found else (metric, str(solver))
    return f"{SHORT[name]}, {steps}" if name in SHORT else metric


def overview_table(results: Results, datasets: list[str], solver: int) -> str:
    """Return objectives against data sets: energy distance in one evaluation and by the solver."""
    columns = [(dataset, metric) for dataset in datasets for metric in (f"{ENERGY}_1nfe", ENERGY)]
    best = {dataset: best_of(results[dataset], f"{ENERGY}_1nfe") for dataset in datasets}
    lines = [[FLOOR, *(floor_cell(results[dataset], metric) for dataset, metric in columns)]]
    for objective in results[datasets[0]]:
        rows = [(results[d][objective], metric, metric != ENERGY and best[d] == objective) for d, metric in columns]
        lines.append([objective, *(cell(*row) + row[0].remark for row in rows)])
    header = [f"{dataset}, {1 if metric != ENERGY else solver}" for dataset, metric in columns]
    return markdown(["energy distance", *header], lines)


def solver_evaluations(results: Results) -> int:
    """Return what a sample costs by the solver, in evaluations."""
    found = [int(n) for rows in results.values() for row in rows.values() for n in row.values("eval/nfe")]
    return found[0] if found else 50


def full_text(results: Results, caption: str) -> str:
    """Return a table for each data set."""
    solver = solver_evaluations(results)
    metrics = [*keys(ENERGY), *keys(W2), *keys(FLOW_MAP), SECONDS]
    parts = [f"### {dataset}\n\n{dataset_table(rows, metrics, solver)}" for dataset, rows in results.items()]
    return "\n\n".join([caption, *parts])


def short_text(results: Results, caption: str) -> str:
    """Return the first data set with fewer columns, the others in one table."""
    solver, first, others = solver_evaluations(results), next(iter(results)), list(results)[1:]
    metrics = [*keys(ENERGY), f"{FLOW_MAP}_1nfe", FLOW_MAP, f"{W2}_1nfe", SECONDS]
    parts = [caption, f"**{first}**", dataset_table(results[first], metrics, solver)]
    if others:
        parts += ["**The other data sets**", overview_table(results, others, solver)]
    return "\n\n".join([*parts, "The full tables are in EXPERIMENT_LOG.md."])


def taught_text(results: Results, caption: str) -> str:
    """Return for each data set a table of every objective's scores beside those it has with the exact teacher."""
    return "\n\n".join([caption, *(f"**{dataset}**\n\n{taught_table(rows)}" for dataset, rows in results.items())])


def taught_table(rows: dict[str, Row]) -> str:
    """Return one line per objective under the floor, each score twice: its own, and with the exact teacher."""
    metrics = [f"{ENERGY}_1nfe", f"{FLOW_MAP}_1nfe", VELOCITY, SECONDS]
    pairs = {name: (row, rows[name + TAUGHT]) for name, row in rows.items() if name + TAUGHT in rows}
    header = ["objective", *(title for metric in metrics for title in (one_step_heading(metric), WITH_TEACHER))]
    floor = [FLOOR, *(text for metric in metrics for text in (floor_cell(rows, metric), ""))]
    lines = [
        [name + (own.remark or taught.remark), *(cell(row, metric) for metric in metrics for row in (own, taught))]
        for name, (own, taught) in pairs.items()
    ]
    return markdown(header, [floor, *lines])


def one_step_heading(metric: str) -> str:
    """Return a column's title without its evaluations, which are one."""
    return "velocity error" if metric == VELOCITY else heading(metric, 1).removesuffix(", 1")


def write_between(path: Path, body: str, marks: tuple[str, str] = (START, STOP), title: str = "Leaderboard") -> None:
    """Replace what stands between the markers, every other word kept; the section comes last where there is none.

    UserError when only one of the markers is there, or they are not in order.
    """
    path = end_of(path)
    with locked(path):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        first, last = marks
        if first not in text and last not in text:
            text = f"{text.rstrip()}\n\n## {title}\n\n{first}\n{last}\n".lstrip()
        before, start, rest = text.partition(first)
        _, stop, after = rest.partition(last)
        if not start or not stop or first in rest or last in after:
            raise UserError(f"{path} needs {first} and, after it, {last}, once each; correct it, or remove both")
        write_atomically(path, f"{before}{first}\n{body}\n{last}{after}")


def as_json(results: Results, caption: str) -> str:
    """Return every mean, spread and count, and the single values, for other programs."""
    rows = [
        {
            "dataset": dataset, "objective": objective, "planned": row.planned, "finished": len(row.scores),
            "failed": row.failed, "stale": row.stale,
            "scores": {m: score_record(row.values(m)) for m in sorted({m for scores in row.scores for m in scores})},
        }
        for dataset, found in results.items() for objective, row in found.items()
    ]  # fmt: skip
    return json.dumps({"caption": caption, "rows": rows}, indent=1) + "\n"


def score_record(values: list[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(values)
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return {"mean": mean, "standard_deviation": deviation, "standard_error": error, "values": values}

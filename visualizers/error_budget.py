#!/usr/bin/env python
"""Whose error is it? The distance of samples from the exact ends of their noise, by what it is due to and by time.

    python visualizers/error_budget.py
    python visualizers/error_budget.py ckpt=outputs/ckpts/mlp/first_flow_last.pt n=2000

Writes error_budget.png: on the left the parts of the error, of the learned field, of the solver, of a map learned for one
evaluation and of guidance, beside how far apart two sets of real data lie; then the errors of the velocity and of the path
in eight parts of time (docs/metrics.md). For data whose flow is known exactly; n: how many samples.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Mapping

import numpy as np
import torch

from common.errors import UserError
from evaluation.metrics.base_metric import Absent
from evaluation.metrics.error_budget import ErrorBudget
from evaluation.metrics.oracles import OracleFlowMapError, OracleVelocity
from evaluation.metrics.wasserstein import Wasserstein
from evaluation.pictures import GENERATED_COLOR, INK, REAL_COLOR, new_figure
from evaluation.sample import generation_of
from run_files.metrics_file import BY_TIME
from visualizers.memorisation import TIMES, panel
from visualizers.scene import Scene, main

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAP, BUDGET = "oracle/flow_map_error", "oracle/budget_"


@dataclass(frozen=True)
class Row:
    """A line of the budget: its name, the score that it is, the score that is its share of a total, and what it means."""

    name: str
    score: str
    share: str | None
    meaning: str

    @property
    def is_total(self) -> bool:
        return self.score.endswith("total")


ROWS = (
    Row("samples by the solver", f"{BUDGET}total", None, "from the exact ends of their noise"),
    Row("- field", f"{BUDGET}field", f"{BUDGET}field_share", "what was learned wrongly, integrated without error"),
    Row("- solver", f"{BUDGET}solver", f"{BUDGET}solver_share", "what the solver's steps add on the learned field"),
    Row("solver, exact field", f"{MAP}_exact_field", None, "the same solver on the exact field"),
    Row("samples in one evaluation", f"{BUDGET}map_total", None, "from the exact ends of their noise"),
    Row("- field, of these", f"{BUDGET}field", f"{BUDGET}map_field_share", "the learned field's, as above"),
    Row("- map", f"{BUDGET}map", f"{BUDGET}map_share", "of the learned map from the learned field's own ends"),
    Row("guidance", f"{BUDGET}guidance", None, "how far guidance carries the exact ends"),
    Row("guided exact map", f"{BUDGET}guided_map", None, "what guidance makes of the exact maps in one evaluation"),
    Row("finite sample", "eval/w2_floor", None, "between two sets of 500 real points, matched as well as can be"),
)


def rows_of(scores: Mapping[str, float | None]) -> list[Row]:
    """Return the lines of the budget that these scores have; none where the flow is not known exactly."""
    if scores.get(f"{BUDGET}field") is None:
        return []
    of_map = scores.get(f"{BUDGET}map") is not None
    known = [row for row in ROWS if scores.get(row.score) is not None]
    return [row for row in known if of_map or row.share != f"{BUDGET}map_field_share"]


def table(scores: Mapping[str, float | None]) -> list[list[str]]:
    """Return the budget in words: part, root mean square distance, share of its total, meaning."""
    rows = []
    for row in rows_of(scores):
        value, share = scores[row.score], None if row.share is None else scores.get(row.share)
        assert value is not None
        rows.append([row.name, f"{value:.4g}", "" if share is None else f"{share:.0%}", row.meaning])
    return rows


def picture_of_scores(name: str, scores: Mapping[str, float | None]) -> tuple[Figure, str, str] | None:
    """Return the picture of a run by its scores, its description and caption; None where they have not its numbers."""
    lines = table(scores)
    if not lines:
        return None
    parts = ", ".join(f"{part.removeprefix('- ')} {value}" for part, value, _, _ in lines)
    return picture(f"{name}: error budget", scores), f"parts of the error of {name}, and its errors by time: {parts}", parts


def by_time(scores: Mapping[str, float | None], name: str) -> np.ndarray:
    """Return a score at the 8 times (8,), NaN where there is none."""
    values = [scores.get(f"{name}{end}") for end in BY_TIME]
    return np.array([np.nan if value is None else value for value in values])


def picture(title: str, scores: Mapping[str, float | None]) -> Figure:
    """Return the bars of the budget, and the errors of the velocity and of the path by time."""
    legend = "root mean square distances, in the units of the data; shares of a total add up, lengths do not"
    figure = new_figure(430, title, legend, 1300)
    bars, velocity, path = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    draw_bars(bars, scores)
    lines(velocity, "velocity", "relative error", {"v against v*": by_time(scores, "oracle/velocity_error")})
    own = {"X(x₀, 0, t) from the exact one": by_time(scores, MAP)}
    lines(path, "path from the same noise", "distance; excess loss: squared", own)
    excess = by_time(scores, "oracle/excess_loss")
    if np.isfinite(excess).any():
        path.plot(TIMES, excess, "s--", color=GENERATED_COLOR, label="excess loss", markersize=4, linewidth=1.3)
    path.legend(fontsize=8, frameon=False)
    figure.subplots_adjust(left=0.13, right=0.985, bottom=0.12, top=0.8, wspace=0.34)
    return figure


def draw_bars(axes: Axes, scores: Mapping[str, float | None]) -> None:
    """Draw a bar for each line of the budget, totals dark."""
    found = rows_of(scores)
    values = [float(scores[row.score] or 0.0) for row in found]
    axes.barh([row.name for row in found], values, color=[INK if row.is_total else REAL_COLOR for row in found])
    for place, (value, line) in enumerate(zip(values, table(scores), strict=True)):
        axes.text(value, place, f" {line[1]}" + (f", {line[2]}" if line[2] else ""), va="center", fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.3 * max(min(values), 1e-9), 20 * max([*values, 1e-9]))  # room for the numbers
    axes.set_title("where the error comes from", color=INK, fontsize=10, pad=4)
    axes.tick_params(colors=INK, labelsize=8)


def lines(axes: Axes, title: str, unit: str, shown: dict[str, np.ndarray]) -> None:
    """Draw values at the 8 times, by name."""
    for name, values in shown.items():
        axes.plot(TIMES, values, "o-", color=REAL_COLOR, label=name, markersize=4, linewidth=1.3)
    axes.set_yscale("log")
    panel(axes, title, unit)


def scores_of(scene: Scene) -> dict[str, float]:
    """Return the scores that the picture needs. UserError where the flow is not known exactly."""
    scene.show_all_classes()
    metrics = (OracleVelocity(), OracleFlowMapError(), ErrorBudget(scene.n), Wasserstein(min(500, scene.n)))
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        made = generation_of(scene.model, scene.n, scene.seed, scene.label, None, Path(cache))
        for metric in metrics:
            for result in metric.results(made):
                if isinstance(result, Absent) and isinstance(metric, OracleVelocity) and not scores:
                    raise UserError(f"there is no exact flow to hold {scene.name} against: {result.reason}")
                scores |= {} if isinstance(result, Absent) else result.values()
    return scores


def draw(scene: Scene) -> list[Path]:
    title = f"{scene.heading}: error budget, {scene.n:,} samples"
    return scene.save(picture(title, scores_of(scene)), "error_budget")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=1000))

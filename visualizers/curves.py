#!/usr/bin/env python
"""Losses and scores of any set of runs over their steps, with the noise floors of the scores.

    python visualizers/curves.py                           # the newest run
    python visualizers/curves.py first_flow digits          # several, by name
    python visualizers/curves.py "seeds_.*" metrics=train/loss,eval/energy_distance out=seeds.png

Words: run names, or regular expressions for them; ckpt (a checkpoint, for its run); metrics (train/loss and whatever the
runs scored), output_dir (the checkpoint's, or outputs here, else the repository's), out (a folder or .png;
outputs/pictures/curves.png). The band reaches from two standard deviations below the floor's mean to what 99 % of real sets
stay below (two standard deviations above it, where that is not known). Of more than 12 metrics the caption names those that
have no panel.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.command_line import front, matching, outputs
from common.errors import UserError
from configuration.settings import known_settings, unusable
from evaluation.pictures import INK, new_figure, save_figure
from run_files.metrics_file import SCORES, SIDE
from run_files.run_folder import RunFolder, run_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.milestones import Milestone

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
COLUMNS = 3
MOST = 12  # panels
BAND = (
    "Band: noise floor of the score (real against real) at each evaluation, from 2 standard deviations below its mean to "
    "what 99 % of real sets stay below (else 2 above). The last evaluation of a run has more samples, and so a "
    "floor of its own."
)
MILESTONES = (
    " Grey bars: what seeds of the recipe scored at each evaluation, mean and two standard deviations to both sides "
    "(scripts/milestones.py)."
)
LINE = 15  # pixels of a line of the caption


@dataclass(frozen=True)
class Settings:
    """The command line, run names aside."""

    metrics: list[str] = field(default_factory=list)
    ckpt: Path | None = None
    output_dir: Path | None = None
    out: Path | None = None


def chosen_runs(words: list[str], output: Path) -> list[RunFolder]:
    """Return the runs whose names match one of the words, the newest without words. UserError when one matches none."""
    known, chosen = run_folders(output, "metrics.jsonl"), dict[str, RunFolder]()
    if not known:
        raise UserError(f"there are no runs with metrics in {output / 'runs'}; train one, or give output_dir=<folder>")
    by_time = sorted(known.values(), key=lambda folder: folder.metrics.path.lstat().st_mtime)
    for word in words:
        names = {word, *matching(word, known)}
        asked = {folder.name: folder for folder in by_time if folder.name in names}
        if not asked and "=" in word:
            raise UserError(unusable(word, Settings) + "; and no run has that name")
        if not asked:
            raise UserError(f"no run in {output / 'runs'} is called {word}; `python scripts/runs.py list` shows them")
        chosen |= asked  # one that is there already keeps its place
    return list(chosen.values()) if words else by_time[-1:]


def series(rows: list[dict[str, Any]], metric: str) -> np.ndarray:
    """Return (N, 2): step and value of the rows that have the metric."""
    known = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return np.array(known, dtype=float).reshape(-1, 2)


def metrics_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return what is worth a panel: the training loss and every score, in the order they appear."""
    names = [name for row in rows for name in row if name == "train/loss" or name.startswith(SCORES)]
    return [name for name in dict.fromkeys(names) if not name.endswith(SIDE) and not name.startswith("oracle/budget_")]


def draw_metric(axes: Axes, metric: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw a metric of runs, by name, over their steps, above its noise floors; logarithmic where it spans a decade."""
    from matplotlib.ticker import NullFormatter

    right = 1.04 * max([row["step"] for rows in runs.values() for row in rows], default=1)
    for index, (name, rows) in enumerate(runs.items()):
        points = series(rows, metric)
        if len(points):
            color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
            marker = "o" if len(points) < 40 else None
            axes.plot(*points.T, style, color=color, linewidth=1.3, marker=marker, markersize=3, label=name)
            draw_floor(axes, metric, rows, color, right)
    axes.set_xlim(0, right)
    values = np.concatenate([series(rows, metric)[:, 1] for rows in runs.values()] or [np.zeros(1)])
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(metric, color=INK, fontsize=10, pad=4)
    axes.set_xlabel("optimizer step", fontsize=9, color=INK)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)


def draw_floor(axes: Axes, metric: str, rows: list[dict[str, Any]], color: str, right: float) -> None:
    """Draw the band of a run's noise floors: each reaches half of the way to the next evaluation, the outer ones on."""
    floor, sd, end = (series(rows, f"{metric}_floor{part}") for part in ("", "_sd", "_q99"))
    if len(floor) and len(floor) == len(sd):
        low = floor[:, 1] - 2 * sd[:, 1]
        high = end[:, 1] if len(end) == len(floor) else floor[:, 1] + 2 * sd[:, 1]
        steps = [0, *floor[:, 0], right]
        bottom, top = ([values[0], *values, values[-1]] for values in (low, high))
        axes.fill_between(steps, bottom, top, step="mid", color=color, alpha=0.15, linewidth=0)


def draw_milestones(axes: Axes, milestones: list[Milestone]) -> None:
    """Draw what seeds of a recipe scored, as bars of two standard deviations to both sides of the mean."""
    if milestones:
        steps, means, sds = np.array([(at.step, at.mean, at.sd) for at in milestones]).T
        axes.errorbar(steps, means, 2 * sds, fmt="none", ecolor="#8a8a8a", elinewidth=3, alpha=0.6, capsize=3, zorder=0)


def draw(words: list[str]) -> Path:
    """Carry out the command; return the file written."""
    settings, names = known_settings(words, Settings)
    own, folder = None, Path("pictures")
    if settings.ckpt:
        from configuration.stored import output_dir_of
        from run_files.checkpoint import load_checkpoint

        name, own = load_checkpoint(settings.ckpt)["run_name"], output_dir_of(settings.ckpt)
        names, folder = [*names, re.escape(name)], folder / name
    output = settings.output_dir or own or outputs()
    runs = {folder.name: folder.metrics.read() for folder in chosen_runs(names, output)}
    every = list(dict.fromkeys(name for rows in runs.values() for name in metrics_of(rows)))
    wanted = settings.metrics or every[:MOST]
    for name in wanted:
        if not any(len(series(rows, name)) for rows in runs.values()):
            raise UserError(f"none of these runs logged {name}; they have {', '.join(every)}")
    path = settings.out or output / folder
    path = path if path.suffix == ".png" else path / "curves.png"
    save_figure(picture(runs, wanted, [] if settings.metrics else every[MOST:]), path)
    return path


def picture(runs: dict[str, list[dict[str, Any]]], wanted: list[str], left_out: list[str]) -> Figure:
    """Return a panel for each metric that is wanted, under a caption that names those left out."""
    columns = min(COLUMNS, len(wanted))
    lines = -(-len(wanted) // columns)
    caption = BAND + (f" Not drawn: {', '.join(left_out)} (metrics=NAME,NAME draws them)." if left_out else "")
    width, title = 100 + 400 * columns, ", ".join(runs) if len(runs) <= 3 else f"{len(runs)} runs"
    wrapped = textwrap.wrap(caption, (width - 20) // 7)
    head = 65 + LINE * len(wrapped)
    height = head + 10 + 240 * lines
    figure = new_figure(height, title, "\n".join(wrapped), width)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, name in zip(panels, wanted, strict=False):
        draw_metric(panel, name, runs)
    for panel in panels[len(wanted) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        panels[0].legend(fontsize=8, frameon=False)
    figure.subplots_adjust(left=70 / width, right=0.985, bottom=50 / height, top=1 - head / height, hspace=0.45)
    return figure


def main(words: list[str]) -> int:
    return front(words, __doc__, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

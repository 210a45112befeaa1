#!/usr/bin/env python
"""Does the network copy its training data? Its velocity beside the exact flow of its training rows, by time.

    python visualizers/memorisation.py
    python visualizers/memorisation.py ckpt=outputs/ckpts/cnn/digits_last.pt n=4096

Writes memorisation.png: on the left the ratio of the distances to that flow with a row and without it, at states made of
training rows and of rows never seen (docs/metrics.md), with the probability that such a state was made of the training
row nearest to it; on the right losses, and the distance to the least possible one. n:
states of each kind, fewer where there are many rows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Mapping

import numpy as np

from common.errors import UserError
from evaluation.metrics.empirical import memorisation
from evaluation.parts import build_dataset
from evaluation.pictures import GENERATED_COLOR, INK, REAL_COLOR, new_figure
from run_files.metrics_file import BY_TIME, COPIES
from visualizers.scene import Scene, main

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COPIED = "#f3d9d2"  # behind the times at which it copies
TIMES = (np.arange(8) + 0.5) / 8  # in parts of the path's time
LINES = {  # of losses: what they are called, colour and style
    "held_out_loss": ("network, held-out rows", GENERATED_COLOR, "o-"),
    "memoriser_loss": ("copyist, held-out rows", GENERATED_COLOR, "s--"),
    "train_loss": ("network, training rows", REAL_COLOR, "o-"),
    "empirical_excess_loss": ("excess: the same minus the copyist's, the least possible", REAL_COLOR, "s--"),
}


def picture(title: str, verdict: str, by_time: dict[str, np.ndarray]) -> Figure:
    """Return the two panels; by_time: arrays (8,) as of Memorisation; older runs have no nearest_posterior."""
    copying, held_out = by_time["copying"], by_time["copying_held_out"]
    figure = new_figure(430, title, verdict, 1000)
    left, right = figure.subplots(1, 2)
    for t, near, far in zip(TIMES, copying, held_out, strict=True):
        if near <= COPIES * far:
            left.axvspan(t - 1 / 16, t + 1 / 16, color=COPIED, linewidth=0)
    left.plot(TIMES, held_out, "o-", color=GENERATED_COLOR, label="held-out rows")
    left.plot(TIMES, copying, "o-", color=REAL_COLOR, label="training rows")
    left.plot(TIMES, COPIES * held_out, ":", color=GENERATED_COLOR, label=f"{COPIES:g} of held-out rows: below it copies")
    if "nearest_posterior" in by_time:
        left.plot(TIMES, by_time["nearest_posterior"], "--", color="#7a7a7a", label="posterior of the nearest training row")
    left.set_ylim(0)
    left.legend(fontsize=8, frameon=False)
    panel(left, "distance to the flow with the row / without it", "median ratio")
    top = max(float(by_time[name].max()) for name in LINES)
    for name, (words, color, style) in LINES.items():
        shown = np.where(by_time[name] > 1e-6 * top, by_time[name], np.nan)  # 0 has no logarithm
        right.plot(TIMES, shown, style, color=color, label=words, markersize=4, linewidth=1.3)
    right.set_yscale("log")
    right.set_ylim(top=50 * top)  # room for the legend
    right.legend(fontsize=8, frameon=False)
    panel(right, "flow-matching loss", "sum over dimensions")
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.12, top=0.8, wspace=0.2)
    return figure


def panel(axes: Axes, title: str, unit: str) -> None:
    """Name a panel and its axes."""
    axes.set_title(title, color=INK, fontsize=10, pad=4)
    axes.set_xlabel("time of the state: 0 noise, 1 data", fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.set_xlim(0, 1)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)


def picture_of_scores(name: str, scores: Mapping[str, float | None]) -> tuple[Figure, str, str] | None:
    """Return the picture of a run by its scores, its description and caption; None where they have not its numbers."""
    copying = scores.get("oracle/copying")
    if copying is None:
        return None
    names = [*LINES, "copying", "copying_held_out", *["nearest_posterior"] * ("oracle/nearest_posterior_t0" in scores)]
    by_time = {line: np.array([scores[f"oracle/{line}{end}"] for end in BY_TIME], dtype=float) for line in names}
    caption = f"oracle/copying {copying:.4g}: it {'copies' if copying <= COPIES else 'does not copy'}"
    alt = f"distance ratios and losses of {name} by time, on training and held-out rows"
    return picture(name, caption, by_time), alt, caption


def draw(scene: Scene) -> list[Path]:
    model = scene.model
    found = memorisation(model.objective.eval(), build_dataset(model.config, model.device), model.source, scene.n)
    if isinstance(found, str):
        raise UserError(f"there is nothing to compare {scene.name} with: {found}")
    by_time = {name: values.numpy() for name, values in found.by_time.items()}
    return scene.save(picture(f"{scene.name}, {found.of}", found.verdict, by_time), "memorisation")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=4096))

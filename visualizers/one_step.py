#!/usr/bin/env python
"""One evaluation against many, from the same noise.

    python visualizers/one_step.py ckpt=outputs/ckpts/mlp/kmeans_one_step_last.pt
    python visualizers/one_step.py n=100 label=all

Writes one_step.png: points joined with where the solver takes the same noise, or two image grids. Distances are root
mean squares. One evaluation is a step of the learned map, or of Euler where only a velocity was learned.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from visualizers.scene import Scene, main, solver_label

if TYPE_CHECKING:
    from torch import Tensor


def draw(scene: Scene) -> list[Path]:
    from evaluation.parts import build_decoder
    from evaluation.pictures import image_grid_picture

    if scene.shape != (2,) and scene.label is None and scene.model.objective.network.num_classes:
        scene.label = "all"
    solver, model = scene.own_solver(), scene.model
    many = model.sample(scene.n, scene.seed, scene.label, solver)
    one = model.sample(scene.n, scene.seed, scene.label, evaluations=1)
    moved, apart = (root_mean_square(many - other) for other in (one, many.roll(scene.n // 2, 0)))
    title = f"{scene.heading}: one evaluation beside {solver_label(solver)}, {scene.n:,} samples"
    measured = f"distance between the two {moved:.3g}, between two samples {apart:.3g} (root mean square)"
    path = scene.folder / "one_step.png"
    if scene.shape == (2,):
        draw_points(path, one.numpy(), many.numpy(), scene.real(2000), title, measured)
        return [path]
    scene.need_images("use scripts/sample.py with out=samples.npz")
    decode, known = build_decoder(model.config, model.device), model.config["dataloaders"]["value_range"]
    low, high = (-1.0, 1.0) if decode is not None or known is None else known
    labels = model.labels(scene.n, scene.label)
    numbers = None if labels is None else labels.numpy()
    image_grid_picture(
        path, model.images(one).numpy(), (low, high), max(1, round(scene.n**0.5)), model.images(many).numpy(),
        title, numbers, numbers, names=("one evaluation", f"{solver.evaluations} evaluations"),
        score_line=measured,
    )  # fmt: skip
    return [path]


def root_mean_square(differences: Tensor) -> float:
    """Of the lengths of differences (N, ...)."""
    return differences.flatten(1).square().sum(1).mean().sqrt().item()


def draw_points(path: Path, one: np.ndarray, many: np.ndarray, real: np.ndarray, title: str, measured: str) -> None:
    from matplotlib.collections import LineCollection

    from evaluation.pictures import GENERATED_COLOR, INK, REAL_COLOR, new_figure, save_figure, shared_limits

    low, high = shared_limits(np.concatenate([one, many]), real)
    figure = new_figure(450, title, measured)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, name in zip(
        panels, ("one evaluation (blue) joined with many (orange)", "one evaluation over the data (grey)"), strict=True
    ):
        panel.set_title(name, color=INK, fontsize=11, pad=5)
        panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="x₁")
        panel.set_aspect("equal", adjustable="box")
        panel.tick_params(colors=INK, labelsize=9)
    joined = LineCollection(list(np.stack([one, many], 1)), colors="#bbbbbb", linewidths=0.5, zorder=1)
    panels[0].add_collection(joined)
    panels[0].scatter(*many.T, s=6, c=REAL_COLOR, linewidths=0, zorder=2)
    panels[0].scatter(*one.T, s=6, c=GENERATED_COLOR, linewidths=0, zorder=2)
    panels[1].scatter(*real.T, s=5, c="#d5d5d5", linewidths=0)
    panels[1].scatter(*one.T, s=5, c=GENERATED_COLOR, alpha=0.6, linewidths=0)
    panels[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.12, top=0.84, wspace=0.06)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=100, points=1000))

#!/usr/bin/env python
"""One evaluation against many, from the same noise.

    python visualizers/one_step.py ckpt=outputs/ckpts/mlp/kmeans_shortcut_last.pt
    python visualizers/one_step.py n=100 label=all

Writes one_step.png: points joined with where the solver takes the same noise, or two image grids. Distances are root
mean squares. One evaluation is a step of the learned map, or of Euler where only a velocity was learned.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import Tensor

from evaluation.pictures import GENERATED_COLOR, REAL_COLOR, image_grid_picture, new_figure, save_figure, shared_limits
from models.inputs import classes_in
from visualizers.scene import Scene, main, plane, solver_label


def draw(scene: Scene) -> list[Path]:
    if scene.shape != (2,):
        scene.show_all_classes()
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
    labels = classes_in(model.labels(scene.n, scene.label), model.objective.network.num_classes)
    numbers = None if labels is None else labels.numpy()
    made = {"one evaluation": one, f"{solver.evaluations} evaluations": many}
    panels = {name: (model.images(states).numpy(), numbers) for name, states in made.items()}
    image_grid_picture(path, panels, scene.value_range, max(1, round(scene.n**0.5)), title, measured)
    return [path]


def root_mean_square(differences: Tensor) -> float:
    """Return that of the lengths of differences (N, ...)."""
    return differences.flatten(1).square().sum(1).mean().sqrt().item()


def draw_points(path: Path, one: np.ndarray, many: np.ndarray, real: np.ndarray, title: str, measured: str) -> None:
    from matplotlib.collections import LineCollection

    low, high = shared_limits(np.concatenate([one, many]), real)
    figure = new_figure(450, title, measured)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    plane(panels[0], "one evaluation (blue) joined with many (orange)", low, high)
    plane(panels[1], "one evaluation over the data (grey)", low, high)
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

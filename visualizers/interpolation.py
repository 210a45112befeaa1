#!/usr/bin/env python
"""Samples along a path in noise space: what lies between two samples.

    python visualizers/interpolation.py
    python visualizers/interpolation.py n=6 seed=1 label=3

Writes interpolation.png. Images: each row goes from one noise to another along the great circle between them. Points:
circles in noise space, and what the flow makes of them, for one class (label, or 0) of a conditional model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from evaluation.generate import fresh_noise, generate
from evaluation.pictures import draw_grids, new_figure, save_figure, shared_limits, tile
from visualizers.denoising import as_bytes, enlarged
from visualizers.scene import Scene, main, plane

COLUMNS = 11
RADII = (0.5, 1.0, 1.5, 2.0)  # standard deviations of the noise


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Return states (N, W, ...) between a and b (N, ...) along the great circle, norms going from one's to the other's."""
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos()[:, None, None]
    w = weights[None, :, None].to(x)
    turned = ((1 - w) * angle).sin() * x[:, None] + (w * angle).sin() * y[:, None]
    return (turned / angle.sin()).reshape(len(a), len(weights), *a.shape[1:])


def carried(scene: Scene, noise: Tensor, label: Tensor | None) -> Tensor:
    with torch.no_grad():
        return generate(scene.model.flow(), scene.own_solver(), noise, label, fresh_noise(scene.model.source, scene.seed))


def draw(scene: Scene) -> list[Path]:
    path = scene.folder / "interpolation.png"
    if scene.shape == (2,):
        scene.choose_one_class()
        draw_circles(scene, path)
    else:
        draw_rows(scene, path)
    return [path]


def draw_rows(scene: Scene, path: Path) -> None:
    scene.need_images("see particles.py")
    rows, labels = scene.n, scene.labels
    scene.n *= 2
    ends = scene.noise()
    between = slerp(ends[:rows], ends[rows:], torch.linspace(0, 1, COLUMNS))
    label = None if labels is None else labels.repeat_interleave(COLUMNS, 0)
    images = as_bytes(scene, carried(scene, between.flatten(0, 1), label))
    grid = enlarged(tile(images, COLUMNS), 900)
    draw_grids(path, {"each row: from one noise to another": grid}, f"{scene.heading}: between samples")


def draw_circles(scene: Scene, path: Path) -> None:
    from matplotlib import colormaps

    angle = torch.linspace(0, 2 * np.pi, 721)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    label = scene.labels
    shared = None if label is None else label[:1].expand(len(circle), *label.shape[1:])
    rings = [(radius * circle).to(scene.model.device) for radius in RADII]
    ends = [carried(scene, ring, shared).cpu().numpy() for ring in rings]
    real = scene.real(2000)
    figure = new_figure(450, f"{scene.heading}: circles in noise space", "")
    left, right = figure.subplots(1, 2)
    plane(left, "noise", *np.array([(-2.6, -2.6), (2.6, 2.6)]))
    plane(right, "data (grey) and where the circles go", *shared_limits(np.concatenate(ends), real))
    right.scatter(*real.T, s=4, c="#d5d5d5", linewidths=0)
    for index, (radius, ring, end) in enumerate(zip(RADII, rings, ends, strict=True)):
        color = colormaps["plasma"](0.85 * index / (len(RADII) - 1))
        left.plot(*ring.cpu().numpy().T, color=color, linewidth=1.5, label=f"radius {radius:g}")
        right.plot(*end.T, color=color, linewidth=1, marker=".", markersize=2)
    left.legend(loc="upper right", fontsize=8, frameon=False)
    left.set_ylabel("x₂")
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.12, top=0.84, wspace=0.16)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=8))

#!/usr/bin/env python
"""Particles on their way from noise to data: by Euler, by Runge-Kutta and in a single jump, from the same noise.

    python visualizers/particles.py
    python visualizers/particles.py ckpt=outputs/ckpts/mlp/first_flow_last.pt solver=heun solver.steps=8

Writes particles.png (the start, half of the way, the end) and particles.gif. A particle keeps its colour, from left to right
at the start; the data is grey. With a solver typed, that one takes the place of the first two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from evaluation.generate import few_step_solver
from evaluation.pictures import new_figure, save_figure, shared_limits
from solvers.base_solver import Sampler
from solvers.runge_kutta import RK4, Euler
from visualizers.films import film_beside, pixels
from visualizers.scene import Limits, Scene, frame_times, main, makes_points, plane, solver_label, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure


LEGEND = "grey: the data; a particle keeps its colour"


def ways(scene: Scene) -> dict[str, np.ndarray]:
    """Return where the particles are at each frame's time, by the name of the way they go: (frames, n, 2) each."""
    flow, label, noise, times = scene.model.flow(), scene.labels, scene.noise(), frame_times(scene.frames)
    solvers: list[Sampler] = [Euler(10), RK4(24)] if scene.solver is None else [scene.solver]
    solvers.append(few_step_solver(flow, 1))
    with torch.no_grad():
        walked = (walk(solver, flow, noise, label, times, scene.fresh()) for solver in solvers)
        walks = [flow.in_data_units(states).cpu().numpy() for states in walked]
    return dict(zip(map(solver_label, solvers), walks, strict=True))


def start_colors(start: np.ndarray) -> np.ndarray:
    """Return an RGBA colour (n, 4) for each particle by its rank along x₁ at the start (n, 2)."""
    from matplotlib import colormaps

    rank = start[:, 0].argsort().argsort() / max(len(start) - 1, 1)
    return colormaps["plasma"](0.85 * rank)


def draw_panel(
    axes: Axes, name: str, points: np.ndarray, colors: np.ndarray, real: np.ndarray, limits: Limits
) -> PathCollection:
    """Draw particles (n, 2) over the data; return them."""
    plane(axes, name, *limits)
    axes.scatter(real[:, 0], real[:, 1], s=5, c="#d5d5d5", linewidths=0)
    return axes.scatter(points[:, 0], points[:, 1], s=7, c=colors, linewidths=0)


def draw(scene: Scene) -> list[Path]:
    scene.need_points("see denoising.py")
    paths, real = ways(scene), scene.real(1500)
    limits = shared_limits(np.concatenate([states[[0, -1]].reshape(-1, 2) for states in paths.values()]), real)
    title = f"{scene.heading}: from noise to data"
    path = scene.folder / "particles.png"
    save_figure(still(paths, real, limits, title), path)
    if scene.form == "png":
        return [path]
    figure, particles = film_figure(paths, real, limits, title)
    return [path, film_beside(path, scene.form, scene.frames, lambda index: filmed(figure, particles, paths, index))]


def still(paths: dict[str, np.ndarray], real: np.ndarray, limits: Limits, title: str) -> Figure:
    """Return the start, the middle and the end of every way."""
    frames = len(next(iter(paths.values())))
    colors, times = start_colors(next(iter(paths.values()))[0]), frame_times(frames).numpy()
    height, shown = 130 + 280 * len(paths), sorted({0, (frames - 1) // 2, frames - 1})
    figure = new_figure(height, title, LEGEND, 300 * len(shown))
    axes = figure.subplots(len(paths), len(shown), sharex=True, sharey=True, squeeze=False)
    for row, (name, states) in zip(axes, paths.items(), strict=True):
        for panel, index in zip(row, shown, strict=True):
            draw_panel(panel, f"{name}, t = {times[index]:.2f}", states[index], colors, real, limits)
            panel.label_outer()
        row[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.07, right=0.985, bottom=50 / height, top=1 - 80 / height, wspace=0.06, hspace=0.16)
    return figure


def film_figure(
    paths: dict[str, np.ndarray], real: np.ndarray, limits: Limits, title: str
) -> tuple[Figure, list[PathCollection]]:
    """Return the first frame of the film, and what moves in it."""
    colors, count = start_colors(next(iter(paths.values()))[0]), len(paths)
    figure = new_figure(390, title, "", 300 * count + 40)
    panels = np.atleast_1d(figure.subplots(1, count, sharey=True))
    shown = zip(panels, paths.items(), strict=True)
    particles = [draw_panel(panel, name, states[0], colors, real, limits) for panel, (name, states) in shown]
    figure.axes[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.16 / count, right=0.985, bottom=0.12, top=0.8, wspace=0.06)
    return figure, particles


def filmed(figure: Figure, particles: list[PathCollection], paths: dict[str, np.ndarray], index: int) -> np.ndarray:
    """Return a frame as bytes (H, W, 3)."""
    for drawn, states in zip(particles, paths.values(), strict=True):
        drawn.set_offsets(states[index])
    t = frame_times(len(states))[index]
    figure.texts[1].set_text(f"t = {t:.2f}; {LEGEND}")
    return pixels(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, fits=makes_points, n=1500, frames=31))

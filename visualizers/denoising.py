#!/usr/bin/env python
"""Images on their way from noise to data: a strip for each sample, above the data the model expects at that moment.

    python visualizers/denoising.py
    python visualizers/denoising.py n=8 label=all format=mp4

Writes denoising.png (strips) and denoising.gif (all samples at once). The expected image at time t is E[x1 | z_t],
read off the velocity: (sigma v - sigma' z) / (alpha' sigma - alpha sigma').
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from evaluation.pictures import draw_grids, new_figure, rescale, tile, to_bytes
from solvers.runge_kutta import RK4
from visualizers.films import film_beside, pixels
from visualizers.scene import Scene, frame_times, main, solver_label, walk

COLUMNS = 10  # times of a strip
CAPTION = 28  # pixels of the line below a frame
STRIPS = 5  # samples in the PNG


def expected_data(scene: Scene, states: Tensor, t: Tensor) -> Tensor:
    """Return E[x1 | z_t = states (N, ...)] as the model sees it; at t = 1 the states themselves."""
    flow = scene.model.flow()
    if t >= flow.path.last_time:
        return states
    flow.check_learns_velocity()
    v = flow.velocity(states, t.to(states.device), scene.labels)
    return flow.path.x1_from_velocity(v, states, t.to(states))


def draw(scene: Scene) -> list[Path]:
    scene.need_images("see particles.py")
    solver, flow = scene.own_solver() if scene.solver else RK4(12), scene.model.flow()
    film_times, strip_times = frame_times(scene.frames), torch.linspace(0, 1, COLUMNS)
    times = torch.cat([film_times, strip_times]).sort().values
    with torch.no_grad():
        at = dict(zip(times.tolist(), walk(solver, flow, scene.noise(), scene.labels, times, scene.fresh()), strict=True))
        states = torch.stack([at[t] for t in strip_times.tolist()])[:, :STRIPS]
        expected = torch.stack([expected_data(scene, at[float(t)], t)[:STRIPS] for t in strip_times])

    # Row by row: the states of a sample at all times, below them what the model expects at these times.
    strips = torch.stack([states, expected])
    rows = strips.permute(2, 0, 1, *range(3, strips.dim())).flatten(0, 2)
    path = scene.folder / "denoising.png"
    grid = enlarged(tile(as_bytes(scene, flow.in_data_units(rows)), COLUMNS), 900)
    title = f"{scene.heading}: from noise to data ({solver_label(solver)})"
    measured = "upper rows: states; below each: the data that the model expects of it"
    draw_grids(path, {"": grid}, title, None, measured, [f"t = {t:.2f}" for t in strip_times.tolist()])

    if scene.form == "png":
        return [path]
    columns = max(1, round(scene.n**0.5))

    def frame(index: int) -> np.ndarray:
        t = float(film_times[index])
        grid = tile(as_bytes(scene, flow.in_data_units(at[t])), columns)
        return captioned(enlarged(grid, 480), f"t = {t:.2f}; {solver_label(solver)}")

    return [path, film_beside(path, scene.form, len(film_times), frame)]


def as_bytes(scene: Scene, states: Tensor) -> np.ndarray:
    """Return states (N, ...) in the data's units as image bytes (N, H, W, 3), latents decoded."""
    return to_bytes(scene.model.images(states).numpy(), scene.value_range)


def enlarged(grid: np.ndarray, width: int) -> np.ndarray:
    return rescale(grid, width / grid.shape[1])


def captioned(frame: np.ndarray, words: str) -> np.ndarray:
    """Return a frame (H, W, 3) with a line of words below it, and white added to an even number of rows and columns."""
    frame = np.concatenate([frame, pixels(new_figure(CAPTION, words, "", frame.shape[1]))])
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=64, frames=25))

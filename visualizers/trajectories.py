#!/usr/bin/env python
"""The paths of samples from noise to data, and how straight they are, beside the exact ones where they are known.

    python visualizers/trajectories.py
    python visualizers/trajectories.py solver=euler solver.steps=5

Writes trajectories.png. Straightness (Liu et al. 2022, arXiv 2209.03003, equation 5) is the mean over paths of the integral
of |(z_1 - z_0) - dz/dt|^2 over [0, 1], relative to the mean of |z_1 - z_0|^2: 0 for straight paths walked at an even pace.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from evaluation.pictures import INK, new_figure, shared_limits
from solvers.base_solver import BaseSolver
from solvers.runge_kutta import RK4
from visualizers.scene import Scene, frame_times, main, makes_points, plane, solver_label, walk

SHOWN = 250  # paths drawn; the number is of all n


def straightness(paths: np.ndarray) -> float:
    """Return that of paths (T, N, D) known at T equal times: 0 is straight at an even pace."""
    chord = paths[-1] - paths[0]
    pieces = np.diff(paths, axis=0) * (len(paths) - 1)
    return float(((pieces - chord) ** 2).sum(-1).mean() / (chord**2).sum(-1).mean())


def paths_of(scene: Scene) -> dict[str, np.ndarray]:
    """Return paths (51, n, 2) by the name of what walks them: a solver, the learned map, the exact field."""
    times, noise, flow = frame_times(51), scene.noise(), scene.model.flow()
    solver = scene.own_solver()
    is_ode = isinstance(solver, BaseSolver)
    with torch.no_grad():
        walked = walk(solver, flow, noise, scene.labels, times, scene.fresh())
        paths = {("learned field, " if is_ode else "") + solver_label(solver): flow.in_data_units(walked).cpu().numpy()}
        if flow.learns == "flow_map" and is_ode:
            maps = [flow.flow_map(noise, times[0], t, scene.labels) for t in times]
            paths["learned map from the start"] = flow.in_data_units(torch.stack(maps)).cpu().numpy()
        truth = scene.exact()
        if not isinstance(truth, str):
            grid = torch.linspace(0, truth.path.last_time, 101, dtype=torch.float64)
            seen: list[torch.Tensor] = []
            label = None if isinstance(scene.label, int) or scene.labels is None else scene.labels.cpu()
            exact = lambda z, t: truth(z, t, label)  # noqa: E731
            RK4(100).solve(exact, noise.cpu().double(), grid, lambda x, t: seen.append(x.clone()))
            paths["exact"] = torch.stack(seen[::2]).numpy()
    return paths


def draw(scene: Scene) -> list[Path]:
    from matplotlib.collections import LineCollection

    scene.need_points("see denoising.py")
    paths = paths_of(scene)
    limits = shared_limits(np.concatenate([p[[0, -1]].reshape(-1, 2) for p in paths.values()]), scene.real(1000))
    legend = "grey: the noise; black: the samples; straightness: 0 is straight at an even pace, more is more bent"
    figure = new_figure(450, f"{scene.heading}: paths from noise to data", legend, max(60 + 400 * len(paths), 600))
    panels = np.atleast_1d(figure.subplots(1, len(paths), sharex=True, sharey=True))
    for panel, (name, states) in zip(panels, paths.items(), strict=True):
        shown = states[:, :SHOWN]
        pieces = np.stack([shown[:-1], shown[1:]], 2).reshape(-1, 2, 2)
        when = np.repeat(np.linspace(0, 1, len(shown) - 1), shown.shape[1])
        lines = LineCollection(list(pieces), array=when, cmap="viridis_r", linewidths=0.7, alpha=0.8)
        plane(panel, f"{name}\nstraightness {straightness(states):.3f}", *limits)
        panel.add_collection(lines)
        panel.scatter(*shown[0].T, s=5, c="#999999", linewidths=0)
        panel.scatter(*shown[-1].T, s=8, c=INK, linewidths=0)
    panels[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.16 / len(paths), right=1 - 0.24 / len(paths), bottom=0.12, top=0.79, wspace=0.06)
    bar = figure.colorbar(lines, ax=list(panels), fraction=0.03, pad=0.015, label="t")
    bar.ax.tick_params(colors=INK, labelsize=9)
    return scene.save(figure, "trajectories")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, fits=makes_points, n=1000))

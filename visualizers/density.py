#!/usr/bin/env python
"""Where the samples lie against where the data lies: two densities and their difference on one scale.

    python visualizers/density.py
    python visualizers/density.py n=20000 solver=flow_map solver.steps=1

Writes density.png. Densities are per unit of area, of the samples a histogram, of the data its exact density where it is
known, and a histogram of as many held-out states where not; both are seen through the same cells, in logarithmic colours,
so that a single stray sample shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from evaluation.closed_forms import ExactFlow
from evaluation.pictures import INK, new_figure, shared_limits
from visualizers.scene import Scene, lattice, main, makes_points, plane

CELLS = 64  # a side
LEGEND = "samples and data: logarithmic colours, the darkest a single sample in a cell, white none; difference: linear"


def histogram(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the density (CELLS, CELLS) of points (N, 2), those outside counted, per unit of area; rows along x₂."""
    edges = [np.linspace(low[i], high[i], CELLS + 1) for i in range(2)]
    area = float(np.prod((high - low) / CELLS))
    return np.histogram2d(points[:, 0], points[:, 1], bins=(edges[0], edges[1]))[0].T / (len(points) * area)


def draw(scene: Scene) -> list[Path]:
    from matplotlib.colors import LogNorm, Normalize

    scene.need_points("see samples.py")
    samples, real = scene.samples().numpy(), scene.real(scene.n)
    low, high = shared_limits(samples, real)
    ours, truth = histogram(samples, low, high), scene.exact()
    if not isinstance(truth, ExactFlow):  # the density under guidance has no closed form
        theirs, named = histogram(real, low, high), f"data ({len(real):,} states)"
    else:
        fine = torch.from_numpy(lattice(low, high, 3 * CELLS))
        density = truth.log_prob(fine, torch.tensor(1.0, dtype=torch.float64)).exp().numpy()
        theirs, named = density.reshape(CELLS, 3, CELLS, 3).mean((1, 3)), "data (exact)"

    one = float(CELLS**2 / np.prod(high - low) / scene.n)  # the density of a cell with a single sample
    figure = new_figure(420, f"{scene.heading}: density of the samples", LEGEND, 1300)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    top = max(float(np.quantile(theirs, 0.999)), 2 * one)
    logarithmic: Normalize = LogNorm(0.5 * one, top)
    outside = int(((samples < low) | (samples > high)).any(1).sum())
    shown = [(f"samples ({scene.n:,}, {outside:,} outside)", ours, "viridis", logarithmic)]
    shown.append((named, theirs, "viridis", logarithmic))
    shown.append(("samples - data", ours - theirs, "RdBu_r", Normalize(-top, top)))
    for panel, (name, values, colors, norm) in zip(panels, shown, strict=True):
        seen = np.ma.masked_less(values, 0.5 * one) if norm is logarithmic else values
        image = panel.imshow(seen, origin="lower", extent=(low[0], high[0], low[1], high[1]), cmap=colors, norm=norm)
        plane(panel, name, low, high)
        bar = figure.colorbar(image, ax=panel, fraction=0.046, pad=0.03)
        bar.ax.tick_params(colors=INK, labelsize=8)
    bar.set_label("per unit of area", color=INK)
    panels[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.045, right=0.95, bottom=0.12, top=0.82, wspace=0.12)
    return scene.save(figure, "density")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, fits=makes_points, n=20_000))

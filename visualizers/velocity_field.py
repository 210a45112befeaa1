#!/usr/bin/env python
"""The learned velocity field over time, arrows over the density of the states, the exact field beside it where it is known.

    python visualizers/velocity_field.py
    python visualizers/velocity_field.py ckpt=outputs/ckpts/mlp/first_flow_last.pt format=mp4

Writes velocity_field.png (four times) and velocity_field.gif. Arrows have the same scale in every frame, and fade where
states are rare: nothing was learned there. Of a conditional model it is the field of one class: label, or 0. The relative
error is sqrt(E|v - v*|^2 / E|v*|^2) over the states of that time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from evaluation.closed_forms import ExactFlow
from evaluation.metrics.oracles import KnownFlow
from evaluation.pictures import INK, new_figure, save_figure, shared_limits
from losses.objective import FlowObjective
from solvers.runge_kutta import RK4
from visualizers.films import film_beside, pixels
from visualizers.scene import Scene, frame_times, lattice, main, makes_points, plane, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.quiver import Quiver


ARROWS = 17  # a side
CELLS = 90  # a side of the density
SHADES = 12  # of the density: steps of colour make a film small, and its levels readable
FILM_LEGEND = "blue: density relative to its highest now; arrows fade where states are rare"
STILL = (0.0, 1 / 3, 2 / 3, 1.0)  # the times of the PNG, or the frames nearest to them
LEGEND = "blue: density of the states, relative to its highest at that time; arrows: velocity, faint where states are rare"


class Field:
    """What the frames of one model show: the states (T, N, 2) at times (T,), both fields on a grid of arrows.

    learned, exact (T, A, 2): velocities at the places (A, 2); exact is None where it is not known. errors (T,): relative
    error at the states of that time.
    """

    def __init__(self, scene: Scene, times: np.ndarray):
        self.units = "data units" if scene.model.objective.data_std is None else "standard deviations of the data"
        model, clock = scene.model, torch.from_numpy(times).float()
        flow, label = model.flow(), scene.labels  # of one class, if any
        with torch.no_grad():
            self.states = walk(RK4(12), flow, scene.noise(), label, clock).cpu()
        self.times = times
        real = flow.standardised(torch.from_numpy(scene.real(2000)).to(model.device)).cpu().numpy()
        low, high = shared_limits(self.states.numpy().reshape(-1, 2), real)
        self.low, self.high = np.minimum(low, -2.2), np.maximum(high, 2.2)
        self.places = lattice(self.low, self.high, ARROWS)
        at = torch.from_numpy(self.places).float().to(model.device)
        shared = None if label is None else label[:1].expand(len(at), *label.shape[1:])
        self.learned = np.stack([flow.velocity(at, t.to(at), shared).detach().cpu().numpy() for t in clock])
        truth = scene.exact()
        self.truth: KnownFlow | None = None if isinstance(truth, str) else truth
        self.exact = None if self.truth is None else np.stack([exact_velocity(self.truth, at, float(t)) for t in clock])
        self.errors = None if self.truth is None else self.relative_errors(self.truth, flow, label)
        speeds = np.linalg.norm(self.learned if self.exact is None else self.exact, axis=-1)
        self.scale = float(np.quantile(speeds, 0.9)) * ARROWS / 1.6

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Return the fields there are, by name."""
        return {"learned": self.learned} | ({} if self.exact is None else {"exact": self.exact})

    def relative_errors(self, truth: KnownFlow, flow: FlowObjective, label: Tensor | None) -> list[float]:
        errors = []
        for states, t in zip(self.states, self.times, strict=True):
            last = min(float(t), truth.path.last_time)
            with torch.no_grad():
                ours = flow.velocity(states.to(next(flow.network.parameters()).device), torch.tensor(last), label).cpu()
            true = torch.from_numpy(exact_velocity(truth, states, last))
            errors.append(((ours - true).square().sum() / true.square().sum()).sqrt().item())
        return errors

    def density(self, index: int) -> np.ndarray:
        """Return the density of the states at a frame's time, relative to its highest: (CELLS, CELLS), rows along x₂."""
        if isinstance(self.truth, ExactFlow):
            at = torch.from_numpy(lattice(self.low, self.high, CELLS))
            t = torch.tensor(float(self.times[index]), dtype=torch.float64)
            values = self.truth.log_prob(at, t).exp().numpy().reshape(CELLS, CELLS)
        else:
            bins = [np.linspace(self.low[i], self.high[i], CELLS + 1) for i in range(2)]
            counts = np.histogram2d(self.states[index, :, 0], self.states[index, :, 1], bins=(bins[0], bins[1]))[0].T
            values = gaussian_filter(counts.astype(float), 2.5)  # cells: few states make no blotches
        return (values / max(values.max(), 1e-12)) ** 0.5  # the root: tails stay visible

    def ink(self, density: np.ndarray) -> list[tuple[float, float, float, float]]:
        """Return RGBA colours of the arrows over a density (CELLS, CELLS): black where there are states, else faint."""
        columns, rows = ((self.places - self.low) / (self.high - self.low) * CELLS).astype(int).T
        return [(0.13, 0.13, 0.13, min(0.12 + 3 * float(seen), 1.0)) for seen in density[rows, columns]]

    def draw(self, axes: Axes, index: int, velocities: np.ndarray, name: str) -> tuple[AxesImage, Quiver]:
        """Draw a panel at one time; return what changes with it."""
        from matplotlib import colormaps

        extent = (self.low[0], self.high[0], self.low[1], self.high[1])
        density = self.density(index)
        shades = colormaps["Blues"].resampled(SHADES)
        image = axes.imshow(density, origin="lower", extent=extent, cmap=shades, vmin=0, vmax=1.6)
        arrows = axes.quiver(
            *self.places.T, *velocities[index].T, color=self.ink(density), scale=self.scale, scale_units="width",
            width=0.005, pivot="mid",
        )  # fmt: skip
        if axes is axes.figure.axes[0]:
            speed = float(f"{1.6 * self.scale / ARROWS:.0e}")
            axes.quiverkey(arrows, 0.95, 0.03, speed, f"{speed:g} {self.units} per unit of time", coordinates="figure",
                           labelpos="W", color=INK, fontproperties={"size": 9})  # fmt: skip
        plane(axes, name, self.low, self.high)
        return image, arrows


def exact_velocity(truth: KnownFlow, at: Tensor, t: float) -> np.ndarray:
    return truth(at.cpu().double(), torch.tensor(min(t, truth.path.last_time), dtype=torch.float64)).numpy()


def still(field: Field, title: str) -> Figure:
    """Return both fields at some times, one above the other."""
    height = 130 + 260 * len(field.kinds)
    shown = sorted({round(t * (len(field.times) - 1)) for t in STILL})
    figure = new_figure(height, title, LEGEND, 940)
    axes = figure.subplots(len(field.kinds), len(shown), sharex=True, sharey=True, squeeze=False)
    for row, (kind, velocities) in zip(axes, field.kinds.items(), strict=True):
        for panel, index in zip(row, shown, strict=True):
            known = None if kind == "exact" or field.errors is None else field.errors[index]
            error = "" if known is None else f"\nrelative error {known:.3f}"
            field.draw(panel, index, velocities, f"{kind}, t = {field.times[index]:.2f}{error}")
            panel.label_outer()
        row[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.055, right=0.99, bottom=70 / height, top=1 - 100 / height, wspace=0.05, hspace=0.22)
    return figure


def film_figure(field: Field, title: str) -> tuple[Figure, list[tuple[AxesImage, Quiver]]]:
    """Return the first frame of the film, and what changes in it."""
    two = len(field.kinds) == 2
    figure = new_figure(520, title, "", 900 if two else 520)
    panels = np.atleast_1d(figure.subplots(1, len(field.kinds), sharex=True, sharey=True))
    drawn = [field.draw(panel, 0, v, kind) for panel, (kind, v) in zip(panels, field.kinds.items(), strict=True)]
    panels[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.075 if two else 0.13, right=0.985, bottom=0.14, top=0.83, wspace=0.06)
    return figure, drawn


def filmed(figure: Figure, drawn: list[tuple[AxesImage, Quiver]], field: Field, index: int) -> np.ndarray:
    """Return a frame as bytes (H, W, 3)."""
    error = "" if field.errors is None else f", relative error of the learned field {field.errors[index]:.3f}"
    figure.texts[1].set_text(f"t = {field.times[index]:.2f}{error}\n{FILM_LEGEND}")
    density = field.density(index)
    for (image, arrows), velocities in zip(drawn, field.kinds.values(), strict=True):
        image.set_data(density)
        arrows.set_UVC(*velocities[index].T)
        arrows.set_facecolor(field.ink(density))
    return pixels(figure)


def draw(scene: Scene) -> list[Path]:
    scene.need_points("see denoising.py")
    scene.choose_one_class()
    path, title = scene.folder / "velocity_field.png", f"{scene.heading}: velocity field"
    field = Field(scene, frame_times(scene.frames).numpy())
    save_figure(still(field, title), path)
    if scene.form == "png":
        return [path]
    figure, drawn = film_figure(field, title)
    return [path, film_beside(path, scene.form, scene.frames, lambda index: filmed(figure, drawn, field, index))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, fits=makes_points, n=1500, frames=31))

#!/usr/bin/env python
"""The learned velocity field over time, arrows over the density of the states, the exact field beside it where it is known.

    python visualizers/velocity_field.py
    python visualizers/velocity_field.py ckpt=outputs/ckpts/mlp/first_flow_last.pt format=mp4

Writes velocity_field.png (four times) and velocity_field.gif. Arrows have the same scale in every frame. The error under a
learned field is sqrt(E|v - v*|^2 / E|v*|^2) over the states of that time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from visualizers.scene import Scene, frame_times, main, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.quiver import Quiver
    from torch import Tensor

    from evaluation.closed_forms import ExactFlow
    from losses.objective import FlowObjective

ARROWS = 21  # a side
CELLS = 90  # a side of the density
STILL = (0.0, 0.35, 0.7, 1.0)  # the times of the PNG, or the frames nearest to them


class Field:
    """What the frames of one model show: the states (T, N, 2) at times (T,), both fields on a grid of arrows.

    learned, exact (T, A, 2): velocities at the places (A, 2); exact is None where it is not known. errors (T,): relative
    error at the states of that time.
    """

    def __init__(self, scene: Scene, times: np.ndarray):
        import torch

        from visualizers.pictures import shared_limits

        model, clock = scene.model, torch.from_numpy(times).float()
        flow, label = model.flow(), scene.labels
        with torch.no_grad():
            from solvers.runge_kutta import RK4

            self.states = walk(RK4(12), flow, scene.noise(), label, clock).cpu()
        self.times = times
        self.low, self.high = shared_limits(self.states.numpy().reshape(-1, 2), scene.real(2000))
        self.low, self.high = np.minimum(self.low, -2.2), np.maximum(self.high, 2.2)
        self.places = lattice(self.low, self.high, ARROWS)
        at = torch.from_numpy(self.places).float().to(model.device)
        shared = None if label is None else label[:1].expand(len(at))
        self.learned = np.stack([flow.velocity(at, t.to(at), shared).detach().cpu().numpy() for t in clock])
        truth = scene.exact()
        self.truth: ExactFlow | None = None if isinstance(truth, str) else truth
        self.exact = None if self.truth is None else np.stack([self.velocity(self.truth, at, float(t)) for t in clock])
        self.errors = None if self.truth is None else self.relative_errors(flow, label)
        speeds = np.linalg.norm(self.learned if self.exact is None else self.exact, axis=-1)
        self.scale = float(np.quantile(speeds, 0.9)) * ARROWS / 1.6

    @staticmethod
    def velocity(truth: ExactFlow, at: Tensor, t: float) -> np.ndarray:
        import torch

        return truth(at.cpu().double(), torch.tensor(min(t, truth.path.last_time), dtype=torch.float64)).numpy()

    def relative_errors(self, flow: FlowObjective, label: Tensor | None) -> list[float]:
        import torch

        assert self.truth is not None
        errors = []
        for states, t in zip(self.states, self.times, strict=True):
            last = min(float(t), self.truth.path.last_time)
            with torch.no_grad():
                ours = flow.velocity(states.to(next(flow.network.parameters()).device), torch.tensor(last), label).cpu()
            true = torch.from_numpy(self.velocity(self.truth, states, last))
            errors.append(((ours - true).square().sum() / true.square().sum()).sqrt().item())
        return errors

    def density(self, index: int) -> np.ndarray:
        """Density of the states at a frame's time, relative to its highest: (CELLS, CELLS), rows along the second axis."""
        import torch

        if self.truth is not None:
            at = torch.from_numpy(lattice(self.low, self.high, CELLS))
            t = torch.tensor(float(self.times[index]), dtype=torch.float64)
            values = self.truth.log_prob(at, t).exp().numpy().reshape(CELLS, CELLS)
        else:
            bins = [np.linspace(self.low[i], self.high[i], CELLS + 1) for i in range(2)]
            values = smooth(np.histogram2d(self.states[index, :, 0], self.states[index, :, 1], bins=(bins[0], bins[1]))[0].T)
        return (values / max(values.max(), 1e-12)) ** 0.5  # the root: tails stay visible

    def draw(self, axes: Axes, index: int, velocities: np.ndarray, name: str) -> tuple[AxesImage, Quiver]:
        """A panel at one time; returns what changes with it."""
        from visualizers.pictures import INK

        extent = (self.low[0], self.high[0], self.low[1], self.high[1])
        image = axes.imshow(
            self.density(index), origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=1.6, aspect="equal"
        )
        arrows = axes.quiver(
            *self.places.T, *velocities[index].T, color=INK, scale=self.scale, scale_units="width", width=0.0035, pivot="mid"
        )
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="x₁")
        axes.set_title(name, color=INK, fontsize=11, pad=5)
        axes.tick_params(colors=INK, labelsize=9)
        return image, arrows


def lattice(low: np.ndarray, high: np.ndarray, side: int) -> np.ndarray:
    """The middles of side x side cells between two corners, row by row along the first axis: (side^2, 2)."""
    centres = [low[i] + (np.arange(side) + 0.5) / side * (high[i] - low[i]) for i in range(2)]
    return np.stack(np.meshgrid(*centres), -1).reshape(-1, 2)


def smooth(counts: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(counts.astype(float), 1.5)


def draw(scene: Scene) -> list[Path]:
    from visualizers.films import pixels, write_film
    from visualizers.pictures import new_figure

    scene.need_points("velocity_field.py", "see denoising.py")
    times = frame_times(scene.frames).numpy()
    path = scene.folder / "velocity_field.png"
    title = f"{scene.name}: velocity field"

    field = Field(scene, times)
    kinds = [("learned", field.learned)] + ([] if field.exact is None else [("exact", field.exact)])
    figure = new_figure(80 + 300 * len(kinds), title, "", 1240)
    axes = np.atleast_2d(figure.subplots(len(kinds), len(STILL), sharex=True, sharey=True))
    for row, (kind, velocities) in zip(axes, kinds, strict=True):
        for panel, index in zip(row, np.rint(np.array(STILL) * (len(times) - 1)).astype(int), strict=True):
            field.draw(panel, index, velocities, f"{kind}, t = {times[index]:.2f}")
            panel.set_xlabel("x₁" if row is axes[-1] else "")
        row[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.08, top=0.9, wspace=0.05, hspace=0.15)
    figure.savefig(path)
    if scene.form == "png":
        return [path]

    figure = new_figure(500, title, "", 900 if len(kinds) == 2 else 480)
    panels = np.atleast_1d(figure.subplots(1, len(kinds), sharex=True, sharey=True))
    drawn = [field.draw(panel, 0, velocities, kind) for panel, (kind, velocities) in zip(panels, kinds, strict=True)]
    panels[0].set_ylabel("x₂")
    figure.subplots_adjust(left=0.075 if len(kinds) == 2 else 0.13, right=0.985, bottom=0.1, top=0.83, wspace=0.06)
    frames = []
    for index, t in enumerate(times):
        error = "" if field.errors is None else f", relative error of the learned field {field.errors[index]:.3f}"
        figure.texts[1].set_text(f"t = {t:.2f}{error}")
        density = field.density(index)
        for (image, arrows), (_, velocities) in zip(drawn, kinds, strict=True):
            image.set_data(density)
            arrows.set_UVC(*velocities[index].T)
        frames.append(pixels(figure))
    film = path.with_suffix(f".{scene.form}")
    write_film(film, frames)
    return [path, film]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=1500, frames=31))

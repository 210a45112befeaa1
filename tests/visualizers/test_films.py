"""Films of trained models: they start at the source and end at the data, and are written whole or not at all."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from losses.paths import LinearPath
from solvers.runge_kutta import RK4
from visualizers import denoising, particles, velocity_field
from visualizers.films import FRAMES_A_SECOND, HOLD, HOLD_FIRST, write_film
from visualizers.scene import scene, walk


@pytest.mark.parametrize("kind, name", [("points", "particles"), ("images", "denoising")])
def test_films_are_mp4_when_asked(kind: str, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    words = [f"ckpt={checkpoints[kind]}", f"out={tmp_path}", "n=9", "frames=3", "format=mp4"]
    still, film = import_module(f"visualizers.{name}").draw(scene(words, n=1, frames=2))
    assert Image.open(still).format == "PNG" and film.suffix == ".mp4"
    reader = imageio_ffmpeg.read_frames(str(film))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3).astype(int) for frame in reader]
    assert len(frames) == 3 + round(HOLD_FIRST * FRAMES_A_SECOND) + round(HOLD * FRAMES_A_SECOND)
    assert 400 <= width <= 1400 and np.abs(frames[0] - frames[-1]).max() > 60


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_a_denoising_film_goes_from_the_noise_to_the_samples(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Read off the written file; latents are seen through their decoder."""
    words = [f"ckpt={checkpoints[kind]}", f"out={tmp_path}", "n=9", "frames=3", "solver=rk4", "solver.steps=3"]
    made = scene(words, n=1, frames=2)
    film = Image.open(denoising.draw(made)[1])
    noise = made.noise()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    side = 16 if kind == "latents" else 8
    for index, states in ((0, noise), (2, made.model.sample(9, solver=made.own_solver()))):
        expected = denoising.as_bytes(made, states)
        assert expected.shape == (9, side, side, 3) and expected.std() > 5
        film.seek(index)
        shown = np.asarray(film.convert("RGB")).astype(int)
        scale = round(shown.shape[1] / (3 * side + 2))  # a grid of three by three, a white line between images
        grid = shown[: scale * (3 * side + 2) : scale, : scale * (3 * side + 2) : scale]
        cells = [grid[row : row + side, column : column + side] for row in range(0, 3 * side, side + 1)
                 for column in range(0, 3 * side, side + 1)]  # fmt: skip
        assert np.abs(np.stack(cells) - expected).mean() < 12, index  # 64 colours


def test_a_film_of_the_field_shows_the_density_of_noise_then_that_of_the_data(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Read off the pixels of the written file: how blue the panel of the exact field is, and where."""
    made = scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}", "n=500", "frames=2"], n=1, frames=2)
    film = Image.open(velocity_field.draw(made)[1])
    field = velocity_field.Field(made, np.array([0.0, 1.0]))
    figure, _ = velocity_field.film_figure(field, "")
    figure.canvas.draw()  # which settles where equal axes lie
    panel = figure.axes[1]
    assert isinstance(field.truth, ExactFlow)
    for index, clusters in ((0, np.zeros((1, 2))), (1, field.truth.mixture.means.numpy())):
        film.seek(index)
        colored = np.asarray(film.convert("RGB")).astype(int)
        rows, columns = np.nonzero(colored[..., 2] - colored[..., 0] > 90)  # the bluest half of the shades
        places = panel.transData.inverted().transform(np.stack([columns, film.height - 1 - rows], 1))
        inside = places[(places > [panel.get_xlim()[0], panel.get_ylim()[0]]).all(1)]
        distance = np.linalg.norm(inside[:, None] - clusters, axis=-1)
        radius = 1.35 if index == 0 else 0.25
        assert (distance.min(1) < radius).all() and (np.bincount(distance.argmin(1), minlength=len(clusters)) > 20).all()


@dataclass
class ExactModel:
    """The exact flow of a mixture in the place of a network; its map is the solver's."""

    truth: ExactFlow
    learns: str = "velocity"
    learns_velocity: bool = True

    def velocity(self, x: torch.Tensor, t: torch.Tensor, label: Any = None) -> torch.Tensor:
        return self.truth(x, t)


MEANS = torch.tensor([[-2.0, 1.0], [1.5, 2.0], [2.0, -1.5]], dtype=torch.float64)
STDS, WEIGHTS = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
TRUTH = ExactFlow(GaussianMixture(WEIGHTS, MEANS, STDS), 1.0, LinearPath())


def test_a_film_starts_at_the_source_and_ends_at_the_data(tmp_path: Path) -> None:
    """Read off the pixels of the written file: where the coloured dots are in the first and in the last frame."""
    noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = {"exact": walk(RK4(40), ExactModel(TRUTH), noise, None, torch.linspace(0, 1, 9)).numpy()}
    assert stats.kstest(paths["exact"][0].ravel(), "norm").pvalue > 0.01
    low, high = np.array([-3.5, -3.5]), np.array([3.5, 3.5])
    figure, moving = particles.film_figure(paths, np.zeros((0, 2)), (low, high), "")
    film = tmp_path / "film.gif"
    write_film(film, [particles.filmed(figure, moving, paths, index) for index in range(9)])
    decoded = Image.open(film)
    positions = []
    for index in (0, decoded.n_frames - 1):
        decoded.seek(index)
        colored = np.asarray(decoded.convert("RGB")).astype(int)
        rows, columns = np.nonzero(colored.max(-1) - colored.min(-1) > 60)  # ink and grid are grey
        positions.append(figure.axes[0].transData.inverted().transform(np.stack([columns, decoded.height - 1 - rows], 1)))
    first, last = positions
    assert np.abs(first.mean(0)).max() < 0.2 and np.abs(first.std(0) - 1.1).max() < 0.15  # dots overlap in the middle
    distance = np.linalg.norm(last[:, None] - MEANS.numpy(), axis=-1)
    assert (distance.min(1) < 0.45).mean() > 0.98
    assert (np.bincount(distance.argmin(1), minlength=3) > 0.15 * len(last)).all()


def test_mp4_decodes(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film = tmp_path / "film.mp4"
    write_film(film, [np.full((64, 96, 3), level, dtype=np.uint8) for level in (0, 120, 250)])
    reader = imageio_ffmpeg.read_frames(str(film))
    assert next(reader)["size"] == (96, 64)
    levels = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    second = 1 + round(HOLD_FIRST * FRAMES_A_SECOND)
    assert abs(levels[0]) < 6 and abs(levels[second] - 120) < 6 and abs(levels[-1] - 250) < 6


@pytest.mark.parametrize("form", ["gif", "mp4"])
def test_a_film_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("imageio_ffmpeg")

    def broken(path: str, *_: Any, **__: Any) -> Any:
        Path(path).write_bytes(b"half a film")
        yield
        raise OSError("the encoder died")

    monkeypatch.setattr("imageio_ffmpeg.write_frames", broken)
    film = tmp_path / f"film.{form}"
    film.write_bytes(b"the film before")
    frames = [np.zeros((64, 96, 3), dtype=np.uint8), np.zeros((0, 0, 3), dtype=np.uint8)]  # no GIF has a frame of no size
    with pytest.raises((ValueError, OSError)):
        write_film(film, frames)
    assert film.read_bytes() == b"the film before" and [path.name for path in tmp_path.iterdir()] == [film.name]

"""Pictures and films of trained models: every file decodes, starts at the source and ends at the data."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from common import command_line as front
from common.errors import UserError
from dataloaders.gaussian_mixture import GaussianMixture
from evaluation import pictures
from evaluation.closed_forms import ExactFlow
from losses.paths import LinearPath
from run_files.run_folder import RunFolder
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import RK4, Euler
from visualizers import (
    curves,
    denoising,
    density,
    interpolation,
    memorisation,
    particles,
    trajectories,
    velocity_field,
    vis_all,
)
from visualizers.films import FRAMES_A_SECOND, HOLD, HOLD_FIRST, write_film
from visualizers.interpolation import slerp
from visualizers.scene import Scene, interpolated, newest_checkpoint, scene, walk

ROOT = Path(__file__).resolve().parents[2]
POINTS = ["samples", "one_step", "particles", "trajectories", "velocity_field", "density", "interpolation"]
IMAGES = ["samples", "one_step", "denoising", "interpolation", "memorisation"]
FILMS = {"particles", "velocity_field", "denoising"}
SMALL = [
    "trackio.enabled=false",
    "device=cpu",
    "evaluation=loss_only",
    "max_steps=3",
    "batch_size=32",
    "~callbacks.pictures",
]
ARCHS = {"points": "mlp", "classes": "mlp", "images": "cnn", "latents": "cnn"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path) -> dict[str, Path]:
    """Hardly trained models: points, images by class, and latents of images."""
    import launcher

    folder = tmp_path_factory.mktemp("trained")
    log = f"log.file={folder / 'LOG.md'}"
    launcher.run("run_name=points", f"output_dir={folder}", log, *SMALL, "model.width=16", "loss=meanflow")
    launcher.run("run_name=classes", f"output_dir={folder}", log, *SMALL, "model.width=16", "conditional=true")
    images = ["dataloaders=digits", "model=cnn", "conditional=true"]
    launcher.run("run_name=images", f"output_dir={folder}", log, *SMALL, *images)
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(64, 4, 2, 2)).astype("float32"))
    latents = ["dataloaders=array", f"dataloaders.path={folder / 'latents.npy'}", "model=cnn"]
    latents += ["vae=stable_diffusion", f"vae.path={vae_folder}"]
    launcher.run("run_name=latents", f"output_dir={folder}", log, *SMALL, *latents)
    found = {name: folder / f"ckpts/{arch}/{name}_last.pt" for name, arch in ARCHS.items()}
    return found | {"root": folder}


@pytest.mark.parametrize("kind, name", [*(("points", name) for name in POINTS), *(("images", name) for name in IMAGES)])
def test_every_drawing_decodes(kind: str, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    drawing = import_module(f"visualizers.{name}")
    files = drawing.draw(scene([f"ckpt={checkpoints[kind]}", f"out={tmp_path}", "n=20", "frames=4"], n=1, frames=2))
    assert [path.suffix for path in files] == [".png", ".gif"][: 2 if name in FILMS else 1]
    still = Image.open(files[0])
    assert still.format == "PNG" and 400 <= still.width <= 1400 and np.asarray(still.convert("L")).std() > 5
    if name in FILMS:
        film = Image.open(files[1])
        assert film.n_frames == 4 and film.info["loop"] == 0
        shown = [np.asarray(film.convert("RGB")).astype(int) for index in range(4) if film.seek(index) is None]
        assert all(frame.shape == shown[0].shape for frame in shown) and not np.array_equal(shown[0], shown[-1])
        assert all(side % 2 == 0 for side in shown[0].shape[:2])


def test_of_data_drawn_afresh_no_copying_is_drawn(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to compare points with: data drawn afresh has no training states"):
        memorisation.draw(scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}"], n=1, frames=2))


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


def near(made: Scene, points: np.ndarray) -> np.ndarray:
    """The index of the centroid of kmeans that is nearest to each point (N, 2)."""
    centroids = np.array(made.model.config["dataloaders"]["centroids"])
    return np.linalg.norm(points[:, None] - centroids, axis=-1).argmin(1)


def test_one_class_is_held_against_its_own_data(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = [f"ckpt={checkpoints['classes']}", f"out={tmp_path}", "n=50"]
    every, one = scene(words, n=1, frames=2), scene([*words, "label=3"], n=1, frames=2)
    assert set(near(every, every.real(300))) == {0, 1, 2, 3, 4} and every.heading == "classes"
    assert one.real(300).shape == (300, 2) and set(near(one, one.real(300))) == {3} and one.heading == "classes, class 3"


@pytest.mark.parametrize("words, shown", [([], 0), (["label=2"], 2), (["label=all"], 0)])
def test_a_field_and_its_states_are_of_one_class_that_the_title_names(
    words: list[str], shown: int, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_figure, field_walk = Mock(wraps=pictures.new_figure), Mock(wraps=walk)
    monkeypatch.setattr(velocity_field, "new_figure", new_figure)
    monkeypatch.setattr(interpolation, "new_figure", new_figure)
    monkeypatch.setattr(velocity_field, "walk", field_walk)
    words = [f"ckpt={checkpoints['classes']}", f"out={tmp_path}", "format=png", "n=20", *words]
    velocity_field.draw(scene(words, n=1, frames=2))
    interpolation.draw(scene(words, n=1, frames=2))
    assert (field_walk.call_args.args[3] == shown).all()
    titles = [call.args[1].partition(":")[0] for call in new_figure.call_args_list]
    assert titles == [f"classes, class {shown}"] * 2


@pytest.mark.parametrize("name, kind", [("denoising", "points"), ("particles", "images"), ("density", "images")])
def test_a_drawing_of_other_states_says_which_to_take(
    name: str, kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    drawing = import_module(f"visualizers.{name}")
    with pytest.raises(UserError, match=r"draws (points|images).*; see \w+\.py"):
        drawing.draw(scene([f"ckpt={checkpoints[kind]}", f"out={tmp_path}"], n=4, frames=2))


@pytest.mark.parametrize("solver", sorted(file.stem for file in (ROOT / "configs" / "solver").glob("*.yaml")))
def test_particles_go_by_every_solver(solver: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}", f"solver={solver}", "n=8", "frames=3"], n=1, frames=2)
    (_, states), jump = particles.ways(made).items()
    assert states.shape == (3, 8, 2) and np.array_equal(states[0], made.noise().numpy())
    ends = made.model.sample(8, solver=made.own_solver()).numpy()
    assert np.allclose(states[-1], ends, atol=1e-5)
    assert np.allclose(jump[1][1], (jump[1][0] + jump[1][2]) / 2, atol=1e-6)  # a single jump is straight


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["colour=red"], "unknown key in 'colour=red'"), (["n=0"], "n takes a whole number of at least 1"),
        (["frames=1"], "frames takes"), (["format=bmp"], "format takes png, gif, mp4"), (["label=3"], "knows no classes"),
        (["ckpt=nowhere.pt"], "no checkpoint"), (["solver=flow_map", "solver.renoise=true"], "have no path"),
        (["out=picture.png"], "out takes a folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from visualizers.scene import main

    words = [f"ckpt={checkpoints['points']}", f"out={tmp_path / 'new'}", *words]
    assert main(words, "", particles.draw, n=4) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.slow
def test_scripts_run_from_any_folder_and_all_at_once(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vis_all.py"])
    fast = ["n=8", "frames=2", "format=png", "solver=euler", "solver.steps=2"]
    assert vis_all.main([str(checkpoints["points"]), f"out={tmp_path}", *fast]) == 0
    said = capsys.readouterr()
    assert "8 of 10 drawings" in said.out and "see particles.py" in said.err
    assert {path.stem for path in tmp_path.glob("*.png")} == {*POINTS, "curves"}


@pytest.mark.process
def test_without_the_packages_all_at_once_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S hides site-packages
    python.chmod(0o755)
    told = [str(ROOT / "visualizers" / "vis_all.sh"), "x.pt"]
    done = subprocess.run(told, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 1 and "lacks the packages" in done.stderr and done.stderr.count("\n") == 1


def test_outputs_are_those_of_the_working_folder_or_else_the_repositorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert front.outputs() == ROOT / "outputs"
    (tmp_path / "outputs").mkdir()
    assert front.outputs() == Path("outputs")
    with pytest.raises(UserError, match="no checkpoint under outputs/ckpts"):
        newest_checkpoint()


def test_as_many_samples_as_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = [f"ckpt={checkpoints['points']}", f"out={tmp_path}"]
    assert scene([*words, "n=7"], 100, 2, 2000).n == 7 and scene(words, 100, 2, 2000).n == 2000
    words[0] = f"ckpt={checkpoints['images']}"
    assert scene(words, 100, 2, 2000).n == 100


@dataclass
class ExactModel:
    """The exact flow of a mixture in the place of a network; its map is the solver's."""

    truth: ExactFlow
    learns_flow_map: bool = False

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


def test_between_grid_points_states_move_straight() -> None:
    states = torch.tensor([[[0.0]], [[1.0]], [[5.0]]])
    grid, times = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0.0, 0.125, 0.25, 0.625, 1.0])
    assert interpolated(states, grid, times).flatten().tolist() == [0.0, 0.5, 1.0, 3.0, 5.0]


def test_straightness_is_zero_for_straight_paths_and_known_for_others() -> None:
    t = np.linspace(0, 1, 2001)[:, None, None]
    chord = np.array([[[1.0, 2.0], [-3.0, 0.5]]])
    assert trajectories.straightness(t * chord) < 1e-12
    assert trajectories.straightness(t**2 * chord) == pytest.approx(1 / 3, abs=1e-4)  # the integral of (2 t - 1)^2


@pytest.mark.parametrize("dimensions", [2, 64])
def test_interpolation_keeps_to_the_great_circle(dimensions: int) -> None:
    a, b = torch.randn(2, 5, dimensions, generator=torch.Generator().manual_seed(0)).double()
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    between = slerp(a, b, torch.linspace(0, 1, 7))
    assert torch.allclose(between.norm(dim=-1), torch.ones(5, 7).double())
    assert torch.allclose(between[:, 0], a) and torch.allclose(between[:, -1], b)
    steps = (between[:, 1:] * between[:, :-1]).sum(-1)
    assert torch.allclose(steps, steps[:, :1].expand_as(steps))  # equal angles


def test_the_expected_data_is_the_exact_posterior_mean() -> None:
    """E[x1 | z_t] of one Gaussian: m + t s^2 / (t^2 s^2 + (1 - t)^2) (z - t m)."""
    from visualizers.denoising import expected_data

    mean, std, t = 0.7, 0.4, torch.tensor(0.6, dtype=torch.float64)
    mixture = GaussianMixture(torch.ones(1).double(), torch.full((1, 2), mean).double(), torch.tensor([std]).double())

    class Flow:
        path = LinearPath()
        velocity = staticmethod(lambda z, t, label: ExactFlow(mixture, 1.0, LinearPath())(z, t))

    class Model:
        flow = staticmethod(lambda: Flow())

    class Still:
        model, labels = Model(), None

    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (z - t * mean)
    assert torch.allclose(expected_data(Still(), z, t), expected)


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


def test_all_at_once_says_once_what_is_wrong_for_all(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert vis_all.main([str(checkpoints["points"]), "colour=red"]) == 1
    error = capsys.readouterr().err
    assert "unknown key in 'colour=red'" in error and error.count("\n") == 1


def test_curves_show_what_a_run_logged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    assert curves.draw(["points", "images", f"output_dir={checkpoints['root']}", f"out={out}"]) == out
    assert Image.open(out).format == "PNG"
    with pytest.raises(UserError, match="is called nobody"):
        curves.draw(["nobody", f"output_dir={checkpoints['root']}"])
    with pytest.raises(UserError, match="none of these runs logged eval/fid"):
        curves.draw(["points", "metrics=eval/fid", f"output_dir={checkpoints['root']}"])


def evaluated(*floors: tuple[int, float]) -> list[dict[str, Any]]:
    """Rows of a run that was evaluated at these steps with these floors."""
    name = "eval/energy_distance"
    return [{"step": step, name: 1.0, f"{name}_floor": floor, f"{name}_floor_sd": 0.25} for step, floor in floors]


def band(rows: list[dict[str, Any]], at: float) -> tuple[float, float]:
    """The lowest and highest value of the floor's band at a step, off the drawn outline."""
    axes = pictures.new_figure(300, "", "").subplots()
    curves.draw_metric(axes, "eval/energy_distance", {"x": rows})
    (outline,) = axes.collections[0].get_paths()
    inside = [level for level in np.linspace(-1, 3, 401) if outline.contains_point((at, level))]
    return min(inside), max(inside)


def test_the_floor_of_one_evaluation_reaches_across_the_panel() -> None:
    for step in (1, 300, 599, 620):
        assert band(evaluated((600, 1.0)), step) == pytest.approx((0.5, 1.5), abs=0.02)


def test_the_band_ends_where_99_percent_of_real_sets_do() -> None:
    (row,) = evaluated((600, 1.0))
    assert band([row | {"eval/energy_distance_floor_q99": 2.2}], 300) == pytest.approx((0.5, 2.2), abs=0.02)


def test_one_stray_sample_shows_in_the_density(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """By itself, where there is no data, it is a dark cell on white."""
    made = scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}", "n=2000"], n=1, frames=2)
    samples = torch.from_numpy(made.real(2000)).clone()
    samples[0] = samples.amin(0) - 1
    monkeypatch.setattr(made.model, "sample", lambda *_: samples)
    monkeypatch.setattr(density, "shared_limits", lambda *_: (samples.numpy().min(0), samples.numpy().max(0)))
    figure = pictures.new_figure(420, "", "", 1300)
    monkeypatch.setattr(density, "new_figure", lambda *_: figure)
    density.draw(made)
    image = figure.axes[0].images[0]
    corner = image.to_rgba(image.get_array())[:3, :3]
    assert corner[0, 0, 3] == 1 and corner[0, 0, :3].max() < 0.6  # rows from the bottom
    assert (corner[..., 3].flatten()[1:] == 0).all()  # masked: the white paper


def test_each_evaluation_has_its_own_floor_without_a_slope_between() -> None:
    rows = evaluated((100, 1.0), (200, 1.0), (300, 0.0))
    for step, floor in ((1, 1.0), (200, 1.0), (245, 1.0), (255, 0.0), (310, 0.0)):
        assert band(rows, step) == pytest.approx((floor - 0.5, floor + 0.5), abs=0.02), step


def test_panels_that_are_left_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_figure = Mock(wraps=pictures.new_figure)
    monkeypatch.setattr(curves, "new_figure", new_figure)
    folder = RunFolder(tmp_path / "runs" / "many")
    scores = {f"eval/score_{index:02}": 1.0 for index in range(14)}
    folder.metrics.append(1, 1, 1.0, scores | {f"{name}_train": 0.5 for name in scores})
    curves.draw([f"output_dir={tmp_path}"])
    caption = " ".join(new_figure.call_args.args[2].split())
    assert caption.endswith("Not drawn: eval/score_12, eval/score_13 (metrics=NAME,NAME draws them).")
    curves.draw([f"output_dir={tmp_path}", "metrics=eval/score_13"])
    assert "Not drawn" not in new_figure.call_args.args[2]


def test_a_flow_map_walks_by_its_own_steps(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}"], n=5, frames=2)
    flow, noise = made.model.flow(), made.noise()
    with torch.no_grad():
        half = walk(FlowMapSolver(2), flow, noise, None, torch.tensor([0.5]))[0]
        assert torch.allclose(half, flow.flow_map(noise, torch.tensor(0.0), torch.tensor(0.5)))
        euler = walk(Euler(2), flow, noise, None, torch.tensor([0.5]))[0]
        assert torch.allclose(euler, noise + 0.5 * flow.velocity(noise, torch.tensor(0.0)), atol=1e-6)

"""Pictures and films of trained models: every file decodes, starts at the source and ends at the data."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import command_line as front
from common.errors import UserError
from dataloaders.gaussian_mixture import GaussianMixture
from evaluation import pictures
from evaluation.closed_forms import ExactFlow
from losses.paths import LinearPath
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import Euler
from visualizers import curves, density, interpolation, memorisation, particles, trajectories, velocity_field, vis_all
from visualizers.interpolation import slerp
from visualizers.scene import Scene, interpolated, makes_points, newest_checkpoint, scene, walk

ROOT = Path(__file__).resolve().parents[2]
POINTS = ["samples", "one_step", "particles", "trajectories", "velocity_field", "density", "interpolation", "error_budget"]
IMAGES = ["samples", "one_step", "denoising", "interpolation", "memorisation"]
FILMS = {"particles", "velocity_field", "denoising"}


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


@pytest.mark.parametrize("solver", sorted({file.stem for file in (ROOT / "configs/solver").glob("*.yaml")} - {"ascent"}))
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
        (["colour=red"], "cannot use 'colour=red'"), (["n=0"], "n takes a whole number of at least 1"),
        (["frames=1"], "frames takes"), (["format=bmp"], "format takes png, gif or mp4"), (["label=3"], "knows no classes"),
        (["ckpt=nowhere.pt"], "nowhere.pt; `python"), (["solver=flow_map", "solver.renoise=true"], "have no path"),
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
    assert "9 of 11 drawings" in said.out and "see particles.py" in said.err
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


def test_the_newest_checkpoint_is_one_that_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier, an image model and points, the newest first."""
    monkeypatch.chdir(tmp_path)
    saves, payloads = {}, {}
    kinds = [("resnet", None, [3, 8, 8]), ("unet", "end", [3, 8, 8]), ("mlp", "state", [2])]
    for age, (arch, second_time, shape) in enumerate(kinds):
        saves[arch] = Path("outputs/ckpts") / arch / "last.pt"
        saves[arch].parent.mkdir(parents=True)
        saves[arch].touch()
        os.utime(saves[arch], (1000 - age, 1000 - age))
        payloads[saves[arch]] = {"second_time": second_time, "config": {"dataloaders": {"state_shape": shape}}}
    monkeypatch.setattr("visualizers.scene.load_checkpoint", payloads.__getitem__)
    assert newest_checkpoint() == saves["unet"] and newest_checkpoint(makes_points) == saves["mlp"]
    saves["mlp"].unlink()
    assert newest_checkpoint(makes_points) == saves["resnet"]  # which the drawing refuses in its own words


def test_as_many_samples_as_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = [f"ckpt={checkpoints['points']}", f"out={tmp_path}"]
    assert scene([*words, "n=7"], 100, 2, 2000).n == 7 and scene(words, 100, 2, 2000).n == 2000
    words[0] = f"ckpt={checkpoints['images']}"
    assert scene(words, 100, 2, 2000).n == 100


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
        check_learns_velocity = staticmethod(lambda: None)
        velocity = staticmethod(lambda z, t, label: ExactFlow(mixture, 1.0, LinearPath())(z, t))

    class Model:
        flow = staticmethod(lambda: Flow())

    class Still:
        model, labels = Model(), None

    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (z - t * mean)
    assert torch.allclose(expected_data(Still(), z, t), expected)


def test_all_at_once_says_once_what_is_wrong_for_all(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert vis_all.main([str(checkpoints["points"]), "colour=red"]) == 1
    error = capsys.readouterr().err
    assert "cannot use 'colour=red'" in error and error.count("\n") == 1


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


def test_a_flow_map_walks_by_its_own_steps(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = scene([f"ckpt={checkpoints['points']}", f"out={tmp_path}"], n=5, frames=2)
    flow, noise = made.model.flow(), made.noise()
    with torch.no_grad():
        half = walk(FlowMapSolver(2), flow, noise, None, torch.tensor([0.5]))[0]
        assert torch.allclose(half, flow.flow_map(noise, torch.tensor(0.0), torch.tensor(0.5)))
        euler = walk(Euler(2), flow, noise, None, torch.tensor([0.5]))[0]
        assert torch.allclose(euler, noise + 0.5 * flow.velocity(noise, torch.tensor(0.0)), atol=1e-6)


def test_curves_show_what_a_run_logged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out, runs = tmp_path / "curves.png", f"output_dir={checkpoints['points'].parents[2]}"
    assert checkpoints["images"].is_file() and curves.draw(["points", "images", runs, f"out={out}"]) == out
    assert Image.open(out).format == "PNG"
    with pytest.raises(UserError, match="is called nobody"):
        curves.draw(["nobody", runs])
    with pytest.raises(UserError, match="none of these runs logged eval/fid"):
        curves.draw(["points", "metrics=eval/fid", runs])

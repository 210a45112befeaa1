"""Sample pictures: sizes, what is shown where, and that nothing of pyplot's global state is touched."""

import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from evaluation import pictures
from evaluation.pictures import by_class, class_layout, describe_count, matching, pick_by_class, shared_limits
from evaluation.thumbnail import thumbnail, understood

ROOT = Path(__file__).resolve().parents[2]
RANDOM = np.random.default_rng(0)


def read_png(path: Path) -> np.ndarray:
    picture = Image.open(path)
    assert picture.format == "PNG"
    pixels = np.asarray(picture.convert("RGBA"))
    assert (pixels[..., 3] == 255).all(), "the background shows through"
    return pixels[..., :3].astype(int)


def scatter(folder: Path, samples: np.ndarray, reference: np.ndarray, *words: str) -> np.ndarray:
    pictures.scatter_picture(folder / "scatter.png", samples, reference, *words)
    return read_png(folder / "scatter.png")


def grid(folder: Path, images: np.ndarray, *settings: Any, reference: np.ndarray | None = None, **more: Any) -> np.ndarray:
    panels = {"generated": (images, more.pop("labels", None))}
    if reference is not None:
        panels["real"] = reference, more.pop("reference_labels", None)
    pictures.image_grid_picture(folder / "grid.png", panels, *settings, **more)
    return read_png(folder / "grid.png")


def bluish(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 2] - pixels[..., 0] > 60


def reddish(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] - pixels[..., 2] > 60


def test_generated_left_real_right_in_their_own_colors(tmp_path: Path) -> None:
    points = RANDOM.normal(size=(500, 2))
    pixels = scatter(tmp_path, points, points + 0.1, "x, step 100", "energy distance 0.01")
    assert pixels.shape == (450, 900, 3)
    left, right = pixels[:, :475], pixels[:, 475:]
    assert bluish(left).sum() > 500 and not bluish(right).any()
    assert reddish(right).sum() > 500 and not reddish(left).any()


def test_both_panels_have_the_same_axes_of_equal_aspect(tmp_path: Path) -> None:
    """A generated square of side 1.4 beside a real one of side 1: both stay squares, in that ratio, on one height."""
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])
    pixels = scatter(tmp_path, 1.4 * corners, corners)
    generated, real = (np.argwhere(mask(pixels)) for mask in (bluish, reddish))
    marker = 5
    heights, widths = zip(*(np.ptp(square, axis=0) - marker for square in (generated, real)), strict=True)
    np.testing.assert_allclose(heights, widths, atol=2)
    assert heights[1] > 100 and abs(heights[0] - 1.4 * heights[1]) <= 4
    assert abs(generated.mean(axis=0)[0] - real.mean(axis=0)[0]) <= 1


def test_limits_hold_all_real_points_and_the_bulk_of_the_generated() -> None:
    real = np.array([[0.0, 0.0], [2.0, 1.5]])
    generated = np.concatenate([RANDOM.uniform(0, 2.5, (1000, 2)), [[50.0, 50.0], [np.nan, 0.0]]])
    low, high = shared_limits(generated, real)
    assert (low < 0).all() and (high > [2.4, 2.4]).all() and (high < 3.1).all()
    assert describe_count(generated, low, high) == "1,002, 1 outside, 1 not finite"
    assert (shared_limits(generated + 100, real)[1] < 4).all()


def test_diverged_and_empty_samples_are_drawn(tmp_path: Path) -> None:
    assert scatter(tmp_path, np.full((10, 2), np.nan), RANDOM.normal(size=(10, 2))).shape == (450, 900, 3)
    assert scatter(tmp_path, np.zeros((0, 2)), np.zeros((0, 2))).shape == (450, 900, 3)


def test_pixels_are_enlarged_to_whole_squares_of_their_own_value(tmp_path: Path) -> None:
    """Two 4 x 4 images of one dark pixel each: after enlarging, the dark squares are solid and 4 : 1 of an image."""
    images = np.ones((2, 1, 4, 4))
    images[0, 0, 0, 0] = images[1, 0, 3, 3] = -1
    dark = np.argwhere((grid(tmp_path, images, columns=2) == 0).all(axis=-1))
    side = int(np.sqrt(len(dark) / 2))
    assert len(dark) == 2 * side**2 and side > 20
    rows, columns = np.ptp(dark, axis=0) + 1
    assert rows == 4 * side and columns == 9 * side  # two images of four pixels and one between them


@pytest.mark.parametrize(
    ("color", "expected"), [([0.0], 128), ([-1.0] * 3, 0), ([5.0] * 3, 255), ([1.0, -1.0, -1.0], (255, 0, 0))], ids=str
)
def test_values_become_brightness_of_red_green_and_blue(color: list[float], expected: Any, tmp_path: Path) -> None:
    pixels = grid(tmp_path, np.array(color)[None, :, None, None] * np.ones((1, 1, 8, 8)), (-1.0, 1.0))
    assert (abs(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2] - np.array(expected)) <= 1).all()


def test_real_images_stand_to_the_right(tmp_path: Path) -> None:
    dark, gray = np.full((4, 1, 8, 8), -1.0), np.full((9, 1, 8, 8), 0.0)
    row = grid(tmp_path, dark, columns=2, reference=gray, title="x")[-20, :, 0]
    assert set(np.flatnonzero(row == 0)) and set(np.flatnonzero(row == 128))
    assert np.flatnonzero(row == 0).max() < np.flatnonzero(row == 128).min()
    assert (row == 0).sum() == (row == 128).sum()  # as many real images as generated ones


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (16, 1, 8, 8), (8, 3, 256, 256), (64, 1, 28, 28)])
def test_grids_are_about_900_wide(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = RANDOM.uniform(-1, 1, shape)
    assert 600 <= grid(tmp_path, images, columns=8, reference=images).shape[1] <= 1400


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(N, 2\), not \(3, 3\)"):
        pictures.scatter_picture(tmp_path / "x.png", np.zeros((3, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"not \(2, 4, 8, 8\)"):
        grid(tmp_path, np.zeros((2, 4, 8, 8)))


@pytest.mark.process
def test_a_picture_leaves_no_global_state(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import numpy as np; from evaluation import pictures\n"
        f"pictures.scatter_picture(Path({str(tmp_path)!r}) / 'x.png', np.zeros((3, 2)), np.ones((3, 2)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def class_images(labels: list[int]) -> np.ndarray:
    """4 x 4 images whose gray level is their class: 0 black, 9 nearly white."""
    return np.full((len(labels), 1, 4, 4), 0.0) + np.array(labels)[:, None, None, None] / 10


def rows_of(panel: np.ndarray) -> list[list[int]]:
    """The classes shown in each row of images of one panel, by gray level."""
    found = []
    for row in panel:
        levels = [round(int(v) / 25.5) for v in row[:, 0] if v < 250]
        shown = sorted({level for level in levels if levels.count(level) > 20})
        if shown and (not found or found[-1] != shown):
            found.append(shown)
    return found


def test_each_class_has_its_row_and_real_ones_stand_in_it(tmp_path: Path) -> None:
    labels, reference = [3, 1, 0, 3, 1, 0, 3, 1, 0], [0, 0, 3, 1, 3, 1, 1, 0, 3]
    known = {"labels": np.array(labels), "reference_labels": np.array(reference)}
    pixels = grid(tmp_path, class_images(labels), (0.0, 1.0), reference=class_images(reference), title="x", **known)[57:-8]
    middle = pixels.shape[1] // 2
    left, right = pixels[:, 40:middle], pixels[:, middle:]
    assert rows_of(left) == rows_of(right) == [[0], [1], [3]]
    numbers = (pixels[:, :36] < 128).all(axis=-1).any(axis=1)  # ink at the left of the rows, one run of it for each
    assert np.flatnonzero(np.diff(numbers.astype(int)) == 1).size == 3


def test_samples_stand_left_of_their_neighbours_each_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Mock(wraps=pictures.draw_grids)
    monkeypatch.setattr(pictures, "draw_grids", drawn)
    samples, neighbours = class_images([0, 1, 2]), class_images([3, 4, 5, 6, 7, 8])
    pictures.neighbours_picture(tmp_path / "x.png", samples, neighbours, (0.0, 1.0), "x")
    generated, training = drawn.call_args.args[1].items()
    assert generated[0] == "generated" and training[0] == "the 2 training images nearest to it"
    row = read_png(tmp_path / "x.png")[-20, :, 0]  # the last row: sample 2, neighbours 7 and 8
    levels = [round(level / 25.5) for level in row if level < 250]
    assert list(dict.fromkeys(levels)) == [2, 7, 8] and levels.count(2) == levels.count(7) > 100


def test_by_class_fills_rows_in_order_and_leaves_the_rest_white() -> None:
    labels = np.array([5, 2, 5, 5, 2, 5, 5])
    columns, rows = class_layout(labels)
    assert (columns, rows.tolist()) == (5, [2, 5])
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 3), dtype=np.uint8)
    assert by_class(images, labels, rows, columns)[:, 0, 0, 0].tolist() == [1, 4, 255, 255, 255, 0, 2, 3, 5, 6]
    columns, rows = class_layout(np.repeat([0, 1], 18))
    assert (columns, rows.tolist()) == (6, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("classes", [None, 2])
def test_few_real_images_take_no_more_columns_than_they_fill(classes: int | None, tmp_path: Path, monkeypatch) -> None:
    drawn = Mock(wraps=pictures.draw_grids)
    monkeypatch.setattr(pictures, "draw_grids", drawn)
    images = np.zeros((100, 1, 8, 8), dtype=np.float32)
    labels = None if classes is None else np.arange(100) % classes
    known = None if classes is None else labels[:12]
    grid(tmp_path, images, columns=10, reference=images[:12], labels=labels, reference_labels=known)
    generated, real = (shown.shape[1] for shown in drawn.call_args.args[1].values())
    assert real < 0.3 * generated


def test_a_picture_of_many_classes_shows_some_of_them_alike() -> None:
    labels = np.arange(2000) % 1000
    shown = labels[pick_by_class(labels, 100)]
    assert len(np.unique(shown)) == 10 and (np.unique(shown, return_counts=True)[1] == 2).all() and shown.max() == 999
    labels = np.arange(200) % 10
    assert labels[pick_by_class(labels, 100)].tolist() == np.repeat(np.arange(10), 10).tolist()
    real = np.array([1, 1, 0, 2, 0, 1])
    assert real[matching(np.array([1, 0, 1, 7]), real)].tolist() == [0, 1, 1]


def test_classes_of_one_image_each_are_a_plain_grid(tmp_path: Path) -> None:
    images = class_images([0, 1, 2, 3])
    assert (grid(tmp_path, images, columns=2) == grid(tmp_path, images, columns=2, labels=np.arange(4))).all()


def test_a_thumbnail_shows_the_picture_in_every_form(tmp_path: Path) -> None:
    picture = tmp_path / "half.png"
    pixels = np.full((40, 80, 3), 255, dtype=np.uint8)
    pixels[:, 40:] = (200, 10, 20)
    Image.fromarray(pixels).save(picture)
    lines = thumbnail(picture, "ascii", 8).split("\n")
    assert lines == ["    @@@@"] * 2
    rows = thumbnail(picture, "blocks", 4).split("\n")
    assert (
        len(rows) == 1 and re.findall(r"38;2;(\d+);(\d+);(\d+)m", rows[0]) == [("255",) * 3] * 2 + [("200", "10", "20")] * 2
    )
    assert rows[0].endswith("\x1b[0m") and rows[0].count("▀") == 4
    iterm = re.fullmatch(r"\x1b\]1337;File=inline=1;width=8;size=\d+:(.*)\a", thumbnail(picture, "iterm", 8))
    kitty = re.findall(r"\x1b_G(?:[^;]*,)?m=(\d);([^\x1b]*)\x1b\\", thumbnail(picture, "kitty", 8))
    assert iterm and base64.b64decode(iterm[1]) == picture.read_bytes()
    assert base64.b64decode("".join(part for _, part in kitty)) == picture.read_bytes() and kitty[-1][0] == "0"


@pytest.mark.parametrize(
    "tty, environment, form",
    [(False, {"TERM": "xterm-kitty"}, "ascii"), (True, {"TERM": "xterm-kitty"}, "kitty"), (True, {"TERM": "dumb"}, "ascii"),
     (True, {"TERM": "xterm-256color"}, "blocks"), (True, {"TERM": "vt100"}, "ascii"), (True, {"TERM": "xterm"}, "ascii"),
     (True, {"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
     (True, {"TERM_PROGRAM": "iTerm.app", "TERM": "xterm"}, "iterm")],
)  # fmt: skip
def test_a_terminal_gets_what_it_understands(tty: bool, environment: dict[str, str], form: str) -> None:
    assert understood(tty, environment) == form

"""Sample pictures: generated points beside real ones, generated images beside real ones, as PNG files 900 pixels wide.

Figures are built on the Agg canvas without pyplot, so that nothing global is touched and no display is needed. The
background is opaque white with dark text, which reads on light and dark pages alike; the two colours differ for every
kind of colour vision, and never carry the meaning alone (each panel has its title).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = tuple[np.ndarray, np.ndarray | None]  # images and their labels
GENERATED_COLOR = "#0072B2"  # blue and vermilion of Okabe and Ito's palette
REAL_COLOR = "#D55E00"
INK = "#222222"
DPI = 100
WIDTH = 900  # pixels
MAX_POINTS = 5000  # more run together on 400 pixels, and drawing them takes the time
MAX_IMAGE = 256  # pixels a side that a single image is enlarged to at most
MARGIN = 8  # pixels around the grids
LABEL_MARGIN = 36  # pixels at the sides where rows have class numbers
MAX_HEIGHT = 3000  # pixels of a grid of many rows
MAX_CLASSES = 20  # with more, a picture during training shows some of them
GAP = 28  # pixels between the two grids: wider than between the images of one


def scatter_picture(path: Path, samples: np.ndarray, reference: np.ndarray, title: str = "", score_line: str = "") -> None:
    """Draw generated points (N, 2) and real ones (M, 2) side by side on the same axes, 900 x 450 pixels.

    Rows that are not finite are left out and counted in the panel's title. title: what run and step this is; score_line: the
    scores, under it. ValueError for points that are not two-dimensional.
    """
    for points in (samples, reference):
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"a scatter picture needs points of shape (N, 2), not {points.shape}")
    figure = new_figure(450, title, score_line)
    low, high = shared_limits(samples, reference)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    axes[0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), ylabel="x₂")
    draw_points(axes[0], samples, GENERATED_COLOR)
    draw_points(axes[1], reference, REAL_COLOR)
    for panel, name, points in zip(axes, ("generated", "real"), (samples, reference), strict=True):
        panel.set_title(f"{name} ({describe_count(points, low, high)})", color=INK, fontsize=11, pad=5)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.12, top=0.80, wspace=0.06)
    save_figure(figure, path)


def image_grid_picture(
    path: Path,
    panels: dict[str, Panel],
    value_range: tuple[float, float] = (-1.0, 1.0),
    columns: int = 8,
    title: str = "",
    score_line: str = "",
) -> None:
    """Draw images in grids side by side, 600 to 1350 pixels wide, each under its name: generated ones, then real ones.

    Every image pixel becomes a square of whole pixels; only images too large for that are reduced. With labels, each class
    takes a row or several of its own, its number at the left, and real images stand in the row of their class; `columns`
    then follows from how many there are of a class. Classes of one image each are a plain grid.

    panels: name -> images (N, C, H, W), C = 1 (gray) or 3 (RGB), of which at most as many are shown as the first has, and
    labels (N,) or None. value_range: the values shown as black and as full brightness; what lies outside is clipped.
    columns: images in a row of the first grid; the others have as many as they fill. score_line: what was measured.
    ValueError for images of another shape.
    """
    for batch, _ in panels.values():
        if batch.ndim != 4 or batch.shape[1] not in (1, 3):
            raise ValueError(f"an image grid needs images of shape (N, 1 or 3, H, W), not {batch.shape}")
    images, labels = next(iter(panels.values()))
    if labels is not None and np.unique(labels, return_counts=True)[1].max() == 1:
        labels = None
    columns, row_labels = (min(columns, len(images)), np.zeros(0, dtype=int)) if labels is None else class_layout(labels)
    rows, tiled = -(-len(images) // columns), {}
    for name, (batch, known) in panels.items():
        levels = to_bytes(batch[: len(images)], value_range)
        width = columns if batch is images else min(columns, -(-len(levels) // rows))
        if labels is not None:
            own = (labels if known is None else known)[: len(levels)]
            width = filled_columns(own, row_labels, columns)
            levels = by_class(levels, own, row_labels, width)
        tiled[name] = tile(levels, width)
    draw_grids(path, enlarged(tiled, images.shape[2]), title, row_labels, score_line)


def neighbours_picture(
    path: Path, samples: np.ndarray, neighbours: np.ndarray, value_range: tuple[float, float], title: str
) -> None:
    """Draw generated images in a column, beside a grid whose row i holds the training images nearest to sample i.

    samples (N, C, H, W) and neighbours (N k, C, H, W), those of the first sample first; otherwise as image_grid_picture.
    """
    k = len(neighbours) // len(samples)
    tiled = {
        "generated": tile(to_bytes(samples, value_range), 1),
        f"the {k} training images nearest to it": tile(to_bytes(neighbours, value_range), k),
    }
    draw_grids(path, enlarged(tiled, samples.shape[2]), title)


def enlarged(tiled: dict[str, np.ndarray], height: int) -> dict[str, np.ndarray]:
    """Return grids (H, W, 3) of images of this height, rescaled alike to fill the picture."""
    width, rows = sum(grid.shape[1] for grid in tiled.values()), next(iter(tiled.values())).shape[0]
    scale = min(WIDTH / width, MAX_HEIGHT / rows, max(MAX_IMAGE / height, 1.0))
    return {name: rescale(grid, scale) for name, grid in tiled.items()}


def confusion_picture(path: Path, counts: np.ndarray, title: str, names: list[str]) -> None:
    """Draw a confusion matrix (K, K): each row a class, its columns what its images were taken for, darker for more.

    With at most MAX_CLASSES classes each cell states its number. names: of the K classes.
    """
    figure = new_figure(900, title, f"{counts.trace() / max(counts.sum(), 1):.2%} of {counts.sum():,} right")
    axes = figure.add_axes((0.15, 0.13, 0.80, 0.76))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("taken for", color=INK)
    axes.set_ylabel("class", color=INK)
    if len(counts) <= MAX_CLASSES:
        short = [(name if len(name) <= 12 else f"{name[:11]}…").replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(counts)), short, rotation=45 if max(map(len, short)) > 3 else 0)
        axes.set_yticks(range(len(counts)), short)
        for row, column in np.argwhere(counts > 0):
            ink = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink, fontsize=9)
    save_figure(figure, path)


def class_layout(labels: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the columns of a grid by class, about as wide as high, and the class of each of its rows, ascending."""
    classes, counts = np.unique(labels, return_counts=True)
    rows_each = max(1, round(len(labels) ** 0.5 / len(classes)))
    columns = -(-int(counts.max()) // rows_each)
    return columns, np.repeat(classes, -(-counts // columns))


def filled_columns(labels: np.ndarray, row_labels: np.ndarray, most: int) -> int:
    """Return how many of `most` columns images of these classes (N,) reach into, in rows of these classes."""
    reached = [-(-(labels == label).sum() // (row_labels == label).sum()) for label in np.unique(row_labels)]
    return max(1, min(most, int(max(reached))))


def by_class(images: np.ndarray, labels: np.ndarray, row_labels: np.ndarray, columns: int) -> np.ndarray:
    """Return byte images (N, H, W, 3) in reading order of a grid whose rows have these classes; empty cells are white."""
    cells = np.full((len(row_labels) * columns, *images.shape[1:]), 255, dtype=np.uint8)
    for label in np.unique(row_labels):
        own = images[labels == label]
        places = np.flatnonzero(np.repeat(row_labels == label, columns))[: len(own)]
        cells[places] = own[: len(places)]
    return cells


def pick_by_class(labels: np.ndarray, images: int) -> np.ndarray:
    """Return indices of about `images` rows, equally many of each class; of many classes, of some at even spacing."""
    classes = np.unique(labels)
    if len(classes) > MAX_CLASSES:
        classes = classes[np.linspace(0, len(classes) - 1, max(1, round(images**0.5))).astype(int)]
    each = max(1, images // len(classes))
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])


def matching(labels: np.ndarray, reference_labels: np.ndarray) -> np.ndarray:
    """Return indices of real rows: as many of each class as `labels` has, or as there are."""
    counted = zip(*np.unique(labels, return_counts=True), strict=True)
    return np.concatenate([np.flatnonzero(reference_labels == label)[:count] for label, count in counted])


def draw_grids(
    path: Path,
    grids: dict[str, np.ndarray],
    title: str,
    row_labels: np.ndarray | None = None,
    score_line: str = "",
    column_labels: list[str] | None = None,
) -> None:
    """Write byte grids (H, W, 3) side by side, pixel for pixel, under their names, the title and what was measured.

    row_labels: written at the left of the rows; none where it is empty. column_labels: above the columns of each grid, in
    the place of its name.
    """
    row_labels = np.zeros(0, dtype=int) if row_labels is None else row_labels
    header = (56 if title else 30) + (20 if score_line else 0)
    width = sum(grid.shape[1] for grid in grids.values()) + GAP * (len(grids) - 1)
    height = max(grid.shape[0] for grid in grids.values())
    margin = LABEL_MARGIN if len(row_labels) else MARGIN
    wide = max(width + 2 * margin, 10 * len(title), 8 * len(score_line))
    figure = new_figure(header + height + MARGIN, title, score_line, wide)
    total_width, total_height = figure.get_size_inches() * DPI
    left, above = (total_width - width) / 2, 1 - (header - 8) / total_height
    for row, label in enumerate(row_labels):
        middle = 1 - (header + (row + 0.5) / len(row_labels) * height) / total_height
        figure.text((left - 6) / total_width, middle, str(label), ha="right", va="center", color=INK, fontsize=9)
    for name, grid in grids.items():
        figure.figimage(grid, left, total_height - header - grid.shape[0], origin="upper")
        for column, label in enumerate(column_labels or []):
            place = (left + (column + 0.5) / len(column_labels or []) * grid.shape[1]) / total_width
            figure.text(place, above, label, ha="center", va="bottom", color=INK, fontsize=9)
        middle = (left + grid.shape[1] / 2) / total_width
        figure.text(middle, above, name, ha="center", va="bottom", color=INK, fontsize=11)
        left += grid.shape[1] + GAP
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, **metadata: str) -> None:
    """Write a figure as a PNG in one step, with texts beside it: a reader finds the whole picture, or the one before."""
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata=metadata)


def new_figure(height: int, title: str, score_line: str, width: int = WIDTH) -> Figure:
    """Return an empty white figure of that many pixels with its two heading lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 6 / height, title, ha="center", va="top", color=INK, fontsize=12, weight="bold")
    figure.text(0.5, 1 - 30 / height, score_line, ha="center", va="top", color=INK, fontsize=10)
    return figure


def draw_points(axes: Axes, points: np.ndarray, color: str) -> None:
    """Draw the finite points, at most MAX_POINTS of them, on equal axes."""
    shown = finite_rows(points)[:MAX_POINTS]
    size = float(np.clip(8000 / max(len(shown), 1), 4, 12))
    axes.scatter(shown[:, 0], shown[:, 1], s=size, c=color, alpha=0.55, linewidths=0)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("x₁", color=INK)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)


def describe_count(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """Return how many points there are and how many of them the panel does not show, by reason."""
    finite = finite_rows(points)
    outside = int(((finite < low) | (finite > high)).any(axis=1).sum())
    shown = f"{len(points):,}" if len(finite) <= MAX_POINTS else f"{MAX_POINTS:,} of {len(points):,}"
    missing = {"outside": outside, "not finite": len(points) - len(finite)}
    return ", ".join([shown, *(f"{count:,} {why}" for why, count in missing.items() if count)])


def shared_limits(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest corner (2,) for both panels: every real point and all but the stray generated ones.

    Generated points count from their 0.5 to their 99.5 percentile and no farther out than half the real points' extent:
    one that flew off would shrink everything else to a dot. No side is shorter than 0.6 of the longest.
    """
    real, generated = finite_rows(reference), finite_rows(samples)
    if len(real) == 0:
        return np.full(2, -1.0), np.full(2, 1.0)
    low, high = real.min(axis=0), real.max(axis=0)
    extent = max(float((high - low).max()), 1e-6)
    if len(generated):
        bulk = np.quantile(generated, [0.005, 0.995], axis=0)
        low = np.minimum(low, np.maximum(bulk[0], low - extent / 2))
        high = np.maximum(high, np.minimum(bulk[1], high + extent / 2))
    short = np.maximum(0.6 * (high - low).max() - (high - low), 0) / 2
    margin = short + 0.05 * extent
    return low - margin, high + margin


def finite_rows(points: np.ndarray) -> np.ndarray:
    """Return the rows without NaN or infinity."""
    return points[np.isfinite(points).all(axis=1)]


def to_bytes(images: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Return (N, C, H, W) in `value_range` to (N, H, W, 3) in 0..255; NaN is black."""
    low, high = value_range
    levels = np.nan_to_num((images.astype(np.float32) - low) / (high - low), nan=0.0).clip(0, 1)
    colored = np.repeat(levels, 3, axis=1) if images.shape[1] == 1 else levels
    return np.rint(255 * colored).astype(np.uint8).transpose(0, 2, 3, 1)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Return (N, H, W, 3) to one (rows (H + 1) - 1, columns (W + 1) - 1, 3), one white pixel between images."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + 1, width + 1, channels), 255, dtype=np.uint8)
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, height + 1, width + 1, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def rescale(image: np.ndarray, scale: float) -> np.ndarray:
    """Return the image about `scale` times as large: a pixel becomes a square of pixels, or a block is averaged to one."""
    if scale >= 2 / 3:
        factor = max(1, round(scale))
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    from PIL import Image

    return np.asarray(Image.fromarray(image).reduce(round(1 / scale)))

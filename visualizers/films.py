"""Figures to pixels, and pixels to files: PNG for one, GIF or MP4 for many."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from common.errors import require_package
from common.files import replacing
from common.progress import each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES_A_SECOND = 12
HOLD_FIRST, HOLD = 0.5, 1.5  # seconds that the first and the last frame stay longer than the others
COLORS = 64  # of a GIF, the same ones in every frame: nothing flickers


def pixels(figure: Figure) -> np.ndarray:
    """Return a figure on the Agg canvas as bytes (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def film_beside(still: Path, form: str, count: int, frame: Callable[[int], np.ndarray]) -> Path:
    """Write a film of `count` frames beside a written picture, with progress, and return its path. form: gif or mp4.

    frame: draws one, bytes (H, W, 3), H and W even. UserError when the package that writes .mp4 is missing.
    """
    film = still.with_suffix(f".{form}")
    write_film(film, [frame(index) for index in each(range(count), film.name)])
    return film


def write_film(path: Path, frames: list[np.ndarray]) -> None:
    """Write frames one after another, whole or not at all; the first and the last stay longer. path: .gif or .mp4."""
    write = write_gif if path.suffix == ".gif" else write_mp4
    with replacing(path) as file:
        write(file, frames)


def write_gif(file: BinaryIO, frames: list[np.ndarray]) -> None:
    some = np.concatenate([frames[i] for i in np.linspace(0, len(frames) - 1, min(len(frames), 4)).astype(int)])
    palette = Image.fromarray(some).quantize(COLORS)
    indexed = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each_frame = round(1000 / FRAMES_A_SECOND)
    duration = [each_frame] * len(frames)
    duration[0] += round(1000 * HOLD_FIRST)
    duration[-1] += round(1000 * HOLD)
    indexed[0].save(file, format="GIF", save_all=True, append_images=indexed[1:], duration=duration, loop=0)


def write_mp4(file: BinaryIO, frames: list[np.ndarray]) -> None:
    require_package("imageio_ffmpeg", "format=mp4", "mp4", ", or leave it at gif")
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    first, last = (round(hold * FRAMES_A_SECOND) for hold in (HOLD_FIRST, HOLD))
    with tempfile.NamedTemporaryFile(suffix=".mp4") as written:  # ffmpeg takes a path, and its suffix for the format
        writer = imageio_ffmpeg.write_frames(written.name, (width, height), fps=FRAMES_A_SECOND, macro_block_size=2)
        writer.send(None)
        for frame in [frames[0]] * first + frames + [frames[-1]] * last:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        shutil.copyfileobj(written, file)

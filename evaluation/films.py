"""Figures to pixels, and pixels to files: PNG for one, GIF or MP4 for many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = ("png", "gif", "mp4")
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


def write_film(path: Path, frames: list[np.ndarray]) -> None:
    """Frames (H, W, 3) of bytes, H and W even, one after another; the first and the last stay longer.

    path: ends in .gif (repeats for ever) or .mp4. UserError when the package that writes .mp4 is missing.
    """
    if path.suffix == ".gif":
        write_gif(path, frames)
    else:
        held = [round(hold * FRAMES_A_SECOND) for hold in (HOLD_FIRST, HOLD)]
        write_mp4(path, [*[frames[0]] * held[0], *frames, *[frames[-1]] * held[1]])


def write_gif(path: Path, frames: list[np.ndarray]) -> None:
    some = np.concatenate([frames[i] for i in np.linspace(0, len(frames) - 1, min(len(frames), 4)).astype(int)])
    palette = Image.fromarray(some).quantize(COLORS)
    indexed = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = round(1000 / FRAMES_A_SECOND)
    duration = [each] * len(frames)
    duration[0] += round(1000 * HOLD_FIRST)
    duration[-1] += round(1000 * HOLD)
    with replacing(path) as file:
        indexed[0].save(file, format="GIF", save_all=True, append_images=indexed[1:], duration=duration, loop=0)


def write_mp4(path: Path, frames: list[np.ndarray]) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise UserError(
            'format=mp4 needs the package imageio-ffmpeg; pip install -e ".[mp4]", or leave it at gif'
        ) from error
    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_A_SECOND, macro_block_size=2)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()

"""A PNG in the terminal: as itself where the terminal shows images, else in coloured half blocks, else in characters."""

import base64
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WIDEST = 100  # columns
SHADES = " .:-=+*#%@"  # from paper to ink
COLORFUL = ("-256color", "-direct", "-truecolor")  # ends of the names of terminals that show coloured blocks
KITTY_CHUNK = 4096  # bytes of one escape sequence


def thumbnail(picture: Path, form: str | None = None, columns: int | None = None) -> str:
    """Return the picture as text to print.

    form: "iterm" or "kitty" (inline images), "blocks" (two pixels a character, 24-bit colour), "ascii"; None: what standard
    output seems to understand. columns: as wide as the terminal, at most WIDEST, unless given.
    """
    columns = columns or min(shutil.get_terminal_size().columns, WIDEST)
    form = form or understood(sys.stdout.isatty(), dict(os.environ))
    if form in ("iterm", "kitty"):
        return inline(picture.read_bytes(), form, columns)
    image = Image.open(picture).convert("RGB")
    rows = max(1, round(columns * image.height / image.width / 2))
    if form == "blocks":
        return blocks(np.asarray(image.resize((columns, 2 * rows), Image.Resampling.BOX)))
    return ascii_art(np.asarray(image.convert("L").resize((columns, rows), Image.Resampling.BOX)))


def understood(tty: bool, environment: dict[str, str]) -> str:
    """Return the best form this output shows, by what terminals say of themselves."""
    if not tty or environment.get("TERM") == "dumb":
        return "ascii"
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    if environment.get("TERM") == "xterm-kitty":
        return "kitty"
    colors = environment.get("COLORTERM") in ("truecolor", "24bit") or environment.get("TERM", "").endswith(COLORFUL)
    return "blocks" if colors else "ascii"


def inline(png: bytes, form: str, columns: int) -> str:
    """Return the file itself, in the escape sequences of iTerm2 (OSC 1337) or kitty's graphics protocol."""
    data = base64.b64encode(png).decode()
    if form == "iterm":
        return f"\x1b]1337;File=inline=1;width={columns};size={len(png)}:{data}\a"
    sequences = []
    for start in range(0, len(data), KITTY_CHUNK):
        head = "" if start else f"a=T,f=100,c={columns},"
        sequences.append(f"\x1b_G{head}m={int(start + KITTY_CHUNK < len(data))};{data[start : start + KITTY_CHUNK]}\x1b\\")
    return "".join(sequences)


def blocks(pixels: np.ndarray) -> str:
    """Return bytes (2 R, C, 3) as R lines: the upper pixel in the colour of the half block, the lower one behind it."""
    pairs = np.concatenate([pixels[::2], pixels[1::2]], axis=2)
    cell = "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀"
    return "\n".join("".join(cell.format(*colors) for colors in line) + "\x1b[0m" for line in pairs)


def ascii_art(gray: np.ndarray) -> str:
    """Return bytes (R, C) as R lines, dark pixels as dense characters: pictures here are ink on white."""
    depth = (255 - gray.astype(int)) * (len(SHADES) - 1) / max(255 - int(gray.min()), 1)
    return "\n".join("".join(SHADES[round(float(level))] for level in line).rstrip() for line in depth)

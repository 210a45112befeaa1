"""Arrays of bytes in the format of MNIST's files (IDX), as they are or compressed by gzip."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataloaders.download import unfit

BYTES = b"\x00\x00\x08"  # how a file of unsigned bytes begins; then the number of dimensions, and each size in four bytes
GZIP, RATIO = b"\x1f\x8b", 1032  # gzip's beginning, and by how much it compresses at most


def read_bytes(file: Path, dimensions: int) -> np.ndarray:
    """Return the array of unsigned bytes that an IDX file holds.

    UserError for a file of another kind, or one whose header promises another amount than it holds; no memory is taken for
    what it cannot hold.
    """
    try:
        with file.open("rb") as stream:
            packed = stream.read(2) == GZIP
        with gzip.open(file) if packed else file.open("rb") as stream:
            shape = read_shape(stream, file, dimensions)
            promised, most = math.prod(shape), file.stat().st_size * (RATIO if packed else 1)
            content = stream.read(promised + 1) if promised <= most else b""
    except (OSError, EOFError, zlib.error) as error:
        raise unfit(file, f"it cannot be read ({error})") from error
    if len(content) != promised:
        held = "more" if len(content) > promised else "fewer"
        raise unfit(file, f"its header promises {' x '.join(map(str, shape))} bytes, and it holds {held}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_shape(stream: BinaryIO | gzip.GzipFile, file: Path, dimensions: int) -> tuple[int, ...]:
    """Return the sizes in the header of an IDX file. UserError for another beginning, or number of dimensions."""
    header = stream.read(4 + 4 * dimensions)
    if header[:4] != BYTES + bytes([dimensions]) or len(header) != 4 + 4 * dimensions:
        raise unfit(file, f"it does not begin as an IDX file of bytes in {dimensions} dimensions does")
    return tuple(int.from_bytes(header[4 + 4 * k : 8 + 4 * k], "big") for k in range(dimensions))

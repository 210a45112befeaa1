"""What a user's own array file holds, read from its header: the shapes a config needs before anything is loaded.

Imports neither torch nor, until called, NumPy: the launcher composes configs with it.
"""

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MIN_ROWS = 10  # fewer leave nothing to hold out and learn from
MAX_CLASSES = 1_000_000  # more are no classes, but numbers of another meaning
# What NumPy and zipfile raise at a file that is cut, garbled or made by hand.
BROKEN = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise UserError for what goes wrong in the block because of what the file holds."""
    try:
        yield
    except BROKEN as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is damaged, cut or garbled ({first[:120]}); write or fetch it again") from error


def array_shape(path: str) -> list[int]:
    """Shape of one state, [D] or [C, H, W], in a .npy of states or a .npz with them as `x`. UserError when unfit."""
    return list(state_header(Path(path))[0][1:])


def array_classes(path: str) -> int:
    """Largest label + 1 of a .npz with labels `y`, 0 without labels. UserError when the labels are unfit."""
    file = Path(path)
    rows = state_header(file)[0][0]
    if file.suffix == ".npy" or "y" not in member_names(file):
        return 0
    return 1 + int(read_labels(file, rows).max())


def state_header(file: Path) -> tuple[tuple[int, ...], "np.dtype"]:
    """Shape (N, ...) and dtype of the states. UserError when missing, of another kind or unfit."""
    require_array_file(file)
    if file.suffix == ".npz" and "x" not in member_names(file):
        raise UserError(f"{file} has no array named x; save it with numpy.savez(path, x=states, y=labels)")
    shape, dtype = read_header(file, "x")
    if dtype.kind not in "iuf":
        raise UserError(f"the states in {file} are of type {dtype}; save them as numbers, e.g. x.astype('float32')")
    if len(shape) not in (2, 4) or min(shape[1:]) <= 0:
        raise UserError(f"the states in {file} have shape {shape}; save them as (N, D) or as (N, C, H, W)")
    if shape[0] < MIN_ROWS:
        raise UserError(f"{file} holds {shape[0]} rows; at least {MIN_ROWS} are needed to train on some and hold out others")
    return shape, dtype


def require_array_file(file: Path) -> None:
    """Raise UserError unless `file` exists and is what its suffix, .npy or .npz, says."""
    if file.suffix not in (".npy", ".npz"):
        raise UserError(f"dataloaders.path={file} is no array file; save the states as .npy, or as x in a .npz")
    if not file.is_file():
        raise UserError(f"there is no file {file.absolute()}; correct dataloaders.path")
    with reading(file), file.open("rb") as stream:
        fits = zipfile.is_zipfile(stream) if file.suffix == ".npz" else stream.read(6) == b"\x93NUMPY"
    if not fits:
        raise UserError(f"{file} is not in NumPy's {file.suffix} format; write it with numpy.save or numpy.savez")


def member_names(file: Path) -> list[str]:
    """Return names of the arrays in a .npz."""
    with reading(file), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file: Path, member: str) -> tuple[tuple[int, ...], "np.dtype"]:
    """Shape and dtype of a .npy, or of one array of a .npz, without reading its data.

    UserError for a header that is none, or that tells of more than the file holds.
    """
    with reading(file):
        if file.suffix == ".npy":
            with file.open("rb") as stream:
                shape, dtype = parse_header(stream)
                held = os.fstat(stream.fileno()).st_size - stream.tell()
        else:
            with zipfile.ZipFile(file) as archive, archive.open(f"{member}.npy") as stream:
                shape, dtype = parse_header(stream)
                held = archive.getinfo(f"{member}.npy").file_size - stream.tell()
    if min(shape, default=0) >= 0 and not dtype.hasobject and math.prod(shape) * dtype.itemsize > held:
        raise UserError(
            f"{file} is cut: its header tells of {member} of shape {shape}, and {held:,} bytes of it are there; "
            "write or fetch it again"
        )
    return shape, dtype


def parse_header(stream: IO[bytes]) -> tuple[tuple[int, ...], "np.dtype"]:
    """Shape and dtype at the head of a stream in .npy format. ValueError for a version that NumPy never wrote."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def read_labels(file: Path, rows: int) -> "np.ndarray":
    """Return the labels (rows,) of a .npz. UserError unless they are one whole number from 0 up for each row."""
    import numpy as np

    shape, dtype = read_header(file, "y")
    if shape != (rows,) or dtype.kind not in "iu":
        raise UserError(
            f"the labels y in {file} have shape {shape} and type {dtype}; save one integer for each of the {rows} rows"
        )
    with reading(file):
        labels = np.load(file, allow_pickle=False)["y"]
    if labels.min() < 0:
        raise UserError(f"the labels y in {file} go down to {labels.min()}; number the classes from 0")
    if labels.max() >= MAX_CLASSES:
        raise UserError(f"the labels y in {file} go up to {labels.max()}; number the classes 0, 1, 2, ...")
    return labels

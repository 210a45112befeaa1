"""What a user's own array file holds, read from its headers: the shapes a config needs before anything is loaded.

Imports neither torch nor, until called, NumPy: the launcher composes configs with it.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.errors import BROKEN_ARRAYS, UserError, numpy_fault
from common.files import require

if TYPE_CHECKING:
    import numpy as np

MIN_ROWS = 10  # fewer leave nothing to hold out and learn from
MAX_CLASSES = 1_000_000  # more are no classes, but numbers of another meaning


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise UserError for what goes wrong in the block because of what the file holds."""
    try:
        yield
    except BROKEN_ARRAYS as error:
        raise UserError(
            f"{file} is damaged, cut or no {file.suffix} file of NumPy ({numpy_fault(error)}); write it with "
            "numpy.save or numpy.savez, or fetch it again"
        ) from error


def array_shape(path: str) -> list[int]:
    """Return the shape of one state, [D] or [C, H, W], in a .npy of states or the `x` of a .npz. UserError when unfit."""
    return list(state_shape(Path(path))[1:])


def array_classes(path: str) -> int:
    """Return the largest label + 1 of a .npz with labels `y`, 0 without labels. UserError when they are unfit."""
    labels = read_labels(Path(path))
    return 0 if labels is None else 1 + int(labels.max())


def array_condition(path: str) -> list[int] | None:
    """Return the shape of one condition, [P] or [C, H, W], in a .npz; None where it has none. UserError when unfit."""
    file, rows = Path(path), state_shape(Path(path))[0]
    if file.suffix == ".npy" or "condition" not in member_names(file):
        return None
    shape, dtype = read_header(file, "condition")
    if shape[:1] != (rows,) or len(shape) not in (2, 4) or min(shape) <= 0 or dtype.kind not in "iuf":
        raise UserError(
            f"the conditions in {file} are of type {dtype} and shape {shape}; save numbers of shape ({rows}, P) or "
            f"({rows}, C, H, W), one condition for each row of x"
        )
    return list(shape[1:])


def state_shape(file: Path) -> tuple[int, ...]:
    """Return the shape (N, ...) of all states. UserError when the file is missing, of another kind or unfit."""
    if file.suffix not in (".npy", ".npz"):
        raise UserError(f"dataloaders.path={file} is no array file; save the states as .npy, or as x in a .npz")
    require(file, "correct dataloaders.path")
    if file.suffix == ".npz" and "x" not in member_names(file):
        raise UserError(f"{file} has no array named x; save it with numpy.savez(path, x=states, y=labels)")
    shape, dtype = read_header(file, "x")
    if dtype.kind not in "iuf" or len(shape) not in (2, 4) or min(shape[1:]) <= 0 or shape[0] < MIN_ROWS:
        raise UserError(
            f"the states in {file} are of type {dtype} and shape {shape}; save numbers, e.g. x.astype('float32'), of shape "
            f"(N, D) or (N, C, H, W), with {MIN_ROWS} rows or more to train on some and hold out others"
        )
    return shape


def member_names(file: Path) -> list[str]:
    """Return names of the arrays in a .npz."""
    with reading(file), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def opened(file: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open a .npy, or one array of a .npz, as (its bytes, how many there are)."""
    if file.suffix == ".npy":
        with file.open("rb") as stream:
            yield stream, file.stat().st_size
    else:
        with zipfile.ZipFile(file) as archive, archive.open(f"{member}.npy") as stream:
            yield stream, archive.getinfo(f"{member}.npy").file_size


def read_header(file: Path, member: str) -> tuple[tuple[int, ...], "np.dtype"]:
    """Return shape and dtype of a .npy, or of one array of a .npz, without reading its data, which a header may promise
    more of than there is memory. UserError for a header that cannot be read, or promises more than the file holds.
    """
    from numpy.lib import format as npy

    with reading(file), opened(file, member) as (stream, size):
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0, (3, 0): npy.read_array_header_2_0}
        shape, _, dtype = read[version](stream)
        held = size - stream.tell()
        if min(shape, default=0) >= 0 and not dtype.hasobject and math.prod(shape) * dtype.itemsize > held:
            raise ValueError(f"its header promises {member} of shape {shape}, and {held:,} bytes of it are there")
    return shape, dtype


def read_labels(file: Path) -> "np.ndarray | None":
    """Return the labels (N,) of a .npz, None without any. UserError unless each row has one whole number from 0 up."""
    rows = state_shape(file)[0]
    if file.suffix == ".npy" or "y" not in member_names(file):
        return None
    import numpy as np

    shape, dtype = read_header(file, "y")
    if shape != (rows,) or dtype.kind not in "iu":
        raise UserError(f"the labels y in {file} have shape {shape} and type {dtype}; save an integer for each of {rows}")
    with reading(file):
        labels = np.load(file, allow_pickle=False)["y"]
    if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(f"the labels y in {file} go from {labels.min()} to {labels.max()}; number the classes 0, 1, 2, ...")
    return labels

"""Reading pickled dictionaries of arrays, as old data sets are published, without running anything they name."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError


class PickledType:
    """Stands for the type of an array's elements; takes what a pickle says of it and does nothing."""

    def __init__(self, code: Any = "", *_: Any):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """The byte order and other details, of no concern for single bytes."""


class PickledArray:
    """Stands for an array; keeps its state, which numpy never sees but for the raw bytes."""

    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_array(self, file: str) -> np.ndarray:
        """Return the array, of uint8. UserError when it is of another kind."""
        match self.state:
            case (_, tuple(shape), PickledType(code="u1"), fortran, bytes(raw)) if all(
                isinstance(n, int) and n >= 0 for n in shape
            ) and len(raw) == math.prod(shape):
                return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
        raise UserError(f"{file} holds an array that is not one of bytes; it is not in the official format")


def pickled_text(text: Any, encoding: Any = "latin1") -> bytes:
    """Return how Python 3 writes bytes in old pickles."""
    return str(text).encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): pickled_text,
}


class PlainUnpickler(pickle.Unpickler):
    """Knows the names that arrays and bytes are written with, each replaced by an inert stand-in, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return STAND_INS[module, name]


def read_pickled(stream: Any, file: str | Path) -> dict[str, Any]:
    """Return the dictionary pickled in a binary stream: text, numbers, lists, and uint8 arrays.
    UserError for anything else.
    """
    try:
        found = PlainUnpickler(stream, encoding="bytes").load()
    except Exception as error:  # a foreign file may fail in any way
        raise UserError(
            f"{file} is not a data file in the official format ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no dictionary, so it is not in the official format; fetch it again")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.bytes_array(str(file))
        if isinstance(value, PickledArray)
        else value
        for key, value in found.items()
    }

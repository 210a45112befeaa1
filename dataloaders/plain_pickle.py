"""Reading pickled dictionaries of arrays, as old data sets are published, without running anything they name."""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.download import unfit


class StandIn:
    """Stands for an array or the type of its elements; keeps what a pickle says of it and does nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_array(self, file: Path) -> np.ndarray:
        """Return the array, of uint8. UserError when it is of another kind."""
        match self.state:
            case (_, tuple(shape), StandIn(arguments=("u1" | b"u1", *_)), fortran, bytes(raw)) if all(
                isinstance(n, int) and n >= 0 for n in shape
            ) and len(raw) == math.prod(shape):
                return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
        raise unfit(file, "it holds an array that is not one of bytes")


def pickled_text(text: Any, encoding: Any = "latin1") -> bytes:
    """Return how Python 3 writes bytes in old pickles."""
    return str(text).encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): StandIn,
    ("numpy._core.multiarray", "_reconstruct"): StandIn,
    ("numpy", "ndarray"): StandIn,
    ("numpy", "dtype"): StandIn,
    ("_codecs", "encode"): pickled_text,
}


class PlainUnpickler(pickle.Unpickler):
    """Knows the names that arrays and bytes are written with, each replaced by an inert stand-in, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return STAND_INS[module, name]


def check_opcodes(content: bytes) -> None:
    """Raise UnpicklingError for what a few bytes could keep a reader busy with, or fill its memory: a remembered value whose
    number is larger than the file, and a tuple that is repeated, since tuples of tuples are hashed all over.
    """
    remembered, last = dict[int, bool](), ""  # number -> whether that is a tuple
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "DUP" or ("GET" in opcode.name and remembered.get(int(argument or 0))):
            raise pickle.UnpicklingError("it repeats a tuple")
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            number = len(remembered) if opcode.name == "MEMOIZE" else int(argument or 0)
            if number > len(content):
                raise pickle.UnpicklingError("it remembers more values than it holds")
            remembered[number] = "TUPLE" in last
        last = opcode.name


def read_pickled(content: bytes, file: Path) -> dict[str, Any]:
    """Return a pickled dictionary: text, numbers, lists, and uint8 arrays. UserError, naming `file`, for anything else."""
    try:
        check_opcodes(content)
        found = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a foreign file may fail in any way
        raise unfit(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise unfit(file, "it holds no dictionary")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.bytes_array(file)
        if isinstance(value, StandIn)
        else value
        for key, value in found.items()
    }

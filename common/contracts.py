"""What a part of a run, which may be the user's own, does against its contract: one sentence naming its class."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, own_frames

SHOWN = 80  # characters of a value or of a line of code


@contextmanager
def calling(what: str, part: object) -> Iterator[None]:
    """Turn an error of the part that the block calls into a UserError that ends with the place in its source.

    Errors of the disk and of a full memory are explained elsewhere.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(f"{what} ({type(part).__name__}) fails: {said}, {place_of(error, part)}") from error


def place_of(error: Exception, part: object) -> str:
    """Return where an error of a part came up: the innermost line that is of no library; its class where none is."""
    frames = [frame for frame in own_frames(error) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename != frames[0].filename]
    if own:
        return f"in {own[-1].filename}, line {own[-1].lineno}: {(own[-1].line or '')[:SHOWN]}"
    module = type(part).__module__
    return f"{type(part).__name__} being defined in {sys.modules[module].__dict__.get('__file__', module)}"


def in_words(value: Any) -> str:
    """Return what a value is, shortly: a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}" if value.ndim else "a tensor of one number, without dimensions"
    if isinstance(value, tuple | list):
        return f"{len(value)} values ({', '.join(map(in_words, value))})"
    return " ".join(repr(value).split())[:SHOWN]


def check_tensor(what: str, part: object, given: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Raise UserError unless a part gave a tensor of this shape. meaning: what it stands for."""
    if not isinstance(given, Tensor) or given.shape != shape:
        raise UserError(
            f"{what} ({type(part).__name__}) returned {in_words(given)}; it must return {meaning}, "
            f"here {in_words(torch.empty(shape, device='meta'))}"
        )

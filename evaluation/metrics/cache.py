"""Numbers that are costly to find and the same in every run: kept as small files that may be deleted at any time."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor, from_numpy

from common.files import locked, replacing

T = TypeVar("T")


def cache_file(cache: Path, name: str, key: dict[str, object], suffix: str) -> Path:
    """Return the file that holds `name` for this key."""
    digest = hashlib.blake2s(json.dumps([name, key], sort_keys=True).encode(), digest_size=10).hexdigest()
    return cache / f"{name.replace('/', '_')}_{digest}{suffix}"


def cached(path: Path, compute: Callable[[], T], read: Callable[[bytes], T], written: Callable[[T], bytes]) -> T:
    """Return compute()'s value, from the file where that holds it; a damaged file is computed again.

    It is written beside the path, then moved over it: nobody ever reads half a file.
    """
    if path.exists():
        try:
            return read(path.read_bytes())
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink()
    value = compute()
    with locked(path), replacing(path) as file:  # other runs write it too
        file.write(written(value))
    return value


def cached_numbers(cache: Path, name: str, key: dict[str, object], compute: Callable[[], list[float]]) -> list[float]:
    """Return compute()'s numbers, from the cache when the same key was computed before.

    key: everything the numbers depend on, as JSON values; it is written beside them, for people.
    """
    return cached(
        cache_file(cache, name, key, ".json"), compute,
        lambda content: [float(value) for value in json.loads(content)["values"]],
        lambda values: json.dumps({"name": name, **key, "values": values}, indent=1).encode(),
    )  # fmt: skip


def cached_tensor(cache: Path, name: str, key: dict[str, object], compute: Callable[[], Tensor]) -> Tensor:
    """Return a CPU tensor as cached_numbers does numbers."""

    def written(values: Tensor) -> bytes:
        np.savez(content := io.BytesIO(), values=values.numpy())
        return content.getvalue()

    read = lambda content: from_numpy(np.load(io.BytesIO(content))["values"])  # noqa: E731
    return cached(cache_file(cache, name, key, ".npz"), compute, read, written)

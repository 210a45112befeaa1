"""Numbers that are costly to find and the same in every run: kept as small files that may be deleted at any time."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy

from common.files import locked, replacing


def cache_file(cache: Path, name: str, key: dict[str, object], suffix: str) -> Path:
    """Return the file that holds `name` for this key."""
    digest = hashlib.blake2s(json.dumps([name, key], sort_keys=True).encode(), digest_size=10).hexdigest()
    return cache / f"{name.replace('/', '_')}_{digest}{suffix}"


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the path, then move over it: nobody ever reads half a file."""
    with locked(path), replacing(path) as file:  # other runs write it too
        file.write(content)


def cached_numbers(cache: Path, name: str, key: dict[str, object], compute: Callable[[], list[float]]) -> list[float]:
    """Return compute()'s numbers, from the cache when the same key was computed before; a damaged file is computed anew.

    key: everything the numbers depend on, as JSON values; it is written beside them, for people.
    """
    path = cache_file(cache, name, key, ".json")
    if path.exists():
        try:
            return [float(value) for value in json.loads(path.read_text())["values"]]
        except (ValueError, TypeError, KeyError):
            path.unlink()
    values = compute()
    write_whole(path, json.dumps({"name": name, **key, "values": values}, indent=1).encode())
    return values


def cached_tensor(cache: Path, name: str, key: dict[str, object], compute: Callable[[], Tensor]) -> Tensor:
    """As cached_numbers, for a CPU tensor."""
    path = cache_file(cache, name, key, ".npz")
    if path.exists():
        try:
            return from_numpy(np.load(io.BytesIO(path.read_bytes()))["values"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink()
    values, content = compute(), io.BytesIO()
    np.savez(content, values=values.numpy())
    write_whole(path, content.getvalue())
    return values

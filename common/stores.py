"""Files in an object store, by addresses such as s3://bucket/folder: put there whole or not at all, and copied from there.

fsspec carries it out; s3fs and gcsfs, the extra `remote`, bring the stores themselves. Keys are those that the stores' own
tools have put down (`aws configure`, `gcloud auth application-default login`).
"""

import hashlib
import importlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, first_line
from common.files import locked, replacing, write_atomically

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "file": "fsspec", "memory": "fsspec"}  # by what addresses begin with
BUCKETS = ("s3", "gs")  # whose files appear once they are whole, and whose buckets are not made here
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
VERSION = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "created")  # what tells two files of one name apart
BLOCK = 2**24  # bytes that are read at once


def is_address(text: Any) -> bool:
    """Return whether a setting is the address of a store rather than a path."""
    found = ADDRESS.fullmatch(text) if isinstance(text, str) else None
    return found is not None and found[1] in PACKAGES


def parts_of(address: str) -> tuple[str, list[str]]:
    """Return the kind of store and the names on the way there, the bucket first. UserError for what is no such address."""
    found = ADDRESS.fullmatch(address)
    kind, names = (found[1], found[2].strip("/").split("/")) if found else ("", [])
    if kind not in PACKAGES:
        raise UserError(f"{address[:80]} is no address of a store; give s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
    if any(name in ("", ".", "..") or re.search(r"[\x00-\x1f\\*?\[\]]|::", name) for name in names):
        raise UserError(
            f"{address[:80]!r} names nothing in a store: each name between slashes has a letter, and none of * ? [ ] :: and "
            "backslashes"
        )
    return kind, names


def store_of(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the place in it. UserError where its package is not installed."""
    kind, names = parts_of(address)
    try:
        importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise UserError(
            f"{address} needs {PACKAGES[kind]}, which is not installed ({first_line(error)}); `uv sync --extra remote` or "
            '`pip install -e ".[remote]"` brings it'
        ) from error
    import fsspec

    with explained(address):
        system = fsspec.filesystem(kind, use_listings_cache=False)
    return system, "/" * (kind not in BUCKETS) + "/".join(names)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """What a store refuses becomes one sentence. Each store has exceptions of its own, of no common class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
        if re.search("credential|anonymous", said, re.IGNORECASE):
            remedy = "no keys to it are found here; `aws configure` or `gcloud auth application-default login` stores some"
        elif isinstance(error, FileNotFoundError):
            remedy = "correct the address, or make the bucket by its store's own tools"
        elif isinstance(error, PermissionError):
            remedy = "have its owner let you read and write there, or give another address"
        else:
            remedy = "see whether the store can be reached from here"
        raise UserError(f"{address} cannot be used ({said}); {remedy}") from error


def below(address: str, *names: str) -> str:
    """Return the address of what lies below another."""
    return "/".join([address.rstrip("/"), *names])


def check_reachable(address: str) -> None:
    """Raise UserError for an address that is none, a store that does not answer, and a bucket that is not there."""
    system, place = store_of(address)
    with explained(address):
        try:
            system.ls(place)
        except FileNotFoundError as error:  # also where the bucket holds nothing of that name yet
            if "bucket does not exist" in str(error):
                raise


def info(address: str) -> dict[str, Any] | None:
    """Return what tells a file from others: its size in bytes and what its store counts versions by; None where none is."""
    system, place = store_of(address)
    with explained(address):
        try:
            found = system.info(place)
        except FileNotFoundError:
            return None
    return {key: str(found[key]) for key in VERSION if key in found} if found.get("type") != "directory" else None


def size(place: str | Path) -> int | None:
    """Return the bytes of a file here or at an address; None where there is none."""
    if isinstance(place, Path):
        return place.stat().st_size if place.is_file() else None
    there = info(place)
    return None if there is None else int(there["size"])


def names_below(address: str) -> list[str]:
    """Return the files below an address, by their names from there, which anyone may have chosen."""
    system, place = store_of(address)
    with explained(address):
        return sorted(str(found).removeprefix(place).lstrip("/") for found in system.find(place))


def put(content: bytes | Path, address: str) -> None:
    """Store bytes, or a file, under an address: a reader finds what was there before or all of it. UserError if refused."""
    system, place = store_of(address)
    with explained(address):
        if parts_of(address)[0] in BUCKETS:
            sent(system, content, place)
            return
        folder, _, name = place.rpartition("/")
        temporary = f"{folder}/.{name}.{platform.node()}.{os.getpid()}.tmp"
        try:
            system.makedirs(folder, exist_ok=True)
            sent(system, content, temporary)
            moved(system, temporary, place)
        finally:
            if system.exists(temporary):
                system.rm_file(temporary)


def sent(system: Any, content: bytes | Path, place: str) -> None:
    if isinstance(content, bytes):
        system.pipe_file(place, content)
    else:
        system.put_file(str(content), place)


def moved(system: Any, source: str, target: str) -> None:
    """Give a file another name: at once in a folder, in a bucket by a copy, before which nothing is removed."""
    if "file" in system.protocol:
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.mv(source, target)
    else:
        system.cp_file(source, target)
        system.rm_file(source)


def move(source: str, target: str) -> None:
    """Give the file at an address another address in the same store."""
    system, place = store_of(source)
    with explained(source):
        moved(system, place, store_of(target)[1])


def read(address: str, most: int) -> bytes | None:
    """Return the content of a small file, None where there is none. UserError for more than `most` bytes."""
    length = size(address)
    if length is None:
        return None
    if length > most:
        raise UserError(f"{address} is larger than the {most:,} bytes that are read of such a file; use another")
    system, place = store_of(address)
    with explained(address):
        return bytes(system.cat_file(place))


def blocks(address: str) -> Iterator[bytes]:
    """Yield the content of a file in a store, piece by piece. UserError where there is none, or where it comes cut short."""
    length, read = size(address), 0
    if length is None:
        missing(address)
    system, place = store_of(address)
    with explained(address), system.open(place, "rb", block_size=BLOCK) as source:
        while block := source.read(BLOCK):
            read += len(block)
            yield block
    if read != length:
        raise UserError(f"{address} came with {read:,} of its {length:,} bytes; give the same command again")


def fetch(address: str, target: Path) -> None:
    """Copy a file from a store to `target`, in one step."""
    with replacing(target) as file:
        for block in blocks(address):
            file.write(block)


def missing(address: str) -> NoReturn:
    raise UserError(f"there is no file {address}; correct the address")


def check_file(address: str) -> None:
    """Raise UserError where there is no file at an address."""
    if info(address) is None:
        missing(address)


def checksum(place: str | Path) -> str:
    """Return the BLAKE2b sum, of 16 bytes, of a file here or at an address."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(place, Path):
        with place.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
    for block in blocks(place):
        digest.update(block)
    return digest.hexdigest()


def local_copy(address: str) -> Path:
    """Return where what is fetched from an address is kept on this machine: below $XDG_CACHE_HOME, else ~/.cache."""
    kind, names = parts_of(address)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().joinpath("denoising-zoo", kind, *names)


def fetched(text: str | Path) -> Path:
    """Return a path as it is, and of an address the copy of its file here, which is fetched unless it is that version."""
    if not is_address(text):
        return Path(text)
    copy = local_copy(str(text))
    note, version = copy.with_name(f".{copy.name}.version"), json.dumps(info(str(text)) or missing(str(text)))
    with locked(copy):
        if not (copy.is_file() and note.is_file() and note.read_text() == version):
            note.unlink(missing_ok=True)
            fetch(str(text), copy)
            write_atomically(note, version)
    return copy

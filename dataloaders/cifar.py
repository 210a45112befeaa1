"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official archives of Python batches."""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import require
from dataloaders.augmentation import ImageOptions
from dataloaders.download import fetch, require_bare, require_whole, unfit
from dataloaders.image_tensor import ImageTensor
from dataloaders.plain_pickle import read_pickled

SHAPE = (3, 32, 32)
META_FILES = ("batches.meta", "meta")  # of CIFAR-10 and CIFAR-100
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}  # by how a file begins
MOST_BYTES = 2**29  # of a batch; the largest, CIFAR-100's training part, has 155 million


class Cifar(ImageTensor):
    """Pictures (3, 32, 32) with labels; the official test part is held out.

    Nothing is unpacked on disk and no pickled code is run: batches are read from the archive's members in memory.
    """

    def __init__(
        self,
        root: str,
        archive: str,
        folder: str,
        train_files: Sequence[str],
        test_file: str,
        label_key: str,
        url: str,
        md5: str | None,
        download: bool = False,
        **options: Unpack[ImageOptions],
    ):
        """root: where `archive`, or the `folder` unpacked from it, lies. download: fetch the archive from `url` otherwise.
        md5: of the archive, None for no check. label_key: of a batch's labels. UserError for what is missing or unfit, and
        for names of files that lead elsewhere.
        """
        place, names, classes = Path(root).expanduser(), [*train_files, test_file], options.get("num_classes", 10)
        for name in (archive, folder, *names):
            require_bare(name)
        source, wanted = place / folder, {*names, *META_FILES}
        remedy = f"put {archive}{url and f' from {url}'}, or the folder {folder} in it, into {place.absolute()}"
        if source.is_dir():
            there = [file for file in source.iterdir() if file.name in wanted and file.is_file()]
            for file in there:
                require_size(file, file.stat().st_size, remedy)
            files = {file.name: file.read_bytes() for file in there}
        else:
            source = place / archive
            require_archive(source, url, md5, download, remedy)
            remedy = f"delete it, then {remedy}"
            files = read_archive(source, folder, wanted, remedy)
        for name in names:
            if name not in files:
                raise UserError(f"{source} has no {name}; {remedy}")
        read = {name: read_pickled(content, source / name) for name, content in files.items()}
        batches = [as_pictures(source / name, read[name], label_key, classes) for name in names]
        train = (torch.cat([pictures for pictures, _ in batches[:-1]]), torch.cat([labels for _, labels in batches[:-1]]))
        super().__init__(train, batches[-1], classes, **options)
        self.class_names = next((names_in(read[meta], label_key, classes) for meta in META_FILES if meta in read), None)


def require_archive(archive: Path, url: str, md5: str | None, download: bool, remedy: str) -> None:
    """Raise UserError unless the archive is there, after a download if asked for, and whole."""
    if not download:
        require(archive, f"{remedy}, or add dataloaders.download=true")
    elif not archive.is_file():
        fetch(url, archive, md5, remedy)
    require_whole(archive, md5, f"delete it, then {remedy}")


class Bounded:
    """A file that an archive is read from. A header that states gigabytes, of which tarfile reads the whole, is refused."""

    def __init__(self, archive: Path):
        with archive.open("rb") as file:
            begin = file.read(3)
        opener = next((opener for magic, opener in OPENERS.items() if begin.startswith(magic)), open)
        self.stream: BinaryIO = opener(archive, "rb")  # type: ignore[operator]
        self.seek, self.tell, self.close = self.stream.seek, self.stream.tell, self.stream.close

    def read(self, size: int = -1) -> bytes:
        if size > MOST_BYTES:
            raise tarfile.ReadError(f"it asks for {size:,} bytes at once")
        return self.stream.read(size)


def read_archive(archive: Path, folder: str, names: Collection[str], remedy: str) -> dict[str, bytes]:
    """Return the named files of the folder that are in the archive. UserError when it cannot be read, or one is huge."""
    contents = {}
    try:
        with closing(Bounded(archive)) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                place, _, name = member.name.rpartition("/")
                stream = tar.extractfile(member) if place == folder and name in names and member.isreg() else None
                if stream is not None:
                    require_size(archive / member.name, member.size, remedy)
                    contents[name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        said = str(error).partition(":\n")[0]
        raise UserError(f"{archive} cannot be read to its end ({said}); {remedy}") from error
    return contents


def require_size(file: Path, size: int, remedy: str) -> None:
    """Raise UserError for a file of more bytes than any batch has."""
    if size > MOST_BYTES:
        raise UserError(f"{file} has {size:,} bytes, far too many; {remedy}")


def names_in(meta: dict[str, Any], label_key: str, classes: int) -> list[str] | None:
    """Return what a meta file calls the labels under `label_key`; None if it does not name all."""
    names = meta.get(f"{label_key.removesuffix('s')}_names")
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, bytes | str) for name in names):
        return None
    return [name.decode("latin1") if isinstance(name, bytes) else name for name in names]


def as_pictures(file: Path, batch: dict[str, Any], label_key: str, classes: int) -> tuple[Tensor, Tensor]:
    """Return a batch as pictures (N, 3, 32, 32) uint8 and labels (N,) int64. UserError when it is in no official format."""
    data, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or len(data) == 0:
        raise unfit(file, "it holds no pictures of 3x32x32 bytes under `data`")
    fits = isinstance(labels, list) and len(labels) == len(data)
    if not fits or not all(isinstance(k, int) and 0 <= k < classes for k in labels or []):
        raise unfit(
            file,
            f"it has no `{label_key}` below dataloaders.num_classes={classes} for each of its {len(data)} pictures; leave "
            "label_key and num_classes as they are",
        )
    return torch.from_numpy(data.reshape(-1, *SHAPE).copy()), torch.tensor(labels)

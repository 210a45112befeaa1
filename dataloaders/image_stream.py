"""Pictures that are read, cut and resized as they are needed."""

import copy
import os
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataloaders.augmentation import Augmentation
from dataloaders.base_dataloaders import Batch, Described
from dataloaders.picture_modes import in_eight_bits
from dataloaders.stream import Read, Reader, Rows, StreamDataset
from dataloaders.tensor_dataset import as_states

Crop = Literal["resized", "whole", "random"]
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what decoders raise


class PictureReader(Reader):
    """Files below a folder as squares of `size` pixels.

    crop: resized, the largest centred square; whole, the whole picture, its sides squeezed alike or not; random, a square
    of `size` pixels as they are, anywhere (enlarged where the picture is smaller). centre: first cut so many pixels out of
    the middle. A file that cannot be read is replaced by the next one in the list that can.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None, size: int, crop: Crop, channels: int = 3,
        centre: int | None = None,
    ):  # fmt: skip
        """names: relative to root. labels: one for each name."""
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])  # one buffer: each worker would copy a list of strings
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self.size, self.crop, self.channels, self.centre = size, crop, channels, centre

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(bytes(self.names[row]))

    def describe(self) -> str:
        return f"pictures in {self.root}"

    def subset(self, rows: np.ndarray) -> "PictureReader":
        """Return a reader of some of the files."""
        part = copy.copy(self)
        part.names, part.labels = self.names[rows], None if self.labels is None else self.labels[torch.from_numpy(rows)]
        return part

    def __getitem__(self, rows: Rows) -> Read:
        pictures, taken, unreadable = read_each(rows, len(self), (self.channels, self.size, self.size), self.read)
        return Read(pictures, None if self.labels is None else self.labels[taken], unreadable)

    def read(self, row: int, seed: int) -> Tensor | None:
        """Return one picture (C, size, size) uint8, its random crop a function of (seed, row); None if it cannot be read."""
        file = self.root / self.name(row)
        if not file.is_file():  # a pipe would be waited for
            return None
        try:
            with Image.open(file) as image:
                return self.cut(image, random.Random(seed * len(self) + row))
        except BROKEN:
            return None

    def cut(self, image: Image.Image, chance: random.Random) -> Tensor:
        if self.crop != "random" and self.centre is None:
            image.draft("RGB", (2 * self.size, 2 * self.size))  # a JPEG is decoded no larger than needed
        image = in_eight_bits(ImageOps.exif_transpose(image), "RGB" if self.channels == 3 else "L")
        if self.centre is not None:
            image = image.crop(middle(image.size, self.centre))
        if self.crop == "random" and min(image.size) >= self.size:
            left, top = (chance.randint(0, side - self.size) for side in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        box = (0, 0, *image.size) if self.crop == "whole" else middle(image.size, min(image.size))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        return torch.from_numpy(np.array(image)).reshape(self.size, self.size, self.channels).permute(2, 0, 1)


def read_each(
    rows: Rows, count: int, shape: tuple[int, ...], read: Callable[[int, int], Tensor | None]
) -> tuple[Tensor, list[int], list[int]]:
    """Return pictures (B, *shape) uint8, the rows of `count` they are of, and the rows that `read` gives None for."""
    pictures = torch.empty(len(rows.numbers), *shape, dtype=torch.uint8)
    taken, unreadable = list(rows.numbers), set[int]()
    for place, row in enumerate(rows.numbers):
        while len(unreadable) < count:
            picture = read(row, rows.seed)
            if picture is not None:
                pictures[place], taken[place] = picture, row
                break
            unreadable.add(row)
            row = (row + 1) % count
    return pictures, taken, sorted(unreadable)


def middle(sides: tuple[int, int], length: int) -> tuple[int, int, int, int]:
    """Return the centred square of that length, as (left, top, right, bottom)."""
    left, top = ((side - length) // 2 for side in sides)
    return left, top, left + length, top + length


class ImageStream(StreamDataset):
    """Pictures in [-1, 1] from files: training ones augmented, held-out ones not, random cuts of those always the same."""

    train: PictureReader
    unseen: PictureReader

    def __init__(
        self,
        train: PictureReader,
        unseen: PictureReader,
        classes: int,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        augment: float = 0.0,
        **described: Unpack[Described],
    ):
        """classes: what the files have. UserError when the configuration describes other pictures."""
        super().__init__(train, unseen, (train.channels, train.size, train.size), classes, (-1.0, 1.0), described)
        self.augmentation = Augmentation(flip, crop_padding, augment)
        self.mirrored, self.altered = flip, "crop=random" if train.crop == "random" else self.augmentation.altered

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return as_states(stored)

    def augmented(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Batch:
        return self.augmentation(x, label, generator)

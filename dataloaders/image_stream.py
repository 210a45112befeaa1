"""Pictures that are read, cut and resized as they are needed."""

import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Unpack, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.augmentation import Augmentation, AugmentationOptions
from dataloaders.base_dataloaders import Batch
from dataloaders.image_tensor import require_described
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

    def subset(self, rows: np.ndarray, crop: Crop) -> "PictureReader":
        """Some of the files, cut in another way."""
        labels = None if self.labels is None else self.labels[torch.from_numpy(rows)].tolist()
        names = [self.name(int(row)) for row in rows]
        return PictureReader(self.root, names, labels, self.size, crop, self.channels, self.centre)

    def __getitem__(self, rows: Rows) -> Read:
        pictures = torch.empty(len(rows.numbers), self.channels, self.size, self.size, dtype=torch.uint8)
        taken, unreadable = list(rows.numbers), set[int]()
        for place, row in enumerate(rows.numbers):
            while len(unreadable) < len(self):
                picture = self.read(row, rows.seed)
                if picture is not None:
                    pictures[place], taken[place] = picture, row
                    break
                unreadable.add(row)
                row = (row + 1) % len(self)
        return Read(pictures, None if self.labels is None else self.labels[taken], sorted(unreadable))

    def read(self, row: int, seed: int) -> Tensor | None:
        """Return one picture (C, size, size) uint8, its random crop a function of (seed, row); None if it cannot be read."""
        try:
            with Image.open(self.root / self.name(row)) as image:
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


def middle(sides: tuple[int, int], length: int) -> tuple[int, int, int, int]:
    """Return the centred square of that length, as (left, top, right, bottom)."""
    left, top = ((side - length) // 2 for side in sides)
    return left, top, left + length, top + length


class ImageStream(StreamDataset):
    """Pictures in [-1, 1] from files. Training ones are augmented, held-out ones never; one cut at random is cut in
    the same place each time."""

    train: PictureReader
    unseen: PictureReader

    def __init__(
        self,
        train: PictureReader,
        unseen: PictureReader,
        *,
        state_shape: Sequence[Count],
        num_classes: SizeOr0,
        classes: int,
        value_range: Sequence[float] = (-1.0, 1.0),
        epoch_size: EpochSize | None = None,
        **augmentation: Unpack[AugmentationOptions],
    ):
        """classes: what the files have. UserError when the configuration says otherwise, or size or crop is unfit."""
        require_described(self, (train.channels, train.size, train.size), state_shape, value_range)
        if num_classes != classes:
            raise UserError(
                f"{train.root} has {classes} classes, not {num_classes}; leave dataloaders.num_classes to be found out"
            )
        if epoch_size is not None:
            raise UserError("an epoch is all training pictures; leave dataloaders.epoch_size out, limit_data shortens it")
        super().__init__(train, unseen, list(state_shape), num_classes, list(value_range))
        self.augmentation = Augmentation(**augmentation)

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return as_states(stored)

    def augmented(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Batch:
        return self.augmentation(x, label, generator)


def require_crop(size: int, crop: str, channels: int) -> None:
    """Raise UserError for a size, way of cutting or number of channels that does not exist."""
    if not isinstance(size, int) or size < 1:
        raise UserError(f"dataloaders.size takes a whole number of pixels, not {size}")
    if crop not in get_args(Crop):
        raise UserError(f"dataloaders.crop={crop} is none of {', '.join(get_args(Crop))}")
    if channels not in (1, 3):
        raise UserError(f"dataloaders.channels takes 3 (colours) or 1 (grey), not {channels}")

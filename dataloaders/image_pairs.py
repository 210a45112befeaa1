"""Two trees of pictures, one to be drawn from the other: image to image."""

from pathlib import Path, PurePosixPath
from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import require
from common.ranges import Count, Inside, Size, SizeOr0
from dataloaders.augmentation import Augmentation
from dataloaders.base_dataloaders import Batch, Described
from dataloaders.image_folder import held_out_rows, labelled
from dataloaders.image_stream import PictureReader, read_each
from dataloaders.picture_files import class_folders, list_pictures
from dataloaders.stream import Read, Reader, Rows, StreamDataset, some_rows
from dataloaders.tensor_dataset import as_states
from models.inputs import join_condition, split_label

NAMED = 3  # pictures without a partner that are named


class PairReader(Reader):
    """Reads pictures, the channels of each one's partner behind its own; a pair of which one is unreadable is replaced."""

    def __init__(self, pictures: PictureReader, partners: PictureReader):
        """pictures, partners: as many, the same row of both being a pair."""
        self.pictures, self.partners = pictures, partners

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, row: int) -> str:
        return self.pictures.name(row)

    def describe(self) -> str:
        return f"pairs of pictures in {self.pictures.root} and {self.partners.root}"

    def subset(self, rows: np.ndarray) -> "PairReader":
        """Return a reader of some of the pairs."""
        return PairReader(self.pictures.subset(rows), self.partners.subset(rows))

    def read(self, row: int, seed: int) -> Tensor | None:
        """Return a pair (C + C', size, size) uint8; None if it cannot be read."""
        picture, partner = self.pictures.read(row, seed), self.partners.read(row, seed)
        return None if picture is None or partner is None else torch.cat([picture, partner])

    def __getitem__(self, rows: Rows) -> Read:
        size, labels = self.pictures.size, self.pictures.labels
        shape = (self.pictures.channels + self.partners.channels, size, size)
        pairs, taken, unreadable = read_each(rows, len(self), shape, self.read)
        return Read(pairs, None if labels is None else labels[taken], unreadable)


class ImagePairs(StreamDataset):
    """Pictures below a folder, each with a condition: the picture of its name below another folder, whatever its suffix.

    The folders in `root` are the classes, or there are none where pictures lie in it directly. Both of a pair are cut,
    resized, mirrored and shifted alike; a share of the pairs of each class is held out, the same in every run.
    """

    def __init__(
        self,
        root: str,
        condition_root: str,
        size: Size,
        crop: Literal["resized", "whole"] = "resized",
        channels: Literal[1, 3] = 3,
        condition_channels: Literal[1, 3] = 3,
        held_out_fraction: Inside = 0.1,
        held_out_most: Count = 10_000,
        flip: bool = False,
        crop_padding: SizeOr0 = 0,
        **described: Unpack[Described],
    ):
        """condition_root: may be `root` itself, as with condition_channels=1, to colour. Settings: as of ImageFolder.

        UserError for folders that are missing, or pictures without a partner.
        """
        place, other = Path(root).expanduser(), Path(condition_root).expanduser()
        classes = class_folders(place)
        pictures = labelled(place, classes, size, crop, channels)
        partners = PictureReader(other, partner_names(pictures, other), None, size, crop, condition_channels)
        rows, pairs = held_out_rows(pictures, held_out_fraction), PairReader(pictures, partners)
        train = pairs.subset(np.setdiff1d(np.arange(len(pairs)), rows))
        unseen = pairs.subset(rows[some_rows(len(rows), held_out_most)])
        shape, condition = (channels, size, size), (condition_channels, size, size)
        super().__init__(train, unseen, shape, len(classes), (-1.0, 1.0), described, condition)
        self.augmentation, self.class_names = Augmentation(flip, crop_padding), classes or None
        self.mirrored, self.altered = flip, self.augmentation.altered

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return as_states(stored[:, : self.state_shape[0]])

    def batch_of(self, stored: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        x, classes = super().batch_of(stored, labels, generator)
        condition = as_states(stored[:, self.state_shape[0] :].to(self.device, non_blocking=True))
        return x, join_condition(classes, condition)

    def augmented(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Batch:
        """Return both of each pair with the same random changes."""
        assert label is not None and self.condition_shape is not None
        pair = torch.cat([x, label[:, 2:].unflatten(1, self.condition_shape)], dim=1)
        pair = self.augmentation(pair, None, generator)[0]
        return pair[:, : x.shape[1]], join_condition(split_label(label)[0], pair[:, x.shape[1] :])


def partner_names(pictures: PictureReader, other: Path) -> list[str]:
    """Return which picture below `other` has the place and name of each picture. UserError where one has none, or two."""
    require(other, "correct dataloaders.condition_root", "folder")
    found: dict[str, list[str]] = {}
    for name in list_pictures(other):
        found.setdefault(bare(name), []).append(name)
    names = [pictures.name(row) for row in range(len(pictures))]
    lacking = [name for name in names if bare(name) not in found]
    if lacking:
        some = ", ".join(lacking[:NAMED]) + ", ..." * (len(lacking) > NAMED)
        raise UserError(
            f"{len(lacking):,} of the {len(names):,} pictures in {pictures.root} have none of their name in {other}: "
            f"{some}; each one needs the picture that it is drawn from, in the same folder below"
        )
    twice = next((partners for partners in map(found.get, map(bare, names)) if partners and len(partners) > 1), None)
    if twice:
        raise UserError(f"{twice[0]} and {twice[1]} in {other} differ in their suffix alone; leave one of them out")
    return [found[bare(name)][0] for name in names]


def bare(name: str) -> str:
    """Return the place and name of a file without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))

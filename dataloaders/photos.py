"""Pieces of the two photographs that scikit-learn ships: real pictures without any download."""

from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import CountFrom2
from dataloaders.augmentation import ImageOptions
from dataloaders.image_tensor import ImageTensor

SIDE = 32
CELL = 48  # pixels a side of the cells that are held out


class Photos(ImageTensor):
    """32 x 32 pieces of a temple (label 0) and of a dahlia (label 1), 427 x 640 pixels each, at random places.

    Each photograph is a board of cells of 48 x 48 pixels. Every fifth, scattered, is held out: held-out pieces lie inside
    one, and no training piece touches any. The pieces are the same in every run.
    """

    def __init__(
        self,
        crops: CountFrom2 = 10_000,
        held_out_crops: CountFrom2 = 2_000,
        condition: Literal["grey"] | None = None,
        **options: Unpack[ImageOptions],
    ):
        """crops, held_out_crops: pieces to train on and to hold out, half of them of each photograph.

        condition: see ImageTensor. UserError for more pieces than there are places, or fewer than 2.
        """
        from sklearn.datasets import load_sample_images  # takes a second to import

        photographs = load_sample_images().images
        places = [legal_places(photograph.shape[:2]) for photograph in photographs]
        train, held_out = (
            cut_out(photographs, [both[part] for both in places], count, key)
            for part, (key, count) in enumerate([("crops", crops), ("held_out_crops", held_out_crops)])
        )
        super().__init__(train, held_out, 2, condition=condition, **options)


def legal_places(size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper left corners (N, 2) of all training pieces and of all held-out pieces of a photograph."""
    height, width = size
    row, column = np.indices((height, width)) // CELL
    held_out = (2 * row + column) % 5 == 0  # a knight's move apart
    sums = np.pad(held_out.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = sums[SIDE:, SIDE:] - sums[:-SIDE, SIDE:] - sums[SIDE:, :-SIDE] + sums[:-SIDE, :-SIDE]  # of each piece's pixels
    return np.argwhere(inside == 0), np.argwhere(inside == SIDE**2)


def cut_out(photographs: list[np.ndarray], places: list[np.ndarray], count: int, key: str) -> tuple[Tensor, Tensor]:
    """Return `count` pieces (count, 3, 32, 32) uint8 at places chosen once for all, and their photographs (count,)."""
    most = 2 * min(len(corners) for corners in places)
    if count > most:
        raise UserError(f"dataloaders.{key} takes at most {most:,} pieces, for want of other places, not {count}")
    pieces, labels = [], torch.arange(count) % 2
    for number, (photograph, corners) in enumerate(zip(photographs, places, strict=True)):
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIDE, SIDE), axis=(0, 1))
        chosen = corners[np.random.RandomState(number).permutation(len(corners))[: int((labels == number).sum())]]
        pieces.append(torch.from_numpy(windows[chosen[:, 0], chosen[:, 1]]))
    mixed = torch.empty(count, *pieces[0].shape[1:], dtype=torch.uint8)
    for number, piece in enumerate(pieces):
        mixed[labels == number] = piece
    return mixed, labels

"""Small sets of pictures: on the training device as bytes, augmented there in whole batches."""

from collections.abc import Iterator
from typing import Literal, Unpack

import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.augmentation import Augmentation
from dataloaders.base_dataloaders import Batch, Described, EpochPlan
from dataloaders.tensor_dataset import TensorDataset
from models.inputs import join_condition, split_label

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class ImageTensor(TensorDataset):
    """Pictures in [-1, 1], stored as uint8; training batches are augmented, held-out ones never."""

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
        classes: int,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        augment: float = 0.0,
        condition: Literal["grey"] | None = None,
        **described: Unpack[Described],
    ):
        """train, held_out: pictures (N, C, H, W) uint8 and labels (N,) below `classes`. condition: grey, the brightness of a
        picture, to be coloured. UserError if otherwise described, and for that of grey pictures or turned ones.
        """
        states, labels = (torch.cat(both) for both in zip(train, held_out, strict=True))
        rows = torch.arange(len(train[0]), len(states))
        shape = (1, *states.shape[2:]) if condition else None
        if condition and (states.shape[1] != 3 or augment):
            raise UserError("dataloaders.condition=grey takes pictures in colour, without dataloaders.augment; leave it out")
        super().__init__(states, labels, rows, classes, (-1.0, 1.0), described, condition_shape=shape)
        self.augmentation = Augmentation(flip, crop_padding, augment)
        self.mirrored, self.altered = flip, self.augmentation.altered

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield TensorDataset.epoch, augmented with randomness from plan.generator."""
        for x, label in super().epoch(plan):
            yield self.beside(*self.augmentation(x, label, plan.generator))

    def rows(self, index: Tensor) -> Batch:
        return self.beside(*super().rows(index))

    def beside(self, x: Tensor, label: Tensor | None) -> Batch:
        """Return pictures and labels, with their conditions where there are any."""
        if self.condition_shape is None:
            return x, label
        weights = torch.tensor(BRIGHTNESS, device=x.device)[:, None, None]
        return x, join_condition(split_label(label)[0], (weights * x).sum(1, keepdim=True))

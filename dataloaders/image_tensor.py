"""Small sets of pictures: on the training device as bytes, augmented there in whole batches."""

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor

from dataloaders.augmentation import Augmentation
from dataloaders.base_dataloaders import Batch, Described, EpochPlan
from dataloaders.tensor_dataset import TensorDataset


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
        **described: Unpack[Described],
    ):
        """train, held_out: pictures (N, C, H, W) uint8 and labels (N,) below `classes`. UserError if otherwise described."""
        states, labels = (torch.cat(both) for both in zip(train, held_out, strict=True))
        rows = torch.arange(len(train[0]), len(states))
        super().__init__(states, labels, rows, num_classes=classes, value_range=(-1.0, 1.0), described=described)
        self.augmentation = Augmentation(flip, crop_padding, augment)
        self.mirrored, self.altered = flip, self.augmentation.altered

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield TensorDataset.epoch, augmented with randomness from plan.generator."""
        for x, label in super().epoch(plan):
            yield self.augmentation(x, label, plan.generator)

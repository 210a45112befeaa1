"""Small sets of pictures: on the training device as bytes, augmented there in whole batches."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.augmentation import Augmentation, AugmentationOptions
from dataloaders.base_dataloaders import Batch, EpochPlan
from dataloaders.tensor_dataset import TensorDataset


class ImageTensor(TensorDataset):
    """Pictures in [-1, 1], stored as uint8; training batches are augmented, held-out ones never."""

    def __init__(
        self,
        train: tuple[Tensor, Tensor | None],
        held_out: tuple[Tensor, Tensor | None],
        *,
        state_shape: Sequence[Count],
        num_classes: SizeOr0,
        value_range: Sequence[float] = (-1.0, 1.0),
        epoch_size: EpochSize | None = None,
        **augmentation: Unpack[AugmentationOptions],
    ):
        """train, held_out: pictures (N, C, H, W) uint8 and labels (N,) or None.

        UserError when state_shape, num_classes, value_range or epoch_size say otherwise.
        """
        (pictures, labels), (unseen, unseen_labels) = train, held_out
        require_described(self, tuple(pictures.shape[1:]), state_shape, value_range)
        count = 0 if labels is None else num_classes
        if num_classes != count or (labels is not None and not num_classes > int(labels.max())):
            raise UserError(
                f"{type(self).__name__} has {'no classes' if labels is None else f'classes up to {int(labels.max())}'}; "
                f"dataloaders.num_classes={num_classes} does not fit"
            )
        both = None if labels is None or unseen_labels is None else torch.cat([labels, unseen_labels])
        super().__init__(
            torch.cat([pictures, unseen]), both, torch.arange(len(pictures), len(pictures) + len(unseen)),
            epoch_size=epoch_size, num_classes=num_classes, value_range=value_range,
        )  # fmt: skip
        self.augmentation = Augmentation(**augmentation)

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield TensorDataset.epoch, augmented with randomness from plan.generator."""
        for x, label in super().epoch(plan):
            yield self.augmentation(x, label, plan.generator)


def require_described(
    dataset: object, shape: tuple[int, ...], state_shape: Sequence[int], value_range: Sequence[float]
) -> None:
    """Raise UserError when the configuration describes pictures of another shape or range."""
    if tuple(state_shape) != shape:
        raise UserError(
            f"{type(dataset).__name__} has pictures of shape {list(shape)}, not {list(state_shape)}; "
            "leave dataloaders.state_shape as it is"
        )
    if tuple(value_range) != (-1.0, 1.0):
        raise UserError(f"pictures are served between -1 and 1; leave dataloaders.value_range={list(value_range)} out")

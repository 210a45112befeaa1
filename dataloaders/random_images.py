"""Random images of any shape: a stand-in for data when only speed or memory is asked for."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.tensor_dataset import TensorDataset


class RandomImages(TensorDataset):
    """Smooth noise of any (C, H, W) clipped to [-1, 1], the same in every run; labels in turn; an eighth held out."""

    def __init__(
        self,
        state_shape: Sequence[Count] = (4, 32, 32),
        epoch_size: EpochSize = 448,
        num_classes: SizeOr0 = 10,
        value_range: Sequence[float] = (-1.0, 1.0),
    ):
        """UserError for a shape that is no image's, no classes, or an epoch that is no multiple of 7."""
        if len(state_shape) != 3 or num_classes < 1:
            raise UserError(
                "random images have a shape such as dataloaders.state_shape=[3,32,32] and dataloaders.num_classes of 1 or "
                f"more, not {list(state_shape)} and {num_classes}"
            )
        if epoch_size < 7 or epoch_size % 7:
            near = max(7, 7 * round(epoch_size / 7))
            raise UserError(f"an epoch of {epoch_size} leaves no eighth to hold out; set dataloaders.epoch_size={near}")
        channels, height, width = state_shape
        count = epoch_size * 8 // 7
        coarse = torch.randn(count, channels, -(-height // 4), -(-width // 4), generator=torch.Generator().manual_seed(0))
        states = F.interpolate(coarse, size=(height, width), mode="bilinear").clamp(-1, 1)
        labels, held_out = torch.arange(count) % num_classes, torch.arange(count - count // 8, count)
        super().__init__(states, labels, held_out, num_classes, value_range)

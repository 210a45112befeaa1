"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships (UCI optical digits, test part)."""

from collections.abc import Sequence

import torch

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.tensor_dataset import TensorDataset, stratified_rows


class Digits(TensorDataset):
    """States (1, 8, 8) in [-1, 1], labels 0..9; one fifth of each digit is held out, the same rows in every run."""

    def __init__(
        self,
        state_shape: Sequence[Count] = (1, 8, 8),
        epoch_size: EpochSize | None = None,
        num_classes: SizeOr0 = 10,
        value_range: Sequence[float] = (-1.0, 1.0),
    ):
        """UserError when the configuration describes other data than the digits."""
        from sklearn.datasets import load_digits  # takes a second to import

        if tuple(state_shape) != (1, 8, 8) or num_classes != 10 or tuple(value_range) != (-1.0, 1.0):
            raise UserError(
                "the digits are of shape [1, 8, 8], in 10 classes and between -1 and 1; "
                "leave dataloaders.state_shape, num_classes and value_range as they are"
            )
        digits = load_digits()
        states = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # pixels count 0 to 16
        labels = torch.from_numpy(digits.target).long()
        held_out = stratified_rows(labels, len(labels), fraction=0.2, seed=0)
        super().__init__(states, labels, held_out, epoch_size=epoch_size, num_classes=num_classes, value_range=value_range)

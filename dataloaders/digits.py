"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships (UCI optical digits, test part)."""

from typing import Unpack

import torch

from dataloaders.base_dataloaders import Described
from dataloaders.tensor_dataset import TensorDataset, stratified_rows


class Digits(TensorDataset):
    """States (1, 8, 8) in [-1, 1], labels 0..9; one fifth of each digit is held out, the same rows in every run."""

    def __init__(self, **described: Unpack[Described]):
        """UserError when the configuration describes other data than the digits."""
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        states = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # pixels count 0 to 16
        labels = torch.from_numpy(digits.target).long()
        held_out = stratified_rows(labels, len(labels), fraction=0.2, seed=0)
        super().__init__(states, labels, held_out, 10, (-1.0, 1.0), described)

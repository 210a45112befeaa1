"""A user's own data, from a NumPy file or from memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from common.errors import UserError
from common.ranges import Inside
from dataloaders.array_header import array_condition, read_labels, reading, state_shape
from dataloaders.base_dataloaders import Described
from dataloaders.tensor_dataset import TensorDataset, stratified_rows


class OwnTensors(TensorDataset):
    """States and optional labels in memory; a share of the rows is held out, always the same."""

    def __init__(
        self,
        states: torch.Tensor,
        labels: torch.Tensor | None,
        held_out_fraction: Inside = 0.1,
        standardize: bool = False,
        conditions: torch.Tensor | None = None,
        **described: Unpack[Described],
    ):
        """states (N, *state_shape), fp32, or uint8 of pixels; labels (N,) from 0 up; conditions (N, *condition_shape).

        UserError for a state_shape, epoch_size or num_classes that contradict them.
        """
        held_out = stratified_rows(labels, len(states), held_out_fraction, seed=0)
        classes, value_range = 0 if labels is None else 1 + int(labels.max()), described.get("value_range")
        super().__init__(states, labels, held_out, classes, value_range, described, conditions)
        self.standardize = standardize


class ArrayDataset(OwnTensors):
    """States of a .npy, or `x` of a .npz with labels `y` and conditions `condition`, if any; some rows held out."""

    def __init__(
        self, path: str, held_out_fraction: Inside = 0.1, standardize: bool = False, **described: Unpack[Described]
    ):
        """path: the file, with states (N, D) or (N, C, H, W), 10 rows or more.

        UserError for a file that is missing or unfit, for values that are not finite or lie outside value_range, and
        for a state_shape, epoch_size, num_classes or condition_shape that contradict the file.
        """
        file, value_range = Path(path), described.get("value_range")
        state_shape(file)
        states, found = load_numbers(file, "x"), read_labels(file)
        conditions = None if array_condition(path) is None else load_numbers(file, "condition")
        require_values_in(states, value_range, file)
        labels = None if found is None else torch.from_numpy(found.astype(np.int64))
        super().__init__(states, labels, held_out_fraction, standardize, conditions, **described)


def load_numbers(file: Path, member: str, nan: bool = False) -> torch.Tensor:
    """Return an array of a file, (N, ...) in fp32. UserError where it is none of finite numbers (or NaN, if `nan`)."""
    with reading(file):
        loaded = np.load(file, allow_pickle=False)
        array = loaded if file.suffix == ".npy" else loaded[member]
    if array.dtype.kind not in "fiub" or not array.size:
        raise UserError(f"{file} holds {array.dtype} of shape {list(array.shape)}; it takes real numbers, one or more")
    with np.errstate(over="ignore"):  # too large for fp32: infinite, and refused below
        numbers = torch.from_numpy(array.astype(np.float32))
    good = numbers.isfinite() | (numbers.isnan() & nan)
    bad = int((~good.reshape(len(numbers), -1).all(dim=1)).sum()) if numbers.ndim else int(not good)
    if bad:
        count = len(numbers) if numbers.ndim else 1
        raise UserError(f"{bad} of the {count} rows in {file} are not finite in fp32; remove or rescale them")
    return numbers


def require_values_in(states: torch.Tensor, value_range: Sequence[float] | None, file: Path) -> None:
    """Raise UserError when a value lies outside the declared range."""
    low, high = float(states.min()), float(states.max())
    if value_range is not None and not value_range[0] <= low <= high <= value_range[1]:
        raise UserError(
            f"the values in {file} go from {low:g} to {high:g}, outside dataloaders.value_range={list(value_range)}; "
            "rescale them, or state the range they have"
        )

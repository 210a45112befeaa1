"""A user's own data from a NumPy file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.array_header import member_names, read_labels, reading, state_header
from dataloaders.tensor_dataset import TensorDataset, stratified_rows


class ArrayDataset(TensorDataset):
    """States of a .npy, or `x` and optional labels `y` of a .npz; a share of the rows is held out, always the same."""

    def __init__(
        self,
        path: str,
        state_shape: Sequence[Count] | None = None,
        epoch_size: EpochSize | None = None,
        num_classes: SizeOr0 | None = None,
        value_range: Sequence[float] | None = None,
        held_out_fraction: float = 0.1,
        standardize: bool = False,
    ):
        """path: the file, with states (N, D) or (N, C, H, W), 10 rows or more. None reads a value from the file.

        UserError for a file that is missing or unfit, for values that are not finite or lie outside value_range, and
        for a state_shape, epoch_size or num_classes that contradict the file.
        """
        file = Path(path)
        states = load_states(file)
        labels = load_labels(file, len(states))
        classes = 0 if labels is None else 1 + int(labels.max())
        if tuple(state_shape or states.shape[1:]) != tuple(states.shape[1:]) or num_classes not in (None, classes):
            raise UserError(
                f"{file} holds states of shape {list(states.shape[1:])} in {classes} classes; "
                "leave dataloaders.state_shape and dataloaders.num_classes to be read from it"
            )
        require_values_in(states, value_range, file)
        if not 0 < held_out_fraction < 1:
            raise UserError(f"dataloaders.held_out_fraction must lie between 0 and 1, not {held_out_fraction}")
        held_out = stratified_rows(labels, len(states), held_out_fraction, seed=0)
        super().__init__(states, labels, held_out, epoch_size=epoch_size, num_classes=classes, value_range=value_range)
        self.standardize = standardize


def load_states(file: Path) -> torch.Tensor:
    """Return states (N, D) or (N, C, H, W) in fp32. UserError when the file is unfit or a value is not finite in fp32."""
    state_header(file)
    with reading(file):
        loaded = np.load(file, allow_pickle=False)
        array = loaded if file.suffix == ".npy" else loaded["x"]
    with np.errstate(over="ignore"):  # too large for fp32: infinite, and refused below
        states = torch.from_numpy(array.astype(np.float32))
    bad = int((~states.flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise UserError(f"{bad} of the {len(states)} rows in {file} are not finite in fp32; remove or rescale them")
    return states


def load_labels(file: Path, rows: int) -> torch.Tensor | None:
    """Return labels (rows,) int64 of a .npz, or None when there are none. UserError when they are unfit."""
    if file.suffix == ".npy" or "y" not in member_names(file):
        return None
    return torch.from_numpy(read_labels(file, rows).astype(np.int64))


def require_values_in(states: torch.Tensor, value_range: Sequence[float] | None, file: Path) -> None:
    """Raise UserError when a value lies outside the declared range."""
    low, high = float(states.min()), float(states.max())
    if value_range is not None and not value_range[0] <= low <= high <= value_range[1]:
        raise UserError(
            f"the values in {file} go from {low:g} to {high:g}, outside dataloaders.value_range={list(value_range)}; "
            "rescale them, or state the range they have"
        )

"""The units that a flow is learned in."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Standardised(nn.Module):
    """Learns the flow of (x1 - data_mean) / data_std; both are None where data are learned as they are.

    Velocities and maps are those of the standardised states.
    """

    network: nn.Module
    data_mean: Tensor | None
    data_std: Tensor | None

    def standardise_by(self, mean: list[float] | None, std: list[float] | None, state_shape: Sequence[int] = ()) -> None:
        """Set mean and standard deviation: numbers for each channel of images, for each dimension of vectors."""
        shape = (-1, *(1,) * (len(state_shape) - 1))
        for name, numbers in (("data_mean", mean), ("data_std", std)):
            value = (
                None if numbers is None else torch.tensor(numbers).reshape(shape).to(next(self.network.parameters()).device)
            )
            self.register_buffer(name, value, persistent=False)

    def standardised(self, x1: Tensor) -> Tensor:
        """Return data (B, ...) as the flow has them."""
        return x1 if self.data_mean is None or self.data_std is None else (x1 - self.data_mean) / self.data_std

    def in_data_units(self, x: Tensor) -> Tensor:
        """Return states of the flow (B, ...) in the units of the data."""
        return x if self.data_mean is None or self.data_std is None else self.data_mean + self.data_std * x

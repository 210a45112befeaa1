"""Any velocity model, given a condition beside the state."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.velocity_model import VelocityModel


def widened(state_shape: Sequence[int], condition_shape: Sequence[int]) -> list[int]:
    """Return the shape of states with a condition in further dimensions, or channels, and one for whether it is shown."""
    flat = len(state_shape) == 1 or len(condition_shape) == 1
    more = math.prod(condition_shape) if flat else condition_shape[0]
    return [state_shape[0] + more + 1, *state_shape[1:]]


class Conditioned(VelocityModel):
    """A velocity model of wider states: the state, the condition, and a channel of 1 where that is shown, of 0 where it is
    hidden, the condition then being 0, too. What it answers in the further channels is left out.

    With states that are images, each number of a vector is a constant channel, as the times are, and a picture of another
    size is resized to theirs; with states that are vectors, a picture is a vector. Labels are those of join_condition.
    """

    def __init__(self, network: VelocityModel, state_shape: Sequence[int], condition_shape: Sequence[int]):
        """network: of states of shape `widened(state_shape, condition_shape)`."""
        super().__init__()
        self.network, self.num_classes = network, network.num_classes
        self.state_shape, self.condition_shape = tuple(state_shape), tuple(condition_shape)

    def init_weights(self) -> None:
        self.network.init_weights()

    def null_label(self, label: Tensor) -> Tensor:
        return torch.cat([super().null_label(label)[:, :1], torch.zeros_like(label[:, 1:])], dim=1)

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            label = unified_input.new_zeros(len(unified_input), 2 + math.prod(self.condition_shape or ()))
            label[:, 0] = self.num_classes
        state, times = unified_input[:, :-2], unified_input[:, -2:]
        wide = torch.cat([state, self.channels(label[:, 1:]), times], dim=1)
        classes = label[:, 0].long() if self.num_classes else None
        return self.network(wide, classes)[:, : state.shape[1]]

    def channels(self, given: Tensor) -> Tensor:
        """Return "shown" and the condition (B, 1 + P) as dimensions of vectors (B, 1 + P), or channels (B, 1 + C, H, W)."""
        assert self.condition_shape is not None
        if len(self.state_shape) == 1:
            return given
        sides = self.state_shape[1:]
        if len(self.condition_shape) == 1:
            return given[:, :, None, None].expand(-1, -1, *sides)
        picture, shown = given[:, 1:].unflatten(1, self.condition_shape), given[:, :1, None, None].expand(-1, -1, *sides)
        if self.condition_shape[1:] != sides:
            picture = F.interpolate(picture, sides, mode="bilinear", align_corners=False, antialias=True)
        return torch.cat([shown, picture], dim=1)

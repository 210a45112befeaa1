"""The velocity-model contract."""

from abc import ABC, abstractmethod

from torch import Tensor

from models.network import Network


class VelocityModel(Network, ABC):
    """A network over the unified input: forward(unified_input, label=None) -> velocity of the state's shape.

    unified_input (B, D + 2) or (B, C + 2, H, W): the state and its two times, see make_unified_flow_matching_input.
    label (B,) int64 in [0, num_classes], the last being the null label; None means the null label everywhere. Where the
    data is augmented, label (B, 1 + A) holds what was done to each row as well, see split_label.
    num_classes: 0 for an unconditional network, which is never given labels.
    A model may define init_weights(); it is called once at set-up.
    """

    @abstractmethod
    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor: ...

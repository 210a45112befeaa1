"""The velocity-model contract."""

from abc import ABC, abstractmethod

from torch import Tensor

from models.inputs import with_class
from models.network import Network


class VelocityModel(Network, ABC):
    """A network over the unified input: forward(unified_input, label=None) -> velocity of the state's shape.

    unified_input (B, D + 2) or (B, C + 2, H, W): the state and its two times, see make_unified_flow_matching_input.
    label (B,) int64 in [0, num_classes], the last being the null label; None means the null label everywhere. Where the
    data is augmented, label (B, 1 + A) holds what was done to each row as well, see split_label.
    num_classes: 0 for a network that is given no classes. condition_shape: of the conditions it is given, see Conditioned;
    None for none. A network of neither is unconditional, and never given labels.
    A model may define init_weights(); it is called once at set-up.
    """

    @property
    def is_conditional(self) -> bool:
        """Whether labels say what to draw."""
        return self.num_classes > 0 or self.condition_shape is not None

    def null_label(self, label: Tensor) -> Tensor:
        """Return labels like these with all hidden that says what to draw."""
        return with_class(label, self.num_classes)

    @abstractmethod
    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor: ...

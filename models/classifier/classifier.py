"""The classifier contract."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.network import Network


class Classifier(Network, ABC):
    """A network over images: forward(images (B, C, H, W)) -> logits (B, num_classes).

    head: the last, linear layer. features(images) -> (B, F), what it reads: sets of images are compared by these.
    """

    head: nn.Linear

    @abstractmethod
    def features(self, images: Tensor) -> Tensor: ...

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

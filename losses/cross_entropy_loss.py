"""Classification."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from common.errors import UserError
from common.ranges import ShareBelow1
from dataloaders.sources import Source
from losses.objective import Objective
from models.classifier.classifier import Classifier


@dataclass
class LabelledBatch:
    """One step's rows: images (B, C, H, W) and label (B,) int64."""

    images: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)


class CrossEntropyLoss(Objective):
    """-log p(label | image), with the share label_smoothing of each label spread over all classes (Szegedy et al. 2015).

    Its terms also state the share of rows it gets right. Raises UserError around a network that is no classifier.
    """

    network: Classifier

    def __init__(self, network: Classifier, label_smoothing: ShareBelow1 = 0.0):
        super().__init__()
        if not isinstance(network, Classifier):
            raise UserError(
                "loss=cross_entropy trains a classifier, and this model gives velocities; "
                "use model=small_cnn_classifier or model=resnet18, or loss=mse for this model"
            )
        self.network, self.label_smoothing = network, label_smoothing

    def batch(
        self, source: Source, x1: Tensor, label: Tensor | None, generator: Generator, progress: float
    ) -> LabelledBatch:
        assert label is not None, "a classifier's model is not built for data without labels"
        return LabelledBatch(x1, label)

    def forward(self, batch: LabelledBatch, teacher: Objective | None = None) -> dict[str, Tensor]:
        logits = self.network(batch.images).float()
        loss = F.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == batch.label).float().mean()}

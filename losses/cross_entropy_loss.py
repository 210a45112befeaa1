"""Classification."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.errors import UserError
from common.ranges import NotNegative, Range, Share, ShareBelow1, SizeOr0
from dataloaders.augmentation import Distortion
from dataloaders.sources import Source
from losses.objective import Objective
from models.classifier.classifier import Classifier
from models.inputs import split_label

TRIES = 16  # of drawing a beta variable; at the worst alpha one in 65,536 is none of them


@dataclass
class LabelledBatch:
    """One step's rows: images (B, C, H, W) and label (B,) int64; of mixed images the lesser label, and its share (B,)."""

    images: Tensor
    label: Tensor
    other: Tensor | None = None
    share: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)


class CrossEntropyLoss(Objective):
    """-log p(label | image), with the share label_smoothing of each label spread over all classes (Szegedy et al. 2015).

    focusing: power g of the focal loss, each row's loss times (1 - p(label))^g: easy rows count less (Lin et al. 2017, arXiv
    1708.02002, eq. 4). superloss: strength 1 / lambda of SuperLoss, which weighs rows that are harder than chance less, as
    wrong labels are (Castells et al. 2020, eq. 4). mixup: alpha of Beta(alpha, alpha), the share of another row of the batch
    that is mixed into each (Zhang et al. 2017, arXiv 1710.09412). rotation, elastic, blur, cutout: see Distortion. Each is
    off at 0.
    Its terms also state the share of rows it gets right. Raises UserError around a network that is no classifier.
    """

    network: Classifier

    def __init__(
        self,
        network: Classifier,
        label_smoothing: ShareBelow1 = 0.0,
        focusing: NotNegative = 0.0,
        superloss: NotNegative = 0.0,
        mixup: Share = 0.0,
        rotation: Annotated[float, Range(0, 180)] = 0.0,
        elastic: NotNegative = 0.0,
        blur: NotNegative = 0.0,
        cutout: SizeOr0 = 0,
    ):
        super().__init__()
        if not isinstance(network, Classifier):
            raise UserError(
                "loss=cross_entropy trains a classifier, and this model gives velocities; "
                "use model=small_cnn_classifier or model=resnet18, or loss=mse for this model"
            )
        self.network, self.label_smoothing = network, label_smoothing
        self.focusing, self.superloss, self.mixup = focusing, superloss, mixup
        self.distortion = Distortion(rotation, elastic, blur, cutout)

    def batch(
        self, source: Source, x1: Tensor, label: Tensor | None, generator: Generator, progress: float
    ) -> LabelledBatch:
        label = split_label(label)[0]
        assert label is not None, "a classifier's model is not built for data without labels"
        x1 = self.distortion(x1, generator)
        if self.mixup == 0:
            return LabelledBatch(x1, label)
        share = beta(self.mixup, len(x1), generator)
        share = torch.minimum(share, 1 - share)  # of the other row: the row's own label stays the greater one
        other = torch.randperm(len(x1), generator=generator, device=x1.device)
        return LabelledBatch(torch.lerp(x1, x1[other], share.reshape(-1, 1, 1, 1)), label, label[other], share)

    def forward(self, batch: LabelledBatch, teacher: Objective | None = None) -> dict[str, Tensor]:
        logits = self.network(batch.images).float()
        loss = self.loss_of(logits, batch.label)
        if batch.other is not None and batch.share is not None:
            loss = torch.lerp(self.rows(logits, batch.label), self.rows(logits, batch.other), batch.share).mean()
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == batch.label).float().mean()}

    def loss_of(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of rows that are not mixed: logits (B, K), label (B,) -> a scalar."""
        if self.focusing or self.superloss:
            return self.rows(logits, label).mean()
        return F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)

    def rows(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each row (B,)."""
        rows = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing, reduction="none")
        if self.focusing:
            p = logits.softmax(1).gather(1, label[:, None])[:, 0]
            rows = rows * (1 - p).clamp(min=1e-6) ** self.focusing
        return rows if self.superloss == 0 else super_loss(rows, math.log(logits.shape[1]), 1 / self.superloss)


def super_loss(rows: Tensor, threshold: float, strength: float) -> Tensor:
    """Return min over c > 0 of (l - threshold) c + strength (log c)^2 for losses l (B,).

    (Castells et al. 2020, eq. 4 and 6.) The minimum is at c = exp(-W(max(-2 / e, (l - threshold) / strength) / 2)), W
    Lambert's function, and its gradient is c.
    """
    excess = (rows.detach() - threshold) / strength
    c = torch.exp(-lambert_w(0.5 * excess.clamp(min=-2 / math.e)))
    return (rows - threshold) * c + strength * c.log().square()


def lambert_w(x: Tensor) -> Tensor:
    """Return w with w e^w = x, the branch above -1, for x >= -1 / e: Halley's steps, without waiting for the device."""
    edge = (2 * (math.e * x + 1)).clamp(min=0).sqrt()
    w = torch.where(x < 0.5, -1 + edge - edge.square() / 3, torch.log1p(x.clamp(min=0)))
    for _ in range(8):
        over = w * w.exp() - x
        slope = w.exp() * (w + 1)
        step = over / (slope - 0.5 * (w + 2) * over / (w + 1).clamp(min=1e-6)).clamp(min=1e-6)
        w = (w - step).clamp(min=-1)
    return w


def beta(alpha: float, count: int, generator: Generator) -> Tensor:
    """Return draws (count,) of Beta(alpha, alpha), alpha in (0, 1], on the generator's device (Joehnk 1964)."""
    x, y = torch.rand(2, TRIES, count, generator=generator, device=generator.device).log() / alpha
    first = ((x.exp() + y.exp()) <= 1).int().argmax(0, keepdim=True)
    return torch.sigmoid(x.gather(0, first) - y.gather(0, first))[0]  # x / (x + y) of what the logarithms stand for

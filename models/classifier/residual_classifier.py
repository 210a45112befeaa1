"""Residual networks for small images: ResNet-18 in its CIFAR form, and a small one."""

from typing import Literal

from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.classifier.classifier import Classifier
from models.layers import GroupNorm

Norm = Literal["batch", "group"]
GROUPS = 8  # of channels, for norm=group


def normalisation(norm: Norm, channels: int) -> nn.Module:
    """Return a normalisation layer. UserError for channels that groups do not divide."""
    if norm == "group" and channels % GROUPS:
        raise UserError(f"model.norm=group wants multiples of {GROUPS} channels, not {channels}; change model.width")
    return nn.BatchNorm2d(channels) if norm == "batch" else GroupNorm(GROUPS, channels)


def convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), the skip a 1x1 convolution where the shape changes (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, outputs, 3, stride), normalisation(norm, outputs)
        self.conv2, self.norm2 = convolution(outputs, outputs, 3), normalisation(norm, outputs)
        same = stride == 1 and inputs == outputs
        self.skip: nn.Module = (
            nn.Identity() if same else nn.Sequential(convolution(inputs, outputs, 1, stride), normalisation(norm, outputs))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(h + self.skip(x))


class ResidualClassifier(Classifier):
    """A 3x3 stem without pooling, stages of basic blocks each at half the side of the one before, a mean over the image.

    width 64, multipliers [1, 2, 4, 8], two blocks a stage and norm=batch are ResNet-18 in its CIFAR form (He et al. 2015,
    arXiv 1512.03385). norm=group sees each row by itself. dropout: of the features that the linear layer reads.
    Raises UserError for images too small to be halved that often.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0,
        width: Size = 64,
        multipliers: list[Size] | None = None,
        blocks: Depth = 2,
        norm: Norm = "batch",
        dropout: ShareBelow1 = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        widths = [width * factor for factor in multipliers or [1, 2, 4, 8]]
        if min(state_shape[1:]) < 2 ** (len(widths) - 1):
            raise UserError(
                f"model.multipliers={list(multipliers or [])} halve images {len(widths) - 1} times, and these are "
                f"{state_shape[1]}x{state_shape[2]}; use fewer stages, or model=small_cnn_classifier"
            )
        self.stem = nn.Sequential(convolution(state_shape[0], width, 3), normalisation(norm, width), nn.ReLU())
        stages: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(zip([width, *widths], widths, strict=False)):
            stages.append(BasicBlock(inputs, outputs, 2 if stage else 1, norm))
            stages += [BasicBlock(outputs, outputs, 1, norm) for _ in range(blocks - 1)]
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def init_weights(self) -> None:
        """Draw normal weights that keep the gradients' variance (He et al. 2015, arXiv 1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))

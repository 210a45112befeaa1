"""Residual networks for small images: ResNet-18 and ResNet-50 in their CIFAR form, wide ones, and a small one."""

from typing import Literal

from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.classifier.classifier import Classifier
from models.layers import GroupNorm

Norm = Literal["batch", "group"]
Block = Literal["basic", "bottleneck", "preactivated"]
GROUPS = 8  # of channels, for norm=group


def normalisation(norm: Norm, channels: int) -> nn.Module:
    """Return a normalisation layer. UserError for channels that groups do not divide."""
    if norm == "group" and channels % GROUPS:
        raise UserError(f"model.norm=group wants multiples of {GROUPS} channels, not {channels}; change model.width")
    return nn.BatchNorm2d(channels) if norm == "batch" else GroupNorm(GROUPS, channels)


def convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)


def activation(norm: Norm, channels: int) -> list[nn.Module]:
    return [normalisation(norm, channels), nn.ReLU()]


def projection(inputs: int, outputs: int, stride: int, norm: Norm | None) -> nn.Module:
    """Return what carries a block's input to its sum: a 1x1 convolution where the shape changes, normalised if asked."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    project = convolution(inputs, outputs, 1, stride)
    return nn.Sequential(project, normalisation(norm, outputs)) if norm else project


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), the skip a 1x1 convolution where the shape changes (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, outputs, 3, stride), normalisation(norm, outputs)
        self.conv2, self.norm2 = convolution(outputs, outputs, 3), normalisation(norm, outputs)
        self.skip, self.relu = projection(inputs, outputs, stride, norm), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(h + self.skip(x))


class Bottleneck(nn.Module):
    """relu(skip(x) + inner(x)), a 3x3 convolution of a quarter of the channels between two of 1x1 (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [inputs, outputs // 4, outputs // 4, outputs]
        for before, after, side, by in zip(sizes, sizes[1:], (1, 3, 1), (1, stride, 1), strict=False):
            layers += [convolution(before, after, side, by), normalisation(norm, after), nn.ReLU()]
        self.inner, self.skip = nn.Sequential(*layers[:-1]), projection(inputs, outputs, stride, norm)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.inner(x) + self.skip(x))


class PreactivatedBlock(nn.Module):
    """skip(x) + conv(relu(norm(conv(h)))), h = relu(norm(x)), which a skip that changes the shape takes in the place of x
    (Zagoruyko & Komodakis 2016).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.before = nn.Sequential(normalisation(norm, inputs), nn.ReLU())
        self.inner = nn.Sequential(
            convolution(inputs, outputs, 3, stride),
            normalisation(norm, outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 3),
        )
        self.skip, self.same = projection(inputs, outputs, stride, None), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.inner(h) + (x if self.same else self.skip(h))


BLOCKS: dict[Block, type[nn.Module]] = {"basic": BasicBlock, "bottleneck": Bottleneck, "preactivated": PreactivatedBlock}


class ResidualClassifier(Classifier):
    """A 3x3 stem without pooling, stages of blocks each at half the side of the one before, a mean over the image.

    width 64, multipliers [1, 2, 4, 8], two blocks a stage and norm=batch are ResNet-18 in its CIFAR form; multipliers
    [4, 8, 16, 32] of blocks [3, 4, 6, 3], by stage, and block=bottleneck ResNet-50 (He et al. 2015, arXiv 1512.03385); width
    16, multipliers [10, 20, 40], four blocks a stage and block=preactivated WRN-28-10 (Zagoruyko & Komodakis 2016, arXiv
    1605.07146). norm=group sees each row by itself. dropout: of the features that the linear layer reads.
    Raises UserError for images too small to be halved that often.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0,
        width: Size = 64,
        multipliers: list[Size] | None = None,
        blocks: Depth | list[Depth] = 2,
        norm: Norm = "batch",
        dropout: ShareBelow1 = 0.0,
        block: Block = "basic",
    ):
        super().__init__()
        self.num_classes = num_classes
        widths = [width * factor for factor in multipliers or [1, 2, 4, 8]]
        if min(state_shape[1:]) < 2 ** (len(widths) - 1):
            raise UserError(
                f"model.multipliers={list(multipliers or [])} halve images {len(widths) - 1} times, and these are "
                f"{state_shape[1]}x{state_shape[2]}; use fewer stages, or model=small_cnn_classifier"
            )
        depths = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
        if len(depths) != len(widths):
            raise UserError(f"model.blocks={depths} are of {len(depths)} stages, and model.multipliers of {len(widths)}")
        late = block == "preactivated"  # each block normalises its input, and the last one's output is left
        self.stem = nn.Sequential(convolution(state_shape[0], width, 3), *([] if late else activation(norm, width)))
        stages: list[nn.Module] = []
        for stage, (inputs, outputs, depth) in enumerate(zip([width, *widths], widths, depths, strict=False)):
            stages.append(BLOCKS[block](inputs, outputs, 2 if stage else 1, norm))
            stages += [BLOCKS[block](outputs, outputs, 1, norm) for _ in range(depth - 1)]
        stages += activation(norm, widths[-1]) if late else []
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

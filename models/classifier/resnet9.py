"""ResNet-9."""

from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, ShareBelow1, Size, SizeOr0
from models.classifier.classifier import Classifier
from models.classifier.residual_classifier import Norm, convolution, normalisation


class Residual(nn.Module):
    """x + two convolutions of x, each normalised and rectified."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.inner = nn.Sequential(*step(channels, channels, norm), *step(channels, channels, norm))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def step(inputs: int, outputs: int, norm: Norm) -> list[nn.Module]:
    return [convolution(inputs, outputs, 3), normalisation(norm, outputs), nn.ReLU()]


class ResNet9(Classifier):
    """Eight convolutions and a linear layer, made to be trained in a few epochs (Page 2018, DAWNBench's CIFAR-10 entry).

    Channels width, 2, 4 and 8 times as many, each but the first halving the image by a maximum, residual pairs after the
    second and the last, and the maximum over the image. dropout: of the features that the linear layer reads. Its logits are
    scaled by 1/8, as they were there. Raises UserError for images too small to be halved three times.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0,
        width: Size = 64,
        norm: Norm = "batch",
        dropout: ShareBelow1 = 0.0,
    ):
        super().__init__()
        if min(state_shape[1:]) < 8:
            raise UserError(f"model=resnet9 halves images three times, and these are {state_shape[1]}x{state_shape[2]}")
        self.num_classes = num_classes
        layers = step(state_shape[0], width, norm)
        for times in (2, 4, 8):
            layers += [*step(times * width // 2, times * width, norm), nn.MaxPool2d(2)]
            layers += [Residual(times * width, norm)] if times != 4 else []
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images).amax((2, 3)) / 8

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))

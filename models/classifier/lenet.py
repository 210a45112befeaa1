"""LeNet-5."""

from torch import Tensor, nn

from common.ranges import Count, ShareBelow1, Size, SizeOr0
from models.classifier.classifier import Classifier

SIDE = 32  # of the images that it was made for


class LeNet(Classifier):
    """Two 5x5 convolutions, each followed by means of 2x2, and three linear layers, by tanh (LeCun et al. 1998, fig. 2, each
    map seeing all of those before).

    width: channels of the first convolution, 6 in the paper; all other sizes are in its proportion. Images smaller than 32
    pixels are padded to them by zeros. dropout: of the features that the last layer reads.
    """

    def __init__(self, state_shape: list[Count], num_classes: SizeOr0, width: Size = 6, dropout: ShareBelow1 = 0.0):
        super().__init__()
        channels, high, wide = state_shape
        second, padding = width * 8 // 3, [max(0, SIDE + 1 - side) // 2 for side in (high, wide)]
        left = [((side + 2 * pad - 4) // 2 - 4) // 2 for side, pad in zip((high, wide), padding, strict=True)]
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, width, 5, padding=(padding[0], padding[1])), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(width, second, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(second * left[0] * left[1], 20 * width), nn.Tanh(), nn.Linear(20 * width, 14 * width), nn.Tanh()),
        )
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(14 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))

"""Vision transformers for small and large images."""

from functools import partial

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.classifier.classifier import Classifier

HEAD = 64  # numbers in an attention head


class VisionTransformer(Classifier):
    """Patches of the image and a class token, learned positions, `depth` pre-norm transformer blocks, the class token's
    features normalised (Dosovitskiy et al. 2020, arXiv 2010.11929).

    width 192, 384, 768, 1024 with depth 12, 12, 12, 24 are its tiny, small, base and large form, of heads of 64 numbers
    each. patch: side of a patch in pixels; an eighth of the image's side unless given. dropout: within the blocks.
    Raises UserError for patches that do not tile the image, or a width that heads do not divide.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0,
        width: Size = 192,
        depth: Depth = 12,
        patch: Size | None = None,
        dropout: ShareBelow1 = 0.0,
    ):
        super().__init__()
        channels, high, wide = state_shape
        self.num_classes, side = num_classes, patch or max(1, min(high, wide) // 8)
        if high % side or wide % side:
            raise UserError(f"model.patch={side} does not tile images of {high}x{wide}; give a divisor of both sides")
        heads = max(1, width // HEAD)
        if width % heads:
            raise UserError(f"model.width={width} is no multiple of its {heads} heads; give one of {HEAD}")
        self.patches = nn.Conv2d(channels, width, side, side)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + (high // side) * (wide // side), width))
        settings = (width, heads, 4 * width, dropout, "gelu")
        block = partial(nn.TransformerEncoderLayer, *settings, batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """Draw positions of standard deviation 0.02; the rest as torch has it."""
        nn.init.normal_(self.position, std=0.02)

    def features(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1) + self.position
        return self.blocks(tokens)[:, 0]

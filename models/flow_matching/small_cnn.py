"""A small convolutional velocity model for small images."""

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.inputs import split_unified_flow_matching_input
from models.layers import ClassEmbedding, GroupNorm, TimeFeatures
from models.velocity_model import VelocityModel


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; time and label enter as a scale and shift after the second normalisation."""

    def __init__(self, channels: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(8, channels), GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.activation, self.dropout = nn.SiLU(), nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(self.activation(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(self.dropout(self.activation(h)))


class SmallCNN(VelocityModel):
    """Residual blocks at full resolution around a deeper stack at half resolution, joined by one skip. About 0.5 M.

    (B, C + 2, H, W) -> (B, C, H, W), H and W even. The time channels enter the first convolution with the state, and
    their Fourier features modulate every block.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0 = 0,
        width: Size = 32,
        inner_width: Size = 96,
        inner_blocks: Depth = 2,
        embedding: Size = 96,
        time_frequencies: list[float] | None = None,
        dropout: ShareBelow1 = 0.0,
    ):
        super().__init__()
        channels, height, width_px = state_shape
        if height % 2 or width_px % 2:
            raise UserError(f"model=cnn halves images: sides must be even, not {height}x{width_px}; resize or pad them")
        self.num_classes = num_classes
        self.time_features = TimeFeatures(list(time_frequencies or []))
        first = nn.Linear(self.time_features.width, embedding)
        self.time_embedding = nn.Sequential(first, nn.SiLU(), nn.Linear(embedding, embedding))
        self.class_embedding = ClassEmbedding(num_classes, embedding) if num_classes else None
        self.stem = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.outer_in = ResidualBlock(width, embedding, dropout)
        self.down = nn.Conv2d(width, inner_width, 2, stride=2)
        self.inner = nn.ModuleList(ResidualBlock(inner_width, embedding, dropout) for _ in range(inner_blocks))
        self.up = nn.ConvTranspose2d(inner_width, width, 2, stride=2)
        self.join = nn.Conv2d(2 * width, width, 1)
        self.outer_out = ResidualBlock(width, embedding, dropout)
        self.head = nn.Sequential(GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.activation = nn.SiLU()

    def init_weights(self) -> None:
        """Start each block as the identity and the output at zero: the first velocity is the mean one."""
        blocks = [self.outer_in, *self.inner, self.outer_out]
        for layer in [block.conv2 for block in blocks if isinstance(block, ResidualBlock)] + [self.head[2]]:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        _, times = split_unified_flow_matching_input(unified_input)
        embedding = self.time_embedding(self.time_features(times))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding.rows(label, len(times))
        embedding = self.activation(embedding)
        outer = self.outer_in(self.stem(unified_input), embedding)
        h = self.down(outer)
        for block in self.inner:
            h = block(h, embedding)
        h = self.join(torch.cat([outer, self.up(h)], dim=1))
        return self.head(self.outer_out(h, embedding))

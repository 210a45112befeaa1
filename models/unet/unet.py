"""The U-Net velocity model for images."""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.inputs import split_unified_flow_matching_input
from models.layers import Conditioning, GroupNorm, Recomputed, attention, group_norm, modulate, zero_
from models.velocity_model import VelocityModel

GROUP_CHANNELS = 8  # channels that are normalised together
HEAD_CHANNELS = 64  # channels of an attention head, where the width allows


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input: (B, C, H, W) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // gcd(channels, HEAD_CHANNELS)
        self.norm = GroupNorm(channels // GROUP_CHANNELS, channels)
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.project(attended).transpose(1, 2).reshape(x.shape)


class ResidualBlock(Recomputed):
    """Two 3x3 convolutions (B, inputs, H, W) -> (B, outputs, H, W), modulated by embedding (B, E); attention if asked."""

    def __init__(self, inputs: int, outputs: int, attention: bool, embedding: int, dropout: float):
        super().__init__()
        self.norm = GroupNorm(inputs // GROUP_CHANNELS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attention else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = group_norm(self.conv1(F.silu(self.norm(x))), scale.shape[1] // GROUP_CHANNELS)
        h = modulate(h, scale, shift)
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


class Level(nn.Module):
    """One resolution, and inside it every coarser one: blocks down, the coarser levels, blocks up that read what was kept.

    widths, attention: channels and whether to attend, for this level and the coarser ones. x (B, widths[0], H, W) -> same.
    """

    def __init__(self, widths: list[int], attention: list[bool], blocks: int, embedding: int, dropout: float):
        super().__init__()
        settings = (attention[0], embedding, dropout)
        here = widths[0]
        self.down = nn.ModuleList(ResidualBlock(here, here, *settings) for _ in range(blocks))
        last = len(widths) == 1
        self.inner = ResidualBlock(here, here, *settings) if last else Halved(widths, attention, blocks, embedding, dropout)
        self.up = nn.ModuleList(ResidualBlock(2 * here, here, *settings) for _ in range(blocks + 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        kept = [x]
        for block in self.down:
            kept.append(block(kept[-1], embedding))
        h = self.inner(kept[-1], embedding)
        for block in self.up:
            h = block(torch.cat([h, kept.pop()], dim=1), embedding)
        return h


class Halved(nn.Module):
    """The coarser levels between a strided convolution and a nearest-neighbour enlargement: (B, widths[0], H, W) -> same."""

    def __init__(self, widths: list[int], attention: list[bool], blocks: int, embedding: int, dropout: float):
        super().__init__()
        self.shrink = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1)
        self.level = Level(widths[1:], attention[1:], blocks, embedding, dropout)
        self.enlarge = nn.Conv2d(widths[1], widths[0], 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.level(self.shrink(x), embedding)
        return self.enlarge(F.interpolate(h, scale_factor=2.0, mode="nearest"))


def check_pyramid(sides: list[int], widths: list[int], patch_size: int) -> None:
    """Raise UserError when the sides do not halve evenly from level to level, or the widths do not form groups."""
    halvings = len(widths) - 1
    multiple = patch_size * 2**halvings
    if any(side % multiple for side in sides):
        patches = f"reads patches of {patch_size}x{patch_size} and " if patch_size > 1 else ""
        raise UserError(
            f"this U-Net {patches}halves images {halvings} times, so their sides must be multiples of {multiple}, not "
            f"{sides[0]}x{sides[1]}; resize or pad the data, or give fewer levels, as in 'model.multipliers=[1,2]'"
        )
    if any(width % GROUP_CHANNELS for width in widths):
        raise UserError(f"the U-Net's channels must be multiples of {GROUP_CHANNELS}, not {widths}; change model.width")


class UNet(VelocityModel):
    """Residual blocks down and up a pyramid of resolutions, what is seen on the way down joined to the way up.

    After Ho et al. 2020 (arXiv 2006.11239, app. B), with time and class as scale and shift (Dhariwal & Nichol 2021,
    arXiv 2105.05233, eq. 6). (B, C + 2, H, W) -> (B, C, H, W).
    width: channels at full resolution, times each level's multiplier. blocks: on each level's way down, one more up.
    attention_up_to: the longest side, in patches, of levels with self-attention. embedding: width of the time and class
    embedding. augment_dim: see Conditioning. patch_size: full resolution is that of patches of so many pixels a side, whose
    pixels are channels. UserError for sides that do not halve evenly, or channels that are no multiples of 8.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0 = 0,
        width: Size = 128,
        multipliers: tuple[Size, ...] | list[Size] = (1, 2, 2, 2),
        blocks: Depth = 3,
        attention_up_to: SizeOr0 = 16,
        embedding: Size = 384,
        time_frequencies: list[float] | None = None,
        dropout: ShareBelow1 = 0.1,
        augment_dim: int = 0,
        patch_size: Size = 1,
    ):
        super().__init__()
        channels, *sides = state_shape
        widths = [width * factor for factor in multipliers]
        check_pyramid(sides, widths, patch_size)
        attention = [max(sides) // (patch_size * 2**level) <= attention_up_to for level in range(len(widths))]
        channels *= patch_size**2
        self.num_classes, self.patch_size = num_classes, patch_size
        self.conditioning = Conditioning(num_classes, embedding, list(time_frequencies or []), augment_dim)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.pyramid = Level(widths, attention, blocks, embedding, dropout)
        self.norm = GroupNorm(widths[0] // GROUP_CHANNELS, widths[0])
        self.head = nn.Conv2d(widths[0], channels, 3, padding=1)

    def init_weights(self) -> None:
        """Start each block as its skip, each attention as the identity and the output at zero."""
        zero_(self.head)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                zero_(module.conv2)
            elif isinstance(module, Attention):
                zero_(module.project)

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        state, times = split_unified_flow_matching_input(unified_input)
        patches = F.pixel_unshuffle(state, self.patch_size) if self.patch_size > 1 else state
        h = self.pyramid(self.stem(patches), self.conditioning(times, label))
        velocity = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(velocity, self.patch_size) if self.patch_size > 1 else velocity

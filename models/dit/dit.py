"""The diffusion transformer, for latents and small images."""

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.inputs import split_unified_flow_matching_input
from models.layers import Conditioning, Recomputed, RMSNorm, attention, layer_norm, modulate, zero_
from models.velocity_model import VelocityModel


def sincos_positions(height: int, width: int, channels: int) -> Tensor:
    """Return (height width, channels): sines and cosines of the row in one half of the channels, of the column in the other.

    Angular frequencies from 1 down to 1 / 10,000, as in Vaswani et al. 2017 (arXiv 1706.03762, sec. 3.5), for each axis.
    """
    frequencies = 1e4 ** -torch.linspace(0, 1, channels // 4 + 1)[:-1]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D). qk_norm: queries and keys of unit root mean square, scaled."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(self.query_norm(q), self.key_norm(k), v)
        return self.project(attended.transpose(1, 2).flatten(2))


class DiTBlock(Recomputed):
    """Attention, then a perceptron, each on a normalised input that the embedding scales and shifts, and gated by it."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, qk_norm: bool, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(mlp_ratio * width, width),
        )
        self.modulation = nn.Linear(width, 6 * width)

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attention(modulate(layer_norm(x), scale1, shift1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(layer_norm(x), scale2, shift2)))


def check_sizes(sides: list[int], patch_size: int, hidden_size: int, heads: int) -> None:
    """Raise UserError when the patches do not tile the image or the width does not split into heads and position waves."""
    if any(side % patch_size for side in sides):
        raise UserError(
            f"this DiT reads patches of {patch_size}x{patch_size}, which do not tile images of {sides[0]}x{sides[1]}; "
            "change model.patch_size, or resize or pad the data"
        )
    if hidden_size % heads or hidden_size % 4:
        raise UserError(f"model.hidden_size={hidden_size} must be a multiple of 4 and of model.heads={heads}")


class DiT(VelocityModel):
    """A transformer over patches with adaLN-zero conditioning (Peebles & Xie 2022, arXiv 2212.09748, sec. 3.2).

    (B, C + 2, H, W) -> (B, C, H, W). depth: blocks. qk_norm: normalise queries and keys (Henry et al. 2020, arXiv
    2010.04245), for large learning rates in bf16. dropout: in the perceptrons. UserError for sides that are no multiples
    of patch_size, or a hidden_size that does not split into heads.
    """

    positions: Tensor

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0 = 0,
        patch_size: Size = 2,
        hidden_size: Size = 384,
        depth: Depth = 12,
        heads: Size = 6,
        mlp_ratio: Size = 4,
        qk_norm: bool = False,
        time_frequencies: list[float] | None = None,
        dropout: ShareBelow1 = 0.0,
    ):
        super().__init__()
        channels, *sides = state_shape
        check_sizes(sides, patch_size, hidden_size, heads)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.grid = (sides[0] // patch_size, sides[1] // patch_size)
        self.conditioning = Conditioning(num_classes, hidden_size, list(time_frequencies or []))
        self.stem = nn.Linear(channels * patch_size**2, hidden_size)
        self.register_buffer("positions", sincos_positions(*self.grid, hidden_size), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, heads, mlp_ratio, qk_norm, dropout) for _ in range(depth))
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, channels * patch_size**2)

    def init_weights(self) -> None:
        """Draw Xavier weights throughout; every gate and the output at zero, so that each block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.conditioning.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
        zero_(self.head, self.modulation)
        for block in self.blocks:
            if isinstance(block, DiTBlock):
                zero_(block.modulation)

    def patches(self, state: Tensor) -> Tensor:
        """Return (B, C, H, W) -> (B, H/p W/p, C p p)."""
        (rows, columns), p = self.grid, self.patch_size
        return (
            state.reshape(len(state), -1, rows, p, columns, p)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(len(state), rows * columns, -1)
        )

    def image(self, patches: Tensor) -> Tensor:
        """Undo `patches`."""
        (rows, columns), p = self.grid, self.patch_size
        tiles = patches.reshape(len(patches), rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(len(patches), -1, rows * p, columns * p)

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        state, times = split_unified_flow_matching_input(unified_input)
        embedding = self.conditioning(times, label)
        x = self.stem(self.patches(state)) + self.positions
        for block in self.blocks:
            x = block(x, embedding)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        return self.image(self.head(modulate(layer_norm(x), scale, shift)))

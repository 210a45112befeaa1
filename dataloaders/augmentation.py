"""Augmentation of whole batches of pictures on the training device."""

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ranges import Count, EpochSize, Share, SizeOr0
from dataloaders.base_dataloaders import Batch
from models.inputs import join_label

SCALE = ANISOTROPY = 2**0.2  # factor of one standard deviation
SHIFT = 1 / 8  # of the picture's side, likewise


class ImageOptions(TypedDict, total=False):
    """What every set of pictures takes besides its own settings; meanings as in FlowDataset and Augmentation."""

    state_shape: Sequence[Count]
    num_classes: SizeOr0
    value_range: Sequence[float]
    epoch_size: EpochSize | None
    flip: bool
    crop_padding: SizeOr0
    augment: Share
    condition_shape: Sequence[Count] | None


class Augmentation:
    """What is done to training pictures, with randomness from the step's generator alone.

    flip: mirror half of them. crop_padding: pad so many black pixels on every side and cut the old size out anywhere.
    augment: probability of each geometric change of Karras et al. 2022 (arXiv 2206.00364, app. F.2), whose parameters join
    the label, so that a network that reads them does not learn to draw turned pictures.
    """

    def __init__(self, flip: bool = False, crop_padding: int = 0, augment: float = 0.0):
        self.flip, self.crop_padding, self.augment = flip, crop_padding, augment

    @property
    def altered(self) -> str | None:
        """Return the setting that does more than mirror, as FlowDataset.altered."""
        settings = (("crop_padding", self.crop_padding), ("augment", self.augment))
        return next((f"{name}={value}" for name, value in settings if value), None)

    def __call__(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Batch:
        """Return x (B, C, H, W) in [-1, 1], label (B,) or None -> as many; with `augment`, labels (B, 1 + 9): join_label."""
        if self.flip:
            x = torch.where(wide(coins(len(x), generator)), x.flip(3), x)
        if self.crop_padding:
            x = shifted(x, self.crop_padding, generator)
        if self.augment:
            amounts = draw_amounts(len(x), self.augment, generator)
            x, label = transformed(x, amounts), join_label(label, parameters(amounts))
        return x, label


def coins(count: int, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """Return (count,) true with the given probability."""
    return torch.rand(count, generator=generator, device=generator.device) < probability


def wide(rows: Tensor) -> Tensor:
    """Return (B,) as (B, 1, 1, 1)."""
    return rows[:, None, None, None]


def shifted(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return x (B, C, H, W) moved by -padding .. padding pixels along each side, black (-1) coming in."""
    count, _, height, width = x.shape
    offset = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=x.device)
    rows = offset[0] + torch.arange(height, device=x.device)
    columns = offset[1] + torch.arange(width, device=x.device)
    padded = F.pad(x, (padding,) * 4, value=-1.0).permute(0, 2, 3, 1)
    picture = torch.arange(count, device=x.device)[:, None, None]
    return padded[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def draw_amounts(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return a_0 .. a_7 of the paper's table 6, (8, count): mirrored left-right (every other picture), upside down, scaled,
    turned, stretched (direction and amount), moved (across and down); each with the given probability, else 0.
    """
    device = generator.device
    uniform = torch.rand(4, count, generator=generator, device=device)
    normal = torch.randn(4, count, generator=generator, device=device)
    on = torch.rand(5, count, generator=generator, device=device) < probability
    angles = math.pi * (2 * uniform[2:] - 1)
    mirrored, upside_down = (uniform[:2] < 0.5).float()
    rows = [mirrored, upside_down * on[0], normal[0] * on[1], angles[0] * on[2], angles[1] * on[3], normal[1] * on[3]]
    return torch.stack([*rows, normal[2] * on[4], normal[3] * on[4]])


def parameters(amounts: Tensor) -> Tensor:
    """Return amounts (8, B) as the network reads them: (B, 9), zero for an untouched picture."""
    mirrored, upside_down, scale, angle, direction, stretch, across, down = amounts
    turned = [angle.cos() - 1, angle.sin()]
    stretched = [stretch * direction.cos(), stretch * direction.sin()]
    return torch.stack([mirrored, upside_down, scale, *turned, *stretched, across, down], dim=1)


def transformed(x: Tensor, amounts: Tensor) -> Tensor:
    """Return x (B, C, H, W) mirrored, scaled, turned, stretched and moved by amounts (8, B), in this order, about its
    centre.

    Bicubic, with the picture reflected beyond its edges; an untouched picture is returned as it was.
    """
    mirrored, upside_down, scale, angle, direction, stretch, across, down = amounts
    height, width = x.shape[2:]
    # From where a pixel lands back to where it comes from: the inverse of each change, the last one first.
    back = (
        diagonal(1 - 2 * mirrored, 1 - 2 * upside_down)
        @ diagonal(SCALE**-scale, SCALE**-scale)
        @ rotation(-angle)
        @ (rotation(direction) @ diagonal(ANISOTROPY**-stretch, ANISOTROPY**stretch) @ rotation(-direction))
    )
    moved = torch.stack([SHIFT * width * across, SHIFT * height * down], dim=1)
    half = torch.cat([amounts.new_full((1,), width / 2), amounts.new_full((1,), height / 2)])
    matrix = back * half / half[:, None]  # in units of half a side, as grid_sample counts
    offset = -(back @ moved[:, :, None]) / half[:, None]
    grid = F.affine_grid(torch.cat([matrix, offset], dim=2), list(x.shape), align_corners=False)
    changed = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where(wide(amounts.any(dim=0)), changed, x)


def diagonal(first: Tensor, second: Tensor) -> Tensor:
    """Return (B,), (B,) -> diagonal matrices (B, 2, 2)."""
    return torch.diag_embed(torch.stack([first, second], dim=1))


def rotation(angle: Tensor) -> Tensor:
    """Return (B,) -> (B, 2, 2): turns by the angle, counter-clockwise where the second axis points up."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)

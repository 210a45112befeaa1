"""Augmentation of whole batches of pictures on the training device."""

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, Share, SizeOr0
from dataloaders.base_dataloaders import Batch
from models.inputs import join_label

SCALE = ANISOTROPY = 2**0.2  # factor of one standard deviation
SHIFT = 1 / 8  # of the picture's side, likewise
ELASTIC_WIDTH = 1 / 7  # of the picture's side: pixels so near to each other move alike (4 of 28 in Simard et al. 2003)


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


class Distortion:
    """What is done to the training pictures of a classifier alone, whose label it does not change; a generator would learn
    to draw distorted pictures. Each is off at 0, and then draws nothing.

    rotation: the largest angle, in degrees. elastic: how far pixels are moved along each axis, root mean square, in pixels
    (Simard et al. 2003). blur: the largest standard deviation of a Gaussian, in pixels. cutout: side of the square of zeros,
    the middle of [-1, 1], that is put anywhere, cut at the edges (DeVries & Taylor 2017, arXiv 1708.04552).
    """

    def __init__(self, rotation: float = 0.0, elastic: float = 0.0, blur: float = 0.0, cutout: int = 0):
        self.rotation, self.elastic, self.blur, self.cutout = rotation, elastic, blur, cutout

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return x (B, C, H, W) distorted. UserError for other states, and where the square is larger than a picture."""
        on = next((f"loss.{name}={value}" for name, value in vars(self).items() if value), None)
        if on is None:
            return x
        if x.ndim != 4:
            raise UserError(f"{on} changes images (C, H, W), and these data are {tuple(x.shape[1:])}; leave it out")
        if self.cutout > min(x.shape[2:]):
            size = f"{x.shape[2]}x{x.shape[3]}"
            raise UserError(f"loss.cutout={self.cutout} is larger than a picture of {size}; give at most {min(x.shape[2:])}")
        if self.rotation or self.elastic:
            turns = math.radians(self.rotation) * (2 * torch.rand(len(x), generator=generator, device=x.device) - 1)
            ways = self.elastic * smooth_ways(x, generator) if self.elastic else torch.zeros((), device=x.device)
            x = turned(x, turns, ways)
        if self.blur:
            x = blurred(x, self.blur * torch.rand(len(x), generator=generator, device=x.device))
        return x.masked_fill(squares(x, self.cutout, generator), 0.0) if self.cutout else x


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
    # From where a pixel lands back to where it comes from: the inverse of each change, the last one first.
    back = (
        diagonal(1 - 2 * mirrored, 1 - 2 * upside_down)
        @ diagonal(SCALE**-scale, SCALE**-scale)
        @ rotation(-angle)
        @ (rotation(direction) @ diagonal(ANISOTROPY**-stretch, ANISOTROPY**stretch) @ rotation(-direction))
    )
    moved = torch.stack([SHIFT * x.shape[3] * across, SHIFT * x.shape[2] * down], dim=1)
    half = half_sides(x)
    matrix = back * half / half[:, None]  # in units of half a side, as grid_sample counts
    offset = -(back @ moved[:, :, None]) / half[:, None]
    grid = F.affine_grid(torch.cat([matrix, offset], dim=2), list(x.shape), align_corners=False)
    changed = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where(wide(amounts.any(dim=0)), changed, x)


def half_sides(x: Tensor) -> Tensor:
    """Return half the width and half the height of pictures, (2,), fp32: the unit of grid_sample."""
    return torch.cat([torch.full((1,), side / 2, device=x.device) for side in (x.shape[3], x.shape[2])])


def diagonal(first: Tensor, second: Tensor) -> Tensor:
    """Return (B,), (B,) -> diagonal matrices (B, 2, 2)."""
    return torch.diag_embed(torch.stack([first, second], dim=1))


def rotation(angle: Tensor) -> Tensor:
    """Return (B,) -> (B, 2, 2): turns by the angle, counter-clockwise where the second axis points up."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def turned(x: Tensor, angle: Tensor, ways: Tensor) -> Tensor:
    """Return x (B, C, H, W) turned counter-clockwise about its centre by angles (B,), each pixel then taken from as many
    pixels across and down as `ways` (B, H, W, 2) says. Bilinear, with the picture reflected beyond its edges.
    """
    half = half_sides(x)
    matrix = rotation(angle) * half / half[:, None]
    grid = F.affine_grid(F.pad(matrix, (0, 1)), list(x.shape), align_corners=False) + ways / half
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def smooth_ways(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ways (B, H, W, 2) whose numbers are Gaussian of variance 1 at every pixel, near ones alike."""
    noise = torch.randn(2, len(x), *x.shape[2:], generator=generator, device=x.device)
    down, across = (F.normalize(bells(side, noise.new_full((1,), ELASTIC_WIDTH * side)), dim=2) for side in x.shape[2:])
    return (down @ noise @ across.mT).permute(1, 2, 3, 0)


def blurred(x: Tensor, std: Tensor) -> Tensor:
    """Return x (B, C, H, W) as means weighed by Gaussians of std (B,) pixels; at the edges of what there is."""
    down, across = (F.normalize(bells(side, std), p=1, dim=2)[:, None] for side in x.shape[2:])
    return down @ x @ across.mT


def bells(side: int, std: Tensor) -> Tensor:
    """Return exp(-d^2 / (2 std^2)) for the distances d between the places 0 to side - 1, (B, side, side)."""
    place = torch.arange(side, device=std.device)
    distance = (place[:, None] - place) / std.clamp(min=1e-3)[:, None, None]
    return torch.exp(-0.5 * distance.square())


def squares(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return (B, 1, H, W), true in a square of that side around a pixel drawn anywhere in each picture."""
    height, width = x.shape[2:]
    first = [torch.randint(most, (len(x), 1), generator=generator, device=x.device) - side // 2 for most in (height, width)]
    places = [torch.arange(most, device=x.device) - start for most, start in zip((height, width), first, strict=True)]
    rows, columns = ((place >= 0) & (place < side) for place in places)
    return (rows[:, :, None] & columns[:, None, :])[:, None]

"""Two-dimensional shapes drawn afresh for every batch: curves with noise about them, and a checkerboard.

In the formulas k is the label, drawn uniformly from 0..K-1, U is uniform on [0, 1) and eps standard normal.
All shapes are centred and reach about 1 to 2 from the origin, so that one MLP fits each.
"""

import math
from abc import abstractmethod
from typing import Unpack

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Inside, NotNegative
from dataloaders.synthetic import CommonOptions, SyntheticDataset


class PlanarShape(SyntheticDataset):
    """Points of a labelled shape in the plane plus isotropic noise: x = shape(k, U) + noise eps.

    noise: standard deviation in each coordinate, in the units of the state; 0 leaves the bare shape.
    classes: labels of the shape; where a setting chooses, it is set before this constructor.
    """

    classes = 2

    def __init__(self, noise: NotNegative = 0.05, **common: Unpack[CommonOptions]):
        super().__init__((2,), self.classes, **common)
        self.noise = float(noise)

    @abstractmethod
    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise-free points (B, 2) of the classes `label` (B,), newly allocated."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(self.classes, (count,), generator=generator, device=generator.device)
        eps = torch.randn((count, 2), generator=generator, device=generator.device)
        return self.shape(label, generator).add_(eps, alpha=self.noise), label


class Moons(PlanarShape):
    """Two interleaved half circles: x = (1 - 2k) (cos a - 1/2, sin a - 1/4) + noise eps, a = pi U."""

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        angle = math.pi * uniform_like(label, generator)
        return (1 - 2 * label)[:, None] * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)


class Circles(PlanarShape):
    """Two concentric circles: x = 1.5 factor^k (cos a, sin a) + noise eps, a = 2 pi U; factor: inner radius over outer."""

    def __init__(self, factor: Inside = 0.5, noise: NotNegative = 0.05, **common: Unpack[CommonOptions]):
        super().__init__(noise, **common)
        self.factor = float(factor)

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * uniform_like(label, generator)
        return on_circle(angle, 1.5 * self.factor**label)


class Spirals(PlanarShape):
    """K arms that wind out of the origin: x = 2 s (cos a, sin a) + noise eps.

    a = 2 pi (rotations s + k / K), s = sqrt(U): the square root spreads the points almost evenly along an arm. K is
    num_classes.
    """

    def __init__(self, rotations: float = 1.0, noise: NotNegative = 0.05, **common: Unpack[CommonOptions]):
        self.classes = common.get("num_classes") or 2
        super().__init__(noise, **common)
        self.rotations = float(rotations)

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        along = uniform_like(label, generator).sqrt()
        return on_circle(2 * math.pi * (self.rotations * along + label / self.classes), 2 * along)


class Checkerboard(PlanarShape):
    """The dark squares of a board over [-2, 2]^2: x = 4 ((column, row) + (U, U')) / cells - 2 + noise eps.

    cells: squares along a side, even. Square k has column = 2k // cells, row = (2k) % cells + column % 2.
    """

    def __init__(self, cells: int = 4, noise: NotNegative = 0.0, **common: Unpack[CommonOptions]):
        if cells < 2 or cells % 2:
            raise UserError(f"dataloaders.cells must be an even number of squares along a side, not {cells}")
        self.cells, self.classes = cells, cells**2 // 2
        super().__init__(noise, **common)

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        column = 2 * label // self.cells
        corner = torch.stack([column, 2 * label % self.cells + column % 2], dim=1)
        return 4 / self.cells * (corner + uniform_like(corner, generator)) - 2


class Pinwheel(PlanarShape):
    """K blades, stretched and twisted: x = 1.5 R(a) (p, q), p = 1 + radial_std eps, q = tangential_std eps'.

    R(a) rotates by a = 2 pi k / K + rate exp(p). K is num_classes. (After Johnson et al. 2016, arXiv 1603.06277.)
    radial_std, tangential_std: of lengths relative to the wheel's radius of 1.5. rate: twist in radians, 0 for none.
    """

    def __init__(
        self,
        radial_std: NotNegative = 0.3,
        tangential_std: NotNegative = 0.05,
        rate: float = 0.25,
        **common: Unpack[CommonOptions],
    ):
        self.classes = common.get("num_classes") or 5
        super().__init__(0.0, **common)
        self.radial_std, self.tangential_std, self.rate = float(radial_std), float(tangential_std), float(rate)

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        eps = torch.randn((2, len(label)), generator=generator, device=generator.device)
        p, q = 1 + self.radial_std * eps[0], self.tangential_std * eps[1]
        angle = 2 * math.pi / self.classes * label + self.rate * p.exp()
        cos, sin = angle.cos(), angle.sin()
        return 1.5 * torch.stack([cos * p - sin * q, sin * p + cos * q], dim=1)


class SCurve(PlanarShape):
    """An S seen from the side: x = (1 - 2k) (sin a, cos a - 1) + noise eps, a = 3 pi U / 2; k is the half of the S."""

    def shape(self, label: Tensor, generator: torch.Generator) -> Tensor:
        angle = 1.5 * math.pi * uniform_like(label, generator)
        return (1 - 2 * label)[:, None] * torch.stack([angle.sin(), angle.cos() - 1], dim=1)


def uniform_like(label: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 uniforms on [0, 1) of the tensor's shape."""
    return torch.rand(label.shape, generator=generator, device=generator.device)


def on_circle(angle: Tensor, radius: Tensor) -> Tensor:
    """Return radius (cos angle, sin angle): (B, 2)."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

"""Where x0 comes from: the distribution at t = 0."""

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, Positive
from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.synthetic import SyntheticDataset


class Source(ABC):
    """Draws noise. gaussian_std: its standard deviation if it is a centred Gaussian, else None."""

    gaussian_std: float | None = None

    @property
    def law(self) -> float | GaussianMixture | None:
        """Return what oracles need: the standard deviation of a centred Gaussian, or a mixture; None for any other law."""
        return self.gaussian_std

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return x0 (count, *state_shape) on the generator's device."""

    @abstractmethod
    def log_prob(self, x0: Tensor) -> Tensor:
        """Log density in nats at x0 (B, ...): (B,). UserError when the source has no known density."""

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`; returns self."""
        return self


class GaussianSource(Source):
    """N(0, std^2 I) over states of the given shape."""

    def __init__(self, state_shape: list[Count], std: Positive = 1.0):
        self.state_shape, self.std = tuple(state_shape), float(std)
        self.gaussian_std = self.std

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return self.std * torch.randn((count, *self.state_shape), generator=generator, device=generator.device)

    def log_prob(self, x0: Tensor) -> Tensor:
        flat = x0.flatten(1)
        normaliser = flat.shape[1] * math.log(self.std * math.sqrt(2 * math.pi))
        return -0.5 * (flat / self.std).square().sum(1) - normaliser


class DatasetSource(Source):
    """Synthetic data as the starting distribution, e.g. from eight_gaussians to moons; its labels are dropped."""

    def __init__(self, dataset: SyntheticDataset, state_shape: list[Count] | None = None):
        """state_shape: of the data the flow leads to. UserError when it is another than the source's."""
        if not isinstance(dataset, SyntheticDataset):
            name = type(dataset).__name__
            raise UserError(f"{name} data is finite and cannot be a source; use a synthetic set, as source=eight_gaussians")
        if state_shape is not None and tuple(state_shape) != dataset.state_shape:
            raise UserError(
                f"{type(dataset).__name__} as source has states of shape {list(dataset.state_shape)}, but the data has "
                f"{list(state_shape)}; use source=gaussian, which takes the data's shape"
            )
        self.dataset = dataset

    @property
    def law(self) -> GaussianMixture | None:
        return self.dataset.mixture

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return self.dataset.draw(count, generator)[0]

    def log_prob(self, x0: Tensor) -> Tensor:
        if self.dataset.mixture is None:
            raise UserError("this source has no known density, so likelihoods cannot be computed; use source=gaussian")
        return self.dataset.mixture.to(x0.device, x0.dtype).log_prob(x0)

    def to(self, device: torch.device | str) -> Self:
        self.dataset.to(device)
        return self

"""Infinite data drawn afresh for every batch, and the Gaussian mixtures among it, whose flow is known exactly."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, TypedDict, Unpack

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, CountOr0, EpochSize, Positive, SizeOr0
from dataloaders.base_dataloaders import Batch, EpochPlan, FlowDataset, typed
from dataloaders.gaussian_mixture import ConditionalMixture, GaussianMixture
from models.inputs import join_condition

KMEANS_CENTROIDS = ((1.5, 2.0), (-2.0, 1.0), (-1.5, -2.0), (2.0, -1.5), (0.5, 0.5))


class CommonOptions(TypedDict, total=False):
    """What every synthetic set takes besides its own settings; meanings as in FlowDataset."""

    state_shape: Sequence[Count]
    num_classes: SizeOr0
    epoch_size: EpochSize
    value_range: Sequence[float] | None
    condition_shape: Sequence[Count] | None


class SyntheticDataset(FlowDataset):
    """Infinite labelled data: every batch of every epoch is new, and no generator is kept.

    Randomness comes only from the generator a method is given, so ranks and epochs differ as their seeds do.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, condition: Sequence[int] | None = None, **common: Unpack[CommonOptions]
    ):
        """shape, classes, condition: what the data have. UserError where the configuration says otherwise."""
        size = common.get("epoch_size", 200_000)
        super().__init__(shape, size, classes, common.get("value_range"), common, condition)

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` states (count, *state_shape) fp32 and labels, as a batch has them, on the generator's device."""

    def to(self, device: torch.device | str) -> Self:
        if self.mixture is not None:
            self.mixture = self.mixture.to(device)
        return self

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield fresh draws; plan.order is unused. A rank draws as many rows as rank::world of the batch would hold."""
        for first in range(plan.start * plan.batch_size, self.epoch_size, plan.batch_size):
            rows = range(plan.rank, min(plan.batch_size, self.epoch_size - first), plan.world)
            x, label = self.draw(max(len(rows), 1), plan.generator)
            yield x[: len(rows)], label[: len(rows)]

    def held_out(self, count: int, generator: torch.Generator) -> Batch:
        return self.draw(count, generator)

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.draw(first, generator)[0], self.draw(second, generator)[0]


class MixtureDataset(SyntheticDataset):
    """Draws of an isotropic Gaussian mixture; the label is the component, or the class that the component belongs to."""

    mixture: GaussianMixture

    def __init__(
        self,
        means: Tensor,
        std: float | Sequence[float],
        weights: Sequence[float] | None,
        classes: Sequence[int] | None = None,
        **common: Unpack[CommonOptions],
    ):
        """means: (K, D). std: of every component, or one for each. weights: normalised here; None weighs all alike.

        classes: the label of each component, every one from 0 on in use; None: its number.
        """
        labels = list(range(len(means))) if classes is None else list(classes)
        if len(labels) != len(means) or set(labels) != set(range(max(labels) + 1)):
            raise UserError(
                f"dataloaders.classes takes the class of each of the {len(means)} components, every one of 0, 1, ... "
                f"in use, or null for a class each, not {typed(labels)}"
            )
        super().__init__((means.shape[1],), max(labels) + 1, **common)
        shares = for_each("weights", 1.0 if weights is None else weights, len(means))
        stds = for_each("std", std, len(means))
        self.mixture = GaussianMixture(shares / shares.sum(), means, stds, None if classes is None else torch.tensor(labels))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.mixture.labelled(count, generator)


class Mixture(MixtureDataset):
    """Any isotropic Gaussian mixture: x = m_k + s_k eps, eps ~ N(0, I), with k drawn by weight."""

    def __init__(
        self,
        means: Sequence[float | Sequence[float]],
        std: Positive | Sequence[Positive] = 0.3,
        weights: Sequence[Positive] | None = None,
        classes: Sequence[CountOr0] | None = None,
        **common: Unpack[CommonOptions],
    ):
        """means: K points m_k of one dimension; a number stands for a point of that number in all of state_shape."""
        dimensions = math.prod(common.get("state_shape", (2,)))
        points = [[mean] * dimensions if isinstance(mean, int | float) else list(mean) for mean in means]
        if len({len(point) for point in points}) != 1 or not points[0]:
            raise UserError(
                "dataloaders.means takes one or more points of one dimension, such as [[1,2],[0,-1]], or numbers that stand "
                f"for all of dataloaders.state_shape, such as [1,-1], not {typed(means)}"
            )
        super().__init__(torch.tensor(points, dtype=torch.float32), std, weights, classes, **common)


class MixtureRegression(SyntheticDataset):
    """States beside a condition of as many dimensions, y -> x by several regressions: see ConditionalMixture."""

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        condition_means: Sequence[Sequence[float]],
        slope: float = 0.5,
        std: Positive | Sequence[Positive] = 0.3,
        condition_std: Positive | Sequence[Positive] = 0.5,
        weights: Sequence[Positive] | None = None,
        **common: Unpack[CommonOptions],
    ):
        """means, condition_means: K points each, of one dimension. std, condition_std: one, or K. UserError for others."""
        points = [torch.tensor(of, dtype=torch.float32) for of in (means, condition_means)]
        if points[0].ndim != 2 or points[0].shape != points[1].shape:
            raise UserError(
                "dataloaders.means and dataloaders.condition_means take as many points of one dimension, not "
                f"{typed(means)} and {typed(condition_means)}"
            )
        count, shape = points[0].shape[0], points[0].shape[1:]
        super().__init__(shape, 0, shape, **common)
        shares = for_each("weights", 1.0 if weights is None else weights, count)
        stds, of_conditions = for_each("std", std, count), for_each("condition_std", condition_std, count)
        law = ConditionalMixture(shares / shares.sum(), points[0], stds, points[1], of_conditions, slope)
        self.conditional_mixture = law
        self.mixture = self.conditional_mixture.marginal

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        assert self.conditional_mixture is not None
        x, y = self.conditional_mixture.sample(count, generator)
        return x, join_condition(None, y)


class KMeans(MixtureDataset):
    """Gaussian blobs: x = m_k + std eps, eps ~ N(0, I), with k drawn by weight."""

    def __init__(
        self,
        centroids: Sequence[Sequence[float]] = KMEANS_CENTROIDS,
        std: Positive | Sequence[Positive] = 0.1,
        weights: Sequence[Positive] | None = None,
        **common: Unpack[CommonOptions],
    ):
        """centroids: K points m_k of one dimension. std: of every blob, or one for each."""
        if len({len(centroid) for centroid in centroids}) != 1:
            raise UserError("dataloaders.centroids must be a list of points of one dimension, e.g. [[1, 2], [0, -1]]")
        super().__init__(torch.tensor(centroids, dtype=torch.float32), std, weights, **common)


class Gaussian(MixtureDataset):
    """One Gaussian of any dimension: x = mean + std eps, eps ~ N(0, I). Every label is 0."""

    def __init__(self, mean: float | Sequence[float] = 0.7, std: Positive = 0.4, **common: Unpack[CommonOptions]):
        """mean: one number for all dimensions of state_shape, (2,) unless given, or one for each."""
        dimensions = math.prod(common.get("state_shape", (2,)))
        values = [mean] * dimensions if isinstance(mean, int | float) else mean
        super().__init__(torch.tensor([values], dtype=torch.float32), std, None, **common)


class EightGaussians(MixtureDataset):
    """Blobs on a circle: x = radius (cos a_k, sin a_k) + std eps, a_k = pi k / 4, k = 0..7, eps ~ N(0, I)."""

    def __init__(
        self,
        radius: Positive = 2.0,
        std: Positive | Sequence[Positive] = 0.2,
        weights: Sequence[Positive] | None = None,
        **common: Unpack[CommonOptions],
    ):
        """std: of every blob, or one for each, counterclockwise from the right, as are the weights."""
        angles = torch.arange(8) * (math.pi / 4)
        super().__init__(radius * torch.stack([angles.cos(), angles.sin()], dim=1), std, weights, **common)


def for_each(knob: str, value: float | Sequence[float], count: int) -> Tensor:
    """Return one number for each of `count` components (count,), a single one repeated. UserError for another count."""
    numbers = [value] * count if isinstance(value, int | float) else value
    if len(numbers) != count:
        each = "one for each component" + " (or one for all)" * (knob == "std")
        raise UserError(f"dataloaders.{knob} takes {count} numbers above 0, {each}, not {value}")
    return torch.tensor(numbers, dtype=torch.float32)

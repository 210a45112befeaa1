"""The dataset contract and the one tensor a velocity model sees.

Time runs from noise (t = 0) to data (t = 1). Datasets return data only; noise comes from a Source, time
from the objective.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypedDict

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.gaussian_mixture import ConditionalMixture, GaussianMixture

# States (B, *state_shape) and labels: classes (B,) int64, None without; (B, 1 + A) if an augmentation says what it did, and
# (B, 2 + P) of data with conditions, see models/inputs.py.
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class EpochPlan:
    """Which batches of an epoch a rank serves, and the generators that they are drawn with.

    batch_size: rows over all ranks. order: a CPU generator seeded per epoch, equal on all ranks, that shuffles finite data.
    generator: on the dataset's device, used lazily: the caller reseeds it between batches. start: the first batch.
    """

    batch_size: int
    order: torch.Generator
    generator: torch.Generator
    start: int = 0
    rank: int = 0
    world: int = 1


class Moments(NamedTuple):
    """N rows that training draws afresh each time, in one of V views (as it is, mirrored): view k of row i is i + k N.

    mean (V N, *state_shape), fp32; std the same, None for 0; label (V N,) or None. whole: whether these are all rows there
    are, or all of their classes.
    """

    mean: Tensor
    std: Tensor | None
    label: Tensor | None
    whole: bool


class Described(TypedDict, total=False):
    """What a configuration may say of finite data; meanings as in FlowDataset. epoch_size: None is all training rows."""

    state_shape: Sequence[Count]
    num_classes: SizeOr0
    value_range: Sequence[float] | None
    condition_shape: Sequence[Count] | None
    epoch_size: EpochSize | None


class FlowDataset(ABC):
    """Data of one shape, served on the training device in whole batches.

    Attributes
    state_shape: shape of one state, (D,) or (C, H, W).
    num_classes: number of labels, 0 when unlabelled.
    class_names: what people call the labels, in order; None where they are only numbers.
    value_range: (low, high) of image values, None for vectors.
    condition_shape: shape of what is known of each row beside its class, (P,) or (C, H, W); None where there is nothing.
    epoch_size: training draws in an epoch, over all ranks.
    mixture: the closed-form density of the data where it is known (oracles need it), else None.
    conditional_mixture: that of the data beside their conditions, likewise.
    num_workers: processes that read ahead, for data that streams from disk; set before the first epoch.
    standardize: whether a flow shall learn them with mean 0 and standard deviation 1; they are served as they are.
    mirrored: whether training mirrors half of its rows, left to right.
    altered: the setting by which training changes its rows at random in another way ("augment=0.12"), else None.
    views: in how many views it draws its rows afresh, where `moments` says all that `altered` does; else 0.
    """

    mixture: GaussianMixture | None = None
    conditional_mixture: ConditionalMixture | None = None
    class_names: list[str] | None = None
    num_workers: int = 0
    standardize: bool = False
    mirrored: bool = False
    altered: str | None = None
    views: int = 0

    def __init__(
        self,
        state_shape: Sequence[int],
        epoch_size: int,
        num_classes: int = 0,
        value_range: Sequence[float] | None = None,
        described: Mapping[str, object] | None = None,
        condition_shape: Sequence[int] | None = None,
    ):
        """described: what the configuration says of the same. UserError where it is something else."""
        self.state_shape: tuple[int, ...] = tuple(state_shape)
        self.epoch_size, self.num_classes = epoch_size, num_classes
        self.value_range: tuple[float, float] | None = None if value_range is None else (value_range[0], value_range[1])
        self.condition_shape = None if condition_shape is None else tuple(condition_shape)
        self.check_described(described or {})

    def check_described(self, described: Mapping[str, object]) -> None:
        """Raise UserError where the configuration describes other data. TypeError for what is no setting of theirs."""
        for key, said in described.items():
            if key not in Described.__annotations__:
                raise TypeError(f"{type(self).__name__} takes no {key}")
            true = getattr(self, key)
            same = (tuple(said) if isinstance(said, Sequence) else said) == true
            if not same and (key, said) != ("epoch_size", None):
                raise UserError(
                    f"{type(self).__name__} has {key}={typed(true)}, not {typed(said)} as dataloaders.{key} says; set "
                    f"dataloaders.{key}={typed(true)}" + "; limit_data shortens an epoch" * (key == "epoch_size")
                )

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has, the last one possibly smaller."""
        return -(-self.epoch_size // batch_size)

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, where every later batch is made. Returns self."""

    def balance(self) -> None:
        """Let every class be drawn equally often in training. UserError for data that cannot."""
        raise UserError(f"balanced=true needs a finite set with labels, unlike {type(self).__name__}; leave it out")

    @abstractmethod
    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield this rank's rows of the plan's batches of one epoch of exactly epoch_size draws."""

    def trial_rows(self, count: int, generator: torch.Generator) -> Batch:
        """Return the first `count` rows of an epoch, or as many as it has: what a run is tried on before it trains."""
        return next(self.epoch(EpochPlan(count, torch.Generator().manual_seed(0), generator)))

    @property
    def held_out_size(self) -> float:
        """Return how many states are held out; infinity of data that is drawn afresh."""
        return math.inf

    @abstractmethod
    def held_out(self, count: int, generator: torch.Generator) -> Batch:
        """Return at most `count` states never used for training, with labels."""

    def training_part(self, count: int) -> Batch | None:
        """Return training states with labels, without augmentation: all that are in memory, else at most `count` that are
        read, the same ones each time; None for data drawn afresh.
        """
        return None

    def moments(self, count: int, by_class: bool) -> tuple[Moments, Moments]:
        """Return at most `count` training rows and as many held-out ones, the same each time, of data with `views`.

        by_class: of as many whole classes as `count` rows hold, one at least, and the held-out rows of these.
        """
        raise NotImplementedError(f"{type(self).__name__} has no views")

    @abstractmethod
    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return two disjoint sets of real states, at most `first` and `second` many, for a metric's noise floor."""


def typed(value: Any) -> str:
    """Return a setting's value as a command line gives it."""
    return "null" if value is None else str(list(value) if isinstance(value, Sequence) else value).replace(" ", "")


def pair_sizes(first: int, second: int, there: int) -> tuple[int, int]:
    """Return how many of `there` states each side of a real pair has: as asked where they suffice.

    Where they do not, the larger side shrinks first: the smaller one decides how wide a noise floor is.
    """
    smaller = min(first, second, there // 2)
    return min(first, max(smaller, there - smaller)), min(second, max(smaller, there - smaller))

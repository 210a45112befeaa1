"""Finite data that lives on the training device as one tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dataloaders.base_dataloaders import Batch, EpochPlan, FlowDataset, pair_sizes
from models.inputs import join_condition, split_label


class TensorDataset(FlowDataset):
    """Rows of one tensor, the training part first and the held-out part behind it.

    Attributes
    states: (N, *state_shape) as stored: fp32, or uint8 for pictures, a quarter of the memory.
    train_states, held_out_states: (N, *state_shape) fp32.
    train_labels, held_out_labels: as a batch has them, (N,) or (N, 2 + P), or None when unlabelled.
    """

    def __init__(
        self,
        states: Tensor,
        labels: Tensor | None,
        held_out_rows: Tensor,
        num_classes: int = 0,
        value_range: Sequence[float] | None = None,
        described: Mapping[str, object] | None = None,
        conditions: Tensor | None = None,
        condition_shape: Sequence[int] | None = None,
    ):
        """states: (N, *state_shape), uint8 being pixels. labels: (N,). held_out_rows: indices never trained on. conditions:
        (N, *condition_shape), which become part of the labels. condition_shape: of those that a subclass makes in `rows`.

        described: what the configuration says; UserError where the data are something else.
        """
        training = torch.ones(len(states), dtype=torch.bool).index_fill(0, held_out_rows, False)
        rows = torch.cat([training.nonzero()[:, 0], held_out_rows])
        self.train_size = len(rows) - len(held_out_rows)
        condition_shape = condition_shape if conditions is None else conditions.shape[1:]
        super().__init__(states.shape[1:], self.train_size, num_classes, value_range, described, condition_shape)
        self.states = (states if states.dtype == torch.uint8 else states.float())[rows].contiguous()
        self.labels = None if labels is None else labels[rows].long()
        if conditions is not None:
            self.labels = join_condition(self.labels, conditions[rows])
        self.balanced = False

    @property
    def train_states(self) -> Tensor:
        return as_states(self.states[: self.train_size])

    @property
    def held_out_states(self) -> Tensor:
        return as_states(self.states[self.train_size :])

    @property
    def train_labels(self) -> Tensor | None:
        return None if self.labels is None else self.labels[: self.train_size]

    @property
    def held_out_labels(self) -> Tensor | None:
        return None if self.labels is None else self.labels[self.train_size :]

    def to(self, device: torch.device | str) -> Self:
        self.states = self.states.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def balance(self) -> None:
        if not self.num_classes:
            super().balance()
        self.balanced = True

    def rows(self, index: Tensor) -> Batch:
        """Return the states and labels at `index` (B,), counted from the first training row."""
        return as_states(self.states[index]), None if self.labels is None else self.labels[index]

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield each training row once, shuffled by plan.order, unless balanced. plan.generator is unused."""
        labels = split_label(self.train_labels)[0] if self.balanced else None
        order, count = plan.order, self.train_size
        shuffled = torch.randperm(count, generator=order) if labels is None else balanced_order(labels.cpu(), order)
        for batch in shuffled.to(self.states.device).split(plan.batch_size)[plan.start :]:
            yield self.rows(batch[plan.rank :: plan.world])

    def trial_rows(self, count: int, generator: torch.Generator) -> Batch:
        return self.rows(torch.arange(min(count, self.train_size), device=self.states.device))

    @property
    def held_out_size(self) -> float:
        return len(self.states) - self.train_size

    def held_out(self, count: int, generator: torch.Generator) -> Batch:
        """Return a random subset of the held-out part; all of it when `count` is larger."""
        return self.rows(self.train_size + self.shuffle(len(self.states) - self.train_size, generator)[:count])

    def training_part(self, count: int) -> Batch:
        return self.train_states, self.train_labels

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a random disjoint split of all data, held-out part included."""
        first, second = pair_sizes(first, second, len(self.states))
        index = self.shuffle(len(self.states), generator)
        return as_states(self.states[index[:first]]), as_states(self.states[index[first:][:second]])

    @staticmethod
    def shuffle(count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(count, generator=generator, device=generator.device)


def as_states(stored: Tensor) -> Tensor:
    """Return pixels 0 to 255 as states -1 to 1 in fp32; states as they are."""
    return stored.float().div_(127.5).sub_(1) if stored.dtype == torch.uint8 else stored


def balanced_order(labels: Tensor, order: torch.Generator) -> Tensor:
    """Return as many indices of `labels` (N,) as there are, (N,), shuffled: each class there is equally often, give or take
    one.

    Of a small class every row comes round before any comes again; of a large one only some rows come, others next epoch.
    """
    classes, parts = labels.unique(), []
    for i, label in enumerate(classes):
        rows = (labels == label).nonzero()[:, 0]
        wanted = len(labels) * (i + 1) // len(classes) - len(labels) * i // len(classes)
        rounds = [rows[torch.randperm(len(rows), generator=order)] for _ in range(-(-wanted // len(rows)))]
        parts.append(torch.cat(rounds)[:wanted])
    drawn = torch.cat(parts)
    return drawn[torch.randperm(len(drawn), generator=order)]


def stratified_rows(labels: Tensor | None, count: int, fraction: float, seed: int) -> Tensor:
    """Return about fraction of `count` rows, in ascending order: 2 or more, not all, each label by its share.

    Rows are shuffled, grouped by label and picked at even spacing. The shuffle is NumPy's frozen legacy generator, so
    that a seed means the same split in every version of every library. fraction: between 0 and 1.
    """
    order = np.random.RandomState(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(labels.numpy()[order], kind="stable")]
    picks = min(max(2, round(fraction * count)), count - 1)
    spaced = ((np.arange(picks) + 0.5) * count / picks).astype(np.int64)
    return torch.from_numpy(np.sort(order[spaced]))

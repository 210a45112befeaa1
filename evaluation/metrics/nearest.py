"""Memorisation and mode coverage of stored data, by nearest training states."""

import math

import torch

from common.ranges import CountFrom2, NotNegative
from common.seeds import generator_for
from dataloaders.base_dataloaders import Batch, FlowDataset
from dataloaders.tensor_dataset import TensorDataset
from evaluation.metrics.base_metric import Absent, Generation, LongMetric, Score
from evaluation.metrics.cache import cached_numbers
from evaluation.metrics.distances import nearest
from evaluation.metrics.two_sample import not_finite
from models.inputs import classes_in

RATIO, COPIES, CLASS_SHARE = "eval/nearest_distance_ratio", "eval/copies", "eval/class_share_min"
ELEMENTS = 2**26  # numbers of training states in memory at once, for data read from disk
CLASSES_SHOWN = 20  # with more classes, only the smallest share is logged


def most_rows(dataset: FlowDataset, points: int) -> int:
    """Return how many rows of data on disk are looked at: `points`, and ELEMENTS numbers, at most."""
    return min(points, max(1, ELEMENTS // math.prod(dataset.state_shape)))


def stored_rows(dataset: FlowDataset, points: int) -> Batch | str:
    """Return the training rows in memory, of those on disk at most `points` and ELEMENTS numbers, or why there are none."""
    part = dataset.training_part(most_rows(dataset, points))
    if part is not None:
        return part
    if dataset.held_out_size == math.inf:
        return "data drawn afresh has no training states"
    return f"{type(dataset).__name__} does not say which training states it has (training_part)"


def count_of(dataset: FlowDataset, count: int) -> str:
    """Return in words how many training rows are looked at, and of how many."""
    return f"{count:,}" + (f" of {dataset.epoch_size:,}" if is_part(dataset, count) else "")


def is_part(dataset: FlowDataset, count: int) -> bool:
    """Return whether so many training rows are not all: of data read from disk."""
    return not isinstance(dataset, TensorDataset) and count < dataset.epoch_size


class NearestTraining(LongMetric):
    """How samples lie to the training states, beside how held-out states do (the floors).

    eval/nearest_distance_ratio: median distance to the nearest training state over that of held-out states; well below 1
    is memorisation, well above 1 poor quality. eval/copies: share within `copy_tolerance` of a training state in every
    dimension. eval/class_share_min: share of the rarest class, by the label of the nearest training state, with each
    class under eval/class_share_<k>. Samples are clamped to value_range first, and at most `points` of them are used.
    Of data read from disk so many training states at most, and `ELEMENTS` numbers, are looked at: copies of others are not
    found, as the note says.
    """

    beside = ("eval/class_share",)

    def __init__(self, points: CountFrom2 = 2000, copy_tolerance: NotNegative = 1e-3):
        self.points, self.copy_tolerance = points, copy_tolerance

    def names(self) -> list[str]:
        return [RATIO, COPIES, CLASS_SHARE]

    def compute(self, generation: Generation) -> list[Score | Absent]:
        dataset, states = generation.dataset, generation.samples[: self.points]
        part = stored_rows(dataset, self.points)
        if isinstance(part, str):
            return self.absent(part)
        if reason := not_finite(generation.samples):
            return self.absent(reason)
        if dataset.value_range is not None:
            states = states.clamp(*dataset.value_range)

        def held_out() -> list[float]:
            """Return how many held-out states there are, and `describe` of them."""
            real = dataset.held_out(self.points, generator_for(0, "nearest", 0, states.device))[0].to(states.device)
            return [len(real), *self.describe(dataset.num_classes, part, real)]

        key: dict[str, object] = {"dataset": generation.data_key, "settings": vars(self), "training": len(part[0])}
        count, distance, copies, *shares = cached_numbers(generation.cache, "nearest_of_held_out", key, held_out)
        note = f"{len(states):,} samples against {count_of(dataset, len(part[0]))} training states"
        few = "" if count == len(states) else f"of {int(count):,} held-out states"
        own_distance, own_copies, *own_shares = self.describe(dataset.num_classes, part, states)
        scores: list[Score | Absent] = [
            Score(RATIO, own_distance / max(distance, 1e-12), note=note),
            Score(COPIES, own_copies, floor=copies, note=note, floor_note=few),
        ]
        if not own_shares:
            return [*scores, Absent(CLASS_SHARE, f"{type(dataset).__name__} data has no labels")]
        each = {f"eval/class_share_{k}": share for k, share in enumerate(own_shares)}
        extra = each if len(each) <= CLASSES_SHOWN else None
        return [*scores, Score(CLASS_SHARE, min(own_shares), floor=min(shares), extra=extra, note=note, floor_note=few)]

    def describe(self, classes: int, part: Batch, states: torch.Tensor) -> list[float]:
        """Return the median distance to the nearest training state, the share of copies, then each class's share if any."""
        train, labels = part[0], classes_in(part[1], classes)
        distance, index = nearest(states.flatten(1), train.flatten(1))
        gap = (states - train[index]).flatten(1).abs().amax(1)
        summary = [distance.median().item(), (gap <= self.copy_tolerance).float().mean().item()]
        if labels is None:
            return summary
        counts = torch.bincount(labels[index].cpu(), minlength=classes)
        return summary + (counts / len(states)).tolist()

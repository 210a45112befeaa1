"""Memorisation and mode coverage of finite data, by nearest training states."""

import torch
from torch import Tensor

from dataloaders.tensor_dataset import TensorDataset
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers
from evaluation.metrics.distances import nearest
from evaluation.metrics.two_sample import not_finite
from training.seeds import generator_for

RATIO, COPIES, CLASS_SHARE = "eval/nearest_distance_ratio", "eval/copies", "eval/class_share_min"
CLASSES_SHOWN = 20  # with more classes, only the smallest share is logged


class NearestTraining(Metric):
    """How samples lie to the training states, beside how held-out states do (the floors).

    eval/nearest_distance_ratio: median distance to the nearest training state over that of held-out states; well below 1
    is memorisation, well above 1 poor quality. eval/copies: share within `copy_tolerance` of a training state in every
    dimension. eval/class_share_min: share of the rarest class, by the label of the nearest training state, with each
    class under eval/class_share_<k>. Samples are clamped to value_range first, and at most `points` of them are used.
    """

    def __init__(self, points: int = 2000, copy_tolerance: float = 1e-3):
        self.points, self.copy_tolerance = points, copy_tolerance

    def compute(self, generation: Generation) -> list[Score | Absent]:
        dataset = generation.dataset
        finite = isinstance(dataset, TensorDataset)
        reason = not_finite(generation.samples) if finite else "fresh data has no training states to be near to"
        if not isinstance(dataset, TensorDataset) or reason is not None:
            return [Absent(name, str(reason)) for name in (RATIO, COPIES, CLASS_SHARE)]
        states = generation.samples[: self.points]
        if dataset.value_range is not None:
            states = states.clamp(*dataset.value_range)
        return self.scores(dataset, self.describe(dataset, states), self.held_out(generation, dataset), len(states))

    def scores(self, dataset: TensorDataset, found: list[float], real: list[float], count: int) -> list[Score | Absent]:
        """Of what `describe` said of the samples and of held-out states."""
        note = f"{count:,} samples against {dataset.train_size:,} training states"
        real_count = min(self.points, len(dataset.states) - dataset.train_size)
        few = "" if real_count == count else f"of {real_count:,} held-out states"
        scores: list[Score | Absent] = [
            Score(RATIO, found[0] / max(real[0], 1e-12), note=note),
            Score(COPIES, found[1], floor=real[1], note=note, floor_note=few),
        ]
        shares = found[2:]
        if not shares:
            return [*scores, Absent(CLASS_SHARE, f"{type(dataset).__name__} data has no labels")]
        extra = {f"eval/class_share_{k}": share for k, share in enumerate(shares[:CLASSES_SHOWN])}
        shown = extra if len(shares) <= CLASSES_SHOWN else None
        return [*scores, Score(CLASS_SHARE, min(shares), floor=min(real[2:]), extra=shown, note=note, floor_note=few)]

    def describe(self, dataset: TensorDataset, states: Tensor) -> list[float]:
        """Median distance to the nearest training state, share of copies, then each class's share where there are labels."""
        train = dataset.train_states
        distance, index = nearest(states.flatten(1), train.flatten(1))
        gap = (states - train[index]).flatten(1).abs().amax(1)
        summary = [distance.median().item(), (gap <= self.copy_tolerance).float().mean().item()]
        if dataset.train_labels is None:
            return summary
        counts = torch.bincount(dataset.train_labels[index].cpu(), minlength=dataset.num_classes)
        return summary + (counts / len(states)).tolist()

    def held_out(self, generation: Generation, dataset: TensorDataset) -> list[float]:
        """`describe` of held-out states, cached."""
        generator = generator_for(0, "nearest", 0, generation.samples.device)
        key: dict[str, object] = {"dataset": generation.data_key, "settings": vars(self)}
        return cached_numbers(
            generation.cache, "nearest_held_out", key,
            lambda: self.describe(dataset, dataset.held_out(self.points, generator)[0]),
        )  # fmt: skip

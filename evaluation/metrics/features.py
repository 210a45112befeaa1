"""Scores of generated images by the features of a network, each beside the same score of real against real."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import CountFrom2, Replicates, SizeOr0
from common.seeds import generator_for
from dataloaders.tensor_dataset import TensorDataset
from evaluation.feature_networks import ClassifierFeatures, FeatureNetwork, classifier_features
from evaluation.fid import fit_gaussian, frechet_distance, from_moments
from evaluation.image_sets import images_hash
from evaluation.metrics.base_metric import Absent, Generation, LongMetric, Score, share_score
from evaluation.metrics.cache import cached_numbers, cached_tensor
from evaluation.metrics.feature_scores import FeatureScores, Floor
from evaluation.metrics.two_sample import not_finite
from models.inputs import split_label

ACCURACY = "eval/classifier_accuracy"


class FeatureMetric(LongMetric):
    """Frechet and kernel distance, precision, recall, density and coverage in a network's features, and of samples that were
    asked for by class the share that the network, if it is a classifier, takes for that class: eval/classifier_accuracy.

    network: a classifier (the name of a shipped one, or a checkpoint), or a FeatureNetwork; None: no scores at all.
    reference: held_out states, as many as there are samples at most, or train: all training states of a finite set. Either
    way the same ones in every run, and their features are cached. replicates: real pairs of the floor, random splits of
    one pool of real states. Beside held-out states the training set's own scores are given, under <name>_train.
    final_only: leave them out of evaluations during the run. Images are clipped and rounded to bytes first.
    """

    def __init__(
        self,
        network: str | FeatureNetwork | None,
        reference: Literal["held_out", "train"] = "held_out",
        replicates: Replicates = 20,
        k: SizeOr0 = 5,
        points: CountFrom2 = 5000,
        final_only: bool = False,
    ):
        self.given = classifier_features(network) if isinstance(network, str) else network
        self.reference, self.replicates, self.final_only = reference, replicates, final_only
        self.scores = FeatureScores(k, points)

    @property
    def network(self) -> FeatureNetwork:
        assert self.given is not None
        return self.given

    def names(self) -> list[str]:
        if self.given is None:
            return []
        names = [self.given.metric(name) for name in self.scores.names()]
        return [*names, ACCURACY] if isinstance(self.given, ClassifierFeatures) else names

    def refusal(self, generation: Generation) -> str | None:
        """Return why no scores are given."""
        dataset = generation.dataset
        if generation.decode is None and len(dataset.state_shape) != 3:
            return "features are of images, not of vectors"
        if self.reference == "train" and not isinstance(dataset, TensorDataset):
            return "reference=train needs a finite set in memory; use reference=held_out"
        shape = generation.images.shape[1:]
        return self.network.refusal(tuple(shape)) or not_finite(generation.samples)

    def compute(self, generation: Generation) -> list[Score | Absent]:
        if self.given is None or (self.final_only and not generation.final):
            return []
        if reason := self.refusal(generation):
            return self.absent(reason)
        network, count = self.network, len(generation.samples)
        x = self.features(generation, generation.samples)
        y = self.real_features(generation, self.reference, count)
        provenance = self.provenance(generation, count, len(y))
        results = self.scores.between(
            network, x, y, lambda _: self.floor(generation, count, len(y)),
            lambda: self.training_scores(generation, count, y), provenance,
        )  # fmt: skip
        if isinstance(network, ClassifierFeatures):
            results.append(self.accuracy(generation, network, x, provenance))
        return results

    def accuracy(self, generation: Generation, network: ClassifierFeatures, x: Tensor, provenance: str) -> Score | Absent:
        """Return the share of samples that the classifier takes for the class they were asked for; floor: of real data."""
        label = generation.classes
        if label is None:
            return Absent(ACCURACY, "this model does not know classes (conditional=true)")
        if network.num_classes != generation.dataset.num_classes:
            return Absent(ACCURACY, f"{network.name} knows {network.num_classes} classes, the data others")
        real_label = split_label(generation.dataset.held_out(10_000, self.generator(generation, "reference"))[1])[0]
        assert real_label is not None
        real = network.answers(self.real_features(generation, "held_out", 10_000)) == real_label
        right = network.answers(x) == label
        by_class = {f"{ACCURACY}_{k}": right[label == k].float().mean().item() for k in label.unique().tolist()}
        few = "" if len(real) == len(right) else f"of {len(real):,} held-out images"
        return replace(
            share_score(ACCURACY, right), floor=real.float().mean().item(), extra=by_class if len(by_class) <= 20 else None,
            provenance=provenance, floor_note=few,
        )  # fmt: skip

    def features(self, generation: Generation, states: Tensor) -> Tensor:
        """Return features (N, F) of generated or real states (N, ...), on their device."""
        return self.network.features(generation.bytes_of(states), generation.samples.device)

    @staticmethod
    def generator(generation: Generation, name: str) -> torch.Generator:
        """Return a generator that is the same in every run."""
        return generator_for(0, f"features/{name}", 0, generation.samples.device)

    def key(self, generation: Generation, **more: object) -> dict[str, object]:
        """Return what cached numbers depend on."""
        return {
            "dataset": generation.data_key, "network": self.network.describe(), "rounding": "uint8",
            "decoded": generation.decode is not None, **more,
        }  # fmt: skip

    def real_features(self, generation: Generation, part: str, count: int) -> Tensor:
        """Return features of real states, cached: of the held_out part at most `count`; of the train part all."""

        def compute() -> Tensor:
            dataset = generation.dataset
            if part == "train":
                assert isinstance(dataset, TensorDataset)
                states = dataset.train_states
            else:
                states = dataset.held_out(count, self.generator(generation, "reference"))[0]
            return self.features(generation, states).cpu()

        key = self.key(generation, part=part, count=count if part == "held_out" else "all")
        return cached_tensor(generation.cache, f"features_{self.network.name}", key, compute).to(generation.samples.device)

    def floor(self, generation: Generation, first: int, second: int) -> Floor:
        """Return the scores between two disjoint sets of real states of these sizes, smaller ones of a small set, cached."""

        def compute() -> list[float]:
            larger = max(first, second)
            pair = generation.dataset.real_pair(larger, larger, self.generator(generation, "pool"))
            pool = self.features(generation, torch.cat(pair))
            return self.scores.replicated(pool, first, second, self.replicates).numbers()

        key = self.key(generation, first=first, second=second, replicates=self.replicates, scores=vars(self.scores))
        return Floor.of(cached_numbers(generation.cache, f"features_{self.network.name}_floor", key, compute))

    def training_scores(self, generation: Generation, count: int, y: Tensor) -> list[float]:
        """Return what `count` training states, or all if fewer, score against held-out ones; empty with reference=train."""
        if self.reference == "train" or not isinstance(generation.dataset, TensorDataset):
            return []

        def compute() -> list[float]:
            train = self.real_features(generation, "train", count)
            order = torch.randperm(len(train), generator=generator_for(0, "features/train")).to(train.device)
            few = min(count, len(train), len(y))
            return self.scores.fitting(few).measure(train[order[:count]], y) if few >= 2 else []

        key = self.key(generation, count=count, against=len(y), scores=vars(self.scores))
        return cached_numbers(generation.cache, f"features_{self.network.name}_train", key, compute)

    def provenance(self, generation: Generation, count: int, reference: int) -> str:
        what = "held-out" if self.reference == "held_out" else "training"
        decoded = ", decoded like the samples, so reconstructions and not the pictures" if generation.decode else ""
        return (
            f"{self.network.describe()}; {count:,} samples {generation.made}; {reference:,} {what} images of "
            f"{generation.dataset_key} (data {generation.data_hash}){decoded}; all rounded to 8 bits"
        )


def scores_between(
    network: FeatureNetwork, images: Tensor, reference: Tensor, cache: Path, device: torch.device, made: str = "",
    replicates: int = 20,
) -> list[Score | Absent]:  # fmt: skip
    """Return the scores of two sets of image bytes (N, C, H, W); the floor is of random parts of the reference. That and the
    reference's features are cached. made: how generated images were, where they are."""
    everything, counts, name = FeatureScores(), (len(images), len(reference)), images_hash(reference)
    for part in (images, reference):
        reason = network.refusal(tuple(part.shape[1:]))
        if reason is not None:
            return [Absent(network.metric(score), reason) for score in everything.names()]
    key: dict[str, object] = {"images": name, "network": network.describe()}

    def floor(scores: FeatureScores) -> Floor:
        own = key | {"counts": counts, "replicates": replicates, "scores": vars(scores)}
        compute = lambda: scores.replicated(y, *counts, replicates).numbers()  # noqa: E731
        return Floor.of(cached_numbers(cache, f"features_{network.name}_floor", own, compute))

    y = cached_tensor(cache, f"features_{network.name}", key, lambda: network.features(reference, device).cpu()).to(device)
    provenance = f"{network.describe()}; {described(images, made)}; {len(y):,} reference images ({name})"
    return everything.between(network, network.features(images, device), y, floor, list, provenance)


def scores_against_statistics(
    network: FeatureNetwork, images: Tensor, mu: np.ndarray, sigma: np.ndarray, name: str, device: torch.device,
    made: str = "",
) -> list[Score | Absent]:  # fmt: skip
    """Return the Frechet distance of image bytes (N, C, H, W) to published statistics mu (F,), sigma (F, F) of the same
    network. UserError for those of another."""
    metric = network.metric("frechet_distance")
    reason = network.refusal(tuple(images.shape[1:]))
    if reason is not None:
        return [Absent(metric, reason)]
    fit = fit_gaussian(network.features(images, device))
    if fit.mean.shape != mu.shape or sigma.shape != (*mu.shape, *mu.shape):
        raise UserError(f"{name} has statistics of {mu.shape[0]} features, {network.name} {fit.mean.shape[0]}; use its own")
    moments = from_moments(torch.from_numpy(mu).to(device), torch.from_numpy(sigma).to(device))
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:16]
    why = "statistics hold no images to draw one from"
    provenance = f"{network.describe()}; {described(images, made)}; statistics {name} ({digest}); no floor: {why}"
    value, note = frechet_distance(fit, moments), f"{len(images):,} samples"
    return [Score(metric, value, note=note, provenance=provenance, floor_note=why)]


def described(images: Tensor, made: str) -> str:
    """Return what a set of images is, for provenance."""
    return f"{len(images):,} images ({images_hash(images)})" + (f" {made}" if made else "")

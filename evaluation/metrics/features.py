"""Scores of generated images by the features of a network, each beside the same score of real against real."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders.tensor_dataset import TensorDataset
from evaluation.feature_networks import ClassifierFeatures, FeatureNetwork, classifier_features
from evaluation.fid import fit_gaussian, frechet_distance, from_moments, kernel_distance, neighbour_shares
from evaluation.image_sets import images_hash
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers, cached_tensor
from evaluation.metrics.two_sample import not_finite
from training.errors import UserError
from training.seeds import generator_for

SHARES = ("precision", "recall", "density", "coverage")
ACCURACY = "eval/classifier_accuracy"


@dataclass(frozen=True)
class FeatureScores:
    """What is measured between the features of two sets of images: distances, and shares by k nearest neighbours.

    k 0: no shares. points: images of each side that the shares look at, at most (they take all pairs).
    """

    k: int = 5
    points: int = 5000

    @property
    def least(self) -> int:
        """How many images a side must have."""
        return self.k + 2

    def names(self) -> tuple[str, ...]:
        return ("frechet_distance", "kernel_distance", *(SHARES if self.k else ()))

    def measure(self, x: Tensor, y: Tensor) -> list[float]:
        """Of generated features x (N, F) and real ones y (M, F), in the order of names()."""
        if x.device.type == "mps":  # which has no float64
            x, y = x.cpu(), y.cpu()
        shares = neighbour_shares(x[: self.points], y[: self.points], self.k) if self.k else {}
        frechet = frechet_distance(fit_gaussian(x), fit_gaussian(y))
        return [frechet, kernel_distance(x, y), *(shares[name] for name in SHARES if self.k)]

    def replicated(self, pool: Tensor, first: int, second: int, replicates: int) -> Tensor:
        """(replicates, scores) between random disjoint parts, of these sizes, of one pool of real features (P, F); both
        sizes shrink alike when it is too small."""
        shrink = min(1.0, len(pool) / (first + second))
        n, m = (max(self.least, int(size * shrink)) for size in (first, second))
        rows = []
        for i in range(replicates):
            order = torch.randperm(len(pool), generator=generator_for(0, "features/floor", i)).to(pool.device)
            rows.append(self.measure(pool[order[:n]], pool[order[n : n + m]]))
        return torch.tensor(rows)

    def named(
        self, network: FeatureNetwork, values: list[float], floor: Tensor, own: list[float], count: int, provenance: str
    ) -> list[Score]:
        """One Score for each value. own: what the training set scores, or empty."""
        scores = []
        for i, name in enumerate(map(network.metric, self.names())):
            extra = {f"{name}_train": own[i]} if own else None
            mean, sd = floor[:, i].mean().item(), floor[:, i].std().item()
            scores.append(Score(name, values[i], None, mean, sd, extra, f"{count:,} samples", provenance))
        return scores


class FeatureMetric(Metric):
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
        reference: str = "held_out",
        replicates: int = 20,
        k: int = 5,
        points: int = 5000,
        final_only: bool = False,
    ):
        if reference not in ("held_out", "train"):
            raise UserError(f"a feature score's reference is held_out or train, not {reference!r}; mend evaluation.metrics")
        if replicates < 2:
            raise UserError(f"a noise floor needs at least 2 replicates, not {replicates}; mend evaluation.metrics")
        self.final_only = final_only
        self.given = classifier_features(network) if isinstance(network, str) else network
        self.reference, self.replicates, self.scores = reference, replicates, FeatureScores(k, points)

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
        """Why no scores are given."""
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
        reason = self.refusal(generation)
        if reason is not None:
            return [Absent(name, reason) for name in self.names()]
        network, count = self.network, len(generation.samples)
        x = self.features(generation, generation.samples)
        y = self.real_features(generation, self.reference, count)
        if min(len(x), len(y)) < self.scores.least:
            few = f"{len(x)} samples and {len(y)} real images are fewer than the {self.scores.least} on a side it takes"
            return [Absent(name, few) for name in self.names()]
        values = self.scores.measure(x, y)
        floor = torch.tensor(self.floor(generation, count, len(y))).view(self.replicates, -1)
        own = self.training_scores(generation, count, y)
        provenance = self.provenance(generation, count, len(y))
        results: list[Score | Absent] = [*self.scores.named(network, values, floor, own, count, provenance)]
        if isinstance(network, ClassifierFeatures):
            results.append(self.accuracy(generation, network, x, provenance))
        return results

    def accuracy(self, generation: Generation, network: ClassifierFeatures, x: Tensor, provenance: str) -> Score | Absent:
        """The share of samples that the classifier takes for the class they were asked for; floor: of held-out data."""
        label = generation.label
        if label is None:
            return Absent(ACCURACY, "this model is not told the class (conditional=true)")
        if network.num_classes != generation.dataset.num_classes:
            return Absent(ACCURACY, f"{network.name} knows {network.num_classes} classes, the data others")
        real_label = generation.dataset.held_out(10_000, self.generator(generation, "reference"))[1]
        assert real_label is not None
        real = network.answers(self.real_features(generation, "held_out", 10_000)) == real_label
        right = (network.answers(x) == label).float()
        by_class = {f"{ACCURACY}_{k}": right[label == k].mean().item() for k in label.unique().tolist()}
        value = right.mean().item()
        spread = (value * (1 - value) / len(right)) ** 0.5
        extra = by_class if len(by_class) <= 20 else None
        return Score(ACCURACY, value, spread, real.float().mean().item(), None, extra, provenance=provenance)

    def features(self, generation: Generation, states: Tensor) -> Tensor:
        """Of generated or real states (N, ...): (N, F) on their device."""
        return self.network.features(generation.bytes_of(states), generation.samples.device)

    @staticmethod
    def generator(generation: Generation, name: str) -> torch.Generator:
        """The same in every run."""
        return generator_for(0, f"features/{name}", 0, generation.samples.device)

    def key(self, generation: Generation, **more: object) -> dict[str, object]:
        """What cached numbers depend on."""
        return {
            "dataset": generation.dataset_key, "network": self.network.describe(), "rounding": "uint8",
            "decoded": generation.decode is not None, **more,
        }  # fmt: skip

    def real_features(self, generation: Generation, part: str, count: int) -> Tensor:
        """Features of real states, cached: of the held_out part at most `count`; of the train part all."""

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

    def floor(self, generation: Generation, first: int, second: int) -> list[float]:
        """The scores between two disjoint sets of real states of these sizes, replicate after replicate, cached."""

        def compute() -> list[float]:
            larger = max(first, second)
            pair = generation.dataset.real_pair(larger, larger, self.generator(generation, "pool"))
            pool = self.features(generation, torch.cat(pair))
            return self.scores.replicated(pool, first, second, self.replicates).flatten().tolist()

        key = self.key(generation, first=first, second=second, replicates=self.replicates, scores=vars(self.scores))
        return cached_numbers(generation.cache, f"features_{self.network.name}_floor", key, compute)

    def training_scores(self, generation: Generation, count: int, y: Tensor) -> list[float]:
        """What `count` training states, or all if fewer, score against the held-out ones; empty where nobody asks that."""
        if self.reference == "train" or not isinstance(generation.dataset, TensorDataset):
            return []

        def compute() -> list[float]:
            train = self.real_features(generation, "train", count)
            order = torch.randperm(len(train), generator=generator_for(0, "features/train")).to(train.device)
            return self.scores.measure(train[order[:count]], y)

        key = self.key(generation, count=count, against=len(y), scores=vars(self.scores))
        return cached_numbers(generation.cache, f"features_{self.network.name}_train", key, compute)

    def provenance(self, generation: Generation, count: int, reference: int) -> str:
        what = "held-out" if self.reference == "held_out" else "training"
        return (
            f"{self.network.describe()}, {count:,} samples from seed {generation.seed} by the EMA weights, "
            f"{reference:,} {what} images, all rounded to 8 bits"
        )


def scores_between(
    network: FeatureNetwork, images: Tensor, reference: Tensor, cache: Path, device: torch.device, seed: int | None = None
) -> list[Score | Absent]:
    """The scores of two sets of image bytes (N, C, H, W); the floor is of random parts of the reference, whose features are
    cached. seed: of generated images, where they are."""
    scores = FeatureScores()
    for part in (images, reference):
        few = (
            f"{len(part)} images are fewer than the {scores.least} on a side it takes" if len(part) < scores.least else None
        )
        reason = few or network.refusal(tuple(part.shape[1:]))
        if reason is not None:
            return [Absent(network.metric(name), reason) for name in scores.names()]
    name = images_hash(reference)
    key: dict[str, object] = {"images": name, "network": network.describe()}
    y = cached_tensor(cache, f"features_{network.name}", key, lambda: network.features(reference, device).cpu()).to(device)
    x = network.features(images, device)
    provenance = f"{network.describe()}, {described(images, seed)}, {len(y):,} reference images ({name})"
    return [*scores.named(network, scores.measure(x, y), scores.replicated(y, len(x), len(y), 20), [], len(x), provenance)]


def scores_against_statistics(
    network: FeatureNetwork,
    images: Tensor,
    mu: np.ndarray,
    sigma: np.ndarray,
    name: str,
    device: torch.device,
    seed: int | None = None,
) -> list[Score | Absent]:
    """The Frechet distance of image bytes (N, C, H, W) to published statistics mu (F,), sigma (F, F) of the same network."""
    metric = network.metric("frechet_distance")
    reason = network.refusal(tuple(images.shape[1:]))
    if reason is not None:
        return [Absent(metric, reason)]
    fit = fit_gaussian(network.features(images, device))
    if fit.mean.shape != mu.shape or sigma.shape != (*mu.shape, *mu.shape):
        raise UserError(f"{name} has statistics of {mu.shape[0]} features, {network.name} {fit.mean.shape[0]}; use its own")
    moments = from_moments(torch.from_numpy(mu).to(device), torch.from_numpy(sigma).to(device))
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:16]
    provenance = f"{network.describe()}, {described(images, seed)}, statistics {name} ({digest})"
    return [Score(metric, frechet_distance(fit, moments), note=f"{len(images):,} samples", provenance=provenance)]


def described(images: Tensor, seed: int | None) -> str:
    """What a set of images is, for provenance."""
    return f"{len(images):,} images ({images_hash(images)})" + ("" if seed is None else f" from seed {seed}")

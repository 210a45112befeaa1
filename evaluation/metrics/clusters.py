"""Samples between the clusters of a mixture: what a smooth map leaves on its way across a separatrix."""

import torch
from torch import Tensor

from common.ranges import Positive
from common.seeds import generator_for
from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score

DRAWS = 100_000  # of the data, for their own share


class BetweenClusters(Metric):
    """eval/between_clusters: share of samples farther than `stds` standard deviations from the centre of every component.

    Its floor is the data's own share. Distances between sets hardly see these samples, and maps in one evaluation have them.
    """

    name = "eval/between_clusters"

    def __init__(self, stds: Positive = 5.0):
        self.stds = stds

    def compute(self, generation: Generation) -> list[Score | Absent]:
        mixture, samples = generation.dataset.mixture, generation.samples
        if mixture is None or len(mixture.weights) == 1:
            return self.absent(f"{type(generation.dataset).__name__} data is no mixture of clusters")
        mixture, n = mixture.to("cpu", torch.float64), len(samples)
        real = self.share(mixture.sample(DRAWS, generator_for(0, self.name))[0], mixture)
        value = self.share(samples.cpu().double().flatten(1), mixture)
        note = f"{n:,} samples, farther than {self.stds:g} std from every centre; floor: the data's share"
        return [Score(self.name, value, (value * (1 - value) / n) ** 0.5, real, note=note)]

    def share(self, states: Tensor, mixture: GaussianMixture) -> float:
        """Return the share of states (N, D) that lie in no cluster; one that is not finite lies in none."""
        near = torch.cdist(states, mixture.means) <= self.stds * mixture.stds
        return 1 - near.any(1).double().mean().item()

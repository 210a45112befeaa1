"""The share of samples between the clusters of a mixture."""

import pytest
import torch

from dataloaders.planar_shapes import Moons
from dataloaders.synthetic import KMeans
from evaluation.metrics.base_metric import Absent
from evaluation.metrics.clusters import BetweenClusters


def test_samples_between_clusters_are_counted(generation):
    data = KMeans([[-1.0, 0.0], [1.0, 0.0]], 0.1)
    spread = torch.tensor([[-1.49, 0.0], [-1.51, 0.0], [0.0, 0.0], [1.0, 0.3], [float("nan"), 0.0]])
    (score,) = BetweenClusters().compute(generation(data, spread))
    assert score.value == pytest.approx(3 / 5) and score.floor is not None and score.floor < 1e-4


def test_data_without_clusters_have_no_such_share(generation):
    (absent,) = BetweenClusters().compute(generation(Moons(), torch.zeros(4, 2)))
    assert isinstance(absent, Absent) and "no mixture of clusters" in absent.reason

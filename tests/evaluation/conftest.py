"""Samples as metrics see them, without a model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import GaussianSource
from evaluation.metrics.base_metric import Generation
from evaluation.threads import one_thread


@pytest.fixture
def generation(tmp_path: Path) -> Callable[..., Generation]:
    """generation(dataset, samples, label, key): what metrics are given, its cache under tmp_path."""

    def make(
        dataset: FlowDataset, samples: Tensor, label: Tensor | None = None, key: str = "data", **more: Any
    ) -> Generation:
        inputs = {"objective": None, "solver": None, "seed": 0, "final": False, "cache": tmp_path} | more
        source = GaussianSource(list(dataset.state_shape))
        return Generation(
            dataset=dataset, source=source, dataset_key=key, noise=torch.randn(samples.shape), samples=samples, label=label,
            **inputs,
        )  # fmt: skip

    return make


@pytest.fixture
def single_thread() -> Iterator[None]:
    with one_thread():
        yield

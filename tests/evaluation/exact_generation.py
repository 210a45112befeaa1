"""The evaluation of a model that is the exact field, or off it by a known offset."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import GaussianSource, Source
from dataloaders.synthetic import KMeans
from evaluation.closed_forms import ExactFlow
from evaluation.metrics.base_metric import Generation, Metric, Score
from losses.couplings import Coupling, IndependentCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowObjective
from losses.paths import LinearPath, ProbabilityPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from solvers.runge_kutta import Euler

OFFSET = torch.tensor([0.3, -0.4])
FLOW_MAP = "oracle/flow_map_error"


class OffsetField(VelocityModel):
    """The exact velocity plus a constant."""

    def __init__(self, flow: ExactFlow, offset: Tensor, num_classes: int = 0):
        super().__init__()
        self.flow, self.offset, self.num_classes = flow, nn.Parameter(offset), num_classes

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        x, times = split_unified_flow_matching_input(unified_input)
        return self.flow(x.double(), times[:, 0]).float() + self.offset


class Plain(FlowObjective):
    """An objective that is only read."""

    forward = FlowMatchingLoss.forward  # type: ignore[assignment]


def generation(
    cache: Path,
    dataset: FlowDataset | None = None,
    source: Source | None = None,
    coupling: Coupling | None = None,
    path: ProbabilityPath | None = None,
    offset: Tensor | None = None,
    num_classes: int = 0,
    key: str = "kmeans",
    steps: int = 200,
    count: int = 300,
) -> Generation:
    dataset, path, source = dataset or KMeans(), path or LinearPath(), source or GaussianSource([2], 0.9)
    flow = ExactFlow((dataset.mixture or KMeans().mixture).to(dtype=torch.float64), source.gaussian_std or 1.0, path)
    network = OffsetField(flow, torch.zeros(2) if offset is None else offset, num_classes)
    objective = Plain(
        network, path, coupling or IndependentCoupling(), UniformTimes(), VelocityPrediction(), UniformWeighting()
    )
    noise, solver = source.sample(count, torch.Generator().manual_seed(0)), Euler(steps)
    with torch.no_grad():
        samples = solver.solve(objective.velocity, noise)
    return Generation(
        objective=objective, dataset=dataset, source=source, solver=solver, seed=0, dataset_key=key, cache=cache,
        final=False, noise=noise, samples=samples,
    )  # fmt: skip


def compute(metric: Metric, made: Generation) -> list[Score]:
    with torch.no_grad():
        results = metric.compute(made)
    return [result for result in results if isinstance(result, Score)]

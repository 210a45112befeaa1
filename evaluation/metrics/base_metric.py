"""The metric contract: what an evaluation hands to a metric and what it gets back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from losses.objective import FlowObjective
from solvers.base_solver import BaseSolver


@dataclass(frozen=True)
class Score:
    """One number an evaluation reports.

    name: metric name as logged ("eval/energy_distance"). spread: standard error of value, None if unknown.
    floor, floor_sd: the same metric on real against real (mean and standard deviation over replicates), None if senseless.
    extra: further numbers logged under their own full names. note: what the number was measured with, in a few words.
    """

    name: str
    value: float
    spread: float | None = None
    floor: float | None = None
    floor_sd: float | None = None
    extra: dict[str, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A score that cannot be given here, and why ("the truth of moons is not known in closed form")."""

    name: str
    reason: str


@dataclass
class Generation:
    """What one evaluation produced; metrics read, never write.

    noise (N, ...): x0, sample i from its own fixed seed. samples (N, ...): the solver's end states. label (N,) or None.
    objective: carries the weights that made the samples (EMA by default), in eval mode; objective.velocity(x, t, label).
    field: the velocity the solver followed (guidance included). final: whether this is the run's last, larger evaluation.
    cache: folder for things that may be recomputed. generator(name): a generator on the
    dataset's device with a seed fixed by (run seed, name).
    """

    noise: Tensor
    samples: Tensor
    label: Tensor | None
    objective: FlowObjective
    field: Callable[[Tensor, Tensor], Tensor]
    solver: BaseSolver
    dataset: FlowDataset
    source: Source
    dataset_key: str  # names the dataset and all its settings: part of every cache key
    cache: Path
    final: bool
    generator: Callable[[str], torch.Generator]


class Metric(ABC):
    """One or several scores of a generation. A new metric is one subclass and one entry in configs/evaluation."""

    @abstractmethod
    def compute(self, generation: Generation) -> list[Score | Absent]:
        """Scores of the generated samples, or why there is none. Runs under torch.no_grad()."""

"""The metric contract: what an evaluation hands to a metric and what it gets back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.data_hash import data_hash
from helpers_cfg import Guidance
from losses.objective import FlowObjective
from solvers.base_solver import Sampler

Decode = Callable[[Tensor], Tensor]  # latent states (B, ...) -> images (B, C, H, W) in [-1, 1]
DECODE_CHUNK = 50  # states decoded at once


@torch.no_grad()
def as_images(states: Tensor, decode: Decode | None) -> Tensor:
    """Return states (N, ...), generated or real, as what pictures and image scores look at: decoded on to the CPU if
    latents.
    """
    return states if decode is None else torch.cat([decode(part).float().cpu() for part in states.split(DECODE_CHUNK)])


@dataclass(frozen=True)
class Score:
    """One number an evaluation reports.

    name: metric name as logged ("eval/energy_distance"). spread: standard error of value, None if unknown.
    floor, floor_sd: the same metric on real against real (mean and standard deviation over replicates), None if senseless;
    floor_q99: what 99 % of real sets stay below, so that a larger value is distinguished from real.
    extra: further numbers logged under their own full names. note: what the number was measured with, in a few words.
    provenance: all that the number depends on, for scores whose name does not say it; written beside them.
    floor_note: the counts of a floor that has others than the score ("of 30 against 30"), or why there is no floor.
    """

    name: str
    value: float
    spread: float | None = None
    floor: float | None = None
    floor_sd: float | None = None
    extra: dict[str, float] | None = None
    note: str = ""
    provenance: str = ""
    floor_note: str = ""
    floor_q99: float | None = None

    @property
    def above_floor(self) -> bool:
        """Return whether the samples are distinguished from real ones, at the level of 1 %."""
        return self.floor_q99 is not None and self.value > self.floor_q99


@dataclass(frozen=True)
class Absent:
    """A score that cannot be given here, and why ("the truth of moons is not known in closed form")."""

    name: str
    reason: str


@dataclass
class Generation:
    """What one evaluation produced; metrics read, never write.

    noise (N, ...): x0, sample i from its own fixed seed. samples (N, ...): the solver's end states, with label (N,) or None.
    Distances on states see samples, latents where the model works on latents; pictures and image scores see images.
    objective: what made the samples (EMA weights by default, guidance included), in eval mode; objective.velocity(x, t,
    label). field: its velocity. guided: whether there is guidance, so that the truth about the data is none about the
    samples. final: whether this is the run's last, larger evaluation. cache: folder for things that may be recomputed.
    generator(name): a generator on the dataset's device with a seed fixed by (run seed, name). decode: from latents to
    images, None where states are what they show. seed: of the samples' noise. weights, steps: which weights of the network
    and which steps made the samples, in words.
    """

    noise: Tensor
    samples: Tensor
    label: Tensor | None
    objective: FlowObjective
    field: Callable[[Tensor, Tensor], Tensor]
    solver: Sampler
    dataset: FlowDataset
    source: Source
    dataset_key: str  # names the dataset, all its settings and the autoencoder that decodes it
    cache: Path
    final: bool
    generator: Callable[[str], torch.Generator]
    decode: Decode | None = None
    seed: int = 0
    weights: str = "the network given"
    steps: str = ""

    @property
    def guided(self) -> bool:
        return isinstance(self.objective.network, Guidance)

    @property
    def data_hash(self) -> str:
        """Of the dataset's content."""
        return data_hash(self.dataset, self.samples.device)

    @property
    def data_key(self) -> str:
        """Return names the data by settings and content: part of every cache key."""
        return f"{self.dataset_key} {self.data_hash}"

    @property
    def made(self) -> str:
        """Return how the samples were made, for provenance."""
        return f"from seed {self.seed} by {self.weights}, {self.steps}"

    @cached_property
    def images(self) -> Tensor:
        """Return the samples as images, decoded once where they are latents and then kept on the CPU."""
        return as_images(self.samples, self.decode)

    def bytes_of(self, states: Tensor) -> Tensor:
        """Return states (N, ...), generated or real, as image bytes (N, C, H, W): decoded if latents,
        clipped and rounded.
        """
        decoded = self.images if states is self.samples else as_images(states, self.decode)
        return to_bytes(decoded, self.dataset.value_range if self.decode is None else None)


def to_bytes(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Return images with values in value_range ([-1, 1] for None) as uint8, rounded to the nearest; what lies outside is
    cut.
    """
    low, high = value_range or (-1.0, 1.0)
    return (255 * (images.float() - low) / (high - low)).round().clamp(0, 255).to(torch.uint8)


class Metric(ABC):
    """One or several scores of a generation. A new metric is one subclass and one entry in configs/evaluation."""

    def names(self) -> list[str]:
        """Of its scores, for those that say why there are none."""
        return []

    def evaluations_ahead(self, objective: FlowObjective) -> int:
        """Return how many evaluations of the network the scores cost for each sample, if many."""
        return 0

    @abstractmethod
    def compute(self, generation: Generation) -> list[Score | Absent]:
        """Scores of the generated samples, or why there is none. Runs under torch.no_grad()."""

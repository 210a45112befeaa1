"""The metric contract: what an evaluation hands to a metric and what it gets back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.data_hash import data_hash
from losses.objective import FlowObjective, Objective
from models.inputs import classes_in
from solvers.base_solver import Sampler

Decode = Callable[[Tensor], Tensor]  # latent states (B, ...) -> images (B, C, H, W) in [-1, 1]
DECODE_CHUNK = 50  # states decoded at once


@torch.no_grad()
def as_images(states: Tensor, decode: Decode | None) -> Tensor:
    """Return states (N, ...) as pictures and image scores see them: latents decoded, on the CPU; others as they are."""
    return states if decode is None else torch.cat([decode(part).float().cpu() for part in states.split(DECODE_CHUNK)])


@dataclass(frozen=True)
class Score:
    """One number an evaluation reports.

    name: metric name as logged ("eval/energy_distance"). spread: standard error of value, None if unknown.
    floor, floor_sd: the same metric on real against real, mean and standard deviation over replicates; None if undefined.
    floor_q99: what 99 % of real sets stay below; floor_q01, of scores whose larger values are better: what 99 % stay above.
    extra: further numbers logged under their own full names. note: what the number was measured with, in a few words.
    provenance: all that the number depends on, for scores whose name does not say it; written beside them.
    floor_note: the counts of a floor that has others than the score ("of 30 against 30"), or why there is no floor.
    p: share of splits of real states into two sets that lie as far apart; None of fewer than 100 splits, or of other counts.
    verdict: what the score says, in words for the end of the table.
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
    floor_q01: float | None = None
    p: float | None = None
    verdict: str = ""

    @property
    def floor_end(self) -> str:
        """Return on which side of the floor's end the value lies, in words; beyond it real data lie in 1 % of cases."""
        if self.floor_q99 is not None:
            return f"{'above' if self.value > self.floor_q99 else 'within'} {number(self.floor_q99)}"
        if self.floor_q01 is not None:
            return f"{'below' if self.value < self.floor_q01 else 'within'} {number(self.floor_q01)}"
        return ""

    @property
    def beyond_floor(self) -> float | None:
        """Return how many standard deviations of its floor the value is away from it where it lies beyond the floor's end,
        0 where it does not, inf of a floor that does not vary; None without an end.
        """
        if not self.floor_end or self.floor is None:
            return None
        if self.floor_end.startswith("within"):
            return 0.0
        return abs(self.value - self.floor) / self.floor_sd if self.floor_sd else math.inf

    def values(self) -> dict[str, float]:
        """Return the score as logged: its value, its floor and what else it carries, each under its own name."""
        parts = {
            "floor": self.floor, "floor_sd": self.floor_sd, "floor_q99": self.floor_q99, "floor_q01": self.floor_q01,
            "se": self.spread, "p": self.p,
        }  # fmt: skip
        beside = {f"{self.name}_{suffix}": value for suffix, value in parts.items() if value is not None}
        return {self.name: self.value, **(self.extra or {}), **beside}


def number(value: float) -> str:
    """Return a score with four digits, with two where it is tiny."""
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def share_score(name: str, right: Tensor, note: str = "") -> Score:
    """Return the share of true values in right (N,), with its binomial standard error."""
    share = right.float().mean().item()
    return Score(name, share, (share * (1 - share) / len(right)) ** 0.5, note=note)


@dataclass(frozen=True)
class Absent:
    """A score that cannot be given here, and why ("the truth of moons is not known in closed form")."""

    name: str
    reason: str


@dataclass
class EvaluationInputs:
    """What an evaluator judges, and by what.

    objective: around the network that is judged; weights: which weights it has, in words. dataset: gives held-out states.
    source, solver, flow: what samples are made by (flow: the objective under guidance, None for the objective itself);
    seed: of their noise. dataset_key: names the dataset, its settings and the autoencoder that decodes it. cache: folder of
    floors and whatever may be recomputed. final: whether it is the run's last, larger evaluation. decode: from latent states
    to images, None where states are what they show.
    """

    objective: Objective
    dataset: FlowDataset
    source: Source
    solver: Sampler
    seed: int
    dataset_key: str
    cache: Path
    final: bool
    flow: FlowObjective | None = None
    decode: Decode | None = None
    weights: str = "the network given"


@dataclass(kw_only=True)
class Generation(EvaluationInputs):
    """Samples and what they were made by; metrics read, never write.

    objective: here what made the samples, guidance included, in eval mode. noise (N, ...): x0, sample i from its own fixed
    seed. samples (N, ...): where the solver ended, with label (N,) or None; latents where the model works on latents. steps:
    how the samples were made, in words.
    """

    objective: FlowObjective
    noise: Tensor
    samples: Tensor
    label: Tensor | None = None
    steps: str = ""

    def generator(self, name: str) -> torch.Generator:
        """Return a generator on the samples' device, its seed fixed by (seed, name)."""
        return generator_for(self.seed, f"evaluation/{name}", 0, self.samples.device)

    @property
    def classes(self) -> Tensor | None:
        """Return the samples' classes (N,), None of data without."""
        return classes_in(self.label, self.dataset.num_classes)

    @property
    def label_on_cpu(self) -> Tensor | None:
        return None if self.label is None else self.label.cpu()

    @property
    def data_hash(self) -> str:
        return data_hash(self.dataset, self.samples.device)

    @property
    def data_key(self) -> str:
        """Return the name of the data by settings and content: part of every cache key."""
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
        """Return states (N, ...), generated or real, as bytes (N, C, H, W): decoded if latents, clipped, rounded."""
        decoded = self.images if states is self.samples else as_images(states, self.decode)
        return to_bytes(decoded, self.dataset.value_range if self.decode is None else None)


def to_bytes(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Return images with values in value_range ([-1, 1] for None) as uint8, clipped and rounded to the nearest."""
    low, high = value_range or (-1.0, 1.0)
    return (255 * (images.float() - low) / (high - low)).round().clamp(0, 255).to(torch.uint8)


class Metric(ABC):
    """One or several scores of a generation. A new metric is one subclass and one entry in configs/evaluation.

    needs: what the scores are of: samples, whoever made them, the velocity at an instant, or each sample's own end, which
    only a flow gives it. name: of its one score; a metric of several overrides `names`. beside: what the names of further
    numbers begin with, where they do not begin with a score's.
    """

    needs: Literal["samples", "velocity", "ends"] = "samples"
    name: str = ""
    beside: tuple[str, ...] = ()

    def results(self, generation: Generation) -> list[Score | Absent]:
        """Return what `compute` gives, or why this objective has no such scores."""
        if self.needs == "velocity" and not generation.objective.learns_velocity:
            what = "a field without time" if generation.objective.learns == "equilibrium" else "maps"
            return self.absent(f"this objective learns {what}, not the velocity at an instant")
        if self.needs == "ends" and not generation.objective.has_ends:
            return self.absent("this objective matches the data as a whole, so that no sample has one true end")
        return self.compute(generation)

    def names(self) -> list[str]:
        """Return the names of its scores, under which a reason stands why there are none."""
        return [self.name] if self.name else []

    def absent(self, reason: str) -> list[Score | Absent]:
        """Return every score as absent for this reason."""
        return [Absent(name, reason) for name in self.names()]

    def evaluations_ahead(self, objective: FlowObjective) -> int:
        """Return how many evaluations of the network the scores cost for each sample, if many."""
        return 0

    def rows_ahead(self, objective: FlowObjective, dataset: FlowDataset, final: bool) -> int:
        """Return how many rows the scores take through the network beside the samples', if many."""
        return 0

    def thinned(self, share: float) -> dict[str, int]:
        """Return the settings by which the scores take about that share of those rows, by name."""
        return {}

    @abstractmethod
    def compute(self, generation: Generation) -> list[Score | Absent]:
        """Return scores of the generated samples, or why there is none. Runs under torch.no_grad()."""

    def trial(self, generation: Generation) -> list[Score | Absent]:
        """Return what `compute` gives of noise in place of samples: asked before a run trains, so that a mistake in a metric
        costs nothing. One that takes longer than a moment, or that writes a cache, says nothing.
        """
        return self.results(generation)


class LongMetric(Metric):
    """A metric that takes longer than a moment, whatever the samples: it is not tried before a run trains."""

    def trial(self, generation: Generation) -> list[Score | Absent]:
        return []

"""Judges a trained generator: samples once, from fixed seeds, and hands the samples to every metric."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from losses.objective import FlowObjective
from solvers.base_solver import BaseSolver
from solvers.time_grids import UniformGrid
from training.seeds import generator_for
from training.terms import named_terms

SEED_BLOCK = 256  # noise is drawn in blocks of this many samples, each from its own seed: any batch size, the same set
CHUNK = 4096  # samples carried through the solver at once


@dataclass
class Evaluation:
    """What an evaluation found. values: flat metric name -> number, as logged. reference: real states beside the samples."""

    scores: list[Score]
    absent: list[Absent]
    values: dict[str, float]
    generation: Generation
    reference: Tensor
    seconds: float


def fixed_noise(source: Source, count: int, seed: int) -> Tensor:
    """Noise (count, ...) on the CPU; sample i is the same for every count, batch size and device count."""
    blocks = range(-(-count // SEED_BLOCK))
    return torch.cat([source.sample(SEED_BLOCK, generator_for(seed, "sample", i)) for i in blocks])[:count]


def fixed_labels(num_classes: int, count: int) -> Tensor | None:
    """Labels 0, 1, 2, ... in turn, or None for an unconditional network."""
    return torch.arange(count) % num_classes if num_classes else None


def generate(
    field: Callable[[Tensor, Tensor, Tensor | None], Tensor], solver: BaseSolver, noise: Tensor, label: Tensor | None
) -> Tensor:
    """Carry noise (N, ...) along field(x, t, label) to t = 1, in chunks."""
    labels = [None] * len(noise) if label is None else label.split(CHUNK)
    parts = [
        solver.solve(lambda x, t, y=y: field(x, t, y), x0)  # type: ignore[misc]
        for x0, y in zip(noise.split(CHUNK), labels, strict=False)
    ]
    return torch.cat(parts)


def few_steps(objective: FlowObjective, noise: Tensor, label: Tensor | None, evaluations: int) -> Tensor:
    """Noise (N, ...) carried to t = 1 by the objective's flow map in so many equal steps, one evaluation each, in chunks.

    UserError when the objective learns no flow map.
    """
    times = UniformGrid().times(evaluations).to(noise.device, torch.float32)
    labels = [None] * len(noise) if label is None else label.split(CHUNK)
    parts = []
    for x, y in zip(noise.split(CHUNK), labels, strict=False):
        for r, t in pairwise(times):
            x = objective.flow_map(x, r, t, y)
        parts.append(x)
    return torch.cat(parts)


class GeneratorEvaluator:
    """Scores samples of a velocity network. samples / final_samples: how many during the run / at its end.
    batch_size: rows of one forward pass of eval/loss. loss_weights: as in training.
    """

    def __init__(
        self,
        samples: int,
        final_samples: int,
        metrics: dict[str, Metric],
        batch_size: int = 1024,
        loss_weights: dict[str, float] | None = None,
    ):
        self.samples, self.final_samples, self.metrics = samples, final_samples, metrics
        self.batch_size, self.loss_weights = batch_size, loss_weights or {}

    @torch.no_grad()
    def evaluate(
        self,
        objective: FlowObjective,
        dataset: FlowDataset,
        source: Source,
        solver: BaseSolver,
        seed: int,
        dataset_key: str,
        cache: Path,
        final: bool,
    ) -> Evaluation:
        """Sample with the objective's network (in eval mode) on the dataset's device and compute every metric."""
        begun = time.perf_counter()
        objective.eval()
        device = next(objective.network.parameters()).device
        count = self.final_samples if final else self.samples
        noise = fixed_noise(source.to("cpu"), count, seed).to(device)
        source.to(device)
        label = fixed_labels(objective.network.num_classes, count)
        label = None if label is None else label.to(device)
        samples = generate(objective.velocity, solver, noise, label)
        generation = Generation(
            noise, samples, label, objective, objective.velocity, solver, dataset, source, dataset_key, cache, final,
            lambda name: generator_for(seed, f"evaluation/{name}", 0, device),
        )  # fmt: skip
        values = {"eval/loss": self.held_out_loss(generation, device), "eval/nfe": float(solver.evaluations)}
        results = [result for metric in self.metrics.values() for result in metric.compute(generation)]
        scores = [result for result in results if isinstance(result, Score)]
        for score in scores:
            values |= flat_values(score)
        reference, _ = dataset.held_out(min(count, 2000), generator_for(seed, "evaluation/reference", 0, device))
        absent = [result for result in results if isinstance(result, Absent)]
        return Evaluation(scores, absent, values, generation, reference, time.perf_counter() - begun)

    def held_out_loss(self, generation: Generation, device: torch.device) -> float:
        """The training loss on held-out data with fixed draws, in fp32 and in batches as large as the training ones:
        minibatch optimal transport pairs within a batch."""
        generator = generator_for(0, "evaluation/loss", 0, device)
        states, labels = generation.dataset.held_out(self.final_samples, generator)
        total = 0.0
        for start in range(0, len(states), self.batch_size):
            x1 = states[start : start + self.batch_size]
            label = None if labels is None else labels[start : start + self.batch_size]
            x0 = generation.source.sample(len(x1), generator)
            batch = generation.objective.draw(x0, x1, label, generator, progress=1.0)
            output = generation.objective(batch, generation.objective)
            total += len(x1) * float(named_terms(output, self.loss_weights)["loss"])
        return total / len(states)


def flat_values(score: Score) -> dict[str, float]:
    """A score as logged: its value, its floor and what else it carries, each under its own name."""
    values = {score.name: score.value, **(score.extra or {})}
    if score.floor is not None:
        values[f"{score.name}_floor"] = score.floor
    if score.floor_sd is not None:
        values[f"{score.name}_floor_sd"] = score.floor_sd
    if score.spread is not None:
        values[f"{score.name}_se"] = score.spread
    return values

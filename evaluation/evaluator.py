"""Judges a trained generator: samples once, from fixed seeds, and hands the samples to every metric."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.progress import watched
from common.ranges import Count, CountFrom2
from common.seeds import generator_for
from dataloaders.base_dataloaders import Batch, FlowDataset
from dataloaders.sources import Source
from evaluation.generate import data_labels, fixed_noise, fresh_noise, generate_together, guidance_words, solver_words
from evaluation.metrics.base_metric import Absent, Decode, Generation, Metric, Score
from losses.objective import FlowObjective, Objective
from losses.terms import named_terms
from solvers.base_solver import Sampler


@dataclass
class Evaluation(ABC):
    """What an evaluation found. values: flat metric name -> number, as logged."""

    scores: list[Score]
    absent: list[Absent]
    values: dict[str, float]
    seconds: float

    @abstractmethod
    def heading(self, nfe: int) -> str:
        """Return what the scores are of, in a line; nfe: evaluations a sample."""


@dataclass
class GeneratorEvaluation(Evaluation):
    """reference (M, ...): real states beside the samples, with reference_label (M,) or None."""

    generation: Generation
    reference: Tensor
    reference_label: Tensor | None = None

    def heading(self, nfe: int) -> str:
        if not self.scores:
            return "held-out loss alone: this evaluation has no scores"
        count = f"{len(self.generation.samples):,} samples, {nfe} evaluations each"
        return f"scores of {count}{guidance_words(self.generation.objective)} (noise floor: real against real)"


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluator judges, and by what.

    objective: around the network that is judged; weights: which weights it has, in words. dataset: gives held-out states.
    source, solver, flow, decode: what samples are made by (flow: the objective under guidance, None for the objective
    itself; decode: from latent states to images); a classifier makes none. dataset_key, cache: where floors are kept.
    final: whether it is the run's last evaluation.
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


class Evaluator(ABC):
    """Judges the network of an objective by held-out data; a generator by its samples, a classifier by its answers."""

    @abstractmethod
    def check(self, objective: Objective) -> None:
        """Raise UserError when this objective trains another kind of network; asked before a run trains."""

    @abstractmethod
    def evaluate(self, given: EvaluationInputs) -> Evaluation:
        """Return the scores; rank 0 calls this."""

    def evaluate_on_worker(self, given: EvaluationInputs) -> None:
        """Do another rank's share of an evaluation; all ranks but 0 call this with the same inputs."""


class GeneratorEvaluator(Evaluator):
    """Scores samples of a velocity network. samples / final_samples: how many during the run / at its end; without
    metrics always the former, for a picture. loss_samples: held-out states of eval/loss, None for final_samples.
    batch_size: rows of one forward pass of eval/loss. loss_weights: as in training.
    """

    def __init__(
        self,
        samples: CountFrom2,
        final_samples: CountFrom2,
        metrics: dict[str, Metric],
        batch_size: Count = 1024,
        loss_weights: dict[str, float] | None = None,
        loss_samples: CountFrom2 | None = None,
    ):
        self.loss_samples = loss_samples or final_samples
        self.samples, self.final_samples, self.metrics = samples, final_samples, metrics
        self.batch_size, self.loss_weights = batch_size, loss_weights or {}

    def check(self, objective: Objective) -> None:
        if not isinstance(objective, FlowObjective):
            raise UserError("this evaluation scores samples, and a classifier makes none; use evaluation=classifier")

    def count(self, final: bool) -> int:
        """Return how many samples are drawn."""
        return self.final_samples if final and self.metrics else self.samples

    def rows(self, objective: FlowObjective, dataset: FlowDataset, solver: Sampler, final: bool) -> int:
        """Return how many rows an evaluation takes through the network, as far as can be known before."""
        each = solver.evaluations_ahead + sum(metric.evaluations_ahead(objective) for metric in self.metrics.values())
        return self.count(final) * each + int(min(self.loss_samples, dataset.held_out_size))

    @torch.no_grad()
    def evaluate(self, given: EvaluationInputs) -> GeneratorEvaluation:
        """Sample with the objective's network (in eval mode) on the dataset's device and compute every metric.

        eval/loss is always the objective's own, without guidance.
        """
        begun = time.perf_counter()
        objective, dataset, solver, seed = given.objective, given.dataset, given.solver, given.seed
        self.check(objective)
        assert isinstance(objective, FlowObjective)
        objective.eval()
        flow = (given.flow or objective).eval()
        device = next(objective.network.parameters()).device
        count = self.count(given.final)
        with watched(flow.network, f"evaluation, {count:,} samples", self.rows(flow, dataset, solver, given.final)):
            noise, label, samples = self.samples_of(flow, given)
            generation = Generation(
                noise, samples, label, flow, flow.velocity, solver, dataset, given.source.to(device), given.dataset_key,
                given.cache, given.final, lambda name: generator_for(seed, f"evaluation/{name}", 0, device), given.decode,
                seed, given.weights, solver_words(flow, solver),
            )  # fmt: skip
            values = {"eval/loss": self.held_out_loss(objective, generation, device), "eval/nfe": float(solver.evaluations)}
            results = [result for metric in self.metrics.values() for result in metric.compute(generation)]
        scores = [result for result in results if isinstance(result, Score)]
        for score in scores:
            values |= flat_values(score)
        reference, reference_label = dataset.held_out(min(count, 2000), generation.generator("reference"))
        absent = [result for result in results if isinstance(result, Absent)]
        seconds = time.perf_counter() - begun
        return GeneratorEvaluation(scores, absent, values, seconds, generation, reference, reference_label)

    @torch.no_grad()
    def evaluate_on_worker(self, given: EvaluationInputs) -> None:
        """Make this rank's share of the samples."""
        flow = given.flow or given.objective
        assert isinstance(flow, FlowObjective)
        self.samples_of(flow.eval(), given)

    def samples_of(self, flow: FlowObjective, given: EvaluationInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return noise, labels and samples, on the dataset's device; all ranks call this."""
        dataset, source, solver, seed, count = given.dataset, given.source, given.solver, given.seed, self.count(given.final)
        device = next(flow.network.parameters()).device
        noise = fixed_noise(source.to("cpu"), count, seed).to(device)
        label = data_labels(dataset, flow.network.num_classes, count, generator_for(seed, "evaluation/labels", 0, device))
        label = None if label is None else label.to(device)
        samples = generate_together(flow, solver, noise, label, fresh_noise(source, seed))
        source.to(device)
        return noise, label, samples

    def held_out_loss(self, objective: FlowObjective, generation: Generation, device: torch.device) -> float:
        """Return the training loss on held-out data with fixed draws, in fp32 and in batches as large as the training ones:
        minibatch optimal transport pairs within a batch."""
        generator = generator_for(0, "evaluation/loss", 0, device)
        states, labels = held_out_states(generation.dataset, self.loss_samples, generator)
        total = 0.0
        for start in range(0, len(states), self.batch_size):
            x1 = states[start : start + self.batch_size]
            label = None if labels is None else labels[start : start + self.batch_size]
            x0 = generation.source.sample(len(x1), generator)
            batch = objective.draw(x0, x1, label, generator, progress=1.0)
            output = objective(batch, objective)
            total += len(x1) * float(named_terms(output, self.loss_weights)["loss"])
        return total / len(states)


def held_out_states(dataset: FlowDataset, count: int, generator: torch.Generator) -> Batch:
    """Return at most `count` held-out states with labels. UserError when there is none: a score of nothing says nothing."""
    states, label = dataset.held_out(count, generator)
    if len(states) == 0:
        raise UserError(f"no held-out states to score among the {count} asked for; hold some out, and ask for 1 or more")
    return states, label


def flat_values(score: Score) -> dict[str, float]:
    """Return a score as logged: its value, its floor and what else it carries, each under its own name."""
    values = {score.name: score.value, **(score.extra or {})}
    if score.floor is not None:
        values[f"{score.name}_floor"] = score.floor
    if score.floor_sd is not None:
        values[f"{score.name}_floor_sd"] = score.floor_sd
    if score.floor_q99 is not None:
        values[f"{score.name}_floor_q99"] = score.floor_q99
    if score.spread is not None:
        values[f"{score.name}_se"] = score.spread
    return values

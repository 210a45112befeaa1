"""Judges a trained generator: samples once, from fixed seeds, and hands the samples to every metric."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.base_dataloaders import Batch, FlowDataset
from dataloaders.sources import Source
from evaluation.metrics.base_metric import Absent, Decode, Generation, Metric, Score
from helpers_cfg import Guidance
from losses.objective import FlowObjective, Objective
from solvers.base_solver import Sampler
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import Euler
from training.errors import UserError
from training.progress import watched
from training.ranks import put_together, rank, world
from training.seeds import generator_for
from training.terms import named_terms

SEED_BLOCK = 256  # noise is drawn in blocks of this many samples, each from its own seed: any batch size, the same set
CHUNK = 1024  # samples carried through the solver at once, whatever the number of ranks that share them
Fresh = Callable[[int, int, int], Tensor]  # fresh(k, first, count) -> noise (count, ...) of step k, from sample `first` on


@dataclass
class Evaluation(ABC):
    """What an evaluation found. values: flat metric name -> number, as logged."""

    scores: list[Score]
    absent: list[Absent]
    values: dict[str, float]
    seconds: float

    @abstractmethod
    def heading(self, nfe: int) -> str:
        """What the scores are of, in a line; nfe: evaluations a sample."""


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
        """UserError when this objective trains another kind of network; asked before a run trains."""

    @abstractmethod
    def evaluate(self, given: EvaluationInputs) -> Evaluation:
        """Return the scores; rank 0 calls this."""

    def evaluate_on_worker(self, given: EvaluationInputs) -> None:
        """Do another rank's share of an evaluation; all ranks but 0 call this with the same inputs."""


def fixed_noise(source: Source, count: int, seed: int, stream: str = "sample", first: int = 0) -> Tensor:
    """Noise (count, ...) on the CPU of the samples from number `first` on, for a source on the CPU.

    Sample i depends on (seed, stream, i) alone: it is the same for every count, batch size and device count.
    """
    begin, end = first // SEED_BLOCK, -(-(first + count) // SEED_BLOCK)
    drawn = torch.cat([source.sample(SEED_BLOCK, generator_for(seed, stream, i)) for i in range(begin, end)])
    return drawn[first - begin * SEED_BLOCK :][:count]


def fresh_noise(source: Source, seed: int) -> Fresh:
    """The noise that re-noising solvers add: that of sample i in step k depends on (seed, k, i) alone. For a source on the
    CPU."""
    return lambda k, first, count: fixed_noise(source, count, seed, f"renoise/{k}", first)


def fixed_labels(num_classes: int, count: int) -> Tensor | None:
    """Labels 0, 1, 2, ... in turn, or None for an unconditional network."""
    return torch.arange(count) % num_classes if num_classes else None


def data_labels(dataset: FlowDataset, num_classes: int, count: int, generator: torch.Generator) -> Tensor | None:
    """Labels (count,) of held-out states, so classes come as often as in the data; None for an unconditional network."""
    if not num_classes:
        return None
    labels = dataset.held_out(count, generator)[1]
    assert labels is not None, "a conditional network has learned from labels"
    return labels[torch.arange(count, device=labels.device) % len(labels)]


def generate(
    flow: FlowObjective, solver: Sampler, noise: Tensor, label: Tensor | None, fresh: Fresh | None = None
) -> Tensor:
    """Noise (N, ...) carried to data by what the objective has learned, in chunks.

    label (N,) or None. fresh: as fresh_noise gives it; only re-noising solvers need it.
    """
    firsts = range(0, len(noise), CHUNK)
    labels = [None] * len(firsts) if label is None else label.split(CHUNK)
    parts = zip(noise.split(CHUNK), labels, firsts, strict=True)
    return torch.cat([sample_chunk(flow, solver, x0, own, fresh, first) for x0, own, first in parts])


def generate_together(
    flow: FlowObjective, solver: Sampler, noise: Tensor, label: Tensor | None, fresh: Fresh | None = None
) -> Tensor:
    """`generate`, its chunks shared out among the ranks, all of which call this: the same samples, exactly, on every rank.

    Rank 0 carries the last chunk, so that its solver has counted what it would have counted alone.
    """
    samples, firsts = torch.zeros_like(noise), range(0, len(noise), CHUNK)
    for first in firsts[(len(firsts) - 1 - rank()) % world() :: world()]:
        chunk = slice(first, first + CHUNK)
        own = None if label is None else label[chunk]
        samples[chunk] = sample_chunk(flow, solver, noise[chunk], own, fresh, first)
    return put_together(samples)


def sample_chunk(
    flow: FlowObjective, solver: Sampler, x0: Tensor, label: Tensor | None, fresh: Fresh | None, first: int
) -> Tensor:
    """The samples, in the units of the data, from number `first` on that the noise x0 (B, ...), for label (B,) or None, is
    carried to."""

    def added(k: int) -> Tensor:
        assert fresh is not None, "a re-noising solver needs fresh noise"
        return fresh(k, first, len(x0)).to(x0)

    return flow.in_data_units(solver.sample(flow, x0, label, added))


def few_steps(objective: FlowObjective, noise: Tensor, label: Tensor | None, evaluations: int) -> Tensor:
    """Noise (N, ...) carried to t = 1 in so many equal steps of one evaluation each.

    By the objective's flow map where it learns one, else by Euler steps of its velocity.
    """
    return generate(objective, few_step_solver(objective, evaluations), noise, label)


def few_step_solver(objective: FlowObjective, evaluations: int) -> Sampler:
    """The solver that takes few_steps."""
    return FlowMapSolver(evaluations) if objective.learns_flow_map else Euler(evaluations)


def few_step_words(objective: FlowObjective, evaluations: int | None = None) -> str:
    """What few_steps does, for provenance; without a number of evaluations the score's name tells it."""
    what = "the flow map" if objective.learns_flow_map else "Euler"
    steps = f"steps of {what}: {evaluations or 'as many as the name says'}"
    return steps + guidance_words(objective)


def solver_words(flow: FlowObjective, solver: Sampler) -> str:
    """How samples were made by a solver, after it has solved, for provenance."""
    return f"{solver.evaluations} evaluations by {type(solver).__name__}" + guidance_words(flow)


def guidance_words(flow: FlowObjective) -> str:
    """Its guidance, if it has one, after a comma."""
    return f", {flow.network.describe()}" if isinstance(flow.network, Guidance) else ""


class GeneratorEvaluator(Evaluator):
    """Scores samples of a velocity network. samples / final_samples: how many during the run / at its end; without
    metrics always the former, for a picture. loss_samples: held-out states of eval/loss, None for final_samples.
    batch_size: rows of one forward pass of eval/loss. loss_weights: as in training.
    """

    def __init__(
        self,
        samples: int,
        final_samples: int,
        metrics: dict[str, Metric],
        batch_size: int = 1024,
        loss_weights: dict[str, float] | None = None,
        loss_samples: int | None = None,
    ):
        self.loss_samples = loss_samples or final_samples
        self.samples, self.final_samples, self.metrics = samples, final_samples, metrics
        self.batch_size, self.loss_weights = batch_size, loss_weights or {}

    def check(self, objective: Objective) -> None:
        if not isinstance(objective, FlowObjective):
            raise UserError("this evaluation scores samples, and a classifier makes none; use evaluation=classifier")

    def count(self, final: bool) -> int:
        """How many samples are drawn."""
        return self.final_samples if final and self.metrics else self.samples

    def rows(self, objective: FlowObjective, dataset: FlowDataset, solver: Sampler, final: bool) -> int:
        """How many rows an evaluation takes through the network, as far as can be known before."""
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
        """The training loss on held-out data with fixed draws, in fp32 and in batches as large as the training ones:
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
    """At most `count` held-out states with labels. UserError when there is none: a score of nothing says nothing."""
    states, label = dataset.held_out(count, generator)
    if len(states) == 0:
        raise UserError(f"no held-out states to score among the {count} asked for; hold some out, and ask for 1 or more")
    return states, label


def flat_values(score: Score) -> dict[str, float]:
    """A score as logged: its value, its floor and what else it carries, each under its own name."""
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

"""Judges a trained generator: samples once, from fixed seeds, and hands the samples to every metric."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from common.contracts import calling, in_words
from common.errors import UserError
from common.progress import watched
from common.ranges import Count, CountFrom2
from common.seeds import generator_for
from configuration.nodes import nearest
from dataloaders.base_dataloaders import Batch, FlowDataset
from evaluation.generate import data_labels, fixed_noise, fresh_noise, generate, guidance_words, solver_words
from evaluation.metrics.base_metric import Absent, EvaluationInputs, Generation, Metric, Score
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowObjective, Objective
from losses.terms import named_terms
from losses.weightings import UniformWeighting
from solvers.base_solver import Sampler

SQUARED_ERROR = "eval/squared_error"


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


def checked_results(name: str, metric: Metric, generation: Generation, trial: bool = False) -> list[Score | Absent]:
    """Return a metric's results, or its trial's. UserError where it fails, or gives no list of Score and Absent."""
    with calling(f"the metric {name}", metric):
        given = metric.trial(generation) if trial else metric.results(generation)
    parts = given if isinstance(given, list | tuple) else [given]
    for part in parts:
        what = part.value if isinstance(part, Score) else part
        if not isinstance(part, Score | Absent) or (isinstance(part, Score) and not isinstance(what, int | float)):
            raise UserError(
                f"the metric {name} ({type(metric).__name__}) gives {in_words(what)}; compute() returns a list of "
                'Score("eval/<name>", a float) and Absent("eval/<name>", why)'
            )
    return list(parts)


class Evaluator(ABC):
    """Judges the network of an objective by held-out data; a generator by its samples, a classifier by its answers."""

    @abstractmethod
    def check(self, objective: Objective) -> Objective:
        """Return the objective. UserError when it trains another kind of network; asked before a run trains."""

    def names(self) -> list[str]:
        """Return what the names of its numbers begin with; [] where that is not known before an evaluation."""
        return []

    def check_monitor(self, monitor: str) -> None:
        """UserError for a monitored number that no evaluation gives; asked before a run trains."""
        names = self.names()
        if names and not monitor.startswith(("eval/seconds", *names)):
            raise UserError(
                f"monitor={monitor} is not among this run's evaluation metrics{nearest(monitor, names)}; use one of "
                f"{', '.join(names)}"
            )

    @abstractmethod
    def evaluate(self, given: EvaluationInputs) -> Evaluation:
        """Return the scores; rank 0 calls this."""

    def evaluate_on_worker(self, given: EvaluationInputs) -> None:
        """Do another rank's share of an evaluation; all ranks but 0 call this with the same inputs."""


class GeneratorEvaluator(Evaluator):
    """Scores samples of a velocity network.

    samples / final_samples: how many during the run / at its end; without metrics always the former, for a picture.
    loss_samples: held-out states of eval/loss, None for final_samples; batch_size: of its forward passes.
    """

    def __init__(
        self,
        samples: CountFrom2,
        final_samples: CountFrom2,
        metrics: dict[str, Metric],
        batch_size: Count = 1024,
        loss_weights: dict[str, float | list[list[float]]] | None = None,
        loss_samples: CountFrom2 | None = None,
    ):
        self.loss_samples = loss_samples or final_samples
        self.samples, self.final_samples, self.metrics = samples, final_samples, metrics
        self.batch_size, self.loss_weights = batch_size, loss_weights or {}

    def check(self, objective: Objective) -> FlowObjective:
        if not isinstance(objective, FlowObjective):
            raise UserError("this evaluation scores samples, and a classifier makes none; use evaluation=classifier")
        return objective

    def names(self) -> list[str]:
        parts = [(metric.names(), metric.beside) for metric in self.metrics.values()]
        silent = any(not metric.name and type(metric).names is Metric.names for metric in self.metrics.values())
        if silent:
            return []
        return ["eval/loss", SQUARED_ERROR, "eval/nfe", *(name for names, beside in parts for name in (*names, *beside))]

    def count(self, final: bool) -> int:
        """Return how many samples are drawn."""
        return self.final_samples if final and self.metrics else self.samples

    def rows(self, objective: FlowObjective, dataset: FlowDataset, solver: Sampler, final: bool) -> int:
        """Return how many rows go through the network for samples and loss, as far as can be known before."""
        each = solver.evaluations_ahead + sum(metric.evaluations_ahead(objective) for metric in self.metrics.values())
        return self.count(final) * each + int(min(self.loss_samples, dataset.held_out_size))

    def all_rows(self, objective: FlowObjective, dataset: FlowDataset, solver: Sampler, final: bool) -> int:
        """Return how many rows an evaluation takes through the network in all, as far as can be known before."""
        beside = sum(metric.rows_ahead(objective, dataset, final) for metric in self.metrics.values())
        return self.rows(objective, dataset, solver, final) + beside

    @torch.no_grad()
    def evaluate(self, given: EvaluationInputs) -> GeneratorEvaluation:
        """Sample on the dataset's device and compute every metric; eval/loss is the objective's own, without guidance."""
        begun = time.perf_counter()
        objective, dataset, solver = self.check(given.objective).eval(), given.dataset, given.solver
        flow, count = (given.flow or objective).eval(), self.count(given.final)
        with watched(flow.network, f"evaluation, {count:,} samples", self.all_rows(flow, dataset, solver, given.final)):
            generation = self.sample(flow, given)
            values = self.held_out_loss(objective, generation) | {"eval/nfe": float(solver.evaluations)}
            found = [result for named in self.metrics.items() for result in checked_results(*named, generation)]
        scores = [result for result in found if isinstance(result, Score)]
        for score in scores:
            values |= score.values()
        real = dataset.held_out(min(count, 2000), generation.generator("reference"))
        absent = [result for result in found if isinstance(result, Absent)]
        return GeneratorEvaluation(scores, absent, values, time.perf_counter() - begun, generation, *real)

    @torch.no_grad()
    def evaluate_on_worker(self, given: EvaluationInputs) -> None:
        """Make this rank's share of the samples."""
        self.sample((given.flow or self.check(given.objective)).eval(), given)

    def sample(self, flow: FlowObjective, given: EvaluationInputs) -> Generation:
        """Return samples on the dataset's device; all ranks call this."""
        count, device = self.count(given.final), next(flow.network.parameters()).device
        noise = fixed_noise(given.source.to("cpu"), count, given.seed).to(device)
        labels = labels_generator(given, device)
        label = data_labels(given.dataset, flow.network.is_conditional, count, labels)
        label = None if label is None else label.to(device)
        samples = generate(flow, given.solver, noise, label, fresh_noise(given.source, given.seed), together=True)
        given.source.to(device)
        made = {"objective": flow, "noise": noise, "samples": samples, "label": label}
        return Generation(**vars(given) | made, steps=solver_words(flow, given.solver))

    def held_out_loss(self, objective: FlowObjective, generation: Generation) -> dict[str, float]:
        """Return the training loss on held-out data with fixed draws, in fp32, in batches of training's size (couplings).

        Beside a loss that is not itself the squared error of the velocity: that error at the same states.
        """
        generator = generator_for(0, "evaluation/loss", 0, generation.samples.device)
        states, labels = held_out_states(generation.dataset, self.loss_samples, generator)
        plain = type(objective) is FlowMatchingLoss and isinstance(objective.weighting, UniformWeighting)
        total = error = 0.0
        for start in range(0, len(states), self.batch_size):
            rows = slice(start, start + self.batch_size)
            x1, label = states[rows], None if labels is None else labels[rows]
            batch = objective.draw(generation.source.sample(len(x1), generator), x1, label, generator, progress=1.0)
            total += len(x1) * float(named_terms(objective(batch, objective), self.loss_weights)["loss"])
            if not plain:
                v = objective.velocity(batch.input, batch.r, batch.label)
                error += float((v - batch.conditional_velocity).square().sum())
        return {"eval/loss": total / len(states)} | ({} if plain else {SQUARED_ERROR: error / len(states)})


def labels_generator(given: EvaluationInputs, device: torch.device) -> torch.Generator:
    """Return what the held-out rows are drawn by whose labels the samples have."""
    return generator_for(given.seed, "evaluation/labels", 0, device)


def held_out_beside(made: Generation) -> Batch:
    """Return held-out states, with labels, from which the samples of a conditional network have theirs, in their order."""
    return made.dataset.held_out(len(made.samples), labels_generator(made, made.samples.device))


def held_out_states(dataset: FlowDataset, count: int, generator: torch.Generator) -> Batch:
    """Return at most `count` held-out states with labels. UserError when there is none: a score of nothing says nothing."""
    states, label = dataset.held_out(count, generator)
    if len(states) == 0:
        raise UserError(f"no held-out states to score among the {count} asked for; hold some out, and ask for 1 or more")
    return states, label

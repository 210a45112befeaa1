"""How good few evaluations of the network are."""

from dataclasses import replace

from torch import Tensor

from common.ranges import Steps
from evaluation.generate import few_step_solver, few_step_words, few_steps, fresh_noise
from evaluation.metrics.base_metric import Absent, Generation, LongMetric, Metric, Score
from losses.objective import FlowObjective

RENOISED = "fresh noise between the steps, so that a sample's own noise has no one true end"


class FewStep(LongMetric):
    """Each of `scores` for samples made in so many evaluations: eval/energy_distance_1nfe, oracle/flow_map_error_4nfe, ...

    From the same noise, against the same real states, truth and floor as the solver's own samples. By the flow map in equal
    steps where the objective learns one; elsewhere absent, or with euler by as many Euler steps of the velocity. A generator
    has its one evaluation alone, and samples that are noised again between steps have no true ends.
    """

    def __init__(self, scores: dict[str, Metric], evaluations: list[Steps] | None = None, euler: bool = False):
        self.scores, self.evaluations, self.euler = list(scores.values()), list(evaluations or [1, 2, 4]), euler

    def names(self) -> list[str]:
        return [f"{name}_{n}nfe" for n in self.evaluations for metric in self.scores for name in metric.names()]

    def evaluations_ahead(self, objective: FlowObjective) -> int:
        return sum(n for n in self.evaluations if self.why_not(objective, n) is None)

    def why_not(self, objective: FlowObjective, evaluations: int) -> str | None:
        """Return why the objective makes no samples in so many evaluations; None where it does."""
        if objective.learns == "equilibrium":
            return "this objective's field is climbed, in as many evaluations as its solver takes"
        if objective.learns == "velocity" and not self.euler:
            return "this objective learns velocities, not maps across time"
        if objective.learns == "generator" and evaluations > 1:
            return "this objective makes samples in one evaluation"
        return None

    def compute(self, generation: Generation) -> list[Score | Absent]:
        return [named(result, n) for n in self.evaluations for result in self.of_steps(generation, n)]

    def of_steps(self, generation: Generation, evaluations: int) -> list[Score | Absent]:
        """Return the scores, under their own names, of samples made in so many evaluations."""
        reason = self.why_not(generation.objective, evaluations)
        if reason is not None:
            return [absent for metric in self.scores for absent in metric.absent(reason)]
        made = replace(generation, samples=samples_of(generation, evaluations), steps=few_step_words(generation.objective))
        unknown = "ends" if few_step_solver(generation.objective, evaluations).renoises else None
        found = (metric.absent(RENOISED) if metric.needs == unknown else metric.results(made) for metric in self.scores)
        return [result for results in found for result in results]


def samples_of(generation: Generation, evaluations: int) -> Tensor:
    """Return samples (N, ...) from the generation's own noise, in so many evaluations each."""
    objective, source = generation.objective, generation.source
    if objective.learns != "endpoint_map":
        return few_steps(objective, generation.noise, generation.label, evaluations)
    fresh = fresh_noise(source.to("cpu"), generation.seed)
    samples = few_steps(objective, generation.noise, generation.label, evaluations, fresh)
    source.to(samples.device)
    return samples


def named(result: Score | Absent, evaluations: int) -> Score | Absent:
    """Return the result under its few-step name, what goes with it too: x_median becomes x_1nfe_median."""
    name = f"{result.name}_{evaluations}nfe"
    if isinstance(result, Absent):
        return replace(result, name=name)
    extra = {key.replace(result.name, name, 1): value for key, value in (result.extra or {}).items()}
    return replace(result, name=name, extra=extra or None)

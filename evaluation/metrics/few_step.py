"""How good few evaluations of the network are."""

from dataclasses import replace

from common.ranges import Steps
from evaluation.generate import few_step_words, few_steps
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from losses.objective import FlowObjective


class FewStep(Metric):
    """Each of `scores` for samples made in so many evaluations: eval/energy_distance_1nfe, oracle/flow_map_error_4nfe, ...

    From the same noise, against the same real states, truth and floor as the solver's own samples. By the flow map in equal
    steps where the objective learns one; elsewhere absent, or with euler by as many Euler steps of the velocity.
    """

    def __init__(self, scores: dict[str, Metric], evaluations: list[Steps] | None = None, euler: bool = False):
        self.scores, self.evaluations, self.euler = list(scores.values()), list(evaluations or [1, 2, 4]), euler

    def names(self) -> list[str]:
        return [f"{name}_{n}nfe" for n in self.evaluations for metric in self.scores for name in metric.names()]

    def evaluations_ahead(self, objective: FlowObjective) -> int:
        return sum(self.evaluations) if objective.learns_flow_map or self.euler else 0

    def compute(self, generation: Generation) -> list[Score | Absent]:
        if not self.evaluations_ahead(generation.objective):
            return self.absent("this objective learns velocities, not maps across time")
        results: list[Score | Absent] = []
        for n in self.evaluations:
            samples = few_steps(generation.objective, generation.noise, generation.label, n)
            made = replace(generation, samples=samples, steps=few_step_words(generation.objective))
            results += [named(result, n) for metric in self.scores for result in metric.compute(made)]
        return results


def named(result: Score | Absent, evaluations: int) -> Score | Absent:
    """Return the result under its few-step name, what goes with it too: x_median becomes x_1nfe_median."""
    name = f"{result.name}_{evaluations}nfe"
    if isinstance(result, Absent):
        return replace(result, name=name)
    extra = {key.replace(result.name, name, 1): value for key, value in (result.extra or {}).items()}
    return replace(result, name=name, extra=extra or None)

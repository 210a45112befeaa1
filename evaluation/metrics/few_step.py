"""How good few evaluations of a learned flow map are."""

from dataclasses import replace

from evaluation.evaluator import few_steps
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.energy_distance import EnergyDistance


class FewStepEnergyDistance(Metric):
    """eval/energy_distance_1nfe, _2nfe, ...: samples made by the objective's flow map in so many evaluations.

    From the same noise, against the same real states and the same floor as eval/energy_distance.
    """

    def __init__(self, evaluations: list[int] | None = None):
        self.evaluations = evaluations or [1, 2, 4]

    def compute(self, generation: Generation) -> list[Score | Absent]:
        names = [f"eval/energy_distance_{n}nfe" for n in self.evaluations]
        if not generation.objective.learns_flow_map:
            return [Absent(name, "this objective learns velocities, not maps across time") for name in names]
        scores: list[Score | Absent] = []
        for name, n in zip(names, self.evaluations, strict=True):
            samples = few_steps(generation.objective, generation.noise, generation.label, n)
            scores += [replace(s, name=name) for s in EnergyDistance().compute(replace(generation, samples=samples))]
        return scores

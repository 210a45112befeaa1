"""Which parameters a trial has. All but TPE's are a function of the search's seed and the trial's number, once the trials
before it are known: nothing else is kept, so that a search that is killed goes on as if it had not been.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import CMA
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from searches.space import Value, Varied

SIGMA = 0.3  # standard deviation of CMA-ES's first generation, of a unit interval


class Given(BaseSampler):
    """Gives each parameter the value that was worked out for it, others by chance."""

    def __init__(self, values: dict[str, Value], otherwise: BaseSampler) -> None:
        self.values, self.otherwise = values, otherwise

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        if param_name in self.values:
            return self.values[param_name]
        return self.otherwise.sample_independent(study, trial, param_name, param_distribution)


def sampler_for(
    kind: str, space: Sequence[Varied], seed: int, number: int, trials: Sequence[FrozenTrial], higher: bool
) -> BaseSampler:  # fmt: skip
    """Return what chooses the parameters of trial `number`; kind: random, tpe, grid or cmaes; trials: those before it."""
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    by_chance = RandomSampler(own_seed)
    if kind == "tpe":
        return TPESampler(seed=own_seed, multivariate=True, constant_liar=True)
    if kind == "grid":
        return Given(grid_point(space, number), by_chance)
    if kind == "cmaes":
        return Given(evolved(numbers_in(space), seed, number, trials, higher), by_chance)
    return by_chance


def grid_size(space: Sequence[Varied]) -> int:
    return int(np.prod([len(varied.texts) for varied in space], dtype=object))


def grid_point(space: Sequence[Varied], number: int) -> dict[str, Value]:
    """Return combination `number` of all choices, the last of them turning fastest."""
    places = np.unravel_index(number, [len(varied.texts) for varied in space])
    return {varied.key: varied.texts[int(place)] for varied, place in zip(space, places, strict=True)}


def numbers_in(space: Sequence[Varied]) -> list[Varied]:
    """Return what varies in an interval."""
    return [varied for varied in space if not varied.texts]


def optimizer_of(space: Sequence[Varied], seed: int) -> CMA:
    """Return CMA-ES before its first generation, in the unit cube."""
    count = len(space)
    return CMA(mean=np.full(count, 0.5), sigma=SIGMA, bounds=np.tile([0.0, 1.0], (count, 1)), seed=seed % 2**32)


def generation_size(space: Sequence[Varied]) -> int:
    """Return how many trials CMA-ES has in a generation; the next one begins when all of them have ended."""
    return int(optimizer_of(numbers_in(space), 0).population_size)


def evolved(
    space: Sequence[Varied], seed: int, number: int, trials: Sequence[FrozenTrial], higher: bool
) -> dict[str, Value]:  # fmt: skip
    """Return the parameters that CMA-ES gives to trial `number`: every generation before is worked out again."""
    optimizer, first, size = optimizer_of(space, seed), 0, generation_size(space)
    while first + size <= number:
        points = [optimizer.ask() for _ in range(size)]
        optimizer.tell(list(zip(points, costs(trials[first : first + size], higher), strict=True)))
        first += size
    point = [optimizer.ask() for _ in range(number - first + 1)][-1]
    return {varied.key: varied.at(float(place)) for varied, place in zip(space, point, strict=True)}


def costs(trials: Sequence[FrozenTrial], higher: bool) -> list[float]:
    """Return the values of a generation, to be made small; a trial without one counts as its worst."""
    known = [trial.values[0] for trial in trials if trial.values]
    worst = (min if higher else max)(known, default=0.0)
    return [(-1 if higher else 1) * (trial.values[0] if trial.values else worst) for trial in trials]

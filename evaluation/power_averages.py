"""Averages of weights over training whose length is chosen after it (Karras et al. 2024, arXiv 2312.02696, section 3).

The average of exponent gamma after n steps gives step k the weight (k/n)^(gamma+1) - ((k-1)/n)^(gamma+1). Its length is the
standard deviation of k/n, sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from run_files.averages import read_averages
from run_files.run_folder import RunFolder


def gamma_of(length: float) -> float:
    """Return the exponent of a length in (0, .2887), that of a plain mean."""
    square = length**-2.0
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def profile(length: float, end: int, steps: int) -> np.ndarray:
    """Return what the average of this length after `end` steps gives each of `steps` steps, (steps,)."""
    reached = np.minimum(np.arange(steps + 1) / end, 1.0) ** (gamma_of(length) + 1)
    return np.diff(reached)


def product(end: np.ndarray, gamma: np.ndarray, other_end: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """Return the inner products of profiles as functions of continuous steps (ibid., eq. 21)."""
    ratio = (end / other_end) ** np.where(end < other_end, other_gamma, -gamma)
    return (gamma + 1) * (other_gamma + 1) * ratio / ((gamma + other_gamma + 1) * np.maximum(end, other_end))


@dataclass(frozen=True)
class Snapshots:
    """The stored averages of a run: for each of N its length, the step it is of, and its file."""

    lengths: list[float]
    steps: list[int]
    files: list[Path]

    @property
    def last(self) -> int:
        return max(self.steps)

    def coefficients(self, length: float) -> np.ndarray:
        """Return the factors (N,) whose sum of stored averages is nearest to the average of `length` at the last step."""
        ends, gammas = np.array(self.steps, dtype=float), np.array([gamma_of(one) for one in self.lengths])
        inner = product(ends[:, None], gammas[:, None], ends, gammas)
        wanted = product(ends, gammas, np.array(float(self.last)), np.array(gamma_of(length)))
        return np.linalg.lstsq(inner, wanted, rcond=1e-14)[0]

    def error(self, length: float) -> float:
        """Return how far the profile of that sum is from the true one: root of the summed squares, relative."""
        wanted = profile(length, self.last, self.last)
        parts = zip(self.coefficients(length), self.lengths, self.steps, strict=True)
        found = sum(factor * profile(one, end, self.last) for factor, one, end in parts)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    def average(self, length: float) -> dict[str, Tensor]:
        """Return the weights of the average of `length` at the last step; whole numbers are those of that step."""
        total: dict[str, Tensor] = {}
        factors = self.coefficients(length)
        for file in dict.fromkeys(self.files):
            stored = read_averages(file)
            for i in (i for i, other in enumerate(self.files) if other == file):
                add(total, stored[self.lengths[i]], float(factors[i]))
        return {name: value.float() if value.is_floating_point() else value for name, value in total.items()}


def add(total: dict[str, Tensor], weights: Mapping[str, Tensor], factor: float) -> None:
    """Add factor times the weights to a total in double precision; whole numbers replace those there."""
    for name, value in weights.items():
        if not value.is_floating_point():
            total[name] = value
        elif name in total:
            total[name] += factor * value.double()
        else:
            total[name] = factor * value.double()


def snapshots_of(files: Sequence[Path]) -> Snapshots:
    """Return what the files hold, which RunFolder.averages lists by their steps."""
    found = [(length, RunFolder.step_of(file), file) for file in files for length in read_averages(file)]
    lengths, steps, paths = zip(*found, strict=True)
    return Snapshots(list(lengths), list(steps), list(paths))

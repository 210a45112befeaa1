"""Two sets of runs that differ in their seeds and in a setting: score by score, is the difference more than luck?"""

import math
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.05  # share of comparisons of a configuration with itself that may find a difference, in whatever score
PAIRS = 8  # of equal seeds from which on differences within pairs are tested: their least p is 2 / 2^8
MOST = 200_000  # arrangements of the seeds; of more, so many are drawn at random
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """One score of two sets: means, standard deviations over seeds, difference of the means with a 95 % interval.

    p: the share of arrangements of the seeds with a difference as large; p_all: with one as large in any of the scores.
    """

    means: tuple[float, float]
    deviations: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p: float
    p_all: float

    @property
    def significant(self) -> bool:
        return self.p_all <= LEVEL

    @property
    def significant_alone(self) -> bool:
        """Return whether it would be significant, had this score been decided on beforehand."""
        return self.p <= LEVEL


def least_p(first: int, second: int, paired: bool = False) -> float:
    """Return the smallest p that a test over so many seeds can give, paired or not."""
    if paired and first >= PAIRS:
        return 2.0 / 2**first
    return (2 if first == second else 1) / math.comb(first + second, first)


def least_seeds() -> int:
    """Return the fewest seeds a side with which a difference can be significant."""
    return next(n for n in range(2, 100) if least_p(n, n) <= LEVEL)


def splits(first: int, second: int) -> Array:
    """Return (P, first + second): rows whose product with values is the difference of means of a split; the first is ours.

    All splits, or MOST drawn from a fixed seed.
    """
    count = first + second
    if math.comb(count, first) <= MOST:
        chosen = np.array(list(combinations(range(count), first)))
    else:
        order = np.random.default_rng(0).random((MOST, count)).argsort(1)[:, :first]
        chosen = np.concatenate([np.arange(first)[None], order])
    rows = np.full((len(chosen), count), -1 / second)
    np.put_along_axis(rows, chosen, 1 / first, 1)
    return rows


def sign_flips(pairs: int) -> Array:
    """Return (P, pairs): rows whose product with differences is their mean with some signs turned; the first is ours."""
    if 2**pairs <= MOST:
        return np.array(list(product((1.0, -1.0), repeat=pairs))) / pairs
    signs = np.random.default_rng(0).choice((1.0, -1.0), (MOST, pairs))
    return np.concatenate([np.ones((1, pairs)), signs]) / pairs


def compared(first: Array, second: Array, paired: bool) -> list[Difference]:
    """Return the difference in each of S scores between sets of seeds (N, S) and (M, S).

    paired: row i of both has the same seed and so the same noise of evaluation; intervals are then of the differences within
    pairs, and from 8 pairs on the test turns their signs. Otherwise it is over all splits of the seeds (Fisher 1935). p_all
    by the largest standardised difference over the scores in each arrangement (Westfall & Young 1993): all verdicts hold
    together.
    """
    within = first - second if paired else None
    if within is not None and len(within) >= PAIRS:
        values, arranged = within, sign_flips(len(within))
        scale = np.sqrt(np.square(within).mean(0))
    else:
        values, arranged = np.concatenate([first, second]), splits(len(first), len(second))
        scale = values.std(0)
    moved = scale > 1e-12 * np.abs(values).max(0)
    found = np.abs(arranged @ values) / np.where(moved, scale, 1) * moved
    enough = found[0] * (1 - 1e-9)
    p, p_all = (found >= enough).mean(0), (found.max(1)[:, None] >= enough).mean(0)
    means, deviations = (first.mean(0), second.mean(0)), (first.std(0, ddof=1), second.std(0, ddof=1))
    half = half_width(first, second) if within is None else half_width_of_mean(within)
    return [
        Difference(
            (float(means[0][i]), float(means[1][i])), (float(deviations[0][i]), float(deviations[1][i])), float(gap),
            (float(gap - half[i]), float(gap + half[i])), float(p[i]), float(p_all[i]),
        )
        for i, gap in enumerate(means[0] - means[1])
    ]  # fmt: skip


def half_width(first: Array, second: Array) -> Array:
    """Return half of the 95 % interval of the difference of means (Welch 1947)."""
    a, b = (part.var(0, ddof=1) / len(part) for part in (first, second))
    freedom = np.square(a + b) / np.maximum(np.square(a) / (len(first) - 1) + np.square(b) / (len(second) - 1), 1e-300)
    return np.asarray(stdtrit(np.maximum(freedom, 1), 1 - LEVEL / 2) * np.sqrt(a + b))


def half_width_of_mean(differences: Array) -> Array:
    """Return half of the 95 % interval of the mean of differences (N, S) within pairs."""
    count = len(differences)
    return np.asarray(stdtrit(count - 1, 1 - LEVEL / 2) * differences.std(0, ddof=1) / count**0.5)

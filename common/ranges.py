"""Which numbers a setting may be: written in the annotation of a constructor's parameter, checked before a run begins.

    def __init__(self, width: Size, noise: NotNegative, power: Annotated[float, Range(1, most=100)]) -> None:

configuration/signatures.py reads the annotation from the source, so a Range is written with literal numbers. It holds for
every number of a value, in a list each of them. configuration/values.py says in one sentence what is not allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Which numbers are allowed. above, below: an end that is itself left out. rising: two numbers, the second no less.

    most: an end so far off that it is named only to whoever passes it.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    most: float = math.inf
    rising: bool = False

    def holds(self, number: float) -> bool:
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= min(self.high, self.most))

    def words(self) -> str:
        if self.rising:
            return f" rising from {self.low:g} to {self.high:g}"
        if not (self.above or self.below) and math.inf not in (-self.low, self.high):
            return f" from {self.low:g} to {self.high:g}"
        low = "" if self.low == -math.inf else f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        high = "" if self.high == math.inf else f" below {self.high:g}" if self.below else f" at most {self.high:g}"
        return f"{low} and{high}" if low and high else low + high


ANY = Range()

Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareAbove0 = Annotated[float, Range(0, 1, above=True)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
AverageLength = Annotated[float, Range(0.005, 0.28)]  # of an average of weights: its standard deviation, share of the run
Inside = Annotated[float, Range(0, 1, above=True, below=True)]  # neither none nor all
Tolerance = Annotated[float, Range(1e-12, 1, below=True)]
Interval = Annotated[Sequence[float], Range(0, 1, rising=True)]

Seed = Annotated[int, Range(0)]
Count = Annotated[int, Range(1, most=1_000_000_000)]  # of rows, steps, draws
CountOr0 = Annotated[int, Range(0, most=1_000_000_000)]
CountFrom2 = Annotated[int, Range(2, most=1_000_000_000)]  # of samples with a spread
Steps = Annotated[int, Range(1, most=1_000_000)]  # of a solver: network evaluations
Replicates = Annotated[int, Range(2, most=1_000_000)]
Size = Annotated[int, Range(1, most=100_000)]  # of a layer or a picture
SizeOr0 = Annotated[int, Range(0, most=100_000)]
Depth = Annotated[int, Range(1, most=1000)]
EpochSize = Annotated[int, Range(1, most=1_000_000_000_000)]

"""Who is paired with whom: the joint distribution of noise x0 and data x1."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.ranges import Count, CountFrom2

PRICED_FROM, SINKHORN_STEPS = 128, 40  # rows from which prices save more than they cost
Pairs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Paths:
    """B paths from noise to data: states (P, B, ...) at times (P,), label (B,) or None. of_data: along the marginal flow of
    independent pairs, as far as it was learned.
    """

    states: Tensor
    times: Tensor
    label: Tensor | None
    of_data: bool = True


class Coupling(ABC):
    """Pairs a batch of noise with a batch of data."""

    @abstractmethod
    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        """Return x0, x1 (B, ...) and label (B,) as pairs, as many; a label stays with its x1."""


class IndependentCoupling(Coupling):
    """Noise and data as they come."""

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        return x0, x1, label


class MinibatchOTCoupling(Coupling):
    """Exact optimal transport within the batch: the assignment of least total squared distance (Tong et al. 2023,
    arXiv 2302.00482; Pooladian et al. 2023). Without replacement, and deterministic: it needs no randomness of its own.

    group: rows that are paired with each other, None for the whole batch; the cost is cubic in it.
    """

    def __init__(self, group: Count | None = None):
        self.group = group

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        size = self.group or len(x0)
        partner = torch.cat([
            first + self.partners(x0[first : first + size], x1[first : first + size]) for first in range(0, len(x0), size)
        ])  # fmt: skip
        return x0, x1[partner], None if label is None else label[partner]

    @staticmethod
    def partners(x0: Tensor, x1: Tensor) -> Tensor:
        """Return for each of x0 (B, ...) which of x1 (B, ...) it is assigned to, (B,)."""
        home = "cpu" if x0.device.type == "mps" else x0.device  # MPS has no float64
        a, b = (x.to(home).flatten(1).double() for x in (x0, x1))
        cost = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).cpu()  # but for |x0|^2, which all of a row have in common
        if len(cost) >= PRICED_FROM:
            cost -= column_prices(cost)
        return torch.from_numpy(linear_sum_assignment(cost.numpy())[1]).to(x1.device)


def column_prices(cost: Tensor) -> Tensor:
    """Return prices (B,) that make the search for the best assignment of `cost` (B, B) short when they are subtracted: half
    the time at 256 rows, a third at 1,024.

    Every assignment has one entry of each column, so prices change no assignment's rank, whatever they are. These are dual
    potentials of entropic transport by a few steps of Sinkhorn (Cuturi 2013, arXiv 1306.0895).
    """
    excess = (cost - cost.min(1, keepdim=True).values).float()
    blur = (0.03 * excess.mean()).clamp(min=1e-30)
    kernel, column = torch.exp(-excess / blur), torch.ones(len(cost))
    for _ in range(SINKHORN_STEPS):
        row = 1 / (kernel @ column).clamp(min=1e-30)
        column = 1 / (row @ kernel).clamp(min=1e-30)
    return blur * column.log()


class ReflowCoupling(Coupling):
    """Pairs (x0, X(x0)) of noise and where a trained flow carries it, in place of the batch's own (Liu et al. 2022,
    arXiv 2209.03003): training on them straightens the flow, so that few solver steps suffice.

    teacher: a checkpoint. count: paths made once, when first asked for; batches are drawn from them. points: how many states
    of a path are kept, its ends included. make_pairs: called as make_pairs(teacher, count, like, points), returns them; see
    evaluation.reflow.TeacherPairs.
    """

    def __init__(self, teacher: str, count: Count, make_pairs: Callable[..., Paths], points: CountFrom2 = 2):
        self.teacher, self.count, self.points, self.make_pairs = teacher, count, points, make_pairs
        self.made: Paths | None = None

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        paths = self.paths(x1, generator)
        return paths.states[0], paths.states[-1], paths.label

    def paths(self, like: Tensor, generator: torch.Generator) -> Paths:
        """Return as many paths as `like` (B, ...) has rows."""
        if self.made is None:
            self.made = self.make_pairs(self.teacher, self.count, like, self.points)
        label, size = self.made.label, (len(like),)
        rows = torch.randint(self.made.states.shape[1], size, generator=generator, device=like.device)
        return replace(self.made, states=self.made.states[:, rows], label=None if label is None else label[rows])

    def __deepcopy__(self, memo: dict[int, object]) -> "ReflowCoupling":
        return self  # the EMA objective draws from the same paths

"""Who is paired with whom: the joint distribution of noise x0 and data x1."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.ranges import Count

Pairs = tuple[Tensor, Tensor, Tensor | None]


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
        cost = torch.cdist(x0.flatten(1), x1.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(x1.device)


class ReflowCoupling(Coupling):
    """Pairs (x0, X(x0)) of noise and where a trained flow carries it, in place of the batch's own (Liu et al. 2022,
    arXiv 2209.03003): training on them straightens the flow, so that few solver steps suffice.

    teacher: a checkpoint. count: pairs made once, when first asked for; batches are drawn from them. make_pairs: called as
    make_pairs(teacher, count, like), returns them; see evaluation.reflow.TeacherPairs.
    """

    def __init__(self, teacher: str, count: Count, make_pairs: Callable[[str, int, Tensor], Pairs]):
        self.teacher, self.count, self.make_pairs = teacher, count, make_pairs
        self.pairs: Pairs | None = None

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        if self.pairs is None:
            self.pairs = self.make_pairs(self.teacher, self.count, x1)
        source, target, classes = self.pairs
        rows = torch.randint(self.count, (len(x1),), generator=generator, device=x1.device)
        return source[rows], target[rows], None if classes is None else classes[rows]

    def __deepcopy__(self, memo: dict[int, object]) -> "ReflowCoupling":
        return self  # the EMA objective draws from the same pairs

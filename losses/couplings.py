"""Who is paired with whom: the joint distribution of noise x0 and data x1."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common import distributed
from common.errors import UserError
from common.ranges import Count, CountFrom2, NotNegative, Positive
from models.inputs import split_label

PRICED_FROM, SINKHORN_STEPS = 128, 40  # rows from which prices save more than they cost
SAFE_STEPS = 20  # of Sinkhorn's iteration, by which its factors stay within what floating point holds
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
    label_weight: what a pair costs, beside its squared distance, whose noise came with data of another label (Cheng &
    Schwing 2025, arXiv 2503.10636): the data of a class would else be paired with noise of its own, and samples of the
    class are drawn from all of it. 1e6, or inf: pairs within a class alone.
    across_devices: whether the batch is that of all devices of a run in training, the rows of rank 0 first, not each one's
    share of it.
    """

    def __init__(self, group: Count | None = None, label_weight: NotNegative = 0.0, across_devices: bool = False):
        self.group, self.label_weight, self.across_devices = group, label_weight, across_devices

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        if self.across_devices and distributed.own_share is not None and distributed.world() > 1:
            return self.pair_across(x0, x1, label, distributed.own_share)
        partner = self.assigned(x0, x1, label)
        return x0, x1[partner], None if label is None else label[partner]

    def pair_across(self, x0: Tensor, x1: Tensor, label: Tensor | None, rows: int) -> Pairs:
        """Pair the first `rows` rows with those of the other ranks; further ones, which fill up an empty share, stay."""
        noise, data = distributed.shares_of(x0[:rows]), torch.cat(distributed.shares_of(x1[:rows]))
        labels = None if label is None else torch.cat(distributed.shares_of(label[:rows]))
        partner = self.assigned(torch.cat(noise), data, labels).cpu() if distributed.rank() == 0 else None
        partner = distributed.broadcast_from_rank0(partner)
        assert partner is not None
        first = sum(map(len, noise[: distributed.rank()]))
        own = partner[first : first + rows].to(x1.device)
        new = None if label is None or labels is None else torch.cat([labels[own], label[rows:]])
        return x0, torch.cat([data[own], x1[rows:]]), new

    def assigned(self, x0: Tensor, x1: Tensor, label: Tensor | None) -> Tensor:
        """Return for each of x0 (B, ...) which of x1 (B, ...) is its partner, (B,), group by group."""
        others = other_labels(label, self.label_weight)
        size = self.group or len(x0)
        return torch.cat([
            rows.start + self.partners(x0[rows], x1[rows], None if others is None else others[rows, rows])
            for rows in (slice(first, first + size) for first in range(0, len(x0), size))
        ])  # fmt: skip

    @staticmethod
    def partners(x0: Tensor, x1: Tensor, others: Tensor | None = None) -> Tensor:
        """Return for each of x0 (B, ...) which of x1 (B, ...) it is assigned to, (B,). others (B, B): further costs."""
        from scipy.optimize import linear_sum_assignment  # slow to import, and of this coupling alone

        home = "cpu" if x0.device.type == "mps" else x0.device  # MPS has no float64
        a, b = (x.to(home).flatten(1).double() for x in (x0, x1))
        cost = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).cpu()  # but for |x0|^2, which all of a row have in common
        if others is not None:
            cost += others.cpu()
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
    blur = (0.03 * excess[excess.isfinite()].mean()).clamp(min=1e-30)
    kernel, column = torch.exp(-excess / blur), torch.ones(len(cost))
    for _ in range(SINKHORN_STEPS):
        row = 1 / (kernel @ column).clamp(min=1e-30)
        column = 1 / (row @ kernel).clamp(min=1e-30)
    return blur * column.log()


def other_labels(label: Tensor | None, weight: float) -> Tensor | None:
    """Return `weight` (B, B) where rows have different classes, else 0; None of no weight. UserError without labels."""
    if not weight:
        return None
    classes = split_label(label)[0]
    if classes is None:
        raise UserError("loss.coupling.label_weight needs labels, which these data do not have; leave it at 0")
    return torch.where(classes[:, None] == classes, 0.0, weight)


class SinkhornCoupling(Coupling):
    """Entropic optimal transport within the batch, on its device: for each row of noise one of the data, drawn from the plan
    of least total squared distance plus blur x relative entropy (Cuturi 2013, arXiv 1306.0895; Tong et al. 2023,
    arXiv 2302.00482, the static Schroedinger bridge). Some rows of data may come twice and others not.

    blur: in units of the mean squared distance of independent pairs, means apart; small is nearly the exact assignment,
    large independent pairs. steps: of Sinkhorn's iteration. label_weight: as of MinibatchOTCoupling.
    """

    def __init__(self, blur: Positive = 0.02, steps: Count = 100, label_weight: NotNegative = 0.0):
        self.blur, self.steps, self.label_weight = blur, steps, label_weight

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        below = self.plan(x0, x1, other_labels(label, self.label_weight)).cumsum(1)
        drawn = torch.rand(len(x0), 1, generator=generator, device=x0.device) * below[:, -1:]
        partner = (below <= drawn).sum(1).clamp(max=len(x1) - 1)
        return x0, x1[partner], None if label is None else label[partner]

    def plan(self, x0: Tensor, x1: Tensor, others: Tensor | None = None) -> Tensor:
        """Return the law (B, B) of the partner of each x0 (B, ...) among x1 (B, ...): its rows sum to 1, and, the better the
        more steps, so do its columns. others (B, B): further costs.
        """
        a, b = (x.flatten(1) - x.flatten(1).mean(0) for x in (x0, x1))  # what a row or column has in common changes no plan
        unit = (self.blur * (a.square().sum(1).mean() + b.square().sum(1).mean())).clamp(min=1e-30)
        gain = 2 * a @ b.T / unit
        if others is not None:
            gain = gain - others / unit
        row = -torch.logsumexp(gain, 1, keepdim=True)
        column = -torch.logsumexp(gain + row, 0)
        for first in range(0, self.steps, SAFE_STEPS):
            kernel, c = torch.exp(gain + row + column), torch.ones_like(column)
            for _ in range(min(SAFE_STEPS, self.steps - first)):
                r = 1 / (kernel @ c).clamp(min=1e-30)
                c = 1 / (r @ kernel).clamp(min=1e-30)
            row, column = row + r[:, None].log(), column + c.log()
        return torch.softmax(gain + column, 1)


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

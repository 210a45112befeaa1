"""Moving averages of a network's weights."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import AverageLength, Count, ShareBelow1
from evaluation.power_averages import gamma_of
from training.sharding import local


class EMA(ABC):
    """average <- (1 - share) average + share weights after every step. Buffers are copied.

    lengths: of its averages, the first being the one that is sampled; empty where none has a length. snapshots: how often
    in a run all of them are stored.
    """

    lengths: Sequence[float] = ()
    snapshots: int = 0

    @abstractmethod
    def share(self, step: int) -> float:
        """Return how much of the average update number `step` (from 1) replaces."""

    def others(self) -> "list[EMA]":
        """Return the averages that are kept beside this one, one for each further length."""
        return []

    def average_of(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` that will hold the average: in eval mode, without gradients."""
        return copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, average: nn.Module, network: nn.Module, step: int, broken: Tensor | None = None) -> None:
        """Update number `step` (from 1). broken: a scalar, 1 where the average must stay as it is, else 0."""
        share = self.share(step)
        averages, weights = local(average.parameters()), local(network.parameters())
        if broken is None:
            torch._foreach_lerp_(averages, weights, share)
        else:
            torch._foreach_lerp_(averages, weights, [(1 - broken) * share] * len(averages))
        buffers = list(average.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(network.buffers()))

    def snapshot_is_due(self, step: int, total_steps: int) -> bool:
        """Return whether the averages are stored after so many steps of a run: `snapshots` times, the last at its end."""
        done = step * self.snapshots // total_steps
        return done > (step - 1) * self.snapshots // total_steps


class ConstantEMA(EMA):
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp-up forgets the random start quickly. decay 0 keeps the average equal to the weights.
    """

    def __init__(self, decay: ShareBelow1 = 0.999):
        self.decay = decay

    def share(self, step: int) -> float:
        return 1 - min(self.decay, (1 + step) / (10 + step))


class PowerEMA(EMA):
    """Averages that give step k of n the weight k^gamma, one for each of `lengths`, the standard deviation of k in them as a
    share of n (Karras et al. 2024, arXiv 2312.02696, section 3.1): d = (1 - 1/n)^(gamma + 1) at the n-th update.

    From the snapshots of two of them that of any other length follows after training: scripts/ema.py. Raises UserError for
    lengths that are not different.
    """

    def __init__(self, lengths: list[AverageLength], snapshots: Count = 32):
        if len(set(lengths)) < len(lengths):
            raise UserError(f"ema.lengths={lengths} names one length twice; give different ones, such as [0.05,0.1]")
        self.lengths, self.snapshots = list(lengths), snapshots
        self.power = gamma_of(lengths[0]) + 1

    def share(self, step: int) -> float:
        return 1 - float((1 - 1 / step) ** self.power)

    def others(self) -> list[EMA]:
        return [PowerEMA([length]) for length in self.lengths[1:]]

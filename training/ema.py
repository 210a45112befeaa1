"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn

from common.ranges import ShareBelow1


class ConstantEMA:
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp-up forgets the random start quickly. decay 0 keeps the average equal to the weights. Buffers are copied.
    """

    def __init__(self, decay: ShareBelow1 = 0.999):
        self.decay = decay

    def average_of(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` that will hold the average: in eval mode, without gradients."""
        return copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, average: nn.Module, network: nn.Module, step: int, broken: Tensor | None = None) -> None:
        """Update number `step` (from 1). broken: a scalar, 1 where the average must stay as it is, else 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, weights = list[Tensor](average.parameters()), list[Tensor](network.parameters())
        if broken is None:
            torch._foreach_lerp_(averages, weights, share)
        else:
            torch._foreach_lerp_(averages, weights, [(1 - broken) * share] * len(averages))
        buffers = list(average.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(network.buffers()))

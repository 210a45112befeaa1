"""Evaluations of one network that share their dropout masks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.layers import ReplayedDropout


class RepeatsDropout(nn.Module):
    """A loss of several evaluations of its network: with the same dropout masks they are of one function."""

    network: nn.Module

    @property
    def is_random(self) -> bool:
        """Whether two evaluations of the network differ: dropout, in training."""
        return self.training and any(part.p > 0 for part in self.dropouts())

    def dropouts(self) -> list[ReplayedDropout]:
        return [part for part in self.network.modules() if isinstance(part, ReplayedDropout)]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Let the next evaluation of as many rows use the dropout masks of the one within."""
        parts = self.dropouts() if self.training else []
        outer = [part.keep() for part in parts]
        try:
            yield
        finally:
            for part, kept in zip(parts, outer, strict=True):
                part.replay(kept)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Do as `repeated`, without a graph: for evaluations that make a target."""
        with torch.no_grad(), self.repeated():
            yield

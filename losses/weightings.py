"""From per-sample squared errors (summed over dimensions) to one number."""

from abc import ABC, abstractmethod
from typing import Annotated

from torch import Tensor

from common.ranges import Positive, Range


class Weighting(ABC):
    """Averages squared errors over a batch."""

    @abstractmethod
    def __call__(self, squared_error: Tensor, a: Tensor | None = None) -> Tensor:
        """Return squared_error L (B,), sums over dimensions -> a scalar loss.

        a (B,): the share of its interval that a consistency step crosses. Its error is proportional to a, so that L / a has
        the gradient of the limit a -> 0.
        """


class UniformWeighting(Weighting):
    """The plain mean."""

    def __call__(self, squared_error: Tensor, a: Tensor | None = None) -> Tensor:
        return (squared_error if a is None else squared_error / a).mean()


class AdaptiveWeighting(Weighting):
    """mean(L / sg(L + c)^p) (Geng et al. 2025, arXiv 2505.13447, eq. 22); with a, mean(L / a (a / sg(L + c))^p).

    p = 0 is the plain mean. p > 0 steadies image training, but correlates the weight with the target: on a multimodal
    low-dimensional target it pulls the minimiser from the mean toward a mode, so p = 0 is right in 2-D.
    """

    def __init__(self, p: Annotated[float, Range(0, 2)] = 1.0, c: Positive = 1e-2):
        self.p, self.c = p, c

    def __call__(self, squared_error: Tensor, a: Tensor | None = None) -> Tensor:
        share = 1.0 if a is None else a
        return (squared_error / share * (share / (squared_error + self.c)).pow(self.p).detach()).mean()

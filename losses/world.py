"""What is known exactly of data and of the noise they come from: where the minimisers of losses are read off."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

EXACT = "exact"  # as the name of a teacher: the flow of data whose flow is known
Field = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of states z at times r, headed to t, and labels


class World(ABC):
    """The marginal flow of independent pairs along a path: states z (B, ...), times (B,), label (B,) or None for all."""

    @abstractmethod
    def velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return E[v_c | z_r = z, label] (B, ...), whatever t."""

    @abstractmethod
    def density(self, z: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        """Return p_r(z | label) (B,), but for a factor that all times have in common."""

    @abstractmethod
    def mean_velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return (X(z, r, t) - z) / (t - r) (B, ...), X the flow map; the velocity where t = r."""

    @abstractmethod
    def guided(self, scale: float, start: float, end: float) -> "World":
        """Return the world whose velocity of a label is v_null + scale (v - v_null) at times in [start, end], v_null that of
        all classes; states are drawn as in this one.
        """

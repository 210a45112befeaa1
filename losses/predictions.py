"""What the network's output means. The loss is always taken in velocity; these convert."""

from abc import ABC, abstractmethod

from torch import Tensor

from losses.paths import ProbabilityPath, expand_time


class Prediction(ABC):
    """Reads a network's output as a velocity."""

    @abstractmethod
    def velocity(self, output: Tensor, z: Tensor, t: Tensor, path: ProbabilityPath) -> Tensor:
        """Return velocity at states z (B, ...) and times t, scalar or (B,), for the network's output there."""


class VelocityPrediction(Prediction):
    """The output is the velocity."""

    def velocity(self, output: Tensor, z: Tensor, t: Tensor, path: ProbabilityPath) -> Tensor:
        return output


class DataPrediction(Prediction):
    """The output is E[x1 | z], a denoised state."""

    def velocity(self, output: Tensor, z: Tensor, t: Tensor, path: ProbabilityPath) -> Tensor:
        return path.velocity_from_x1(output, z, expand_time(t, z))


class NoisePrediction(Prediction):
    """The output is E[x0 | z], the noise."""

    def velocity(self, output: Tensor, z: Tensor, t: Tensor, path: ProbabilityPath) -> Tensor:
        return path.velocity_from_x0(output, z, expand_time(t, z))

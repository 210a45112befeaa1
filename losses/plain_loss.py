"""A function of a network, noise and data as an objective."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.seeds import fork_generators, stream_seed
from losses.couplings import IndependentCoupling
from losses.objective import FlowBatch, FlowObjective
from losses.paths import ProbabilityPath
from losses.predictions import VelocityPrediction
from losses.terms import LossOutput
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.velocity_model import VelocityModel

Function = Callable[[Callable[..., Tensor], Tensor, Tensor], LossOutput]


class PlainLoss(FlowObjective):
    """A function(network, x0, x1) -> loss as an objective; it draws its times and makes its states by itself.

    x0 and x1 (B, *state_shape) are what is at time 0 and 1 of the function's own convention: noise and data, or, reversed,
    data and noise. There network(z, t) is the velocity dz/dt at z of time t, and network(z, r, t), r <= t, the mean velocity
    between r and t: of the state at r, or, reversed, of the state at t. Times may be numbers, (B,) or (B, 1).
    """

    second_time = "state"

    def __init__(
        self,
        network: VelocityModel,
        function: Function,
        is_reversed: bool,
        path: ProbabilityPath,
        state_shape: tuple[int, ...] = (1,),
    ):
        """UserError for a function that fails, or a network of labels, which it would not be given."""
        parts = (IndependentCoupling(), UniformTimes(1.0), VelocityPrediction(), UniformWeighting())
        super().__init__(network, path, *parts)
        if network.num_classes:
            raise UserError("conditional=true needs a loss given labels, and a function is not; write a FlowObjective")
        self.function, self.is_reversed = function, is_reversed
        self.called(self.count_times, *torch.randn(2, 64, *state_shape))

    def count_times(self, z: Tensor, *times: Any) -> Tensor:
        """Stand for a network and note whether two times are asked for."""
        self.learns = "flow_map" if len(times) == 2 else self.learns
        return torch.zeros_like(z)

    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> Any:
        """Return the function's loss of the pairs; in evaluations its random numbers are the same each time."""
        pairs = [batch.raw_target, batch.raw_source] if self.is_reversed else [batch.raw_source, batch.raw_target]
        if self.training:
            return self.called(self.read, *pairs)
        with fork_generators(batch.input.device):
            torch.manual_seed(stream_seed(0, "evaluation/loss"))
            return self.called(self.read, *pairs)

    def called(self, network: Callable[..., Tensor], x0: Tensor, x1: Tensor) -> LossOutput:
        """Return what the function gives. UserError for whatever goes wrong in it."""
        try:
            return self.function(network, x0, x1)
        except Exception as error:
            raise UserError(f"the loss, called as f(network, x0, x1), fails: {type(error).__name__}: {error}") from error

    def read(self, z: Tensor, *times: Any) -> Tensor:
        """Return the network's velocity at one time, or its mean velocity between two, as the function means it."""
        r, t = (torch.as_tensor(time, dtype=z.dtype).reshape(-1).expand(len(z)) for time in (times[0], times[-1]))
        return -self.mean_velocity(z, 1 - t, 1 - r) if self.is_reversed else self.mean_velocity(z, r, t)

"""What surrounds an optimizer step: leaving out a step that is not finite, and measuring how far a step went."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.distributed import any_rank
from training.state import TrainState


class StepHook:
    """Accepts every step; measures |change of the weights| / |weights| on each `every`-th one, as update_ratio."""

    def __init__(self, every: int):
        self.every, self.before = every, list[Tensor]()

    def begin(self, state: TrainState) -> None:
        """Called before the first forward pass of a step."""

    def accepts(self, state: TrainState, values: dict[str, Tensor]) -> bool:
        """Return whether the optimizer may use the gradients, the same on every rank. values: losses and grad_norm."""
        self.before = [p.detach().clone() for p in state.trainable()] if state.step % self.every == 0 else []
        return True

    def end(self, state: TrainState, values: dict[str, Tensor]) -> None:
        """Add update_ratio to the values of a measured step, after the update."""
        if self.before:
            changes = torch._foreach_sub([p.detach() for p in state.trainable()], self.before)
            values["update_ratio"] = total_norm(changes) / total_norm(self.before)


class SkipNonFinite(StepHook):
    """Rejects a step whose loss or gradient is not finite on some rank (on_nan=skip).

    Weights, buffers, average and optimizer stay as they are; `values` is emptied, so that the step enters no mean.
    """

    def begin(self, state: TrainState) -> None:
        self.buffers = [(buffer, buffer.clone()) for buffer in state.objective.network.buffers()]

    def accepts(self, state: TrainState, values: dict[str, Tensor]) -> bool:
        finite = torch.stack([value.float() for value in values.values()]).isfinite().all()
        if not any_rank(not finite):
            state.skipped_in_a_row = 0
            return super().accepts(state, values)
        for buffer, old in self.buffers:
            buffer.copy_(old)
        values.clear()
        state.skipped += 1
        state.skipped_in_a_row += 1
        return False


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all the numbers in `tensors`."""
    return torch.stack(torch._foreach_norm(list(tensors))).norm()

"""What surrounds an optimizer step: leaving out a step that is not finite, and measuring how far a step went."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.distributed import all_reduce_max
from training.sharding import plain
from training.state import TrainState


class StepHook:
    """Accepts every step; measures |change of the weights| / |weights| on each `every`-th one, as update_ratio.

    broken: None, or a scalar on the device: 1 where the step must change nothing, else 0.
    """

    broken: Tensor | None = None

    def __init__(self, every: int):
        self.every, self.before = every, list[Tensor]()

    def begin(self, state: TrainState) -> None:
        """Called before the first forward pass of a step."""

    def accepts(self, state: TrainState, values: dict[str, Tensor]) -> bool:
        """Return whether the optimizer steps, the same on every rank. values: losses and grad_norm."""
        self.before = [p.detach().clone() for p in state.trainable()] if state.step % self.every == 0 else []
        return True

    def end(self, state: TrainState, values: dict[str, Tensor]) -> None:
        """Add update_ratio to the values of a measured step, after the optimizer's."""
        if self.before:
            changes = torch._foreach_sub([p.detach() for p in state.trainable()], self.before)
            values["update_ratio"] = total_norm(changes) / total_norm(self.before)


class SkipNonFinite(StepHook):
    """Leaves out a step whose loss or gradient is not finite on some rank (on_nan=skip): weights, buffers, average and
    optimizer stay as they are, and it enters no mean.

    The device decides, so that the host does not wait for it. Fused kernels of optimizers do nothing where found_inf is 1;
    what other optimizers changed is put back from a copy. The host decides until the first good step, which makes the
    optimizer's state; where some of that lies on the CPU, as the step counts of Adam that is not fused; and under loss
    scaling, which sets found_inf itself.
    """

    begun = False
    kept: list[tuple[Tensor, Tensor]]  # what a broken step may change, and a copy from before it

    def begin(self, state: TrainState) -> None:
        self.kept = copies(state.objective.network.buffers())

    def accepts(self, state: TrainState, values: dict[str, Tensor]) -> bool:
        finite = torch.stack([value.float() for value in values.values()]).isfinite().all()
        self.broken = all_reduce_max((~finite).float())
        self.put_back(self.broken)
        state.skipped = state.skipped + self.broken
        state.skipped_in_a_row = (state.skipped_in_a_row + 1) * self.broken
        super().accepts(state, values)
        remembered = optimizer_tensors(state)
        there = all(tensor.device == self.broken.device for tensor in remembered)
        if not (self.begun and there) or state.scaler.is_enabled():
            accepted = not self.broken
            self.begun |= accepted
            return accepted
        if obeys_found_inf(state):
            state.optimizer.found_inf = self.broken  # type: ignore[attr-defined]
        else:
            self.kept = copies([*state.trainable(), *remembered])
        return True

    def end(self, state: TrainState, values: dict[str, Tensor]) -> None:
        assert self.broken is not None
        self.put_back(self.broken)
        state.optimizer.found_inf = None  # type: ignore[attr-defined]
        super().end(state, values)
        if "update_ratio" in values:
            values["update_ratio"] = torch.where(self.broken > 0, torch.nan, values["update_ratio"])

    @torch.no_grad()
    def put_back(self, broken: Tensor) -> None:
        """Undo what has changed since `kept` was copied, where the step is broken."""
        for tensor, before in self.kept:
            tensor.copy_(torch.where(broken > 0, before, tensor))
        self.kept = []


def copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return tensors, and beside each its copy."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def obeys_found_inf(state: TrainState) -> bool:
    """Return whether the optimizer's step does nothing where its found_inf is 1: fused ones but on MPS."""
    on_mps = state.trainable()[0].device.type == "mps"
    return not on_mps and all(group.get("fused") for group in state.optimizer.param_groups)


def optimizer_tensors(state: TrainState) -> list[Tensor]:
    """Return what the optimizer remembers of its steps."""
    return [value for slots in state.optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all the numbers in `tensors`."""
    return torch.stack([plain(norm) for norm in torch._foreach_norm(list(tensors))]).norm()

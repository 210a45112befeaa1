"""The operations preset of dev/benchmark.py: what a training step dispatches, beside what its network and optimizer need.

Every operation has a price of its own, on a GPU a launch, whatever its size: small models are bound by their number. It is
the same on every machine, so a step that grew is seen without a clock.
"""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from configuration.compose import groups
from dev.contestant import NOT_ON_POINTS, Contestant
from training.loop import after_step, train_step

WARM_UP = 3  # steps: the optimizer has its state, and no step counted is the first of its window


class Counter(TorchDispatchMode):
    """Counts the operations dispatched within."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_of(work: Callable[[], Any]) -> int:
    """Return the operations that `work` dispatches."""
    with Counter() as counter:
        work()
    return counter.count


def step_operations(contestant: Contestant) -> dict[str, float]:
    """Return the operations of one step: drawing its batch; the whole step, its record included; the bare network's forward
    and backward pass with the same optimizer's step; and the ratio and difference of the two.
    """
    run, group = contestant.run, next(contestant.groups)
    run.clock.start(run.state.step)
    for _ in range(WARM_UP):
        after_step(run, train_step(run, group))
    (batch,), network, optimizer = group, run.state.objective.network, run.state.optimizer

    def bare() -> None:
        network(batch.unified_input, batch.label).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    draw = operations_of(lambda: next(contestant.groups))
    step, least = operations_of(lambda: after_step(run, train_step(run, group))), operations_of(bare)
    return {"draw": draw, "step": step, "bare": least, "ratio": step / least, "difference": step - least}


def operations_rows(common: str) -> list[dict[str, Any]]:
    """Return the operations of each objective that learns points, on the default network; common: words for every row."""
    losses = [name for name in groups()["loss"] if name not in NOT_ON_POINTS]
    rows = [f"loss={name} {common}".strip() for name in losses]
    return [{"row": row, **step_operations(Contestant(row))} for row in rows]

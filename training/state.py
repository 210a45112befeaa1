"""All of a run that changes while it trains, and nothing else: what a checkpoint holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.distributed import all_reduce_mean
from helpers_cfg import AnyObjective, around
from losses.objective import Objective
from training.ema import EMA
from training.schedules import Schedule
from training.sharding import is_sharded, shared_like, whole

COUNTS = ("step", "best", "waited", "elapsed", "skipped")


class Window:
    """Sums of per-step values since the last log line, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.skipped: int | Tensor = 0  # of these steps, by on_nan=skip
        self.finite: int | Tensor = 0  # steps after which all sums were still finite

    @property
    def count(self) -> int:
        """Return how many steps the sums are of. Waits for the device where some may have been skipped."""
        return self.steps - int(self.skipped)

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], broken: Tensor | None = None) -> None:
        """Add one step's scalars. broken: a scalar, 1 where the step is left out, else 0."""
        new = {name: value.float() for name, value in values.items()}
        if broken is not None:
            new = {name: torch.where(broken > 0, 0.0, value) for name, value in new.items()}
            self.skipped = self.skipped + broken
        known = [name for name in new if name in self.sums]
        added = torch._foreach_add([self.sums[n] for n in known], [new[n] for n in known]) if known else []
        self.sums |= {name: value.clone() for name, value in new.items() if name not in self.sums}
        self.sums |= zip(known, added, strict=True)
        self.steps += 1
        largest = torch.linalg.vector_norm(torch.stack(list(self.sums.values())), math.inf)  # NaN where one of them is
        self.finite = self.finite + (largest < math.inf)

    def all_reduce_mean(self) -> None:
        """Replace each sum by its mean over the ranks, all of which call this."""
        self.sums = all_reduce_mean(self.sums)

    def means(self) -> dict[str, float]:
        """Return means over the window (one device synchronisation)."""
        count = self.count
        if not count:
            return {}
        totals = torch.stack(list(self.sums.values())).tolist()
        return {name: total / count for name, total in zip(self.sums, totals, strict=True)}

    def non_finite(self, overflows: bool = False) -> str | None:
        """Return the name of a value that was NaN or infinite; overflows: gradients may, as under fp16."""
        broken = (name for name, mean in self.means().items() if not math.isfinite(mean))
        return next((name for name in broken if not (overflows and name == "grad_norm")), None)

    def broken_step(self, step: int) -> int | None:
        """Return the first step whose values were not all finite, None if all were; the window ends with `step`."""
        return step - self.steps + int(self.finite) + 1 if int(self.finite) < self.steps else None

    def clear(self) -> None:
        self.sums, self.steps, self.skipped, self.finite = {}, 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums) if self.count else {}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = self.finite = state["count"]  # nothing broken is saved


@dataclass
class TrainState:
    """objective (with the trained network) and ema_objective (with its average) share everything but the network.

    step: optimizer steps done. Epoch and data position follow from it, and every random number from the seed and it, so
    neither is saved. best: monitored value; waited: evaluations since. elapsed: training seconds of earlier sittings.
    skipped: steps left out by on_nan=skip; skipped_in_a_row: the newest of them; counted on the device. others: averages
    of other lengths.
    """

    objective: Objective
    ema_objective: Objective
    ema: EMA
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    window: Window = field(default_factory=Window)
    step: int = 0
    best: float = float("inf")
    waited: int = 0
    elapsed: float = 0.0
    skipped: int | Tensor = 0
    skipped_in_a_row: int | Tensor = 0
    others: list[tuple[EMA, torch.nn.Module]] = field(default_factory=list)

    def averages(self) -> list[tuple[EMA, torch.nn.Module]]:
        """Return every average with how it is updated, the one that is sampled first."""
        return [(self.ema, self.ema_objective.network), *self.others]

    @property
    def teacher(self) -> Objective | None:
        """Return the EMA objective, for losses that want a target from it."""
        return self.ema_objective if self.objective.needs_teacher else None

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the weights that the optimizer changes."""
        return [p for p in self.objective.network.parameters() if p.requires_grad]

    def parts(self) -> dict[str, Any]:
        """Return what has a state_dict of its own, by its name in a checkpoint. Networks are saved bare."""
        networks: dict[str, torch.nn.Module] = {"network": self.objective.network, "ema": self.ema_objective.network}
        networks |= {f"ema_{ema.lengths[0]:g}": average for ema, average in self.others}
        return networks | {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors only."""
        parts = whole({name: part.state_dict() for name, part in self.parts().items()})
        counts = {name: getattr(self, name) for name in COUNTS} | {"skipped": int(self.skipped)}
        return parts | {"window": self.window.state_dict()} | counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state exactly."""
        for name, part in self.parts().items():
            part.load_state_dict(shares(self.optimizer, part, state[name]))
        match_layout(self.optimizer)
        self.window.load_state_dict(state["window"], next(self.objective.network.parameters()).device)
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))  # skipped is in no save of before it was counted


def shares(optimizer: torch.optim.Optimizer, part: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's share of a saved state of a part, where that is shared out over the ranks."""
    if isinstance(part, torch.nn.Module) and is_sharded(part):
        own = part.state_dict()
        return {name: shared_like(own[name], value) for name, value in state.items()}
    if part is not optimizer:
        return state
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    slots = {i: {k: shared_like(weights[i], v) for k, v in of.items()} for i, of in state["state"].items()}
    return state | {"state": slots}


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's tensors the layout of their weights, on which fused kernels rely: another device's may differ."""
    for weight, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                slots[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def averaged_objective(objective: AnyObjective, ema: EMA) -> AnyObjective:
    """Return the same objective around the average of its network."""
    return around(objective, ema.average_of(objective.network)).eval()

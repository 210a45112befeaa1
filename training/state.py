"""All of a run that changes while it trains, and nothing else: what a checkpoint holds."""

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from losses.objective import Objective
from training.ema import ConstantEMA
from training.schedules import Schedule
from training.window import Window

COUNTS = ("step", "best", "waited", "elapsed", "skipped")
AnyObjective = TypeVar("AnyObjective", bound=Objective)


@dataclass
class TrainState:
    """objective (with the trained network) and ema_objective (with its average) share everything but the network.

    step: optimizer steps done. Epoch and data position follow from it, and every random number from the seed and it, so
    neither is saved. best: monitored value; waited: evaluations since. elapsed: training seconds of earlier sittings.
    skipped: steps left out by on_nan=skip; skipped_in_a_row: the newest of them.
    """

    objective: Objective
    ema_objective: Objective
    ema: ConstantEMA
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    window: Window = field(default_factory=Window)
    step: int = 0
    best: float = float("inf")
    waited: int = 0
    elapsed: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def teacher(self) -> Objective | None:
        """Return the EMA objective, for losses that want a target from it."""
        return self.ema_objective if self.objective.needs_teacher else None

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the weights that the optimizer changes."""
        return [p for p in self.objective.network.parameters() if p.requires_grad]

    def parts(self) -> dict[str, Any]:
        """Return what has a state_dict of its own, by its name in a checkpoint. Networks are saved bare."""
        networks = {"network": self.objective.network, "ema": self.ema_objective.network}
        return networks | {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors only."""
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return parts | {"window": self.window.state_dict()} | {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state exactly."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.window.load_state_dict(state["window"], next(self.objective.network.parameters()).device)
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))  # skipped is in no save of before it was counted


def averaged_objective(objective: AnyObjective, ema: ConstantEMA) -> AnyObjective:
    """Return the same objective around the average of its network."""
    shallow = copy.copy(objective)
    shallow._modules = {**objective._modules, "network": ema.average_of(objective.network)}
    return shallow.eval()

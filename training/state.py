"""All of a run that changes while it trains, and nothing else: what a checkpoint holds."""

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from losses.objective import Objective
from training.ema import ConstantEMA
from training.schedules import Schedule
from training.window import Window

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

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors only. Networks are saved bare."""
        return {
            "network": self.objective.network.state_dict(),
            "ema": self.ema_objective.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": self.window.state_dict(),
            "step": self.step,
            "best": self.best,
            "waited": self.waited,
            "elapsed": self.elapsed,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state exactly."""
        parts: dict[str, Any] = {
            "network": self.objective.network,
            "ema": self.ema_objective.network,
            "optimizer": self.optimizer,
        }
        for name, part in (parts | {"schedule": self.schedule, "scaler": self.scaler}).items():
            part.load_state_dict(state[name])
        self.window.load_state_dict(state["window"], next(self.objective.network.parameters()).device)
        self.step, self.best, self.waited, self.elapsed = (state[k] for k in ("step", "best", "waited", "elapsed"))
        self.skipped = state.get("skipped", 0)  # saves of before it was counted


def averaged_objective(objective: AnyObjective, ema: ConstantEMA) -> AnyObjective:
    """Return the same objective around the average of its network."""
    shallow = copy.copy(objective)
    shallow._modules = {**objective._modules, "network": ema.average_of(objective.network)}
    return shallow.eval()

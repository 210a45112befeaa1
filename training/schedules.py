"""Learning-rate schedules: a factor on optimizer.lr that is a pure function of the step, after a linear warm-up."""

import math
from abc import ABC, abstractmethod
from typing import Any, TypedDict, Unpack

from common.errors import UserError
from common.ranges import CountOr0, NotNegative, Share, ShareAbove0


class WarmUp(TypedDict, total=False):
    """What every schedule takes besides its own settings; meanings as in Schedule."""

    warmup_steps: CountOr0
    warmup_epochs: NotNegative


class Schedule(ABC):
    """factor(step, total_steps) in [0, 1]; the rate of step s (from 0) is optimizer.lr times it.

    warmup_steps: steps over which the factor rises linearly to where the schedule starts; or, of the run's epochs,
    warmup_epochs. Raises UserError for both.
    """

    def __init__(self, warmup_steps: CountOr0 = 0, warmup_epochs: NotNegative = 0.0):
        if warmup_steps and warmup_epochs:
            raise UserError(
                f"schedule.warmup_steps={warmup_steps} and schedule.warmup_epochs={warmup_epochs:g} are two lengths of one "
                "warm-up; give one of them"
            )
        self.warmup_steps, self.warmup_epochs = warmup_steps, warmup_epochs

    def count_in_steps(self, steps_per_epoch: int) -> None:
        """Take up the length of an epoch, for what is given in epochs."""
        if self.warmup_epochs:
            self.warmup_steps = round(self.warmup_epochs * steps_per_epoch)

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor of step `step` in a run of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps * self.shape(0.0, 0, total_steps)
        left = max(1, total_steps - self.warmup_steps)
        return self.shape(min(1.0, (step - self.warmup_steps) / left), step, total_steps)

    @abstractmethod
    def shape(self, share: float, step: int, total_steps: int) -> float:
        """Return the factor after warm-up, `share` in [0, 1] of the remaining steps being done."""

    def observe(self, value: float) -> None:
        """Take note of the monitored metric after an evaluation; only plateau does."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


class Constant(Schedule):
    """1 throughout."""

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return 1.0


class Linear(Schedule):
    """Falls linearly from 1 to `final`."""

    def __init__(self, final: Share = 0.0, **warm_up: Unpack[WarmUp]):
        super().__init__(**warm_up)
        self.final = final

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return 1 + share * (self.final - 1)


class Cosine(Linear):
    """Falls from 1 to `final` along half a cosine (Loshchilov & Hutter 2016, arXiv 1608.03983)."""

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))


class Step(Schedule):
    """Multiplied by `gamma` at each of the given shares of the run, e.g. [0.5, 0.75]."""

    def __init__(self, milestones: list[Share], gamma: ShareAbove0 = 0.1, **warm_up: Unpack[WarmUp]):
        super().__init__(**warm_up)
        self.milestones, self.gamma = milestones, gamma

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return self.gamma ** sum(share >= milestone for milestone in self.milestones)


class Exponential(Linear):
    """Falls from 1 to `final` by the same ratio each step."""

    def __init__(self, final: Share = 0.01, **warm_up: Unpack[WarmUp]):
        super().__init__(final, **warm_up)

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return self.final**share


class OneCycle(Schedule):
    """Rises from `start` to 1 over `rise` of the run, then falls to `final`, along half cosines (Smith & Topin 2017).

    As torch.optim.lr_scheduler.OneCycleLR: of N steps, numbers 0 to N - 1, the peak is at rise N - 1 and the last one has
    `final`. torch's own peak may lie between two steps, and in very short runs before the first.
    """

    def __init__(self, rise: Share = 0.3, start: Share = 0.04, final: Share = 4e-6, **warm_up: Unpack[WarmUp]):
        super().__init__(**warm_up)
        self.rise, self.start, self.final = rise, start, final

    def shape(self, share: float, step: int, total_steps: int) -> float:
        steps = max(1, total_steps - self.warmup_steps)
        peak, last = self.rise * steps - 1, steps - 1
        now = min(max(0, step - self.warmup_steps), last)
        if now <= peak:
            low, part = self.start, now / max(peak, 1e-12)
        else:
            low, part = self.final, (last - now) / max(last - peak, 1e-12)
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * part))


class Plateau(Schedule):
    """Multiplied by `gamma` when the monitored metric has not improved for more than `patience` evaluations."""

    def __init__(self, gamma: ShareAbove0 = 0.5, patience: CountOr0 = 3, **warm_up: Unpack[WarmUp]):
        super().__init__(**warm_up)
        self.gamma, self.patience = gamma, patience
        self.best, self.waited, self.drops = math.inf, 0, 0

    def shape(self, share: float, step: int, total_steps: int) -> float:
        return self.gamma**self.drops

    def observe(self, value: float) -> None:
        if value < self.best:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.drops, self.waited = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "drops": self.drops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.drops = state["best"], state["waited"], state["drops"]

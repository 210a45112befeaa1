"""Sums of per-step values over a logging window."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.distributed import all_reduce_mean


class Window:
    """Sums of per-step values since the last log line, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.whole: int | Tensor = 0  # steps until a sum was no longer finite

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars."""
        new = {name: value.float() for name, value in values.items()}
        known = [name for name in new if name in self.sums]
        added = torch._foreach_add([self.sums[n] for n in known], [new[n] for n in known]) if known else []
        self.sums |= {name: value.clone() for name, value in new.items() if name not in self.sums}
        self.sums |= zip(known, added, strict=True)
        self.count += 1
        largest = torch.linalg.vector_norm(torch.stack(list(self.sums.values())), math.inf)  # NaN where one of them is
        self.whole = self.whole + (largest < math.inf)

    def all_reduce_mean(self) -> None:
        """Replace each sum by its mean over the ranks, all of which call this."""
        self.sums = all_reduce_mean(self.sums)

    def means(self) -> dict[str, float]:
        """Return means over the window (one device synchronisation)."""
        if not self.count:
            return {}
        totals = torch.stack(list(self.sums.values())).tolist()
        return {name: total / self.count for name, total in zip(self.sums, totals, strict=True)}

    def non_finite(self, overflows: bool = False) -> str | None:
        """Return the name of a value that was NaN or infinite in this window, if any.

        overflows: gradients may, as under fp16, whose scaler then leaves out the step.
        """
        return next(
            (n for n, m in self.means().items() if not math.isfinite(m) and not (overflows and n == "grad_norm")), None
        )

    def broken_step(self, step: int) -> int | None:
        """Return the first step, of this window that ends with `step`, whose values were not all finite;
        None if all were.
        """
        return step - self.count + int(self.whole) + 1 if int(self.whole) < self.count else None

    def clear(self) -> None:
        self.sums, self.count, self.whole = {}, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.count = self.whole = state["count"]  # nothing broken is saved

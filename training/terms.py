"""What an objective returns, made uniform, and its sums over a logging window."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.errors import UserError
from training.ranks import averaged

LossOutput = Tensor | list[Tensor] | Mapping[str, Tensor]


def named_terms(output: LossOutput, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Named losses with "loss" the total. One loss is the total; a list becomes term_0, term_1, ...

    The total of a dict without "loss", and of a list, is the sum of its terms times loss_weights (1 unless given).
    UserError when a weight names no term, or when it would be ignored because the objective gives its own total.
    """
    if isinstance(output, Tensor):
        output = {"loss": output}
    if not isinstance(output, Mapping):
        output = {f"term_{i}": term for i, term in enumerate(output)}
    terms = dict(output)
    unknown = [name for name in weights if name not in terms or "loss" in terms]
    if unknown:
        raise UserError(
            f"loss_weights.{unknown[0]} weighs nothing: this objective's terms are {', '.join(terms)}"
            + (", already totalled by itself" if "loss" in terms else "")
        )
    shaped = next((name for name, term in terms.items() if not isinstance(term, Tensor) or term.ndim), None)
    if shaped is not None:
        what = f"has shape {list(terms[shaped].shape)}" if isinstance(terms[shaped], Tensor) else f"is {terms[shaped]!r:.60}"
        raise UserError(
            f"the objective's {shaped} {what}, and a loss is one number, a tensor without dimensions; add .mean()"
        )
    if "loss" not in terms:
        terms["loss"] = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return terms


class Window:
    """Sums of per-step values since the last log line, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.whole: int | Tensor = 0  # steps until a sum was no longer finite

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        self.whole = self.whole + torch.stack(list(self.sums.values())).isfinite().all()

    def meet(self) -> None:
        """Each sum becomes its mean over the ranks, all of which call this."""
        self.sums = averaged(self.sums)

    def means(self) -> dict[str, float]:
        """Means over the window (one device synchronisation)."""
        return {name: total.item() / self.count for name, total in self.sums.items()} if self.count else {}

    def non_finite(self, overflows: bool = False) -> str | None:
        """The name of a value that was NaN or infinite in this window, if any.

        overflows: gradients may, as under fp16, whose scaler then leaves out the step.
        """
        return next(
            (n for n, m in self.means().items() if not math.isfinite(m) and not (overflows and n == "grad_norm")), None
        )

    def broken_step(self, step: int) -> int | None:
        """The first step, of this window that ends with `step`, whose values were not all finite; None if all were."""
        return step - self.count + int(self.whole) + 1 if int(self.whole) < self.count else None

    def clear(self) -> None:
        self.sums, self.count, self.whole = {}, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.count = self.whole = state["count"]  # nothing broken is saved

"""Optimizers made of torch's own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, NotNegative, Positive, ShareBelow1


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices (Jordan et al. 2024), torch.optim.AdamW for all other weights: biases, convolutions.

    One lr for both: Muon's steps are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982). Raises
    UserError for a network without a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Positive = 1e-3,
        momentum: ShareBelow1 = 0.95,
        nesterov: bool = True,
        ns_steps: Count = 5,
        betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999),
        weight_decay: NotNegative = 0.0,
        fused: bool | None = True,
    ):
        weights = list(params)
        matrices, others = [p for p in weights if p.ndim == 2], [p for p in weights if p.ndim != 2]
        if not matrices:
            raise UserError("optimizer=muon is for matrices, and this network has none; use optimizer=adamw")
        own = {"ns_steps": ns_steps, "adjust_lr_fn": "match_rms_adamw"}
        groups = list(torch.optim.Muon(matrices, lr, weight_decay, momentum, nesterov, **own).param_groups)  # type: ignore[arg-type]
        if others:
            adamw = torch.optim.AdamW(others, lr, (betas[0], betas[1]), weight_decay=weight_decay, fused=fused)
            groups += adamw.param_groups
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step of each part, on this optimizer's own settings and state."""
        for group in self.param_groups:
            part = object.__new__(torch.optim.Muon if "ns_steps" in group else torch.optim.AdamW)
            part.__setstate__({"defaults": dict(group), "state": self.state, "param_groups": [group]})
            part.step()

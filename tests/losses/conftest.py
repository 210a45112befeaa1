"""Precision of the tests of losses."""

import pytest
import torch
from torch import Tensor

from losses.objective import FlowObjective


@pytest.fixture
def unified_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs keep the states' own precision here, so that quadrature is not drowned in rounding."""
    real = FlowObjective.unified

    def unified(self: FlowObjective, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        if z.ndim == 4:
            return real(self, z, r, t)
        r, t = (time.to(z.dtype).expand(len(z)) for time in (r, t))
        return torch.cat([z, r[:, None], (torch.ones_like(t) if self.second_time == "end" else t)[:, None]], dim=1)

    monkeypatch.setattr(FlowObjective, "unified", unified)

"""Muon for matrices and AdamW for the rest, against torch's own two, over a save and a copy."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from training.optimizers import MuonWithAdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 2)
    )


def steepen(*networks: nn.Module) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for net in networks:
        net.zero_grad()
        net(x).square().mean().backward()


OTHERWISE = {"momentum": 0.8, "nesterov": False, "ns_steps": 3}


@pytest.mark.parametrize(("of_muon", "betas"), [({}, (0.9, 0.999)), (OTHERWISE, (0.7, 0.95))])
def test_matrices_go_as_by_torchs_muon_and_all_else_as_by_its_adamw(
    of_muon: dict[str, Any], betas: tuple[float, float]
) -> None:
    words: dict[str, Any] = {"weight_decay": 0.1, "betas": betas} | of_muon
    ours, theirs = network(), network()
    optimizer = MuonWithAdamW(ours.parameters(), 1e-2, **words)
    matrices, others = ([p for p in theirs.parameters() if (p.ndim == 2) == kind] for kind in (True, False))
    muon = torch.optim.Muon(matrices, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **of_muon)
    adamw = torch.optim.AdamW(others, 1e-2, betas, weight_decay=0.1, fused=True)
    assert (len(matrices), len(others)) == (2, 4)
    for step in range(6):
        for group in [*optimizer.param_groups, *muon.param_groups, *adamw.param_groups]:
            group["lr"] = 1e-2 / (1 + step)
        if step == 2:
            saved, optimizer = optimizer.state_dict(), MuonWithAdamW(ours.parameters(), 1e-2, **words)
            optimizer.load_state_dict(saved)
        if step == 4:
            ours, optimizer = copy.deepcopy((ours, optimizer))
        steepen(ours, theirs)
        for one in (optimizer, muon, adamw):
            one.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)), step


def test_a_network_without_a_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="use optimizer=adamw"):
        MuonWithAdamW(nn.Conv2d(1, 1, 3).parameters())

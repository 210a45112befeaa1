"""Directional derivatives of a network, by forward-mode differentiation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def jvp(field: Callable[..., Tensor], points: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """d/de field(*(p + e d)) at e = 0, for points p and tangents d; of field's shape, without a graph.

    In fp32 whatever the autocast (bf16 drowns the difference of two times), with attention in the one form that has a
    forward derivative. Dropout draws the same mask as the next evaluation of the field: the generator is put back.
    """
    device = points[0].device
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        return torch.func.jvp(field, points, tangents)[1]

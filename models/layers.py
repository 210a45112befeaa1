"""Layers that several models share; each works under jvp, channels_last, autocast and torch.compile of the whole loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeFeatures(nn.Module):
    """Fourier features of the two times: t, sin(w t), cos(w t) for each angular frequency w.

    (B, 2) -> (B, 2 (1 + 2 len(frequencies))), fp32. Frequencies above about 4 suit plain flow matching and make the
    forward-mode derivative of MeanFlow-type losses explode, so the loss chooses them.
    """

    frequencies: Tensor

    def __init__(self, frequencies: list[float]):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float32), persistent=False)
        self.width = 2 * (1 + 2 * len(frequencies))

    def forward(self, times: Tensor) -> Tensor:
        times = times.to(torch.promote_types(times.dtype, torch.float32))
        angles = (times[..., None] * self.frequencies).flatten(1)
        return torch.cat([times, angles.sin(), angles.cos()], dim=1)


class ClassEmbedding(nn.Embedding):
    """One row per class and a last, null row for "no label"; label None reads the null row throughout."""

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes + 1, width)

    def rows(self, label: Tensor | None, batch: int) -> Tensor:
        """(batch, width) embeddings of `label` (batch,)."""
        if label is None:
            return self.weight[-1].expand(batch, -1)
        return self(label)


class GroupNorm(nn.Module):
    """Group normalisation written as a layer norm over each flattened group, with explicit scale and shift.

    The form that survives forward-mode derivatives under channels_last, autocast and compilation alike (torch's affine
    group norm does not). x (B, C, ...) -> same shape.
    """

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        normal = F.layer_norm(grouped, grouped.shape[-1:]).reshape(x.shape)
        wide = (1, -1, *(1,) * (x.ndim - 2))
        return normal * self.weight.view(wide) + self.bias.view(wide)

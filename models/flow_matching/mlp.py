"""The default model for points in a few dimensions."""

from typing import Literal

import torch
from torch import Tensor, nn

from common.ranges import Count, Depth, ShareBelow1, Size, SizeOr0
from models.inputs import split_unified_flow_matching_input
from models.layers import ClassEmbedding, TimeFeatures
from models.velocity_model import VelocityModel

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


class MLP(VelocityModel):
    """Fully connected network over the state, Fourier features of both times, and a class embedding if conditional.

    (B, D + 2) -> (B, D). depth: hidden layers of `width`. dropout: after each hidden layer. activation: silu is smooth,
    as derivatives in the loss want it; relu bends sharply, as a map does between two clusters.
    """

    def __init__(
        self,
        state_shape: list[Count],
        num_classes: SizeOr0 = 0,
        width: Size = 256,
        depth: Depth = 3,
        time_frequencies: list[float] | None = None,
        dropout: ShareBelow1 = 0.0,
        activation: Literal["silu", "relu"] = "silu",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.time_features = TimeFeatures(list(time_frequencies or []))
        self.class_embedding = ClassEmbedding(num_classes, width) if num_classes else None
        (dim,) = state_shape
        inputs = dim + self.time_features.width + (width if num_classes else 0)
        layers: list[nn.Module] = []
        for fan_in in [inputs, *[width] * (depth - 1)]:
            layers += [nn.Linear(fan_in, width), ACTIVATIONS[activation]()] + ([nn.Dropout(dropout)] if dropout else [])
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        state, times = split_unified_flow_matching_input(unified_input)
        features = [state, self.time_features(times)]
        if self.class_embedding is not None:
            features.append(self.class_embedding.rows(label, len(state)))
        return self.layers(torch.cat(features, dim=1))

"""Guidance: predictions pushed along the difference of two of them, in sampling and folded into training."""

import copy
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Interval, NotNegative, ShareBelow1
from losses.objective import FlowObjective, Objective
from losses.predictions import DataPrediction, VelocityPrediction
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

AnyObjective = TypeVar("AnyObjective", bound=Objective)


class Guidance(VelocityModel, ABC):
    """A velocity model around a velocity model: weak + scale (strong - weak), whose strong part is the model alone.

    interval: the times of the state (0 noise, 1 data) that are guided; outside it the strong part alone answers
    (Kynkäänniemi et al. 2024, arXiv 2404.07724). What is combined is the network's output over all channels: velocities,
    mean velocities u(z, r, t) and so flow maps, and predictions of x1 or x0 alike, as each is affine in the output.
    scale 1 is the model alone, scale 0 the weak part. An evaluation costs two forward passes, or one of twice the rows.
    Raises UserError when scale is negative or not finite, or interval is not two times low <= high in [0, 1].
    """

    def __init__(self, network: VelocityModel, scale: NotNegative, interval: Interval = (0.0, 1.0)):
        super().__init__()
        if not 0 <= scale < float("inf"):
            raise UserError(f"guidance.scale takes a number of at least 0 (1 is no guidance), not {scale}")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(f"guidance.interval takes two times [low, high], 0 (noise) to 1 (data), not {list(interval)}")
        self.network, self.num_classes, self.condition_shape = network, network.num_classes, network.condition_shape
        self.scale, self.interval = float(scale), (float(interval[0]), float(interval[1]))

    def null_label(self, label: Tensor) -> Tensor:
        return self.network.null_label(label)

    @abstractmethod
    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor: ...

    def check(self, objective: FlowObjective) -> None:
        """Raise UserError when the objective has not taught the network what this guidance asks of it."""

    def describe(self) -> str:
        """Return the guidance in a few words, for a line about samples."""
        low, high = self.interval
        where = "" if self.interval == (0, 1) else f" for t in [{low:g}, {high:g}]"
        return f"{type(self).__name__} {self.scale:g}{where}"

    def combine(self, unified_input: Tensor, weak: Tensor, strong: Tensor, known: Tensor | bool = True) -> Tensor:
        """Return weak + scale (strong - weak) (B, ...) in the rows of guided times that are `known` (B,), else strong."""
        time = split_unified_flow_matching_input(unified_input)[1][:, 0]
        guided = (self.interval[0] <= time) & (time <= self.interval[1]) & known
        return torch.where(guided.reshape(-1, *(1,) * (strong.ndim - 1)), self.extrapolated(weak, strong), strong)

    def extrapolated(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return what stands for the strong prediction (B, ...) at guided times."""
        return weak + self.scale * (strong - weak)


class ClassifierFreeGuidance(Guidance):
    """v_null + scale (v_c - v_null), both in one forward pass of twice the rows (Ho & Salimans 2022, arXiv 2207.12598).

    Rows of the null label, and label None, are the null prediction unguided. Raises UserError for an unconditional network.
    """

    def __init__(self, network: VelocityModel, scale: NotNegative, interval: Interval = (0.0, 1.0)):
        super().__init__(network, scale, interval)
        if not network.is_conditional:
            raise UserError(
                "guidance=cfg requires a class-conditional model, and this one is not; train it with conditional=true, "
                "or use guidance=autoguidance"
            )

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None or self.scale == 1:
            return self.network(unified_input, label)
        null = self.network.null_label(label)
        strong, weak = self.network(torch.cat([unified_input] * 2), torch.cat([label, null])).chunk(2)
        return self.combine(unified_input, weak, strong, (label != null).reshape(len(label), -1).any(1))

    def check(self, objective: FlowObjective) -> None:
        if objective.label_dropout == 0:
            raise UserError(
                "guidance=cfg needs a model that has also learned without the class, and this one was trained with "
                "loss.label_dropout=0; train it with loss.label_dropout=0.1, or use guidance=autoguidance"
            )


class ZeroStarGuidance(ClassifierFreeGuidance):
    """CFG-Zero*: s v_null + scale (v_c - s v_null), s = <v_c, v_null> / |v_null|^2 in each sample (Fan et al. 2025, arXiv
    2503.18886): only the part of v_c that is orthogonal to v_null is scaled.

    zero_until: before this time the velocity is 0, the paper's zero-init; 0 for none. In one dimension s v_null is v_c, and
    nothing is guided. Raises UserError for an objective whose network does not predict velocities, and with zero_until for
    one that learns a flow map.
    """

    def __init__(
        self, network: VelocityModel, scale: NotNegative, interval: Interval = (0.0, 1.0), zero_until: ShareBelow1 = 0.0
    ):
        super().__init__(network, scale, interval)
        self.zero_until = zero_until

    def combine(self, unified_input: Tensor, weak: Tensor, strong: Tensor, known: Tensor | bool = True) -> Tensor:
        """Return the guided velocity (B, ...) as `Guidance.combine` does, 0 before zero_until."""
        guided = super().combine(unified_input, weak, strong, known)
        if not self.zero_until:
            return guided
        early = split_unified_flow_matching_input(unified_input)[1][:, 0] < self.zero_until
        return guided * ~early.reshape(-1, *(1,) * (strong.ndim - 1))

    def extrapolated(self, weak: Tensor, strong: Tensor) -> Tensor:
        inner, square = (strong * weak).flatten(1).sum(1), weak.square().flatten(1).sum(1)
        share = (inner / square.clamp(min=1e-12)).reshape(-1, *(1,) * (strong.ndim - 1))
        return super().extrapolated(share * weak, strong)

    def check(self, objective: FlowObjective) -> None:
        super().check(objective)
        if not isinstance(objective.prediction, VelocityPrediction):
            raise UserError(
                "guidance=cfg_zero_star projects velocities, and this network predicts "
                f"{'x1' if isinstance(objective.prediction, DataPrediction) else 'x0'}; use guidance=cfg"
            )
        if self.zero_until and objective.learns != "velocity":
            raise UserError("guidance.zero_until stops states at early times, which maps cross in one step; leave it at 0")


class Autoguidance(Guidance):
    """v_guide + scale (v - v_guide): away from what a weaker network gets wrong (Karras et al. 2024, arXiv 2406.02507).

    guide: smaller or less trained, of the same states and classes, or unconditional. guide_flow: the exact flow of the data
    that it learned, or why that is not known; oracles ask. Raises UserError for other classes.
    """

    def __init__(
        self,
        network: VelocityModel,
        guide: VelocityModel,
        scale: NotNegative,
        interval: Interval = (0.0, 1.0),
        guide_flow: Any = "the data that the guide learned are not known",
    ):
        super().__init__(network, scale, interval)
        self.guide_flow = guide_flow
        if guide.is_conditional and guide.condition_shape != network.condition_shape:
            raise UserError(
                f"the model that guides takes conditions of shape {guide.condition_shape}, the guided one "
                f"{network.condition_shape}; guidance.checkpoint takes a model of the same, or an unconditional one"
            )
        if guide.num_classes not in (0, network.num_classes):
            raise UserError(
                f"the model that guides knows {guide.num_classes} classes, the guided one {network.num_classes}; "
                "guidance.checkpoint takes a model of the same classes, or an unconditional one"
            )
        self.guide = guide

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        strong = self.network(unified_input, label)
        if self.scale == 1:
            return strong
        weak = self.guide(unified_input, label if self.guide.is_conditional else None)
        return self.combine(unified_input, weak, strong)


def around(objective: AnyObjective, network: torch.nn.Module) -> AnyObjective:
    """Return a copy of the objective that shares all but the network, which is this one; the original stays as it is."""
    shallow = copy.copy(objective)
    shallow._modules = {**objective._modules, "network": network}
    return shallow


def unguided(objective: FlowObjective) -> FlowObjective:
    """Return the objective around the network alone; itself where nothing guides it."""
    return around(objective, objective.network.network) if isinstance(objective.network, Guidance) else objective


def guided(objective: FlowObjective, guidance: Guidance) -> FlowObjective:
    """Return the objective around the guidance. UserError when its training does not allow this guidance."""
    guidance.check(objective)
    return around(objective, guidance)

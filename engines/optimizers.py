"""Optimizers and averages in MLX, as torch computes them: pure functions of weights, gradients and what is remembered."""

from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx
import torch

from common.errors import UserError
from engines.layers import Arrays

Slots = dict[str, Arrays]  # what is remembered of every weight, by torch's name for it


class Rule(ABC):
    """An optimizer's step. settings: the parameter group of torch's optimizer of the same kind."""

    slots: tuple[str, ...]  # names of what is remembered

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def rates(self, rate: float, step: int) -> list[float]:
        """Return the numbers that change from step to step (from 1), worked out in double precision."""
        return [rate]

    @abstractmethod
    def updated(self, weight: mx.array, gradient: mx.array, slots: list[mx.array], rates: list[mx.array]) -> list[mx.array]:
        """Return a weight after a step, then what is remembered of it."""

    def step(self, weights: Arrays, gradients: Arrays, slots: Slots, rates: list[mx.array]) -> tuple[Arrays, Slots]:
        """Return all weights after a step, and what is remembered."""
        after = {n: self.updated(w, gradients[n], [slots[s][n] for s in self.slots], rates) for n, w in weights.items()}
        kept = {slot: {n: values[1 + i] for n, values in after.items()} for i, slot in enumerate(self.slots)}
        return {n: values[0] for n, values in after.items()}, kept


class AdamW(Rule):
    """torch.optim.AdamW."""

    slots = ("exp_avg", "exp_avg_sq")

    def rates(self, rate: float, step: int) -> list[float]:
        b1, b2 = self.settings["betas"]
        return [1 - rate * self.settings["weight_decay"], rate / (1 - b1**step), (1 - b2**step) ** 0.5]

    def updated(self, weight: mx.array, gradient: mx.array, slots: list[mx.array], rates: list[mx.array]) -> list[mx.array]:
        (b1, b2), (mean, square), (decay, rate, correction) = self.settings["betas"], slots, rates
        mean, square = mean + (1 - b1) * (gradient - mean), b2 * square + (1 - b2) * gradient.square()
        change = rate * mean / (mx.sqrt(square) / correction + self.settings["eps"])
        return [weight * decay - change, mean, square]


class Adam(AdamW):
    """torch.optim.Adam, whose weight decay is part of the gradient."""

    def rates(self, rate: float, step: int) -> list[float]:
        return [1.0, *super().rates(rate, step)[1:]]

    def updated(self, weight: mx.array, gradient: mx.array, slots: list[mx.array], rates: list[mx.array]) -> list[mx.array]:
        return super().updated(weight, gradient + self.settings["weight_decay"] * weight, slots, rates)


class SGD(Rule):
    """torch.optim.SGD."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.slots = ("momentum_buffer",) if settings["momentum"] else ()

    def updated(self, weight: mx.array, gradient: mx.array, slots: list[mx.array], rates: list[mx.array]) -> list[mx.array]:
        gradient, momentum = gradient + self.settings["weight_decay"] * weight, self.settings["momentum"]
        if not momentum:
            return [weight - rates[0] * gradient]
        velocity = momentum * slots[0] + gradient
        direction = gradient + momentum * velocity if self.settings["nesterov"] else velocity
        return [weight - rates[0] * direction, velocity]


RULES: dict[Any, type[Rule]] = {torch.optim.AdamW: AdamW, torch.optim.Adam: Adam, torch.optim.SGD: SGD}
OFF = ("amsgrad", "maximize", "dampening")  # settings of torch's that these do not have


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """Return the rule that is a torch optimizer's. UserError for one that is not written in MLX."""
    settings = optimizer.param_groups[0]
    on = next((f"optimizer.{name}" for name in OFF if settings.get(name)), None)
    if type(optimizer) not in RULES or on:
        raise UserError(
            f"engine=mlx does not have {on or type(optimizer).__name__}; use optimizer=adamw, adam or sgd, or engine=torch"
        )
    return RULES[type(optimizer)](settings)


def clipped(gradients: Arrays, most: float | None) -> tuple[Arrays, mx.array]:
    """Return gradients whose norm is at most `most`, as torch's clip_grad_norm_ has them, and their norm before."""
    norm = mx.sqrt(sum((g.square().sum() for g in gradients.values()), start=mx.array(0.0)))
    if most is None:
        return gradients, norm
    factor = mx.minimum(most / (norm + 1e-6), 1.0)
    return {name: factor * gradient for name, gradient in gradients.items()}, norm


def averaged(average: Arrays, weights: Arrays, share: mx.array) -> Arrays:
    """Return average + share (weights - average), the weights themselves at share 1."""
    near = {name: average[name] + share * (weight - average[name]) for name, weight in weights.items()}
    far = {name: weight - (1 - share) * (weight - average[name]) for name, weight in weights.items()}
    return {name: mx.where(share < 0.5, near[name], far[name]) for name in weights}

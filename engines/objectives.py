"""The objectives in MLX, each forward pass beside the one in losses/ that it is, on batches that torch has drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor, nn

from common.errors import UserError
from engines.layers import Arrays, Part, Pass, states_to_mlx
from losses.alpha_flow_loss import AlphaFlowLoss
from losses.cross_entropy_loss import CrossEntropyLoss
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_loss import ImprovedMeanFlowLoss, MeanFlowLoss
from losses.objective import Objective
from losses.predictions import VelocityPrediction
from losses.shortcut_loss import ShortcutLoss
from losses.split_meanflow_loss import SplitMeanFlowLoss
from losses.total_derivative import STEP, picked_engine
from losses.weightings import AdaptiveWeighting, UniformWeighting

Terms = dict[str, mx.array]
UNUSED = ("raw_source", "raw_target", "unified_input")  # of a batch: what its other tensors were made of, or hold


def rows_of(batch: Any) -> dict[str, Any]:
    """Return what a batch of torch's holds, by name, as arrays with the channels last; without what is None."""
    held = {name: value for name, value in vars(batch).items() if value is not None and name not in UNUSED}
    return {name: states_to_mlx(value) if isinstance(value, Tensor) else value for name, value in held.items()}


class Rows:
    """The rows of a batch, its arrays as attributes; None for one that it does not hold."""

    def __init__(self, held: dict[str, Any]):
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return self.held.get(name)

    def part(self, rows: slice) -> Rows:
        """Return some of the rows."""
        return Rows({k: v[rows] if isinstance(v, mx.array) else v for k, v in self.held.items()})


def wide(t: mx.array, x: mx.array) -> mx.array:
    """Return times (B,) as (B, 1, ...), to broadcast against the states x (B, ...)."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Flow:
    """An objective's settings around one set of weights."""

    objective: Any
    now: Pass

    def u(self, z: mx.array, r: mx.array, t: mx.array, label: mx.array | None) -> mx.array:
        """Return the mean velocity (B, ...) at states z (B, ...) of times r (B,), headed to t (B,)."""
        if len(z) == 0:
            return z
        second = mx.ones_like(t) if self.objective.second_time == "end" else t
        return Part(self.objective.network, self.now)(z, mx.stack([r, second], axis=1), label)

    def interval_rows(self, batch: Rows) -> int:
        return int(self.objective.time_sampler.interval_rows(len(batch.input)))

    def mean_velocities(self, batch: Rows) -> mx.array:
        return self.u(batch.input, batch.r, batch.t, batch.label)

    def weighted(self, error: mx.array, a: mx.array | None = None) -> mx.array:
        """Return the scalar loss of errors (B, ...), squared and summed over dimensions."""
        squared, by = error.square().reshape(len(error), -1).sum(1), self.objective.weighting
        share = 1.0 if a is None else a
        if isinstance(by, AdaptiveWeighting):
            squared = squared * mx.stop_gradient(share / (squared + by.c)) ** by.p
        return (squared / share).mean()

    def derivative(self, batch: Rows, direction: mx.array) -> mx.array:
        """Return D_direction u (B, ...), along (direction, 1, 0) of (z, r, t), in fp32 and without a graph."""
        if len(batch.input) == 0:
            return direction
        flow = replace(self, now=replace(self.now, dtype=mx.float32))
        by_difference = picked_engine(self.objective.jvp, torch.device("cpu")) == "finite_difference"
        along = flow.central_difference if by_difference else flow.forward_mode
        return mx.stop_gradient(along(batch, mx.stop_gradient(direction)))

    def central_difference(self, batch: Rows, direction: mx.array) -> mx.array:
        ends = [(batch.input + e * direction, batch.r + e, batch.t) for e in (STEP, -STEP)]
        z, r, t = (mx.concatenate([end[k] for end in ends]) for k in range(3))
        label = None if batch.label is None else mx.concatenate([batch.label, batch.label])
        ahead, behind = mx.split(self.u(z, r, t, label), 2)
        return (ahead - behind) / (2 * STEP)

    def forward_mode(self, batch: Rows, direction: mx.array) -> mx.array:
        def u(z: mx.array, r: mx.array) -> mx.array:
            return self.u(z, r, batch.t, batch.label)

        convolves = any(isinstance(part, nn.Conv2d) for part in self.objective.network.modules())
        at, along = [batch.input, batch.r], [direction, mx.ones_like(batch.r)]
        return (reversed_twice if convolves else lambda f, x, v: mx.jvp(f, x, v)[1][0])(u, at, along)


def reversed_twice(function: Callable[..., mx.array], at: list[mx.array], along: list[mx.array]) -> mx.array:
    """Return the derivative of a function along arrays, by the derivative of its reverse mode, which is linear in what it
    carries back: convolutions have no forward mode in MLX.
    """

    def back(carried: mx.array) -> list[mx.array]:
        return mx.vjp(function, at, [carried])[1]

    return mx.vjp(back, [mx.zeros_like(along[0])], along)[1][0]


def flow_matching(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    return {"loss": flow.weighted(flow.mean_velocities(batch) - batch.conditional_velocity)}


def meanflow(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    rows, b = flow.interval_rows(batch), flow.objective.variance_reduction
    first, v = batch.part(slice(rows)), velocity_target(flow, batch)
    direction = v[:rows]
    if b < 1 and rows:
        direction = b * direction + (1 - b) * flow.u(first.input, first.r, first.r, first.label)
    duration = wide(first.t - first.r, v)
    target = mx.concatenate([v[:rows] + duration * flow.derivative(first, direction), v[rows:]])
    return {"loss": flow.weighted(flow.mean_velocities(batch) - target)}


def improved_meanflow(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    rows, target = flow.interval_rows(batch), velocity_target(flow, batch)
    v, first = flow.u(batch.input, batch.r, batch.r, batch.label), batch.part(slice(rows))
    instant = flow.weighted(v - target)
    if rows == 0:
        return {"loss": instant}
    along = wide(first.t - first.r, v) * flow.derivative(first, v[:rows])
    mean = rows / len(v) * flow.weighted(flow.mean_velocities(first) - along - target[:rows])
    return {"instant": instant, "mean": mean, "loss": instant + mean}


def velocity_target(flow: Flow, batch: Rows) -> mx.array:
    """Return v_c (B, ...), or with guidance its guided form on the rows that have a label, without a graph."""
    v, guidance, network = batch.conditional_velocity, flow.objective.guidance, flow.objective.network
    if guidance is None or batch.label is None:
        return v
    null = mx.full(batch.label.shape, network.num_classes, batch.label.dtype)
    of_label, of_null = (flow.u(batch.input, batch.r, batch.r, label) for label in (batch.label, null))
    w, k = guidance.omega, guidance.kappa
    guided = (guidance.start <= batch.r) & (batch.r <= guidance.end) & (batch.label != null)
    return mx.stop_gradient(mx.where(wide(guided, v), w * v + k * of_label + (1 - w - k) * of_null, v))


def alpha_flow(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    if batch.by_derivative:
        return meanflow(flow, teacher, batch)
    rows, v = flow.interval_rows(batch), velocity_target(flow, batch)
    first = batch.part(slice(rows))
    step, a = first.a * (first.t - first.r), wide(first.a, v)
    later = flow.u(first.input + wide(step, v) * v[:rows], first.r + step, first.t, first.label)
    target = mx.concatenate([a * v[:rows] + (1 - a) * later, v[rows:]])
    return {"loss": flow.weighted(flow.mean_velocities(batch) - mx.stop_gradient(target), batch.a)}


def shortcut(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    rows = flow.interval_rows(batch)
    first = batch.part(slice(rows))
    d = 0.5 * (first.t - first.r)
    middle, at_foot = first.r + d, d < 1.5 * flow.objective.shortest
    u1 = teacher.u(first.input, first.r, mx.where(at_foot, first.r, middle), first.label)
    z = first.input + wide(d, u1) * u1
    u2 = teacher.u(z, middle, mx.where(at_foot, middle, first.t), first.label)
    target = mx.concatenate([0.5 * (u1 + u2), batch.conditional_velocity[rows:]])
    return {"loss": flow.weighted(flow.mean_velocities(batch) - mx.stop_gradient(target))}


def split_meanflow(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    rows = flow.interval_rows(batch)
    first = batch.part(slice(rows))
    s, share = first.r + first.share * (first.t - first.r), wide(first.share, first.input)
    u1 = flow.u(first.input, first.r, s, first.label)
    u2 = flow.u(first.input + wide(s - first.r, u1) * u1, s, first.t, first.label)
    target = mx.concatenate([share * u1 + (1 - share) * u2, batch.conditional_velocity[rows:]])
    return {"loss": flow.weighted(flow.mean_velocities(batch) - mx.stop_gradient(target))}


def cross_entropy(flow: Flow, teacher: Flow, batch: Rows) -> Terms:
    logits = Part(flow.objective.network, flow.now)(batch.images).astype(mx.float32)
    losses = entropies(flow.objective, logits, batch.label)
    if batch.other is not None:
        losses = losses + batch.share * (entropies(flow.objective, logits, batch.other) - losses)
    right = mx.argmax(logits, axis=1) == batch.label
    return {"loss": losses.mean(), "accuracy": right.astype(mx.float32).mean()}


def entropies(objective: CrossEntropyLoss, logits: mx.array, label: mx.array) -> mx.array:
    """Return the loss of each row (B,)."""
    logp = logits - mx.logsumexp(logits, axis=1, keepdims=True)
    own, smoothing = mx.take_along_axis(logp, label[:, None], axis=1)[:, 0], objective.label_smoothing
    rows = -(1 - smoothing) * own - smoothing * logp.mean(1)
    if objective.focusing:
        rows = rows * mx.maximum(1 - mx.exp(own), 1e-6) ** objective.focusing
    return rows


LOSSES: dict[type[Objective], Callable[[Flow, Flow, Rows], Terms]] = {
    FlowMatchingLoss: flow_matching,
    MeanFlowLoss: meanflow,
    ImprovedMeanFlowLoss: improved_meanflow,
    AlphaFlowLoss: alpha_flow,
    ShortcutLoss: shortcut,
    SplitMeanFlowLoss: split_meanflow,
    CrossEntropyLoss: cross_entropy,
}


def check_objective(objective: Any) -> None:
    """Raise UserError for an objective, or a setting of one, that is not written in MLX."""
    lacking = [type(objective).__name__] if type(objective) not in LOSSES else []
    if isinstance(objective, CrossEntropyLoss):
        lacking += ["loss.superloss"] if objective.superloss else []
    elif not lacking:
        known = (VelocityPrediction, UniformWeighting, AdaptiveWeighting)
        lacking += [type(part).__name__ for part in (objective.prediction, objective.weighting) if type(part) not in known]
        lacking += ["loss.teacher"] if getattr(objective, "teacher", None) else []
    if lacking:
        raise UserError(f"engine=mlx does not have {lacking[0]}; use engine=torch")


def terms_of(objective: Objective, now: Pass, average: Arrays, batch: dict[str, Any]) -> Terms:
    """Return named scalar losses of a batch as rows_of has it, "loss" being the one to minimise; average: the weights of the
    teacher, for the losses that ask for a target from it.
    """
    flow, teacher = Flow(objective, now), Flow(objective, replace(now, weights=average))
    return LOSSES[type(objective)](flow, teacher, Rows(batch))

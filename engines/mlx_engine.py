"""Training steps on Apple's MLX, which computes on Metal or the CPU: the objects of a torch run, stepped by another engine.

Torch draws every batch, so all randomness is its own. The engine holds weights, average and what the optimizer remembers as
arrays, and hands them back, under torch's names and in its layout, before anything is judged or saved: files of the two
engines are the same.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor

from common.errors import UserError
from engines.layers import Arrays, Layout, Pass
from engines.networks import check_network
from engines.objectives import check_objective, rows_of, terms_of
from engines.optimizers import Slots, averaged, clipped, rule_of
from losses.objective import Objective

State = dict[str, Any]  # weights; fixed: what is not trained, buffers included; means: the average; slots
TYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}


@dataclass(frozen=True)
class EngineSettings:
    """The names are those of the keys in configs/train.yaml."""

    device: str
    precision: str
    grad_clip: float | None
    compile: bool


def check_parts(objective: Objective) -> None:
    """Raise UserError for an objective, or a network, that is not written in MLX."""
    check_objective(objective)
    check_network(objective.network)


def take_device(name: str) -> bool:
    """Let MLX compute on a device, auto being its own choice; return whether that is Metal. UserError for one not there."""
    if name == "mps" and not mx.metal.is_available():
        raise UserError("device=mps is Metal, which MLX does not find on this machine; use device=auto or device=cpu")
    if name == "cpu":
        mx.set_default_device(mx.Device(mx.cpu))
    return bool(mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu))


class MlxEngine:
    """Takes the optimizer steps of an objective, of its average and its optimizer, all torch's, which it reads once.

    UserError for an optimizer that is not written in MLX.
    """

    def __init__(
        self, objective: Objective, average: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ):
        self.objective, self.average, self.optimizer, self.settings = objective, average, optimizer, settings
        self.on_metal, self.rule = take_device(settings.device), rule_of(optimizer)
        self.layout, network = Layout(objective.network), objective.network
        self.trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        others = dict(network.named_parameters()) | dict(network.named_buffers())
        slots, self.steps = self.remembered()
        self.state: State = {
            "weights": self.layout.to_mlx(self.trained),
            "fixed": self.layout.to_mlx({name: value for name, value in others.items() if name not in self.trained}),
            "means": self.layout.to_mlx(dict(average.named_parameters())),
            "slots": slots,
        }
        self.take = mx.compile(self.after) if settings.compile else self.after

    @property
    def name(self) -> str:
        """Return what a person calls the engine and its device."""
        return f"mlx {version('mlx')} on {'Metal' if self.on_metal else 'the CPU'}"

    def remembered(self) -> tuple[Slots, int]:
        """Return what the optimizer remembers, zeros of what it has not begun, and the steps it has counted."""
        states = {name: self.optimizer.state.get(weight, {}) for name, weight in self.trained.items()}
        none = {name: torch.zeros_like(weight) for name, weight in self.trained.items()}
        kept = {slot: {n: of.get(slot, none[n]) for n, of in states.items()} for slot in self.rule.slots}
        first = next(iter(states.values()))
        return {slot: self.layout.to_mlx(values) for slot, values in kept.items()}, int(first.get("step", 0))

    def step(self, group: list[Any], shares: list[float], rate: float, share: float) -> dict[str, Tensor]:
        """Take one optimizer step over a group of batches; return its mean losses, grad_norm and update_ratio, scalars.

        shares: what each batch weighs. rate: the learning rate; share: how much of the average the new weights replace.
        """
        self.steps += 1
        batches = [rows_of(batch) for batch in group]
        numbers = [mx.array(number) for number in (share, *self.rule.rates(rate, self.steps))]
        self.state, values = self.take(self.state, batches, shares, numbers)
        mx.eval(self.state, values)
        return {name: torch.tensor(value.item()) for name, value in values.items()}

    def after(
        self, state: State, batches: list[dict[str, Any]], shares: list[float], numbers: list[mx.array]
    ) -> tuple[State, Arrays]:
        """Return the state after a step, and the step's values: a pure function, which is compiled as a whole."""
        weights, means, (share, *rates) = state["weights"], state["means"], numbers
        values, gradients, fixed = self.gradients(state, batches, shares)
        gradients, values["grad_norm"] = clipped(gradients, self.settings.grad_clip)
        new, slots = self.rule.step(weights, gradients, state["slots"], rates)
        _, change = clipped({name: new[name] - weight for name, weight in weights.items()}, None)
        values["update_ratio"] = change / clipped(weights, None)[1]
        means = means | averaged({name: means[name] for name in new}, new, share)
        return {"weights": new, "fixed": fixed, "means": means, "slots": slots}, values

    def gradients(self, state: State, batches: list[dict[str, Any]], shares: list[float]) -> tuple[Arrays, Arrays, Arrays]:
        """Return the mean losses of some batches, their gradients, and what is not trained after them."""
        sums: list[Arrays] = [{}, {}]
        fixed = state["fixed"]
        for batch, share in zip(batches, shares, strict=True):
            (_, terms, fixed), of_batch = mx.value_and_grad(self.loss)(state["weights"], fixed, state["means"], batch)
            for total, part in zip(sums, (terms, of_batch), strict=True):
                total |= {name: share * value + total.get(name, 0.0) for name, value in part.items()}
        return sums[0], sums[1], fixed

    def loss(self, weights: Arrays, fixed: Arrays, means: Arrays, batch: dict[str, Any]) -> tuple[mx.array, Arrays, Arrays]:
        """Return the loss of a batch, all its terms, and what is not trained after it."""
        now = Pass(weights | fixed, TYPES[self.settings.precision], training=True)
        terms = terms_of(self.objective, now, fixed | means, batch)
        return terms["loss"], {name: mx.stop_gradient(term) for name, term in terms.items()}, fixed | now.changed

    def tried(self, batch: Any) -> None:
        """Compute the loss of a batch and its gradient, and nothing with it."""
        mx.eval(self.gradients(self.state, [rows_of(batch)], [1.0]))

    @torch.no_grad()
    def hand_back(self) -> None:
        """Give the torch objects the weights, the average and what the optimizer remembers."""
        weights, fixed, means = (self.layout.to_torch(self.state[kind]) for kind in ("weights", "fixed", "means"))
        for network, values in ((self.objective.network, weights | fixed), (self.average, fixed | means)):
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                tensor.copy_(values[name])
        slots = {slot: self.layout.to_torch(values) for slot, values in self.state["slots"].items()}
        for name, weight in self.trained.items():
            kept = {slot: values[name].contiguous() for slot, values in slots.items()}
            counted = {"step": torch.tensor(float(self.steps))} if "exp_avg" in kept else {}
            self.optimizer.state[weight] = counted | kept

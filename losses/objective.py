"""The objective contract: what is drawn for a step, what is minimised, and how the trained network is read.

All equations are in one convention: t = 0 is noise, t = 1 is data, and a network sees (state, time of the state, time it
is headed to). Which second time a network was trained with is the objective's knowledge; samplers ask the objective.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Share
from dataloaders.sources import Source
from losses.couplings import Coupling, IndependentCoupling, Pairs
from losses.paths import ProbabilityPath, expand_time
from losses.predictions import Prediction
from losses.repeated_dropout import RepeatsDropout
from losses.standardised import Standardised
from losses.time_samplers import TimeSampler
from losses.weightings import Weighting
from losses.world import Field, World
from models.inputs import make_unified_flow_matching_input
from models.layers import replace_dropout
from models.network import Network
from models.velocity_model import VelocityModel

SecondTime = Literal["end", "state"]
Learns = Literal["velocity", "flow_map", "endpoint_map", "generator", "equilibrium"]


@dataclass
class FlowBatch:
    """One step's rows, made whole on the training device.

    raw_source x0 and raw_target x1 (B, ...); r and t (B,), r <= t; input z (B, ...), the state at r; conditional_velocity
    (B, ...), dz/dr for these x0 and x1; unified_input, what the network sees; label (B,) or (B, ...), or None.
    """

    raw_source: Tensor
    raw_target: Tensor
    r: Tensor
    t: Tensor
    input: Tensor
    conditional_velocity: Tensor
    unified_input: Tensor
    label: Tensor | None = None

    def __len__(self) -> int:
        return self.input.shape[0]

    def split(self, rows: int) -> tuple["FlowBatch", "FlowBatch"]:
        """Return the first `rows` rows and the rest, as views: fixed sizes, so shapes stay static."""
        return self.rows(slice(rows)), self.rows(slice(rows, None))

    def rows(self, part: slice) -> Self:
        """Return some of the rows, as views."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[part] for name, value in named.items() if isinstance(value, Tensor)})


def check_labels(network: VelocityModel, given: Tensor | None, label: Tensor | None) -> None:
    """Raise UserError when data of a conditional network have labels and the pairs made of them have none."""
    if given is not None and label is None and network.is_conditional:
        raise UserError(
            "conditional=true needs labels, and these pairs have none; train the teacher of loss/coupling=reflow with "
            "conditional=true, or leave conditional out"
        )


def check_plain(label: Tensor | None) -> Tensor | None:
    """Return labels (B,), for losses that compare the rows of a label. UserError where each row has one of its own."""
    if label is not None and label.ndim > 1:
        raise UserError(
            "this loss compares rows of one label, and one that is augmented, or has a condition, is alone with its own; "
            "use dataloaders.augment=0, or a loss of single rows such as loss=meanflow"
        )
    return label


class Objective(nn.Module, ABC):
    """A loss around a bare network. Instantiated with the network; compiled and DDP-wrapped as a whole, never the network.

    All that the training loop knows of a loss: flows are one kind, classifiers another.
    """

    network: Network
    second_time: SecondTime | None = None  # of flows, see FlowObjective
    needs_teacher: bool = False  # whether forward wants the EMA objective beside the batch

    @abstractmethod
    def batch(self, source: Source, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float) -> Any:
        """Return one forward pass's rows from data x1 (B, ...) and label (B,) or None, with all of the loss's randomness,
        from `generator`; progress in [0, 1] is the share of the run that is done. len() of it is B.
        """

    def exact(self, world: World) -> Field | str:
        """Return what a network that minimises this loss gives on the data of `world`, or why that is not known."""
        return f"{type(self).__name__} learns no flow"

    @abstractmethod
    def forward(self, batch: Any, teacher: Any = None) -> dict[str, Tensor]:
        """Return named scalar losses, "loss" being the one to minimise. Pure: it compiles, and is what DDP wraps.

        teacher: the same objective around the EMA network, for the losses that ask for a target from it.
        """


class FlowObjective(Standardised, RepeatsDropout, Objective, ABC):
    """A loss that teaches a velocity model.

    second_time "end": the network's second time is always 1 (plain flow matching). "state": it is t >= r, and t = r asks
    for the instantaneous velocity (MeanFlow family).
    learns: what of u the network is trained for. "velocity": u(z, r, r) alone. "flow_map": u(z, r, t) for every r <= t.
    "endpoint_map": u(z, r, 1), the map to data, from any time, so that u(z, r, r) means nothing. "generator": u(x0, 0, 1).
    "equilibrium": a field without time, no flow, which leads to data where one climbs it.
    marginals_only: whether any map is as good that carries noise to data, so that no sample has one true end.
    pairwise: whether every row of a batch is compared with every other, so that its cost grows with the square of them.
    label_dropout: share of rows whose label, class and condition, is hidden, for classifier-free guidance.
    Raises UserError around a network that is no velocity model.
    """

    network: VelocityModel
    second_time: SecondTime = "end"
    learns: Learns = "velocity"
    marginals_only: bool = False
    pairwise: bool = False

    def __init__(
        self,
        network: VelocityModel,
        path: ProbabilityPath,
        coupling: Coupling,
        time_sampler: TimeSampler,
        prediction: Prediction,
        weighting: Weighting,
        label_dropout: Share = 0.0,
    ):
        super().__init__()
        if not isinstance(network, VelocityModel):
            raise UserError(
                "this loss teaches velocities, and this model is a classifier; use loss=cross_entropy, or another model "
                "such as model=unet_small"
            )
        self.network = network
        self.path, self.coupling, self.time_sampler, self.prediction = path, coupling, time_sampler, prediction
        self.weighting, self.label_dropout = weighting, label_dropout
        replace_dropout(network)
        self.standardise_by(None, None)

    def batch(
        self, source: Source, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float
    ) -> FlowBatch:
        return self.draw(source.sample(len(x1), generator), x1, label, generator, progress)

    def draw(
        self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float = 0.0
    ) -> FlowBatch:
        """Pair, drop labels and choose times for a batch: all of the objective's randomness, from `generator`.

        x0, x1 (B, ...) noise and data; label (B,) or None; progress in [0, 1] is the share of the run that is done.
        """
        x0, x1, label = self.pairs(x0, x1, label, generator)
        r, t = (self.path.last_time * time for time in self.time_sampler.sample(len(x1), generator))
        wide = expand_time(r, x1)
        z = self.path.state(x0, x1, wide)
        return FlowBatch(
            x0, x1, r, t, z,
            self.path.conditional_velocity(x0, x1, wide),
            self.unified(z, r, t),
            self.drop_labels(label, generator),
        )  # fmt: skip

    def pairs(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        """Return noise, data as the flow has them, and labels, paired by the coupling."""
        given = label
        x0, x1, label = self.coupling.pair(x0, self.standardised(x1), label, generator)
        check_labels(self.network, given, label)
        return x0, x1, label

    def drop_labels(self, label: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Return labels the network may see: some hidden for a conditional one, none, but for augmentation, for another."""
        network = self.network
        if label is None or (not network.is_conditional and label.ndim == 1):
            return None
        if self.label_dropout == 0 or not network.is_conditional:
            return label
        dropped = torch.rand(len(label), generator=generator, device=label.device) < self.label_dropout
        return torch.where(dropped.reshape(-1, *(1,) * (label.ndim - 1)), network.null_label(label), label)

    def unified(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Return the network's input for states z (B, ...) at times r headed to t, scalars or (B,)."""
        r, t = (time.to(z.device, torch.float32).expand(len(z)) for time in (r, t))
        second = torch.ones_like(t) if self.second_time == "end" else t
        return make_unified_flow_matching_input(z, torch.stack([r, second], dim=1))

    def predict(self, unified: Tensor, z: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        """Return the network's output as a velocity at states z and times r."""
        if len(z) == 0:  # one part of a batch that is all intervals, or all instants
            return z
        return self.prediction.velocity(self.network(unified, label), z, r, self.path)

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the instantaneous velocity at states x (B, ...) and times t, scalar or (B,): what an ODE solver follows."""
        return self.predict(self.unified(x, t, t), x, t, label)

    def mean_velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the network's u(z, r, t) at states z (B, ...) at times r, headed to t, scalars or (B,)."""
        return self.predict(self.unified(z, r, t), z, r, label)

    def mean_velocities(self, batch: FlowBatch, rows: int = 0) -> Tensor:
        """Return u on every row (B, ...): in one pass, unless dropout asks that the first `rows` have one of their own."""
        parts = batch.split(rows) if self.is_random and 0 < rows < len(batch) else (batch,)
        return torch.cat([self.mean_velocity(part.input, part.r, part.t, part.label) for part in parts])

    def weighted(self, error: Tensor, *a: Tensor) -> Tensor:
        """Return the scalar loss of errors (B, ...), squared and summed over dimensions. a: see Weighting."""
        return self.weighting(error.square().flatten(1).sum(1), *a)

    def flow_map(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return X(x, r, t) = x + (t - r) u(x, r, t): states x (B, ...) at times r carried to times t by one evaluation.

        UserError when the objective teaches the network no map.
        """
        self.check_learns_map()
        return x + expand_time(t - r, x) * self.mean_velocity(x, r, t, label)

    def check_learns_map(self) -> None:
        """Raise UserError when the objective teaches the network no map from one time to another."""
        self.check_learns_flow()
        if self.learns == "velocity":
            raise UserError(
                "this model knows only the velocity at an instant, not a map from one time to another; "
                "sample it with an ODE solver, or train one with loss=meanflow"
            )

    def check_learns_flow(self) -> None:
        """Raise UserError when the objective teaches the network a field without time."""
        if self.learns == "equilibrium":
            raise UserError("this model knows a field without time, which is climbed, and no flow; use solver=ascent")

    @property
    def has_ends(self) -> bool:
        """Return whether each sample has one true end, where the flow of the data carries its noise."""
        return not self.marginals_only and self.learns != "equilibrium"

    @property
    def learns_velocity(self) -> bool:
        """Whether the network is taught the velocity at an instant, by itself or as the limit of the one flow map."""
        return self.learns == "velocity" or (self.learns == "flow_map" and not self.marginals_only)

    def check_learns_velocity(self) -> None:
        """Raise UserError when the objective does not teach the network the velocity at an instant."""
        self.check_learns_flow()
        if not self.learns_velocity:
            raise UserError(
                "this model knows only where a state is carried to, not its velocity at an instant; sample it with "
                "solver=flow_map solver.steps=1"
            )

    def exact(self, world: World) -> Field | str:
        """Return the velocity, or where maps are learned the mean velocity, of independent pairs."""
        if self.marginals_only:
            return f"{type(self).__name__} is least at every map that carries noise to data, not at one alone"
        return self.stationary(world)

    def stationary(self, world: World) -> Field | str:
        """Return a field where the gradient is zero, or why none is known: of several, that of independent pairs."""
        if not isinstance(self.coupling, IndependentCoupling):
            return f"the pairs of {type(self.coupling).__name__} have another flow than independent ones, not known exactly"
        return world.velocity if self.learns == "velocity" else world.mean_velocity

    @abstractmethod
    def forward(self, batch: FlowBatch, teacher: "FlowObjective | None" = None) -> dict[str, Tensor]: ...

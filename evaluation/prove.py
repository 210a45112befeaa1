"""Is the exact field where a loss is least? Its mean gradient there is held against zero, on data whose field is known.

The network is the exact field plus sum_j c_j phi_j, at c = 0. The gradient in c is taken through the objective's own batch()
and forward(), so that whatever is wrong on the way (a sign, the order of the times, a weight that depends on the target)
shows as a mean that is not zero; Hotelling's test says whether it is. The phi are orthonormal in the mean over states and
times, so that |c| is a relative error of the field, and one Newton step says how far off the loss has its optimum.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import brentq
from scipy.stats import chi2, f, ncx2
from torch import Tensor, nn

from common.errors import UserError
from common.seeds import fork_generators, generator_for, stream_seed
from dataloaders.sources import GaussianSource
from evaluation.exact_worlds import MixtureWorld
from losses.couplings import Paths, ReflowCoupling
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowObjective, Objective
from losses.paths import ProbabilityPath
from losses.terms import Weight, named_terms
from losses.world import Field
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

LEVEL, CHANCE = 1e-3, 0.9  # of a false alarm, and of seeing a bias of the size that is called seen
ENOUGH = 0.05  # a stage that would not have seen a bias of this size decides nothing
NOTHING = 1e-3  # a bias that counts as none: rounding and the step of a finite difference make less
SIGNIFICANT = 2.0  # standard errors: what of a mean gradient is below says nothing of where the optimum is
UNSEEN = 1e-18  # least variance of a mean gradient: below it the loss never asks in that direction
NUDGE = 0.05  # of c, for the curvature
PAIRED = 512  # rows at most that are all compared with each other, in twice as many batches
STATES = 20_000  # by which the directions are made orthonormal
CPU = torch.device("cpu")
WORLDS = {
    "a Gaussian": ([[1.0]], [0.7], [0.4]),
    "a mixture": ([[0.35, 0.65]], [-1.2, 0.9], [0.3, 0.5]),
    "two classes": ([[0.35, 0.0, 0.0], [0.0, 0.4, 0.25]], [-1.2, 0.9, 0.2], [0.3, 0.5, 0.3]),
}


@dataclass
class Plan:
    """How much is drawn for a world: batches of so many rows for the mean gradient, and for the curvature; a run's words.

    seconds: at most so many for a world, in which the batches are doubled until they decide.
    """

    batches: int = 160
    rows: int = 2048
    curvature: int = 16
    seed: int = 0
    seconds: float = 0.0
    loss_weights: dict[str, Weight] = field(default_factory=dict)


def raw_directions(z: Tensor, r: Tensor, t: Tensor, label: Tensor | None, field: Tensor, classes: int) -> dict[str, Tensor]:
    """Return functions of the network's input, (B,) each, by what a network that has more of them does."""
    z, r, gap, u = z[:, 0].double(), r.double(), t.double() - r.double(), field[:, 0]
    found = {
        "a constant": torch.ones_like(z), "the state": z, "a wave over the states": (3 * z).sin(), "the time": r - 0.5,
        "the exact field itself": u, "the exact field at late times": r * u,
        "the length of the interval": gap, "the state over long intervals": gap * z,
        "the exact field over long intervals": gap * u,
    }  # fmt: skip
    if classes and label is not None:
        first, hidden = ((label == which).double() for which in (0, classes))
        found |= {"a constant for the first class": first, "the exact field of the first class": first * u}
        found |= {"a constant for a hidden label": hidden, "the exact field for a hidden label": hidden * u}
    return found


class Probe(VelocityModel):
    """The exact field plus sum_j c_j phi_j of states (B, 1), in whatever quantity the objective reads from its network."""

    def __init__(self, classes: int):
        super().__init__()
        self.num_classes = classes
        self.c = nn.Parameter(torch.zeros(0, dtype=torch.float64))
        self.mixing = torch.zeros(0)

    def teach(self, objective: FlowObjective, exact: Field, world: MixtureWorld, intervals: bool) -> None:
        """Take the exact field and the way the objective reads it; choose the directions."""
        self.exact, self.prediction, self.path, self.intervals = exact, objective.prediction, objective.path, intervals
        generator = generator_for(0, "prove/states")
        x1, label = world.sample(STATES, generator)
        r, ahead = torch.rand(2, STATES, generator=generator)
        r, t = world.path.last_time * r, world.path.last_time * (r + (1 - r) * ahead)
        r = torch.zeros_like(r) if objective.learns == "generator" else r
        t = torch.ones_like(t) if objective.learns in ("endpoint_map", "generator") else t
        z = world.path.state(torch.randn(x1.shape, generator=generator), x1, r[:, None])
        if objective.learns == "equilibrium":  # states of all times, which the network does not see
            r, t = torch.zeros_like(r), torch.ones_like(t)
        hidden = torch.rand(STATES, generator=generator) < (0.2 if objective.label_dropout else 0.0)  # as training has them
        shown = torch.where(hidden, self.num_classes, label) if self.num_classes else None
        u, raw = self.raw(z, r, t, shown)
        self.names = list(raw_directions(z, r, t, shown, u, self.num_classes))
        self.gram = raw.T @ raw / STATES / u.square().mean()
        size = self.gram.diagonal().sqrt().clamp(min=1e-9)
        values, vectors = torch.linalg.eigh(self.gram / size / size[:, None])
        kept = values > 1e-3
        self.mixing = vectors[:, kept] / values[kept].sqrt() / size[:, None]
        self.c = nn.Parameter(torch.zeros(int(kept.sum()), dtype=torch.float64))

    def raw(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the exact field (B, 1) and the directions before they are made orthonormal (B, J)."""
        t = t if self.intervals else r
        u = self.exact(z, r, t, label)
        return u, torch.stack(list(raw_directions(z, r, t, label, u, self.num_classes).values()), dim=1)

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        if self.num_classes and label is None:
            label = torch.full((len(z),), self.num_classes)
        u, raw = self.raw(z, times[:, 0], times[:, 1], label)
        v = u + (raw @ (self.mixing @ self.c))[:, None]
        r = times[:, 0]  # the reading is affine in the output: undone by two values of it
        zero, one = (self.prediction.velocity(torch.full_like(v, k), z, r, self.path) for k in (0.0, 1.0))
        return ((v - zero) / (one - zero)).float()

    def in_words(self, c: Tensor) -> str:
        """Return which raw direction a shift c looks like most, and whether it has more or less of it."""
        shift = self.mixing @ c
        likeness = self.gram @ shift / (self.gram.diagonal().clamp(min=1e-18) * (shift @ self.gram @ shift)).sqrt()
        most = int(likeness.abs().argmax())
        return f"{'more' if likeness[most] > 0 else 'less'} of {self.names[most]}"


def has_intervals(objective: FlowObjective, rows: int) -> bool:
    """Return whether a batch of so many rows asks the network for a map from one time to a later one."""
    if objective.learns == "flow_map":
        return objective.time_sampler.interval_rows(rows) > 0
    return objective.learns != "velocity"


@dataclass
class Stage:
    """What one world says. Sizes are shares of the root mean square of the exact field.

    bias, spread: how far off the optimum is, by those parts of the gradient that differ significantly from zero, and its
    standard error; seen: the least bias, in whatever direction, that would have been seen, in so many batches; reason: why
    nothing is decided, where that is so.
    """

    world: str
    statistic: float = math.nan
    dof: int = 0
    p: float = math.nan
    bias: float = math.nan
    spread: float = math.nan
    seen: float = math.inf
    direction: str = ""
    seconds: float = 0.0
    reason: str = ""
    batches: int = 0

    @property
    def verdict(self) -> str:
        """Return "stationary", "biased" or "undecided"."""
        if not self.reason and self.p < LEVEL:
            return "biased"
        return "undecided" if self.reason or not self.seen < ENOUGH else "stationary"


def exact_paths(world: MixtureWorld, classes: int, points: int) -> Paths:
    """Return STATES paths of the exact flow at so many times, for a loss that learns from those of teacher=exact."""
    generator, times = generator_for(0, "prove/paths"), world.path.last_time * torch.linspace(0, 1, points)
    label = world.sample(STATES, generator)[1] if classes else None
    x0 = torch.randn(STATES, 1, generator=generator)
    later = [world.flow_map(x0, times[0].expand(STATES), t.expand(STATES), label).float() for t in times[1:]]
    return Paths(torch.stack([x0, *later]), times, label)


Builder = Callable[[VelocityModel], Objective]


class Proof:
    """An objective around the exact field of one world, and the gradients there."""

    def __init__(self, objective: FlowObjective, exact: Field, world: MixtureWorld, plan: Plan):
        self.objective, self.world, self.plan = objective, world, plan
        if objective.pairwise:
            self.plan = replace(plan, rows=min(plan.rows, PAIRED), batches=2 * plan.batches)
        probe = objective.network
        assert isinstance(probe, Probe)
        if isinstance(objective, FlowMapObjective) and objective.teacher:
            objective.follow(lambda z, r, label: world.velocity(z, r, r, label))
        if isinstance(objective.coupling, ReflowCoupling):
            objective.coupling.made = exact_paths(world, probe.num_classes, objective.coupling.points)
        probe.teach(objective, exact, world, intervals=has_intervals(objective, plan.rows))
        self.probe, self.teacher = probe, copy.deepcopy(objective).requires_grad_(False) if objective.needs_teacher else None

    def gradients(self, c: Tensor, stream: str, batches: range) -> Tensor:
        """Return the gradient at c of the loss of each of these batches, (batches, dof)."""
        for objective in (self.objective, self.teacher):
            if objective is not None:
                objective.network.c.data = c.clone()
        return torch.stack([self.gradient(stream, index) for index in batches])

    def gradient(self, stream: str, index: int) -> Tensor:
        generator = generator_for(self.plan.seed, f"prove/{stream}", index)
        x1, label = self.world.sample(self.plan.rows, generator)
        source, shown = GaussianSource([1]), label if self.probe.num_classes else None
        with fork_generators(CPU):
            torch.manual_seed(stream_seed(self.plan.seed, f"prove/global/{stream}", index))
            batch = self.objective.batch(source, x1, shown, generator, 1.0)
            loss = named_terms(self.objective(batch, self.teacher), self.plan.loss_weights)["loss"]
        if not loss.requires_grad:
            raise UserError("this loss does not depend on its network, so there is nothing to prove; call the network in it")
        return torch.autograd.grad(loss, self.probe.c)[0]

    def curvature(self) -> Tensor:
        """Return d(mean gradient) / dc (dof, dof), stopped gradients left stopped."""
        return torch.stack(list(self.columns()), dim=1)

    def columns(self) -> Iterator[Tensor]:
        for unit in torch.eye(len(self.probe.c), dtype=torch.float64):
            batches = range(self.plan.curvature)
            ahead, behind = (self.gradients(e * unit, "curvature", batches).mean(0) for e in (NUDGE, -NUDGE))
            yield (ahead - behind) / (2 * NUDGE)

    def exact_gradients(self, batches: range) -> Tensor:
        """Return the gradients of these batches at the exact field, (batches, dof)."""
        return self.gradients(torch.zeros_like(self.probe.c.data), "gradient", batches)

    def carried_out(self, stage: Stage) -> Stage:
        """Return the stage with what was found, the batches doubled while they decide nothing and the seconds last.

        Whether to go on is asked of the power alone, so that a proof looks for a bias twice at most, and a false alarm
        stays below twice its level.
        """
        begun, found, curvature = time.perf_counter(), self.exact_gradients(range(self.plan.batches)), self.curvature()
        if not (found.isfinite().all() and curvature.isfinite().all()):
            stage.reason = "its gradient at the exact field is NaN or infinite"
            return stage
        self.judge(stage, found, curvature)
        if stage.verdict != "undecided":
            return stage
        while not stage.seen < ENOUGH and 2 * (time.perf_counter() - begun) < self.plan.seconds:
            found = torch.cat([found, self.exact_gradients(range(len(found), 2 * len(found)))])
            self.judge(stage, found, curvature)
        return stage

    def judge(self, stage: Stage, found: Tensor, curvature: Tensor) -> None:
        """Write into the stage what the gradients (batches, dof) and the curvature (dof, dof) say."""
        batches, dof = found.shape
        mean, noise = found.mean(0), torch.cov(found.T) / batches + (NOTHING * curvature) @ (NOTHING * curvature).T
        variances, axes = torch.linalg.eigh(noise)
        scale = variances.clamp(min=UNSEEN).sqrt()
        scores = axes.T @ mean / scale
        stage.batches, stage.dof, stage.statistic = batches, dof, float(scores.square().sum())
        stage.p = float(f.sf(stage.statistic * (batches - dof) / (dof * (batches - 1)), dof, batches - dof))
        sharpness = torch.linalg.svdvals(axes.T @ curvature / scale[:, None])
        stage.seen = (noncentrality(dof) ** 0.5 / sharpness[-1]).item()
        to_step = -torch.linalg.pinv(curvature, rtol=1e-4) @ axes * scale * (scores.abs() > SIGNIFICANT)
        step = to_step @ scores
        stage.bias = float(step.norm())
        stage.spread = float((to_step.T @ step).norm() / step.norm().clamp(min=1e-12))
        stage.direction = self.probe.in_words(step)


def noncentrality(dof: int) -> float:
    """Return how far off a mean must be for the test to see it with probability CHANCE."""
    bar = chi2.isf(LEVEL, dof)
    return float(brentq(lambda size: ncx2.sf(bar, dof, size) - CHANCE, 1.0, 1000.0))


def prove(build: Builder, path: ProbabilityPath, worlds: list[str], plan: Plan) -> Iterator[Stage]:
    """Yield what each of the named worlds says of the objective that `build` makes around a network.

    path: the objective's own. UserError for a loss that does not depend on its network.
    """
    for name in worlds:
        begun, stage, world = time.perf_counter(), Stage(name), MixtureWorld(path, *WORLDS[name])
        classes = len(world.joint) if len(world.joint) > 1 else 0
        objective = build(Probe(classes))
        if isinstance(objective, FlowObjective) and objective.marginals_only:
            exact = objective.stationary(world)
        else:
            exact = objective.exact(world)
        if isinstance(exact, str):
            stage.reason = exact
        else:
            assert isinstance(objective, FlowObjective)
            stage = Proof(objective, exact, world, plan).carried_out(stage)
        stage.seconds = time.perf_counter() - begun
        yield stage

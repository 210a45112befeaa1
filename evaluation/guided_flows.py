"""The exact flow under guidance: two exact fields, and the rule by which guidance joins them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from evaluation.closed_forms import Density, ExactFlow, Part, carried, linear
from evaluation.threads import one_thread
from helpers_cfg import Autoguidance, ClassifierFreeGuidance, Guidance, ZeroStarGuidance
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowObjective
from losses.paths import ProbabilityPath
from solvers.dopri5 import Dopri5
from solvers.likelihood import log_likelihood

LIKELIHOOD_TOLERANCE = 1e-7
OF_PROJECTIONS = 1e-6  # tolerance: where the weak velocity passes by 0 they turn fast, and steps become short
Rule = Callable[[Tensor, Tensor], Tensor]  # (weak, strong) velocities (B, ...) -> the guided one


@dataclass(frozen=True)
class GuidedFlow:
    """The flow of the field that is rule(weak, strong) at times within the interval, and strong alone at others.

    strong: what the guided network learns; weak: what it is guided away from, for the classes where labelled, else of all.
    rule: where affine, its coefficients of sum 1, the field is the same along every path in that path's own clock, and the
    flow is integrated along the linear one; else along the path itself, its bounded sigma' included.
    Callable as a field, as ExactFlow is; of the label None the strong field is that of all classes.
    """

    strong: ExactFlow
    weak: ExactFlow
    scale: float
    rule: Rule
    interval: tuple[float, float]
    labelled: bool
    affine: bool = True

    @property
    def plain(self) -> ExactFlow:
        """Return the flow without guidance."""
        return self.strong

    @property
    def key(self) -> dict[str, object]:
        """Return what, besides the data and the path, its flow map depends on, as JSON values."""
        weak = [part.tolist() for part in (self.weak.mixture.weights, self.weak.mixture.means, self.weak.mixture.stds)]
        rule, chances = [self.scale, *self.interval, self.labelled, self.affine], self.weak.pairs.chances.tolist()
        return self.strong.key | {"guidance": [*rule, chances, *weak, self.weak.key]}

    @property
    def path(self) -> ProbabilityPath:
        return self.strong.path

    def __call__(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the guided velocity, of z's shape. Whether a time is guided is asked in fp32, as networks do."""
        low, high = self.interval
        time = t.to(z.device, torch.float32).expand(len(z)).reshape(-1, *(1,) * (z.ndim - 1))
        strong = self.strong(z, t, label)
        weak = self.weak(z, t, label if self.labelled else None)
        return torch.where((low <= time) & (time <= high), self.rule(weak, strong), strong)

    @torch.no_grad()
    def flow_map(self, z: Tensor, r: float, t: float, label: Tensor | None = None) -> Tensor:
        """Return X(z, r, t) as ExactFlow does, in pieces between the ends of the interval, where the field jumps."""
        states, classes = z.detach().to("cpu", torch.float64), None if label is None else label.cpu()
        ends = [r, *(end for end in self.interval if r < end < t), t]
        for times in pairwise(ends):
            inside = self.interval[0] <= (times[0] + times[1]) / 2 <= self.interval[1]
            states = self.piece(states, torch.tensor(times, dtype=torch.float64), classes, inside)
        return states.to(z.device, z.dtype)

    def piece(self, z: Tensor, times: Tensor, label: Tensor | None, inside: bool) -> Tensor:
        """Return the states that z is carried to between two times that are all guided, or all not."""
        flows = (self.strong, self.weak)
        part = Part(z, [linear(flow) if self.affine else flow.to("cpu", torch.float64) for flow in flows])
        strong, weak = part.flows
        field = replace(self, strong=strong, weak=weak, interval=(0.0, 1.0)) if inside else strong
        moved = lambda states, t: field(states, t, label)  # noqa: E731
        if self.affine:
            return part.back(carried(moved, part.states, self.path, times))
        with one_thread():
            return part.back(Dopri5(rtol=OF_PROJECTIONS, atol=OF_PROJECTIONS).solve(moved, part.states, times))

    def of_class(self, label: int) -> "GuidedFlow":
        """Return the guided flow to one class."""
        weak = self.weak.of_class(label) if self.labelled else self.weak
        return replace(self, strong=self.strong.of_class(label), weak=weak)

    def end_log_prob(self, x: Tensor, label: Tensor | None, source_log_prob: Density) -> Tensor:
        """Return log p_1(x) in nats of data x (B, ...), float64 on the CPU: (B,), by the change of variables."""
        solver = Dopri5(rtol=LIKELIHOOD_TOLERANCE, atol=LIKELIHOOD_TOLERANCE)
        return log_likelihood(lambda z, t: self(z, t, label), x, source_log_prob, solver, "exact").log_prob


def with_guidance(flow: ExactFlow, objective: FlowObjective) -> ExactFlow | GuidedFlow | str:
    """Return what a perfect network follows under the guidance of the objective, in training or at sampling, or why not.

    flow: without any. Networks that guide are perfect, too: each has learned the flow of its own data.
    """
    network = objective.network
    folded = objective.guidance if isinstance(objective, MeanFlowLoss) and objective.scale != 1 else None
    if isinstance(objective, MeanFlowLoss) and folded is not None:
        if reason := objective.why_no_guided_flow():
            return reason
        if isinstance(network, Guidance):
            return "a model whose training has guidance in it is guided once more, and that flow is not known exactly"
        scale, interval = folded.scale, (folded.start, folded.end)
        return GuidedFlow(flow, flow, scale, lambda weak, strong: weak + scale * (strong - weak), interval, False)
    if not isinstance(network, Guidance) or network.scale == 1:
        return flow
    if type(network) is ClassifierFreeGuidance:
        return GuidedFlow(flow, flow, network.scale, network.extrapolated, network.interval, False)
    if type(network) is ZeroStarGuidance and not network.zero_until:
        return GuidedFlow(flow, flow, network.scale, network.extrapolated, network.interval, False, affine=False)
    if type(network) is not Autoguidance:
        return f"the exact flow under {type(network).__name__} is not known"
    if not isinstance(network.guide_flow, ExactFlow):
        return str(network.guide_flow)
    guide, labelled = network.guide_flow, network.guide.num_classes > 0
    return GuidedFlow(flow, guide, network.scale, network.extrapolated, network.interval, labelled)

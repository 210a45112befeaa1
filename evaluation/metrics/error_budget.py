"""What the distance between samples and the exact ends of their noise is due to: field, solver, map, guidance."""

import torch
from torch import Tensor

from common.ranges import CountFrom2
from evaluation.generate import few_steps
from evaluation.guided_flows import GuidedFlow
from evaluation.metrics.base_metric import Absent, Generation, Score
from evaluation.metrics.oracles import KnownFlow, Oracle, exact_ends, standard_error
from evaluation.metrics.two_sample import not_finite
from helpers_cfg import Guidance
from run_files.metrics_file import BY_TIME
from solvers.base_solver import BaseSolver
from solvers.dopri5 import Dopri5

TOLERANCE = 1e-5  # of the adaptive solver that follows the network: its own error is far below any network's


class ErrorBudget(Oracle):
    """Parts of X(x0, 0, 1) - X*(x0, 0, 1), each a root mean square distance of the same samples, at the final evaluation.

    With Y the end of x0 under the network's own velocity, integrated adaptively: oracle/budget_field is |Y - X*|, what was
    learned wrongly; oracle/budget_solver |X - Y|, what the run's solver adds; oracle/budget_map |X_1 - Y|, X_1 being a
    learned map's sample in one evaluation. Parts add up as vectors, not as these lengths: ..._share is E<part, X - X*> over
    E|X - X*|^2, of field and solver 1 in all, as of oracle/budget_map_share and oracle/budget_map_field_share, the parts of
    X_1 - X*; oracle/budget_total and oracle/budget_map_total are the lengths of these two. oracle/budget_guidance is how far
    guidance itself carries the exact ends from those without it, and oracle/budget_guided_map how far from X* guidance
    leaves the exact maps in one evaluation: it guides each step's mean velocity, which is not the mean of the guided one.
    oracle/flow_map_error_t<k>: the distance of the network's own path, or of a learned map's X(x0, 0, t), from the exact one
    at the middle of each of 8 equal parts of the path's time. samples: how many are looked at.
    """

    needs, name, beside = "velocity", "oracle/budget_field", ("oracle/budget", "oracle/flow_map_error_t")

    def __init__(self, samples: CountFrom2 = 1000):
        self.samples = samples

    def errors(self, generation: Generation, flow: KnownFlow) -> list[Score | Absent]:
        if not generation.final:
            return []
        noise, label = generation.noise[: self.samples], generation.label
        label = None if label is None else label[: self.samples]
        truth = exact_ends(generation, flow)[: self.samples]
        own, path = self.own_path(generation, noise, label)
        if reason := not_finite(own):
            return self.absent(reason)
        field = ends(own) - truth
        found = [self.part("field", field, extra=self.path_errors(generation, flow, path))]
        if isinstance(generation.solver, BaseSolver) and not_finite(generation.samples) is None:
            total = ends(generation.samples[: self.samples]) - truth
            shares = whole("total", total, {"field": field, "solver": total - field})
            found.append(self.part("solver", total - field, extra=shares))
        if generation.objective.learns == "flow_map":
            total = ends(few_steps(generation.objective, noise, label, 1)) - truth
            shares = whole("map_total", total, {"map_field": field, "map": total - field})
            found.append(self.part("map", total - field, extra=shares))
        if isinstance(flow, GuidedFlow):
            plain = exact_ends(generation, flow.plain)[: self.samples]
            found.append(self.part("guidance", truth - plain))
            samples_guided = isinstance(generation.objective.network, Guidance)  # else the training alone
            if generation.objective.learns == "flow_map" and flow.interval[0] == 0 and samples_guided:
                found.append(self.part("guided_map", self.guided_map(generation, flow, plain) - truth))
        return list(found)

    def part(self, name: str, error: Tensor, extra: dict[str, float] | None = None) -> Score:
        """Return the root mean square length of errors (N, D), with its standard error."""
        squared = error.square().sum(1)
        value = squared.mean().sqrt().item()
        spread = 0.5 * standard_error(squared) / max(value, 1e-300)
        return Score(f"oracle/budget_{name}", value, spread, extra=extra, note=f"{len(error):,} samples")

    def own_path(self, generation: Generation, noise: Tensor, label: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the ends of noise (N, ...) under the network's own velocity, and its states at the middles of 8 parts."""
        objective, seen = generation.objective, list[Tensor]()
        times = torch.cat([torch.zeros(1), middles(objective.path.last_time), torch.ones(1)])
        field = lambda z, t: objective.velocity(z, t, label)  # noqa: E731
        solver = Dopri5(rtol=TOLERANCE, atol=TOLERANCE)
        own = solver.solve(field, noise, times, lambda x, t: seen.append(x))
        if objective.learns == "flow_map":
            return own, [objective.flow_map(noise, times[0].to(noise), t.to(noise), label) for t in times[1:-1]]
        return own, seen[1:-1]

    def guided_map(self, generation: Generation, flow: GuidedFlow, strong: Tensor) -> Tensor:
        """Return where guidance leads in one evaluation of the exact maps (N, D); strong (N, D): the strong one's ends."""
        noise, label = generation.noise[: self.samples].cpu().double(), generation.label_on_cpu
        known = None if label is None or not flow.labelled else label[: self.samples]
        return flow.rule(ends(flow.weak.flow_map(noise, 0.0, 1.0, known)), strong)

    def path_errors(self, generation: Generation, flow: KnownFlow, path: list[Tensor]) -> dict[str, float]:
        """Return the distances of states (N, ...) at the 8 times from the exact ones, as logged."""
        times = [0.0, *middles(flow.path.last_time).tolist()]
        exact, label, found = generation.noise[: self.samples].cpu().double(), generation.label_on_cpu, {}
        label = None if label is None else label[: self.samples]
        for k, end in enumerate(BY_TIME):
            exact = flow.flow_map(exact, times[k], times[k + 1], label)
            found[f"oracle/flow_map_error{end}"] = (ends(path[k]) - ends(exact)).square().sum(1).mean().sqrt().item()
        return found


def middles(last: float) -> Tensor:
    """Return the middles of 8 equal parts of the times up to the last: (8,)."""
    return last * (torch.arange(len(BY_TIME)) + 0.5) / len(BY_TIME)


def ends(states: Tensor) -> Tensor:
    """Return states (N, ...) as (N, D), float64 on the CPU."""
    return states.detach().cpu().double().flatten(1)


def whole(name: str, total: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
    """Return the root mean square length of a total (N, D), and E<part, total> / E|total|^2 of each part, as logged."""
    square = total.square().sum().clamp(min=1e-300)
    shares = {f"oracle/budget_{part}_share": ((error * total).sum() / square).item() for part, error in parts.items()}
    return {f"oracle/budget_{name}": (square / len(total)).sqrt().item()} | shares

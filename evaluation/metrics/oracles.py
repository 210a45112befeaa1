"""Errors against the exact flow, where the data's density and so the truth is known in closed form."""

import copy
import hashlib
from abc import abstractmethod

import torch
from torch import Tensor

from common.device import full_products
from common.ranges import Count, CountFrom2
from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.closed_forms import ExactFlow
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_tensor
from evaluation.metrics.two_sample import not_finite
from evaluation.threads import one_thread
from helpers_cfg import Guidance
from losses.couplings import IndependentCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowObjective, expand_time
from losses.time_samplers import TimeSampler, UniformTimes
from losses.weightings import UniformWeighting
from solvers.base_solver import BaseSolver
from solvers.dopri5 import Dopri5
from solvers.likelihood import log_likelihood

CHUNK = 8192  # states the network sees at once


def known_flow(objective: FlowObjective, dataset: FlowDataset, source: Source, guided: bool) -> ExactFlow | str:
    """Return the flow a perfect network of this objective follows, in float64 on the CPU, or why it is not known."""
    if dataset.mixture is None:
        return f"the truth of {type(dataset).__name__} data is not known in closed form"
    reason = why_unknown(objective, source, guided)
    if reason is not None or source.gaussian_std is None:
        return str(reason)
    if objective.network.num_classes > 0:
        return "the network is conditional on labels, the known truth is not"
    return ExactFlow(dataset.mixture.to("cpu", torch.float64), source.gaussian_std, objective.path)


def why_unknown(objective: FlowObjective, source: Source, guided: bool) -> str | None:
    """Return why the flow of these data, whatever they are, is not known in closed form; None where it is."""
    if source.gaussian_std is None:
        return "the source is not Gaussian, so the truth is not known in closed form"
    if not isinstance(objective.coupling, IndependentCoupling):
        return "optimal-transport pairs, and those a teacher made, have another truth than independent ones"
    return "guidance leads away from the data's own law, whose truth is known" if guided else None


def standard_error(terms: Tensor) -> float:
    """Return that of the mean of independent terms (N,)."""
    return (terms.std() / len(terms) ** 0.5).item()


class Oracle(Metric):
    """Errors against the exact flow of the data, where that is known."""

    @full_products()
    def compute(self, generation: Generation) -> list[Score | Absent]:
        guided = isinstance(generation.objective.network, Guidance)
        flow = known_flow(generation.objective, generation.dataset, generation.source, guided)
        return self.absent(flow) if isinstance(flow, str) else self.errors(generation, flow)

    @abstractmethod
    def errors(self, generation: Generation, flow: ExactFlow) -> list[Score | Absent]:
        """Return the scores, or why there is none; flow: float64 on the CPU."""


def why_no_least_loss(objective: FlowObjective) -> str | None:
    """Return why the least possible value of this objective's loss is not known; None for the plain squared error."""
    if type(objective).forward is not FlowMatchingLoss.forward:
        name = type(objective).__name__
        return f"the least possible {name} is not known in closed form; oracle/squared_velocity_error is of any loss"
    if type(objective.weighting) is not UniformWeighting:
        return "the least possible loss is not known where rows are weighted by their own error"
    return None


class OracleVelocity(Oracle):
    """How far the velocity v is from v* = E[v_c | z_t]: three scores, sums over dimensions, as in the losses.

    oracle/velocity_error = sqrt(E|v - v*|^2 / E|v*|^2) and oracle/squared_velocity_error = E|v - v*|^2, z_t drawn afresh
    along the path, t uniform on [0, path.last_time], the same draws in every run. oracle/excess_loss is the loss minus the
    least possible one, E|v_c - v|^2 - E|v_c - v*|^2 = E|v - v*|^2 over the times the loss draws; only for the unweighted
    squared error. draws, final_draws: states during the run / at its end.
    """

    needs = "velocity"

    def __init__(self, draws: Count = 10_000, final_draws: Count = 100_000):
        self.draws, self.final_draws = draws, final_draws

    def names(self) -> list[str]:
        return ["oracle/velocity_error", "oracle/squared_velocity_error", "oracle/excess_loss"]

    def errors(self, generation: Generation, flow: ExactFlow) -> list[Score | Absent]:
        error, size = self.squares(generation, flow, UniformTimes())
        relative = (error.mean() / size.mean()).sqrt().item()
        spread = 0.5 * relative * standard_error(error / error.mean().clamp(min=1e-300) - size / size.mean())
        note = f"{len(error):,} states on the path"
        velocity, squared, excess = self.names()
        scores: list[Score | Absent] = [
            Score(velocity, relative, spread, note=note),
            Score(squared, error.mean().item(), standard_error(error), note=note),
        ]
        reason, sampler = why_no_least_loss(generation.objective), generation.objective.time_sampler
        if reason is not None:
            return [*scores, Absent(excess, reason)]
        if type(sampler) is not UniformTimes or sampler.ratio:
            error = self.squares(generation, flow, sampler)[0]
        return [*scores, Score(excess, error.mean().item(), standard_error(error), note=note)]

    def squares(self, generation: Generation, flow: ExactFlow, sampler: TimeSampler) -> tuple[Tensor, Tensor]:
        """Return |v - v*|^2 and |v*|^2 (N,) at states on the path."""
        count, generator = self.final_draws if generation.final else self.draws, generator_for(0, "oracle/velocity")
        with one_thread():
            x1 = flow.mixture.to(dtype=torch.float32).sample(count, generator)[0]
            x1 = x1.reshape(-1, *generation.dataset.state_shape)
            x0 = flow.source_std * torch.randn(x1.shape, generator=generator)
            t = flow.path.last_time * sampler.sample(count, generator)[0]
            z = flow.path.state(x0, x1, expand_time(t, x1))
            chunks = zip(z.double().split(CHUNK), t.split(CHUNK), strict=True)
            exact = torch.cat([flow(states, times) for states, times in chunks])
        device = generation.samples.device
        chunks = zip(z.to(device).split(CHUNK), t.to(device).split(CHUNK), strict=True)
        learned = torch.cat([generation.objective.velocity(states, times) for states, times in chunks])
        return (learned.cpu().double() - exact).flatten(1).square().sum(1), exact.flatten(1).square().sum(1)


class OracleFlowMapError(Oracle):
    """oracle/flow_map_error = sqrt(E|X(x0, 0, 1) - X*(x0, 0, 1)|^2): each sample against the exact end of its own noise.

    Far sharper than any distance between sets. On blobs most of it comes from the few samples near a separatrix, hence
    oracle/flow_map_error_median; oracle/flow_map_error_exact_field is what the run's solver makes of the exact field (left
    out where exact_field is false: samples that no solver made have no use for it).
    """

    needs = "ends"
    name = "oracle/flow_map_error"

    def __init__(self, exact_field: bool = True):
        self.exact_field = exact_field

    def names(self) -> list[str]:
        return [self.name]

    def errors(self, generation: Generation, flow: ExactFlow) -> list[Score | Absent]:
        if self.exact_field and generation.solver.renoises:
            return self.absent("this solver adds fresh noise, so that a sample's own noise has no one true end")
        reason = not_finite(generation.samples)
        if reason is not None:
            return self.absent(reason)
        noise = generation.noise.cpu().double()
        truth = self.truth(generation, flow, noise)
        squared = (generation.samples.cpu().double() - truth).flatten(1).square().sum(1)
        extra = {f"{self.name}_median": squared.median().sqrt().item()}
        if self.exact_field and isinstance(generation.solver, BaseSolver):
            with one_thread():
                solved = copy.copy(generation.solver).solve(flow, noise)  # a copy: its count of evaluations is the samples'
            own = (solved - truth).flatten(1).square().sum(1)
            extra[f"{self.name}_exact_field"] = own.mean().sqrt().item()
        value = squared.mean().sqrt().item()
        spread = 0.5 * standard_error(squared) / max(value, 1e-300)
        return [Score(self.name, value, spread, extra=extra, note=f"{len(noise):,} samples")]

    def truth(self, generation: Generation, flow: ExactFlow, noise: Tensor) -> Tensor:
        """Return X*(noise, 0, 1), cached: integrating it for 10,000 samples takes seconds."""
        key: dict[str, object] = {
            "dataset": generation.data_key, "source_std": flow.source_std,
            "path": [type(flow.path).__name__, vars(flow.path)],
            "noise": hashlib.blake2s(noise.numpy().tobytes(), digest_size=16).hexdigest(),
        }  # fmt: skip
        return cached_tensor(generation.cache, "flow_map_truth", key, lambda: flow.flow_map(noise, 0.0, 1.0))


class OracleLogProbError(Oracle):
    """oracle/log_prob_error = mean |log p_model(x) - log p(x)| in nats over fixed held-out points, at the final evaluation.

    The model's density by the change of variables along its own flow, integrated adaptively (solver=dopri5, rtol 1e-6);
    extra oracle/log_prob_error_exact_field is what the same integration makes of the exact field. Above 16 dimensions the
    densities are estimates by random probes, and oracle/log_prob_error_probes, the mean standard error of one, is part of
    the error.
    """

    needs = "velocity"
    name = "oracle/log_prob_error"

    def __init__(self, points: CountFrom2 = 500):
        self.points = points

    def names(self) -> list[str]:
        return [self.name]

    def errors(self, generation: Generation, flow: ExactFlow) -> list[Score | Absent]:
        if not generation.final:
            return []
        points, prior = (
            generation.dataset.held_out(self.points, generation.generator("log_prob"))[0],
            generation.source.log_prob,
        )
        exact = flow.mixture.log_prob(points.cpu().double())
        found = log_likelihood(generation.objective.velocity, points, prior, Dopri5())
        error = (found.log_prob.cpu().double() - exact).abs()
        own = (log_likelihood(flow, points.cpu().double(), prior, Dopri5()).log_prob.cpu().double() - exact).abs()
        extra = {f"{self.name}_exact_field": own.mean().item()}
        if found.standard_error is not None:
            extra[f"{self.name}_probes"] = found.standard_error.mean().item()
        return [Score(self.name, error.mean().item(), standard_error(error), extra=extra, note=f"{len(points)} points")]

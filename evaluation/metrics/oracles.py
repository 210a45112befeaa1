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
from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.sources import Source
from evaluation.closed_forms import ExactFlow, in_chunks, law_to
from evaluation.conditional_flow import ConditionalFlow
from evaluation.generate import states_at_once
from evaluation.guided_flows import GuidedFlow, with_guidance
from evaluation.metrics.base_metric import Absent, Generation, LongMetric, Score
from evaluation.metrics.cache import cached_tensor
from evaluation.metrics.two_sample import not_finite
from evaluation.threads import one_thread
from helpers_cfg import Guidance, unguided
from losses.couplings import IndependentCoupling, ReflowCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowObjective, expand_time
from losses.time_samplers import TimeSampler, UniformTimes
from losses.weightings import UniformWeighting
from run_files.metrics_file import BY_TIME
from solvers.base_solver import BaseSolver
from solvers.dopri5 import Dopri5
from solvers.likelihood import log_likelihood

CHUNK = 8192  # states the network sees at once
KnownFlow = ExactFlow | GuidedFlow | ConditionalFlow


def known_flow(objective: FlowObjective, dataset: FlowDataset, source: Source, of_map: bool = False) -> KnownFlow | str:
    """Return the flow that a perfect network of this objective, guidance included, follows, or why it is not known.

    In float64 on the CPU. A conditional network's is asked for with labels. of_map: whether only its map from noise to data
    is asked for, which the pairs of a teacher keep.
    """
    if dataset.mixture is None:
        return f"the truth of {type(dataset).__name__} data is not known in closed form"
    law = source.law
    if law is None:
        return "the density of the source is not known in closed form"
    if reason := why_other_pairs(objective, of_map):
        return reason
    noise = law_to(law, "cpu", torch.float64)
    if objective.network.condition_shape is not None:
        return conditional_flow(objective, dataset, noise)
    return with_guidance(ExactFlow(dataset.mixture.to("cpu", torch.float64), noise, objective.path), objective)


def conditional_flow(
    objective: FlowObjective, dataset: FlowDataset, noise: float | GaussianMixture
) -> ConditionalFlow | str:
    """Return the flow of a network that is given conditions, or why it is not known."""
    if isinstance(objective.network, Guidance) or (isinstance(objective, MeanFlowLoss) and objective.guidance):
        return "the flow under guidance by conditions is not known exactly"
    if dataset.conditional_mixture is None:
        return f"the truth of {type(dataset).__name__} data given their conditions is not known in closed form"
    return ConditionalFlow(dataset.conditional_mixture.to("cpu", torch.float64), noise, objective.path)


def why_other_pairs(objective: FlowObjective, of_map: bool = False) -> str | None:
    """Return why the flow of the objective's pairs, or of_map their map, is not known in closed form; None where it is."""
    pairs = objective.coupling
    kept = of_map and isinstance(pairs, ReflowCoupling) and pairs.made is not None and pairs.made.of_data
    if isinstance(pairs, IndependentCoupling) or kept:
        return None
    return "optimal-transport pairs, and those a teacher made, have another truth than independent ones"


def why_unknown(objective: FlowObjective, source: Source, guided: bool) -> str | None:
    """Return why the flow of these data, whatever they are, is not known in closed form; None where it is."""
    if source.gaussian_std is None:
        return "the source is not Gaussian, so the truth is not known in closed form"
    guidance = "guidance leads away from the data's own law, whose truth is known" if guided else None
    return why_other_pairs(objective) or guidance


def standard_error(terms: Tensor) -> float:
    """Return that of the mean of independent terms (N,)."""
    return (terms.std() / len(terms) ** 0.5).item()


class Oracle(LongMetric):
    """Errors against the exact flow of the data, where that is known. of_map: against its map from noise to data alone."""

    of_map = False

    @full_products()
    def compute(self, generation: Generation) -> list[Score | Absent]:
        flow = known_flow(generation.objective, generation.dataset, generation.source, self.of_map)
        return self.absent(flow) if isinstance(flow, str) else self.errors(generation, flow)

    @abstractmethod
    def errors(self, generation: Generation, flow: KnownFlow) -> list[Score | Absent]:
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
    along the path, t uniform on [0, path.last_time], the same draws in every run; under guidance v* is the guided field.
    oracle/excess_loss is the loss minus the least possible one, E|v_c - v|^2 - E|v_c - v*|^2 = E|v - v*|^2 over the times
    and null labels that the loss draws, without guidance; only for the unweighted squared error.
    oracle/velocity_error_t<k>, oracle/excess_loss_t<k>: the same in each of 8 equal parts of the path's time.
    draws, final_draws: states during the run / at its end.
    """

    needs = "velocity"

    def __init__(self, draws: Count = 10_000, final_draws: Count = 100_000):
        self.draws, self.final_draws = draws, final_draws

    def names(self) -> list[str]:
        return ["oracle/velocity_error", "oracle/squared_velocity_error", "oracle/excess_loss"]

    def errors(self, generation: Generation, flow: KnownFlow) -> list[Score | Absent]:
        objective, sampler = generation.objective, generation.objective.time_sampler
        t, error, size = self.squares(generation, objective, flow, UniformTimes())
        relative = (error.mean() / size.mean()).sqrt().item()
        spread = 0.5 * relative * standard_error(error / error.mean().clamp(min=1e-300) - size / size.mean())
        note = f"{len(error):,} states on the path"
        velocity, squared, excess = self.names()
        sizes = by_time(velocity, t, size)
        parts = {name: (value / sizes[name]) ** 0.5 for name, value in by_time(velocity, t, error).items()}
        scores: list[Score | Absent] = [
            Score(velocity, relative, spread, extra=parts, note=note),
            Score(squared, error.mean().item(), standard_error(error), note=note),
        ]
        reason, hidden = why_no_least_loss(objective), objective.network.is_conditional and objective.label_dropout > 0
        if reason is not None:
            return [*scores, Absent(excess, reason)]
        if type(sampler) is not UniformTimes or sampler.ratio or hidden or isinstance(objective.network, Guidance):
            t, error, _ = self.squares(generation, unguided(objective), flow.plain, sampler, hidden)
        extra = by_time(excess, t, error)
        return [*scores, Score(excess, error.mean().item(), standard_error(error), extra=extra, note=note)]

    def squares(
        self, generation: Generation, objective: FlowObjective, flow: KnownFlow, sampler: TimeSampler, hidden: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return times over the last one, |v - v*|^2 and |v*|^2 (N,) on the path. hidden: drop labels as the loss does."""
        count, generator = self.final_draws if generation.final else self.draws, generator_for(0, "oracle/velocity")
        with one_thread():
            x1, label = flow.plain.data(count, generator)
            x1 = x1.reshape(-1, *generation.dataset.state_shape)
            x0 = flow.plain.noise(count, generator).reshape(x1.shape)
            share = sampler.sample(count, generator)[0]
            t = flow.path.last_time * share
            z = flow.path.state(x0, x1, expand_time(t, x1))
            labels = label if objective.network.is_conditional else None
            labels = objective.drop_labels(labels, generator) if hidden else labels
            exact = in_chunks(flow, CHUNK, z.double(), t, labels)
        device = generation.samples.device
        labels = None if labels is None else labels.to(device)
        learned = in_chunks(
            objective.velocity, min(CHUNK, 8 * states_at_once(z.shape[1:])), z.to(device), t.to(device), labels
        )
        return share, (learned.cpu().double() - exact).flatten(1).square().sum(1), exact.flatten(1).square().sum(1)


def by_time(name: str, t: Tensor, values: Tensor) -> dict[str, float]:
    """Return the means of values (N,) over 8 equal parts of the times t (N,) in [0, 1], by name; a part without has none."""
    part = (len(BY_TIME) * t).long().clamp(max=len(BY_TIME) - 1)
    return {name + end: values[part == k].mean().item() for k, end in enumerate(BY_TIME) if (part == k).any()}


class OracleFlowMapError(Oracle):
    """oracle/flow_map_error = sqrt(E|X(x0, 0, 1) - X*(x0, 0, 1)|^2): each sample against the exact end of its own noise.

    Far sharper than any distance between sets. On blobs most of it comes from the few samples near a separatrix, hence
    oracle/flow_map_error_median; oracle/flow_map_error_exact_field is what the run's solver makes of the exact field (left
    out where exact_field is false: samples that no solver made have no use for it).
    """

    needs, of_map = "ends", True
    name = "oracle/flow_map_error"

    def __init__(self, exact_field: bool = True):
        self.exact_field = exact_field

    def errors(self, generation: Generation, flow: KnownFlow) -> list[Score | Absent]:
        if self.exact_field and generation.solver.renoises:
            return self.absent("this solver adds fresh noise, so that a sample's own noise has no one true end")
        if reason := not_finite(generation.samples):
            return self.absent(reason)
        noise = generation.noise.cpu().double()
        truth = exact_ends(generation, flow)
        squared = (generation.samples.cpu().double().flatten(1) - truth).square().sum(1)
        extra = {f"{self.name}_median": squared.median().sqrt().item()}
        if self.exact_field and isinstance(generation.solver, BaseSolver):
            with one_thread():
                own_solver = copy.copy(generation.solver)  # whose count of evaluations stays the samples'
                solved = own_solver.solve(lambda z, t: flow(z, t, generation.label_on_cpu), noise)
            own = (solved.flatten(1) - truth).square().sum(1)
            extra[f"{self.name}_exact_field"] = own.mean().sqrt().item()
        value = squared.mean().sqrt().item()
        spread = 0.5 * standard_error(squared) / max(value, 1e-300)
        return [Score(self.name, value, spread, extra=extra, note=f"{len(noise):,} samples")]


def exact_ends(generation: Generation, flow: KnownFlow) -> Tensor:
    """Return X*(noise, 0, 1) (N, D) of the generation's noise, cached: integrating it for 10,000 samples takes seconds."""
    label, noise = generation.label_on_cpu, generation.noise.cpu().double()
    key: dict[str, object] = {
        "dataset": generation.data_key, **flow.key,
        "path": [type(flow.path).__name__, vars(flow.path)],
        "noise": hashlib.blake2s(noise.numpy().tobytes(), digest_size=16).hexdigest(),
    }  # fmt: skip
    if label is not None:
        key["label"] = hashlib.blake2s(label.numpy().tobytes(), digest_size=16).hexdigest()
    ends = cached_tensor(generation.cache, "flow_map_truth", key, lambda: flow.flow_map(noise, 0.0, 1.0, label))
    return ends.flatten(1)


class OracleLogProbError(Oracle):
    """oracle/log_prob_error = mean |log p_model(x) - log p(x)| in nats over fixed held-out points, at the final evaluation.

    The model's density by the change of variables along its own flow, integrated adaptively (solver=dopri5, rtol 1e-6); of
    a conditional model that of each point's own class, and under guidance p is the density of the exact guided flow.
    extra oracle/log_prob_error_exact_field is what the same integration makes of the exact field. Above 16 dimensions the
    densities are estimates by random probes, and oracle/log_prob_error_probes, the mean standard error of one, is part of
    the error.
    """

    needs = "velocity"
    name = "oracle/log_prob_error"

    def __init__(self, points: CountFrom2 = 500):
        self.points = points

    def errors(self, generation: Generation, flow: KnownFlow) -> list[Score | Absent]:
        if not generation.final:
            return []
        points, classes = generation.dataset.held_out(self.points, generation.generator("log_prob"))
        prior, learned = generation.source.log_prob, generation.objective.velocity
        label = classes if generation.objective.network.is_conditional else None
        states, own_label = points.cpu().double(), None if label is None else label.cpu()
        exact = flow.end_log_prob(states, own_label, prior)
        found = log_likelihood(lambda z, t: learned(z, t, label), points, prior, Dopri5())
        error = (found.log_prob.cpu().double() - exact).abs()
        own = log_likelihood(lambda z, t: flow(z, t, own_label), states, prior, Dopri5()).log_prob.cpu().double() - exact
        extra = {f"{self.name}_exact_field": own.abs().mean().item()}
        if found.standard_error is not None:
            extra[f"{self.name}_probes"] = found.standard_error.mean().item()
        return [Score(self.name, error.mean().item(), standard_error(error), extra=extra, note=f"{len(points)} points")]

"""Sampling from fixed per-index seeds, in chunks, by a solver or by few steps."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.distributed import concatenated
from common.errors import UserError
from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from helpers_cfg import Guidance
from losses.objective import FlowObjective
from solvers.base_solver import Sampler
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import Euler

SEED_BLOCK = 256  # noise is drawn in blocks of this many samples, each from its own seed: any batch size, the same set
CHUNK, CHUNK_NUMBERS = 1024, 2**22  # most samples, and numbers in them, carried at once, whatever the number of ranks
Fresh = Callable[[int, int, int], Tensor]  # fresh(k, first, count) -> noise (count, ...) of step k, from sample `first` on


def states_at_once(state_shape: Sequence[int]) -> int:
    """Return how many states of a shape go through a network at once: fewer of large pictures."""
    return min(CHUNK, max(1, CHUNK_NUMBERS // math.prod(state_shape)))


def fixed_noise(source: Source, count: int, seed: int, stream: str = "sample", first: int = 0) -> Tensor:
    """Return noise (count, ...) on the CPU of the samples from number `first` on, for a source on the CPU.

    Sample i depends on (seed, stream, i) alone: it is the same for every count, batch size and device count.
    """
    begin, end = first // SEED_BLOCK, -(-(first + count) // SEED_BLOCK)
    drawn = torch.cat([source.sample(SEED_BLOCK, generator_for(seed, stream, i)) for i in range(begin, end)])
    return drawn[first - begin * SEED_BLOCK :][:count]


def fresh_noise(source: Source, seed: int) -> Fresh:
    """Return the noise re-noising solvers add, from a source on the CPU: of sample i in step k by (seed, k, i) alone."""
    return lambda k, first, count: fixed_noise(source, count, seed, f"renoise/{k}", first)


def data_labels(dataset: FlowDataset, conditional: bool, count: int, generator: torch.Generator) -> Tensor | None:
    """Return `count` labels as they come in held-out data; None for an unconditional network."""
    if not conditional:
        return None
    labels = dataset.held_out(count, generator)[1]
    assert labels is not None, "a conditional network has learned from labels"
    return in_turn(labels, count)


def in_turn(labels: Tensor, count: int) -> Tensor:
    """Return `count` labels: these in order, again and again."""
    return labels[torch.arange(count, device=labels.device) % len(labels)]


def generate(
    flow: FlowObjective,
    solver: Sampler,
    noise: Tensor,
    label: Tensor | None,
    fresh: Fresh | None = None,
    together: bool = False,
) -> Tensor:
    """Return noise (N, ...) carried to data by what the objective has learned, in chunks.

    label (N,) or (N, ...), or None. fresh: as fresh_noise gives it; only re-noising solvers need it. together: every rank
    calls this, and carries some of the chunks.
    """

    rows = states_at_once(noise.shape[1:])

    def carried(first: int) -> Tensor:
        chunk = slice(first, first + rows)
        return sample_chunk(flow, solver, noise[chunk], None if label is None else label[chunk], fresh, first)

    return concatenated(range(0, len(noise), rows), carried, together).to(noise.device)


def sample_chunk(
    flow: FlowObjective, solver: Sampler, x0: Tensor, label: Tensor | None, fresh: Fresh | None, first: int
) -> Tensor:
    """Return the samples from number `first` on, in the data's units, that x0 (B, ...) is carried to; label (B,) or None."""

    def added(k: int) -> Tensor:
        assert fresh is not None, "a re-noising solver needs fresh noise"
        return fresh(k, first, len(x0)).to(x0)

    return flow.in_data_units(solver.sample(flow, x0, label, added))


def few_steps(
    objective: FlowObjective, noise: Tensor, label: Tensor | None, evaluations: int, fresh: Fresh | None = None
) -> Tensor:
    """Return noise (N, ...) carried to t = 1 in so many equal steps of one evaluation each. fresh: as of `generate`."""
    return generate(objective, few_step_solver(objective, evaluations), noise, label, fresh)


def few_step_solver(objective: FlowObjective, evaluations: int) -> Sampler:
    """Return the objective's map where it learns one (noised between its steps if to data alone), else Euler's method."""
    if objective.learns == "velocity":
        return Euler(evaluations)
    return FlowMapSolver(evaluations, renoise=objective.learns == "endpoint_map" and evaluations > 1)


def check_guides_a_step(flow: FlowObjective, evaluations: int) -> None:
    """Raise UserError when guidance lies in an interval that none of so many equal steps starts in."""
    low, high = flow.network.interval if isinstance(flow.network, Guidance) else (0.0, 1.0)
    if not any(low <= k / evaluations <= high for k in range(evaluations)):
        raise UserError(
            f"guidance.interval=[{low:g},{high:g}] guides none of {evaluations} step(s), at 0, 1/{evaluations}, ...; "
            "widen it, take more steps, or leave guidance out"
        )


def few_step_words(objective: FlowObjective, evaluations: int | None = None) -> str:
    """Return what few_steps does, for provenance; without a number of evaluations the score's name has it."""
    what = "Euler" if objective.learns == "velocity" else "the flow map"
    return f"steps of {what}: {evaluations or 'as many as the name says'}{guidance_words(objective)}"


def solver_words(flow: FlowObjective, solver: Sampler) -> str:
    """Return how samples were made by a solver, after it has solved, for provenance."""
    return f"{solver.evaluations} evaluations by {type(solver).__name__}" + guidance_words(flow)


def guidance_words(flow: FlowObjective) -> str:
    """Return its guidance, if any, after a comma."""
    return f", {flow.network.describe()}" if isinstance(flow.network, Guidance) else ""

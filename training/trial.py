"""A run's parts, tried on two rows before it trains or moves a file: a mistake in one of them costs nothing.

What is tried is also how long a row takes, which the estimates in summary.py are of.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from common.contracts import calling, check_tensor, in_words
from common.device import autocast
from common.errors import UserError
from common.progress import seconds_a_row
from common.seeds import fork_generators
from dataloaders.base_dataloaders import Batch
from evaluation.evaluator import GeneratorEvaluator, checked_results
from evaluation.generate import in_turn, states_at_once
from evaluation.metrics.base_metric import Generation
from losses.cross_entropy_loss import LabelledBatch
from losses.objective import FlowBatch, FlowObjective
from losses.terms import named_terms
from training.run import Run
from training.sharding import gathered, is_sharded

ROWS = 2  # a batch norm takes no single row
PATIENCE = 2.0  # seconds that two samples may take; of a network that needs more only the velocity is tried
NUMBERS = 10**7  # in the noise that metrics are tried on, at most


@dataclass(frozen=True)
class RowSeconds:
    """What a row costs in training, forward and backward, but for reading it, and in an evaluation by the solver."""

    training: float
    sampling: float


def try_parts(run: Run) -> RowSeconds:
    """Return what a row costs. UserError for a part that fails, or returns what its contract does not allow.

    Weights, buffers, files and random numbers stay as they are. All ranks call this; metrics are of rank 0.
    """
    with on_trial(run) as generator:
        x1, label = tried_data(run, generator)
        objective = run.state.objective.eval()
        if isinstance(objective, FlowObjective):
            try_draws(objective, run, x1, label, generator)
        with torch.no_grad():
            try_network(run, x1, label, generator)
        training = seconds_of_training(run, label, generator)
        given = label if run.inputs.flow is not None and run.inputs.flow.network.is_conditional else None
        with torch.no_grad(), gathered(run.state.ema_objective.network):
            sampling = seconds_of_sampling(run, given, generator)
            if run.rank == 0:
                try_metrics(run, given, generator)
    return RowSeconds(training, sampling)


@contextmanager
def on_trial(run: Run) -> Iterator[torch.Generator]:
    """Give a generator; afterwards random numbers, gradients and buffers are as before."""
    network = run.state.objective.network
    kept = [buffer.clone() for buffer in network.buffers()]
    with fork_generators(run.device):
        yield torch.Generator(device=run.device)
    for buffer, old in zip(network.buffers(), kept, strict=True):
        buffer.copy_(old)
    network.zero_grad(set_to_none=True)


def tried_data(run: Run, generator: torch.Generator) -> Batch:
    """Return two rows of the data with their labels."""
    dataset, what, classes = run.dataset, "the data", run.dataset.num_classes
    x1, label = tried(what, dataset, lambda: dataset.trial_rows(ROWS, generator), ("states", "labels or None"))
    rows = min(ROWS, dataset.epoch_size)
    check_tensor(what, dataset, x1, (rows, *dataset.state_shape), "as many states of its state_shape as are asked for")
    if x1.dtype != torch.float32 or not x1.isfinite().all():
        wrong = f"states of {x1.dtype}" if x1.dtype != torch.float32 else "states that are NaN or infinite"
        raise UserError(f"{what} ({type(dataset).__name__}) gave {wrong}; give finite numbers of torch.float32")
    if classes and (not isinstance(label, Tensor) or len(label) != rows or (label.dtype != torch.int64 and label.ndim == 1)):
        raise UserError(
            f"{what} ({type(dataset).__name__}) gave {in_words(label)} as labels; num_classes={classes} asks for one whole "
            f"number (torch.int64) for each of its {rows} states"
        )
    return x1, label


def try_draws(objective: FlowObjective, run: Run, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> None:
    """Check what the source, the coupling, the time sampler and the weighting give."""
    rows, coupling, times, weighting = len(x1), objective.coupling, objective.time_sampler, objective.weighting
    x0 = tried("the source", run.source, lambda: run.source.sample(rows, generator))
    check_tensor("the source", run.source, x0, x1.shape, "noise of the data's shape")
    pairs = tried("the coupling", coupling, lambda: coupling.pair(x0, x1, label, generator), ("x0", "x1", "label"))
    for name, part in zip(("x0", "x1"), pairs, strict=False):
        check_tensor("the coupling", coupling, part, x1.shape, f"as its {name} states of the shape it is given")
    drawn = tried("the time sampler", times, lambda: times.sample(rows, generator), ("r", "t"))
    for name, time in zip("rt", drawn, strict=True):
        check_tensor("the time sampler", times, time, (rows,), f"as its {name} a time for each row")
    weighed = tried("the weighting", weighting, lambda: weighting(x1.new_ones(rows)))
    check_tensor("the weighting", weighting, weighed, (), "the mean of the weighted errors")


def tried(what: str, part: object, call: Callable[[], Any], names: tuple[str, ...] = ()) -> Any:
    """Return what a part gives when called. UserError where that fails, or is not as many values as there are names."""
    with calling(what, part):
        given = call()
    if names and (not isinstance(given, tuple | list) or len(given) != len(names)):
        raise UserError(f"{what} ({type(part).__name__}) returned {in_words(given)}; it must return {', '.join(names)}")
    return given


def try_network(run: Run, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> None:
    """Check the shape of what the network answers to two rows, as the objective asks it."""
    objective, network = run.state.objective, run.state.objective.network
    batch = tried("the objective's batch", objective, lambda: objective.batch(run.source, x1, label, generator, 0.0))
    if isinstance(batch, FlowBatch):
        answer = tried("the model", network.named, lambda: network(batch.unified_input, batch.label))
        check_tensor("the model", network.named, answer, x1.shape, "a velocity of the state's shape")
    elif isinstance(batch, LabelledBatch):
        answer = tried("the model", network.named, lambda: network(batch.images))
        check_tensor("the model", network.named, answer, (len(x1), network.num_classes), "a number for each class")


def labels_for(rows: int, label: Tensor | None) -> Tensor | None:
    """Return as many labels as `rows`, or None."""
    return None if label is None else in_turn(label, rows)


def seconds_of_training(run: Run, label: Tensor | None, generator: torch.Generator) -> float:
    """Return what a row costs in training, forward and backward, but for reading it."""
    objective = run.state.objective.train()

    def drawn(rows: int) -> Any:
        return objective.batch(run.source, run.source.sample(rows, generator), labels_for(rows, label), generator, 0.0)

    def train(rows: int) -> None:
        batch = drawn(rows)
        with autocast(run.device, run.settings.precision):
            terms = named_terms(objective(batch, run.state.teacher), run.settings.loss_weights)
        if not terms["loss"].requires_grad:
            raise UserError(
                f"the loss of {type(objective).__name__} has no gradient in the weights of the model; leave out .detach(), "
                ".item() and torch.no_grad() around what it is made of"
            )
        terms["loss"].backward()

    with calling("the loss", objective):
        if is_sharded(objective.network):  # the ranks take as many passes as each other, whatever their clocks say
            train(ROWS)
            return 0.0
        if run.engine is not None:
            train(ROWS)
            tried_elsewhere = run.engine.tried
            return seconds_a_row(lambda rows: tried_elsewhere(drawn(rows)), run.settings.batch_size, run.device)
        return seconds_a_row(train, run.settings.batch_size // run.world, run.device)


def seconds_of_sampling(run: Run, label: Tensor | None, generator: torch.Generator) -> float:
    """Return what a row costs the solver in an evaluation of the network; 0 where nothing is sampled."""
    flow = run.inputs.flow
    if flow is None:
        return 0.0
    flow.eval()

    def answer(rows: int) -> None:
        x = run.source.sample(rows, generator)
        velocity = flow.velocity(x, torch.tensor(0.5, device=run.device), labels_for(rows, label))
        check_tensor("the objective's velocity", flow, velocity, x.shape, "a velocity of the state's shape")

    with calling("the objective's velocity", flow):
        answer(ROWS)  # the first one prepares
        begun = perf_counter()
        answer(ROWS)
        once = perf_counter() - begun
        seconds = seconds_a_row(answer, states_at_once(run.dataset.state_shape), run.device)
    try_solver(run, flow, once, label, generator)
    return seconds


def try_solver(run: Run, flow: FlowObjective, seconds: float, label: Tensor | None, generator: torch.Generator) -> None:
    """Check what the solver makes of two rows of noise, an evaluation of the network taking so many seconds."""
    solver = copy.copy(run.inputs.solver)
    if (both := seconds * solver.evaluations_ahead) > PATIENCE:
        print(f"note: sampling is first tried by an evaluation: {ROWS} samples take {both:.0f} s")
        return
    x0 = run.source.sample(ROWS, generator)
    label = labels_for(ROWS, label)
    fresh = partial(run.source.sample, ROWS, generator)
    samples = tried("the solver", solver, lambda: solver.sample(flow, x0, label, lambda _: fresh()))
    check_tensor("the solver", solver, samples, x0.shape, "states where the path ends")


def try_metrics(run: Run, label: Tensor | None, generator: torch.Generator) -> None:
    """Check what metrics that take no time give of noise."""
    evaluator, flow = run.evaluator, run.inputs.flow
    if not isinstance(evaluator, GeneratorEvaluator) or flow is None or not evaluator.metrics:
        return
    count = min(evaluator.samples, max(ROWS, NUMBERS // math.prod(run.dataset.state_shape)))
    noise = run.source.sample(count, generator)
    made = {"objective": flow, "noise": noise, "samples": noise, "label": labels_for(count, label)}
    generation = Generation(**vars(run.inputs) | made)
    for name, metric in evaluator.metrics.items():
        checked_results(name, metric, generation, trial=True)

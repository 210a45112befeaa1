"""The training loop: one for every model, objective and device.

`fit` runs the epochs: `epoch_groups` draws the batches of each optimizer step, `train_step` takes it, `after_step` logs,
`end_epoch` evaluates and saves.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from common.device import autocast, tune_kernels
from common.distributed import all_draw
from common.errors import UserError
from common.seeds import generator_for, seed_network, stream_seed
from dataloaders.base_dataloaders import Batch, EpochPlan
from losses.terms import named_terms
from run_files.metrics_file import higher_is_better
from training.run import Run
from training.sharding import is_sharded, plain
from training.step_hooks import total_norm

RANK_SEED_STRIDE = 2**24  # between the indices of two ranks' generators at one step; runs are shorter
MAX_CONSECUTIVE_SKIPS = 20  # steps in a row that on_nan=skip leaves out; more are no accident


def fit(run: Run) -> None:
    """Train until the last step, an early stop or an interruption; evaluate and save on the way."""
    run.notify("fit_begin")
    run.state.objective.train()
    run.clock.start(run.state.step)
    while run.state.step < run.total_steps and run.agreed_stop() is None:
        run.notify("epoch_begin")
        for group in epoch_groups(run):
            tune_kernels(run.device, all(len(batch) * run.world == run.settings.batch_size for batch in group))
            values = train_step(run, group) if run.engine is None else engine_step(run, group)
            after_step(run, values)
            if run.state.step >= run.total_steps or run.must_stop():
                break
        if run.engine is not None:
            run.engine.hand_back()
        end_epoch(run)
    run.agreed_stop()
    run.notify("fit_end")


def epoch_groups(run: Run) -> Iterator[list[Any]]:
    """Yield the rest of the current epoch, one list of drawn batches per optimizer step.

    Each step's randomness comes from generators seeded by (seed, step, rank): nothing has to be saved to resume exactly.
    """
    epoch, position = divmod(run.state.step, run.steps_per_epoch)
    accumulate, seed, fixed = run.settings.gradient_accumulation_steps, run.settings.seed, run.settings.overfit
    generator = torch.Generator(device=run.device)
    order = generator_for(seed, "order", 0 if fixed else epoch)
    plan = EpochPlan(run.settings.batch_size, order, generator, position * accumulate, run.rank, run.world)
    batches = run.dataset.epoch(plan)
    for step in range(run.state.step, (epoch + 1) * run.steps_per_epoch):
        index = (0 if fixed else step) + run.rank * RANK_SEED_STRIDE  # distinct for every step and rank
        if fixed:
            batches = run.dataset.epoch(replace(plan, order=generator_for(seed, "order"), start=0))
        generator.manual_seed(stream_seed(seed, "batch", index))
        seed_network(seed, index, run.device)
        progress = step / run.total_steps
        yield [drawn(run, x1, label, generator, progress) for x1, label in islice(batches, accumulate)]


def drawn(run: Run, x1: Tensor, label: Tensor | None, generator: torch.Generator, progress: float) -> Any:
    """Return what the objective makes of this rank's share of a batch."""
    with all_draw(len(x1)):
        return run.state.objective.batch(run.source, *never_empty(x1, label), generator, progress)


def never_empty(x1: Tensor, label: Tensor | None) -> Batch:
    """Return data x1 (B, ...) and its label; where this rank has no row of the batch, a row of zeros, whose weight is 0."""
    if len(x1):
        return x1, label
    return x1.new_zeros(1, *x1.shape[1:]), None if label is None else label.new_zeros(1, *label.shape[1:])


def train_step(run: Run, group: list[Any]) -> dict[str, Tensor]:
    """Take one optimizer step over a group of batches; return its mean losses and grad_norm, scalars on the device."""
    state, parameters = run.state, run.state.trainable()
    # Set the learning rate.
    for settings in state.optimizer.param_groups:
        settings["lr"] = settings["initial_lr"] * state.schedule.factor(state.step, run.total_steps)
    # Accumulate gradients: each batch weighs by its rows; the last backward pass averages them over the ranks.
    run.hook.begin(state)
    values: dict[str, Tensor] = {}
    for i, (batch, share) in enumerate(zip(group, run.row_shares(group), strict=True)):
        with run.gradient_sync(last=i == len(group) - 1):
            with autocast(run.device, run.settings.precision):
                losses = run.forward(batch, state.teacher)
                terms = named_terms(losses, run.settings.loss_weights, state.step / run.total_steps)
            state.scaler.scale(weighted(terms["loss"], share)).backward()
        for name, term in terms.items():
            part = weighted(term.detach(), share)
            values[name] = values[name] + part if name in values else part
    # Clip gradients.
    state.scaler.unscale_(state.optimizer)
    values["grad_norm"] = plain(torch.nn.utils.clip_grad_norm_(parameters, run.settings.grad_clip or math.inf))
    # Update the weights.
    state.step += 1
    if run.hook.accepts(state, values):
        state.scaler.step(state.optimizer)
        run.hook.end(state, values)
        # Update their averages.
        for ema, average in state.averages():
            ema.update(average, state.objective.network, state.step, run.hook.broken)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return values


def engine_step(run: Run, group: list[Any]) -> dict[str, Tensor]:
    """Take one optimizer step by an engine that is not torch; return what train_step does."""
    assert run.engine is not None
    state, settings = run.state, run.state.optimizer.param_groups[0]
    settings["lr"] = settings["initial_lr"] * state.schedule.factor(state.step, run.total_steps)
    state.step += 1
    return run.engine.step(group, run.row_shares(group), settings["lr"], state.ema.share(state.step))


def weighted(term: Tensor, share: float) -> Tensor:
    """Return share * term; the term itself, without an operation on the device, where the share is 1."""
    return term if share == 1 else term * share


def all_finite(network: torch.nn.Module) -> bool:
    """Return whether the weights, and the buffers, such as a batch norm's running variance, are all finite."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    return all(bool(total_norm(part).isfinite()) for part in (list(network.parameters()), buffers) if part)


def after_step(run: Run, values: dict[str, Tensor]) -> None:
    """Count the step in the window; every log_every steps, write a line."""
    ratio = values.pop("update_ratio", None)
    run.state.window.add(values, run.hook.broken)
    if run.state.ema.snapshot_is_due(run.state.step, run.total_steps):
        run.records.write_averages(run.state.step, {ema.lengths[0]: net.state_dict() for ema, net in run.state.averages()})
    if run.state.step % run.settings.log_every == 0:
        log_window(run, {} if ratio is None or ratio.isnan() else {"train/update_ratio": ratio.item()})
    run.notify("step_end")


def log_window(run: Run, more: dict[str, float] | None = None) -> None:
    """Write the means since the last line, and `more`. UserError when a loss or gradient was not finite."""
    window, state = run.state.window, run.state
    check_finite(run)
    if not window.count:
        return
    means = window.means()
    steps, seconds = run.clock.lap(state.step)
    rate = steps / max(seconds, 1e-9)
    metrics = {f"train/{name}": value for name, value in means.items()}
    metrics |= more or {}
    if state.skipped:
        metrics["train/skipped_steps"] = float(state.skipped)
    metrics["train/lr"] = state.optimizer.param_groups[0]["lr"]
    metrics["train/steps_per_second"] = rate
    metrics["train/samples_per_second"] = rate * run.settings.batch_size * run.settings.gradient_accumulation_steps
    window.clear()
    run.log(metrics)


def check_finite(run: Run, weights: bool = False) -> None:
    """Check losses and gradients, and the weights before they are judged and saved, for NaN and infinity.

    UserError naming the term, the step and the last good save; with on_nan=skip, after MAX_CONSECUTIVE_SKIPS in a row.
    """
    state = run.state
    state.window.all_reduce_mean()
    term = state.window.non_finite(overflows=state.scaler.is_enabled())
    if (skipped := int(state.skipped_in_a_row)) >= MAX_CONSECUTIVE_SKIPS:
        term = f"loss (in each of the last {skipped} steps, all skipped)"
    if weights and term is None:
        parts = (("weights", state.objective.network), ("EMA weights", state.ema_objective.network))
        term = next((name for name, network in parts if not all_finite(network)), None)
    if term is not None:
        # Under fp16 gradients may overflow without harm, so the first such step names no culprit.
        first = None if state.scaler.is_enabled() else state.window.broken_step(state.step)
        when = f"at step {first}" if first else f"within the steps up to {state.step}"
        raise UserError(
            f"train/{term} became NaN or infinite {when}; {run.records.last_save()}; "
            "try a lower optimizer.lr, a smaller grad_clip or precision=fp32"
        )


def end_epoch(run: Run) -> None:
    """Evaluate where due, then save: at the end of an epoch, of the run, or on a stop."""
    complete = run.state.step % run.steps_per_epoch == 0
    last = run.state.step >= run.total_steps
    if not complete and not last:
        check_finite(run, weights=True)
        run.save(epoch=None, best=False)
        return
    log_window(run)
    check_finite(run, weights=True)
    best = False
    if last or run.epoch % run.settings.eval_every == 0:
        best = judge(run, evaluate(run, final=last))
    run.agreed_stop()
    if run.stop is not None and not last and run.stop.early:
        judge(run, evaluate(run, final=True))
    if last or best or run.stop is not None or run.epoch % run.settings.save_every == 0:
        run.save(epoch=run.epoch, best=best)
    run.notify("epoch_end")
    run.clock.lap(run.state.step)  # the next rate is of training alone


def evaluate(run: Run, final: bool) -> dict[str, float]:
    """Return the scores by name. An error is raised only after the epoch has been saved, so that no training is lost."""
    tune_kernels(run.device, True)
    try:
        return run.evaluate(final)
    except BaseException:
        if not is_sharded(run.state.objective.network):  # whose save takes all ranks, and this one may have failed alone
            run.save(epoch=None, best=False)
        if run.world == 1:  # else it may be another rank that failed, and the launcher says what
            print(f"note: the evaluation after step {run.state.step:,} failed; {run.records.last_save()}", file=sys.stderr)
        raise


def judge(run: Run, values: dict[str, float]) -> bool:
    """Return whether the monitored metric is the best so far; pass it to the schedule (plateau) and to early stopping."""
    state, monitor, patience = run.state, run.settings.monitor, run.settings.patience
    if monitor not in values:
        run.save(epoch=None, best=False)
        known = ", ".join(sorted(values))
        raise UserError(f"monitor={monitor} is not among this run's evaluation metrics; use one of {known}")
    sign = -1 if higher_is_better(monitor, run.settings.monitor_mode) else 1
    state.schedule.observe(sign * values[monitor])
    better = sign * values[monitor] < (math.inf if math.isinf(state.best) else sign * state.best)
    state.best, state.waited = (values[monitor], 0) if better else (state.best, state.waited + 1)
    if patience and state.waited >= patience:
        run.stop_early(f"{monitor} has not improved for {state.waited} evaluations")
    return better

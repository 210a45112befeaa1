"""A run: the parts a configuration names, assembled, and the few things they do together."""

from __future__ import annotations

import signal
import time
from abc import ABC
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from common.device import device_name
from common.distributed import Ballot, broadcast_from_rank0, first_non_none, orphaned
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.evaluator import Evaluation, Evaluator
from evaluation.metrics.base_metric import EvaluationInputs
from losses.objective import Objective
from losses.terms import LossOutput, Weight
from run_files.checkpoint import FORMAT
from run_files.metrics_file import SCORES
from run_files.provenance import git_commit, package_versions, weights_in_words
from training.records import Moment, Records
from training.sharding import gathered, gradients_shared, is_sharded
from training.state import TrainState
from training.step_hooks import StepHook

if TYPE_CHECKING:
    from engines.mlx_engine import MlxEngine  # imports MLX


@dataclass(frozen=True)
class LoopSettings:
    """How the loop trains and judges; the names are those of the keys in configs/train.yaml."""

    seed: int
    batch_size: int
    gradient_accumulation_steps: int
    epochs: int
    max_steps: int | None
    precision: str
    grad_clip: float | None
    on_nan: str
    loss_weights: dict[str, Weight]
    overfit: bool
    eval_every: int
    save_every: int
    log_every: int
    monitor: str
    monitor_mode: str
    patience: int | None


@dataclass(frozen=True)
class LogSettings:
    """What the experiment log says of a run. changed: settings of a resumed run, (old, new) by key."""

    run_name: str
    command: str
    choices: dict[str, str]
    changed: dict[str, tuple[Any, Any]]
    seed: int
    file: str
    expect: str | None = None
    source: str | None = None
    reason: str | None = None
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step. early: it was voted for, so the run counts as finished."""

    why: str
    early: bool = False
    signal: int = 0


class Clock:
    """Seconds in the loop, and between two looks at it."""

    begun = last = 0.0
    step = 0

    def start(self, step: int) -> None:
        self.begun = time.perf_counter()
        self.lap(step)

    def elapsed(self) -> float:
        """Return seconds since `start`, 0 before it."""
        return time.perf_counter() - self.begun if self.begun else 0.0

    def lap(self, step: int) -> tuple[int, float]:
        """Return steps and seconds since the last call, `step` being done now."""
        seconds, steps = time.perf_counter() - self.last, step - self.step
        self.last, self.step = self.last + seconds, step
        return steps, seconds


@dataclass
class Run:
    """Everything one process of a run holds; rank and world count processes.

    inputs: of evaluations; `evaluate` replaces what differs between two. asked: why this process wants the run to end, set
    at any moment, by a signal for example; stop: what all ranks agreed on. engine: None where torch takes the steps.
    """

    settings: LoopSettings
    notes: LogSettings
    device: torch.device
    dataset: FlowDataset
    source: Source
    state: TrainState
    forward: Callable[[Any, Objective | None], LossOutput]  # the objective, possibly compiled, under DDP if ranks are many
    evaluator: Evaluator
    inputs: EvaluationInputs
    records: Records
    hook: StepHook
    callbacks: list[Callback]
    rank: int = 0
    world: int = 1
    asked: Stop | None = None
    stop: Stop | None = None
    evaluation: Evaluation | None = None
    last_values: dict[str, float] = field(default_factory=dict)  # the newest value of every metric
    clock: Clock = field(default_factory=Clock)
    ballot: Ballot = field(default_factory=Ballot)
    engine: MlxEngine | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Return optimizer steps of an epoch; the last may see fewer batches."""
        batches = self.dataset.batches_per_epoch(self.settings.batch_size)
        return -(-batches // self.settings.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        return self.settings.max_steps or self.settings.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Return epochs done, a begun one counted once the run ends in it."""
        return -(-self.state.step // self.steps_per_epoch)

    @property
    def now(self) -> Moment:
        """Return step, epoch, and seconds spent in the loop, earlier sittings included."""
        return self.state.step, self.epoch, self.state.elapsed + self.clock.elapsed()

    @property
    def device_words(self) -> str:
        """Return the name of the device, or of the engine, that the run is computed on."""
        return device_name(self.device) if self.engine is None else self.engine.name

    @property
    def shared_device(self) -> torch.device:
        """Return the device that is shared with other processes: torch's, or Metal where MLX computes on it."""
        return torch.device("mps") if self.engine is not None and self.engine.on_metal else self.device

    @property
    def interrupted(self) -> bool:
        """Return whether a signal ends the run before its last step."""
        return self.stop is not None and not self.stop.early and self.state.step < self.total_steps

    def notify(self, hook: str) -> None:
        """Call a hook of every callback. UserError where it may write, and the run's folder is gone."""
        for callback in self.callbacks:
            if hook != "step_end":  # the one that writes no file of its own, and comes too often to look
                self.records.folder.lock.check()
            with self.records.writing():
                getattr(callback, hook)(self)

    def stop_early(self, why: str) -> None:
        """Vote to end the run at the next step, as finished."""
        self.asked = self.asked or Stop(why, early=True)

    def agreed_stop(self) -> Stop | None:
        """Return why the run ends, if any rank has asked for it; all ranks ask at the same places."""
        if orphaned():
            self.asked = self.asked or Stop("the process that started this one is gone", signal=signal.SIGTERM)
        self.ballot.close()
        self.stop = first_non_none(self.stop or self.asked)
        return self.stop

    def must_stop(self) -> bool:
        """Return whether the run ends after this step, the same on every rank; several ranks vote one step ahead."""
        asked = self.ballot.cast((self.stop or self.asked) is not None or orphaned())
        return asked and self.agreed_stop() is not None

    def row_shares(self, group: list[Any]) -> list[float]:
        """Return the weight of each batch's mean loss on this rank in the coming step: its own rows over all the step's,
        times the number of ranks, so that the mean over ranks is the mean over all rows. 0 where this rank has no row.
        """
        if self.world == 1:
            rows = [len(batch) for batch in group]
            return [own / sum(rows) for own in rows]
        size, begun = self.settings.batch_size, 0 if self.settings.overfit else self.state.step % self.steps_per_epoch
        first = begun * self.settings.gradient_accumulation_steps * size
        rows = [min(size, self.dataset.epoch_size - first - i * size) for i in range(len(group))]
        return [len(range(self.rank, count, self.world)) * self.world / sum(rows) for count in rows]

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which backward passes average gradients over the ranks only if it is the step's last."""
        if is_sharded(self.state.objective.network):
            return gradients_shared(self.state.objective.network, last)
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def log(self, metrics: dict[str, float], provenance: dict[str, str] | None = None) -> None:
        """Write metrics at the current step; provenance of scores by their names."""
        for callback in self.callbacks:
            metrics = metrics | callback.extra_metrics(self)
        now = self.now
        metrics = {**metrics, "epoch": float(now[1]), "train/elapsed_seconds": now[2]}
        self.last_values |= metrics
        self.records.log(now, metrics, provenance)

    def evaluate(self, final: bool) -> dict[str, float]:
        """Score the EMA weights; returns the values by metric name, on every rank."""
        given = replace(self.inputs, final=final, weights=weights_in_words(self.records.config, self.state.step))
        with gathered(self.state.ema_objective.network):
            if self.rank == 0:
                self.evaluation = self.evaluator.evaluate(given)
            else:
                self.evaluator.evaluate_on_worker(given)
        if self.evaluation is not None and self.state.step:
            provenance = {score.name: score.provenance for score in self.evaluation.scores if score.provenance}
            self.log({**self.evaluation.values, "eval/seconds": self.evaluation.seconds}, provenance)
            self.write_status("running")
        self.notify("evaluation_end")
        return broadcast_from_rank0(None if self.evaluation is None else self.evaluation.values) or {}

    def payload(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the state, and where it comes from."""
        _, epoch, elapsed = self.now
        return self.state.state_dict() | {
            "elapsed": elapsed,
            "format": FORMAT,
            "run_name": self.notes.run_name,
            "arch": self.notes.choices["model"],
            "epoch": epoch,
            "second_time": self.state.objective.second_time,
            "config": self.records.config,
            "git_commit": git_commit(),
            "versions": package_versions(),
        }

    def save(self, epoch: int | None, best: bool) -> None:
        """Save the state, and what people and scripts want to know of it."""
        self.records.save(self.payload(), epoch, best)
        self.write_status("running")

    def write_status(self, state: str, why: str = "") -> None:
        scores = {name: v for name, v in self.last_values.items() if name.startswith(SCORES)}
        self.records.write_status(state, self.now, scores, why, self.device_words)


class Callback(ABC):
    """Hooks in the order they are called. `run` may be read; run.stop_early(why) is the only thing to do to it."""

    def fit_begin(self, run: Run) -> None: ...

    def epoch_begin(self, run: Run) -> None: ...

    def step_end(self, run: Run) -> None: ...

    def extra_metrics(self, run: Run) -> dict[str, float]:
        """Return figures to log beside those of the loop."""
        return {}

    def evaluation_end(self, run: Run) -> None: ...

    def epoch_end(self, run: Run) -> None: ...

    def fit_end(self, run: Run) -> None:
        """Called when the loop ends by itself or is interrupted."""

    def close(self) -> None:
        """Called last, whatever ended the run."""

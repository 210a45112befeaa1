"""A run: the parts a configuration names, assembled, and the few things they do together."""

from __future__ import annotations

import re
import signal
import sys
import time
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common.device import device_name
from common.distributed import broadcast_from_rank0, first_non_none, orphaned
from common.files import DISK_ERRORS, disk_sentence
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.evaluator import Evaluation, EvaluationInputs, Evaluator
from evaluation.metrics.base_metric import Decode
from losses.objective import FlowObjective, Objective
from losses.terms import LossOutput
from run_files.checkpoint import FORMAT, CheckpointFolder, write_export
from run_files.provenance import git_commit, package_versions, weights_in_words
from run_files.run_folder import RunFolder
from run_files.trackers import Tracker
from solvers.base_solver import Sampler
from training.state import TrainState
from training.step_hooks import SkipNonFinite, StepHook


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step. early: it was voted for, so the run counts as finished."""

    why: str
    early: bool = False
    signal: int = 0


@dataclass
class Run:
    """Everything one process of a run holds. config is resolved and plain; rank and world count processes.

    asked: why this process wants the run to end, at any moment; stop: why it does end, the same on every rank.
    """

    config: dict[str, Any]
    device: torch.device
    dataset: FlowDataset
    source: Source
    state: TrainState
    solver: Sampler
    evaluator: Evaluator
    forward: Callable[[Any, Objective | None], LossOutput]  # the objective, possibly compiled, under DDP if ranks are many
    folder: RunFolder
    checkpoints: CheckpointFolder
    tracker: Tracker
    callbacks: list[Callback]
    dataset_key: str
    flow: FlowObjective | None  # what evaluations sample: the EMA objective, under guidance if there is any
    decode: Decode | None = None  # from latent states to images
    rank: int = 0
    world: int = 1
    asked: Stop | None = None
    stop: Stop | None = None
    evaluation: Evaluation | None = None
    last_values: dict[str, float] = field(default_factory=dict)  # the newest value of every metric
    refused: set[str] = field(default_factory=set)  # kinds of files that the disk refused, each said once
    refusal: str = ""  # the newest, in words
    clock: float = 0.0
    split_clock: float = 0.0
    split_step: int = 0
    steps_since_split: int = 0

    def __post_init__(self) -> None:
        self.hook = (SkipNonFinite if self.config["on_nan"] == "skip" else StepHook)(self.config["log_every"])

    @property
    def batch_size(self) -> int:
        return self.config["batch_size"]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may see fewer batches."""
        return -(-self.dataset.batches_per_epoch(self.batch_size) // self.config["gradient_accumulation_steps"])

    @property
    def total_steps(self) -> int:
        return self.config["max_steps"] or self.config["epochs"] * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs done, a begun one counted once the run ends in it."""
        return -(-self.state.step // self.steps_per_epoch)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ends the run before its last step."""
        return self.stop is not None and not self.stop.early and self.state.step < self.total_steps

    @property
    def teacher(self) -> Objective | None:
        """Return the EMA objective, for losses that want a target from it."""
        return self.state.ema_objective if self.state.objective.needs_teacher else None

    def notify(self, hook: str) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            with self.writing():
                getattr(callback, hook)(self)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Where files are written: what the disk refuses ends the run, or with on_save_error=continue costs a line."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_ERRORS or self.config["on_save_error"] == "stop":
                raise
            self.refusal = disk_sentence(error)
            kind = re.sub(r"\d+", "", self.refusal)  # of whatever epoch
            if kind not in self.refused:
                print(f"note: {self.refusal}; training goes on (on_save_error=continue)", file=sys.stderr)
            self.refused.add(kind)

    def stop_early(self, why: str) -> None:
        """Vote to end the run at the next step, as finished."""
        self.asked = self.asked or Stop(why, early=True)

    def agreed_stop(self) -> Stop | None:
        """Why the run ends, if any rank has asked for it; all ranks ask at the same places."""
        if orphaned():
            self.asked = self.asked or Stop("the process that started this one is gone", signal=signal.SIGTERM)
        self.stop = first_non_none(self.stop or self.asked)
        return self.stop

    def shares(self, group: list[Any]) -> list[float]:
        """Return what the mean loss of each batch of the coming step weighs here, so that the mean over ranks is that of all
        rows.

        A batch's rows over the step's, times the number of ranks: that of a batch that left this rank no row is 0.
        """
        if self.world == 1:
            rows = [len(batch) for batch in group]
            return [own / sum(rows) for own in rows]
        begun = 0 if self.config["overfit"] else self.state.step % self.steps_per_epoch
        first = begun * self.config["gradient_accumulation_steps"] * self.batch_size
        rows = [min(self.batch_size, self.dataset.epoch_size - first - i * self.batch_size) for i in range(len(group))]
        return [len(range(self.rank, count, self.world)) * self.world / sum(rows) for count in rows]

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which backward passes average gradients over the ranks only if it is the step's last."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def elapsed(self) -> float:
        """Return seconds spent in the loop, earlier sittings included."""
        return self.state.elapsed + (time.perf_counter() - self.clock if self.clock else 0.0)

    def split_time(self) -> float:
        """Return seconds since the last call, and as a side effect the steps in between."""
        now, step = time.perf_counter(), self.state.step
        seconds = now - self.split_clock
        self.steps_since_split = step - self.split_step
        self.split_clock, self.split_step = now, step
        return seconds

    def log(self, metrics: dict[str, float], provenance: dict[str, str] | None = None) -> None:
        """Write metrics at the current step, to metrics.jsonl and to the tracker; provenance to metrics.jsonl alone."""
        for callback in self.callbacks:
            metrics = metrics | callback.extra_metrics(self)
        metrics = {**metrics, "epoch": float(self.epoch), "train/elapsed_seconds": self.elapsed()}
        self.last_values |= metrics
        with self.writing():
            self.folder.metrics.append(self.state.step, self.epoch, self.elapsed(), metrics, provenance)
        self.tracker.log(metrics, self.state.step)

    def evaluate(self, final: bool) -> dict[str, float]:
        """Score the EMA weights; returns the values by metric name, on every rank."""
        given = EvaluationInputs(
            self.state.ema_objective,
            self.dataset,
            self.source,
            self.solver,
            self.config["seed"],
            self.dataset_key,
            Path(self.config["output_dir"]) / "cache",
            final,
            self.flow,
            self.decode,
            weights_in_words(self.config, self.state.step),
        )
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
        state = self.state.state_dict() | {"elapsed": self.elapsed()}
        return state | {
            "format": FORMAT,
            "run_name": self.config["run_name"],
            "arch": self.config["choices"]["model"],
            "epoch": self.epoch,
            "second_time": self.state.objective.second_time,
            "config": self.config,
            "git_commit": git_commit(),
            "versions": package_versions(),
        }

    def write_config(self) -> None:
        self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(self.config)), self.config["overrides"])

    def save(self, epoch: int | None, best: bool) -> None:
        """Save the state, and what people and scripts want to know of it."""
        self.settle()
        with self.writing():
            self.folder.metrics.sync()
            if not self.folder.config_path.exists():  # deleted meanwhile: without it nothing goes on from the save
                self.write_config()
            self.checkpoints.save(self.payload(), epoch, best)
        self.write_status("running")

    def settle(self) -> None:
        """Wait for a save that is being written while training goes on."""
        with self.writing():
            self.checkpoints.settle()

    def last_save(self) -> str:
        """Return the save a run that ends badly can go on from, in words."""
        with suppress(OSError):
            self.checkpoints.settle()
        saves = self.checkpoints.saves()
        return f"the last good save is {saves[0]}" if saves else "nothing was saved yet"

    def write_status(self, state: str, why: str = "") -> None:
        scores = {name: v for name, v in self.last_values.items() if name.startswith(("eval/", "oracle/"))}
        with self.writing():
            self.folder.status.write(
                state, self.state.step, self.epoch, self.elapsed(), scores, why, device=device_name(self.device)
            )

    def export_weights(self, network_state: dict[str, Tensor]) -> Path:
        """Return model.safetensors: the EMA weights with the configuration, for use elsewhere."""
        path = self.folder.path / "model.safetensors"
        if self.rank == 0:
            self.folder.lock.check()
            write_export(path, self.payload() | {"ema": network_state})
        return path


class Callback(ABC):
    """Hooks in the order they are called. `run` may be read; run.stop_early(why) is the only thing to do to it."""

    def fit_begin(self, run: Run) -> None: ...

    def epoch_begin(self, run: Run) -> None: ...

    def step_end(self, run: Run) -> None: ...

    def extra_metrics(self, run: Run) -> dict[str, float]:
        """Figures to log beside those of the loop."""
        return {}

    def evaluation_end(self, run: Run) -> None: ...

    def epoch_end(self, run: Run) -> None: ...

    def fit_end(self, run: Run) -> None:
        """Called when the loop ends by itself or is interrupted."""

    def close(self) -> None:
        """Called last, whatever ended the run."""

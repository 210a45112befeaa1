"""What a run leaves: its folder, its saves and its tracker, written by rank 0 alone."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from common.errors import UserError
from common.files import DISK_ERRORS, disk_sentence
from run_files.averages import write_averages
from run_files.checkpoint import write_export
from run_files.checkpoint_folder import CheckpointFolder
from run_files.run_folder import RunFolder
from run_files.trackers import Tracker

Moment = tuple[int, int, float]  # step, epoch, seconds in the loop


class Records:
    """The files of a run. config: the resolved configuration, stored as it is and shown by the tracker."""

    def __init__(self, config: dict[str, Any], folder: RunFolder, checkpoints: CheckpointFolder, tracker: Tracker):
        self.config = config
        self.folder, self.checkpoints, self.tracker = folder, checkpoints, tracker
        self.refused: set[str] = set()  # kinds of files that the disk refused, each noted once
        self.refusal = ""  # the newest, in words

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround the writing of files: what the disk refuses ends the run, or with on_save_error=continue costs a line."""
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

    def remove_temporaries(self) -> None:
        """Remove half-written files of processes of this run that were killed; its lock is held."""
        self.folder.remove_temporaries()
        self.checkpoints.remove_temporaries()

    def begin(self, resumed_at: int | None) -> None:
        """Store the configuration, and drop the rows after the step a run goes on from."""
        self.remove_temporaries()
        self.write_config()
        if resumed_at is not None:
            self.folder.metrics.trim(resumed_at)
            for path in self.folder.averages():
                if self.folder.step_of(path) > resumed_at:
                    path.unlink()

    def write_config(self) -> None:
        self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(self.config)), self.config["overrides"])

    def start_tracker(self, resumed_at: int | None) -> None:
        shown = {key: value for key, value in self.config.items() if key not in ("changed", "overrides")}
        self.tracker.start(self.folder.name, shown, self.folder.path, resumed_at, bool(self.config["overwrite"]))

    def log(self, now: Moment, metrics: dict[str, float], provenance: dict[str, str] | None) -> None:
        """Write a row to metrics.jsonl and to the tracker; provenance to metrics.jsonl alone."""
        with self.writing():
            self.folder.metrics.append(*now, metrics, provenance)
        self.tracker.log(metrics, now[0])

    def save(self, payload: dict[str, Any], epoch: int | None, best: bool) -> None:
        """Save the state, the rows up to it being on the disk."""
        self.settle()
        with self.writing():
            self.folder.metrics.sync()
            if not self.folder.config_path.exists():  # deleted meanwhile: without it nothing goes on from the save
                self.write_config()
            self.checkpoints.save(payload, epoch, best)

    def write_averages(self, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
        """Store the averages of the weights after a step, by their lengths."""
        self.folder.lock.check()
        with self.writing():
            write_averages(self.folder.path / "averages" / f"step_{step:08d}.pt", averages)

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

    def check_saved(self, step: int) -> None:
        """Raise UserError when on_save_error=continue has trained to a step that no save holds."""
        self.settle()
        if self.checkpoints.saved_step != step:
            raise UserError(f"{self.refusal}; step {step} is in no save, {self.last_save()}; make room, then resume=true")

    def write_status(self, state: str, now: Moment, scores: dict[str, float], why: str, device: str) -> None:
        epochs = 0 if self.config["max_steps"] else self.config["epochs"]  # 0: it ends by its steps
        with self.writing():
            self.folder.status.write(state, *now, scores, why, device=device, epochs=epochs)

    def export(self, payload: dict[str, Any]) -> None:
        """Write model.safetensors: the EMA weights with the configuration, for use elsewhere."""
        self.folder.lock.check()
        write_export(self.folder.path / "model.safetensors", payload)


class SilentRecords(Records):
    """The files as the other ranks see them: they read, and write nothing."""

    def nothing(self, *_: Any, **__: Any) -> None: ...

    remove_temporaries = begin = log = save = write_averages = check_saved = write_status = export = nothing

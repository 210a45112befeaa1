"""Where the numbers of a run go to be looked at: a local trackio dashboard, TensorBoard or Weights & Biases.

A tracker is a convenience, metrics.jsonl is the record: whatever a tracker does wrong costs one line on stderr, never
the run. The libraries are imported inside the methods, so that a run without a tracker does not pay for them.
"""

import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.errors import UserError


class Tracker(ABC):
    """Receives the scalars and pictures of one run. project: the name they are shown under together."""

    def __init__(self, project: str = "denoising-zoo") -> None:
        self.project = project

    @abstractmethod
    def start(
        self, run_name: str, config: dict[str, Any], folder: Path, resume_step: int | None, overwrite: bool = False
    ) -> None:
        """Open the run.

        config: resolved, of plain values. folder: outputs/runs/<run_name>/, where a tracker that keeps files puts them.
        resume_step: of the checkpoint the run continues from; the history up to it is what metrics.jsonl has, so that each
        step is seen once. None for a run at its first step, which by `overwrite` replaces the earlier ones of its name.
        UserError when the tracker's package is not installed.
        """

    @abstractmethod
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record scalars at an optimizer step."""

    @abstractmethod
    def log_image(self, name: str, picture: Path, step: int) -> None:
        """Record the PNG file `picture` under `name`."""

    @abstractmethod
    def finish(self) -> None:
        """Write out what is pending and close the run."""


class NullTracker(Tracker):
    """trackio.enabled=false, and every process of a run but the first."""

    def start(self, *_: Any, **__: Any) -> None: ...

    def log(self, *_: Any) -> None: ...

    def log_image(self, *_: Any) -> None: ...

    def finish(self) -> None: ...


class TensorboardTracker(Tracker):
    """Event files under <folder>/tensorboard: `tensorboard --logdir outputs/runs`."""

    def start(
        self, run_name: str, config: dict[str, Any], folder: Path, resume_step: int | None, overwrite: bool = False
    ) -> None:
        purge_step = None if resume_step is None else resume_step + 1
        tensorboard = optional("torch.utils.tensorboard", "tensorboard")
        self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        as_markdown = "\n".join(f"    {name}: {value}" for name, value in config.items())
        self.writer.add_text("config", as_markdown, resume_step or 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), step)

    def log_image(self, name: str, picture: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class WandbTracker(Tracker):
    """A run on Weights & Biases, or under <folder>/wandb with WANDB_MODE=offline.

    Its history only moves forward: after a resume, steps that had been logged before are kept and their repetition is
    dropped, which shows each step once as well.
    """

    def start(
        self, run_name: str, config: dict[str, Any], folder: Path, resume_step: int | None, overwrite: bool = False
    ) -> None:
        wandb = optional("wandb", "wandb")
        self.image_type = wandb.Image
        self.run = wandb.init(
            project=self.project,
            name=run_name,
            id=self.run_id(folder / "wandb_id.txt", resumed=resume_step is not None),
            resume="never" if resume_step is None else "allow",
            config=config,
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    @staticmethod
    def run_id(memo: Path, resumed: bool) -> str:
        """Return the identity kept in `memo` for a resumed run, else a new one, written there."""
        if not (resumed and memo.is_file()):
            memo.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return memo.read_text(encoding="utf-8")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def log_image(self, name: str, picture: Path, step: int) -> None:
        self.run.log({name: self.image_type(str(picture))}, step=step)

    def finish(self) -> None:
        self.run.finish()


class GuardedTracker(Tracker):
    """Wraps any tracker: its first failure is one line on stderr and turns it off for the rest of the run."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.on = True

    def start(self, *given: Any, **keys: Any) -> None:
        self.guard(self.tracker.start, *given, **keys)

    def log(self, *given: Any) -> None:
        self.guard(self.tracker.log, *given)

    def log_image(self, *given: Any) -> None:
        self.guard(self.tracker.log_image, *given)

    def finish(self) -> None:
        self.guard(self.tracker.finish)
        self.on = False

    def guard(self, call: Callable[..., None], *given: Any, **keys: Any) -> None:
        """Make the call while the tracker is on; turn it off, once and for all, when that fails."""
        if not self.on:
            return
        try:
            call(*given, **keys)
        except UserError:
            raise
        except Exception as error:
            self.on = False
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"tracker off: {why}; metrics.jsonl has everything", file=sys.stderr)


def tracker_from_config(settings: dict[str, Any]) -> Tracker:
    """Return the guarded tracker that cfg.trackio asks for; that its package is missing is noticed by `start`."""
    from hydra.utils import instantiate

    keys = {name: value for name, value in settings.items() if name != "enabled"}
    return GuardedTracker(instantiate(keys)) if settings["enabled"] else NullTracker()


def optional(module: str, extra: str) -> Any:
    """Return the module of an optional tracker. UserError when its package is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"tracker={extra} needs the package {extra}, which is not installed: run `uv sync --extra {extra}`, "
            "or leave tracker= out for the local dashboard."
        ) from error

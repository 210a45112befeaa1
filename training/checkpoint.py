"""Checkpoint files: written atomically, loaded safely, named so that people find them."""

import os
import re
import shutil
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from training.errors import UserError

FORMAT = "denoising-zoo-checkpoint-1"


def write_atomically(path: Path, payload: dict[str, Any]) -> None:
    """torch.save to a temporary file beside `path`, then rename: a reader sees the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The payload of a checkpoint of this project, tensors only (weights_only). UserError for anything else."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; `python scripts/runs.py list` shows the runs there are")
    unreadable = UserError(f"{path} cannot be read as a checkpoint (it is damaged or not one); use another save")
    if not zipfile.is_zipfile(path):
        raise unreadable
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, ValueError, TypeError) as error:
        raise unreadable from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this project; give a checkpoint from outputs/ckpts")
    return payload


class CheckpointFolder:
    """outputs/ckpts/<arch>: archive/<run>_epoch_XXXX.pt, <run>_last.pt, <run>_best.pt, and last.pt for people.

    keep: how many epoch saves of this run stay in archive/ (0 keeps all). last.pt is a copy of the newest save of the
    architecture; nothing reads it.
    """

    def __init__(self, output_dir: Path, arch: str, run_name: str, keep: int):
        self.folder, self.run_name, self.keep = output_dir / "ckpts" / arch, run_name, keep
        self.archive = self.folder / "archive"

    @property
    def last(self) -> Path:
        return self.folder / f"{self.run_name}_last.pt"

    @property
    def best(self) -> Path:
        return self.folder / f"{self.run_name}_best.pt"

    def epoch_saves(self) -> list[Path]:
        """This run's archived saves, oldest first; never those of a run whose name merely begins alike."""
        pattern = re.compile(re.escape(self.run_name) + r"_epoch_(\d{4,})\.pt")
        found = [(int(m[1]), p) for p in self.archive.glob("*.pt") if (m := pattern.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def all_files(self) -> list[Path]:
        return [*self.epoch_saves(), *(path for path in (self.last, self.best) if path.exists())]

    def save(self, payload: dict[str, Any], epoch: int | None, best: bool) -> Path:
        """Write the newest state as <run>_last.pt; at an epoch's end also into archive/, and as best if it is."""
        write_atomically(self.last, payload)
        saved = self.last
        if epoch is not None:
            saved = self.archive / f"{self.run_name}_epoch_{epoch:04d}.pt"
            copy_atomically(self.last, saved)
        if best:
            copy_atomically(self.last, self.best)
        copy_atomically(self.last, self.folder / "last.pt")
        self.prune()
        return saved

    def prune(self) -> None:
        """Drop the oldest archived saves beyond `keep`."""
        if self.keep:
            for path in self.epoch_saves()[: -self.keep]:
                path.unlink()

    def saves(self) -> list[Path]:
        """What this run can go on from, the newest first."""
        return [path for path in (self.last, *reversed(self.epoch_saves())) if path.exists()]

    def newest(self) -> Path:
        """This run's newest save. UserError when there is none."""
        if not self.saves():
            raise UserError(f"run_name={self.run_name} has no save in {self.folder}; start it anew with overwrite=true")
        return self.saves()[0]


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file so that `target` is never seen half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)

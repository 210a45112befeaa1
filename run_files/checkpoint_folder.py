"""The saves of a run: named so that people find them, written while training goes on, pruned, and found again."""

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from common.errors import UserError
from common.files import remove_temporaries, share
from run_files.checkpoint import is_readable, load_checkpoint, write_checkpoint
from run_files.run_folder import save_name

ASYNC_BYTES = 64 * 2**20  # a smaller save is written in less time than a thread is worth


def tensors_in(node: Any) -> list[Tensor]:
    """Return every tensor of nested dicts and lists."""
    return [leaf for leaf in tree_leaves(node) if isinstance(leaf, Tensor)]


def frozen(node: Any) -> Any:
    """Return a copy of nested dicts and lists whose tensors, on the CPU, training cannot change any more.

    From CUDA they are copied to pinned memory, all on their way at once; the host waits at the end.
    """

    def copied(tensor: Tensor) -> Tensor:
        on_cuda = tensor.device.type == "cuda"
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_cuda)
        return place.copy_(tensor.detach(), non_blocking=on_cuda)

    copy = tree_map_only(Tensor, copied, node)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy


class CheckpointFolder:
    """outputs/ckpts/<arch>: archive/<run>_epoch_XXXX.pt, <run>_last.pt, <run>_best.pt, and last.pt for people.

    keep: how many epoch saves of this run stay in archive/ (0 keeps all). One save is one file under several names (hard
    links). last.pt is the newest save of the architecture; nothing reads it.
    in_background: whether a thread writes while training goes on, from a copy of the state; None: where it is large.
    """

    def __init__(self, output_dir: Path, arch: str, run_name: str, keep: int, in_background: bool | None = None):
        self.output_dir, self.folder, self.run_name, self.keep = output_dir, output_dir / "ckpts" / arch, run_name, keep
        self.archive = self.folder / "archive"
        self.in_background = in_background
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self.pending: Future[None] | None = None
        self.written: Callable[[], None] | None = None  # called after each save, by whichever thread has written it
        self.saved_step: int | None = None  # of the newest save that this object has on the disk

    @property
    def last(self) -> Path:
        return self.folder / f"{self.run_name}_last.pt"

    @property
    def best(self) -> Path:
        return self.folder / f"{self.run_name}_best.pt"

    def epoch_saves(self) -> list[Path]:
        """Return this run's archived saves, oldest first."""
        pattern = save_name(self.run_name)
        found = [(int(m[1]), p) for p in self.archive.glob("*.pt") if (m := pattern.fullmatch(p.name)) and m[1]]
        return [path for _, path in sorted(found)]

    def save(self, payload: dict[str, Any], epoch: int | None, best: bool) -> None:
        """Save the state, once the save before has ended: at once, or as a thread's work that `settle` waits for."""
        self.settle()
        tensors = tensors_in(payload)
        large = sum(tensor.nbytes for tensor in tensors) >= ASYNC_BYTES
        if large if self.in_background is None else self.in_background:
            self.pending = self.writer.submit(self.write, frozen(payload), epoch, best)
        else:
            elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
            self.write(frozen(payload) if elsewhere else payload, epoch, best)

    def settle(self) -> None:
        """Wait for the save that is being written, if any. Raises what stopped it, once."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def write(self, payload: dict[str, Any], epoch: int | None, best: bool) -> None:
        """Write the newest state as <run>_last.pt; at an epoch's end also into archive/, and as best if it is.

        <run>_last.pt comes last: whatever stops a save half-way, a resumed run goes on from the save before and does the
        rest again.
        """
        saved = self.last if epoch is None else self.archive / f"{self.run_name}_epoch_{epoch:04d}.pt"
        write_checkpoint(saved, payload)
        if best:
            share(saved, self.best)
        share(saved, self.folder / "last.pt", owner=f"{self.run_name}.")
        if epoch is not None:
            self.prune()
            share(saved, self.last)
        self.saved_step = payload["step"]
        if self.written is not None:
            self.written()

    def prune(self) -> None:
        """Drop the oldest archived saves beyond `keep`, but none while no newer one can be read back."""
        kept, dropped = self.epoch_saves()[-self.keep :], self.epoch_saves()[: -self.keep]
        if self.keep and dropped and any(is_readable(path) for path in reversed(kept)):
            for path in dropped:
                path.unlink()

    def saves(self) -> list[Path]:
        """Return what this run can go on from: the last save, the archived ones from the newest, the best."""
        return [path for path in (self.last, *reversed(self.epoch_saves()), self.best) if path.exists()]

    def newest(self) -> tuple[Path, dict[str, Any]]:
        """Return this run's newest whole save and its payload; a line names newer ones. UserError when there is none."""
        damaged: list[tuple[Path, UserError]] = []
        for path in self.saves():
            try:
                payload = load_checkpoint(path)
            except UserError as error:
                damaged.append((path, error))
                continue
            if damaged:
                names = ", ".join(path.name for path, _ in damaged)
                print(f"note: {names} cannot be read; going on from {path.name} (step {payload['step']:,}) instead")
            return path, payload
        if len(damaged) == 1:
            raise damaged[0][1]
        why = f"none of the {len(damaged)} saves of {self.run_name} in {self.folder} can be read"
        why = why if damaged else f"run_name={self.run_name} has no save in {self.folder}"
        raise UserError(f"{why}; start it again with overwrite=true, which moves its files aside")

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run left half-written. The run's lock is held."""
        names = rf"{save_name(self.run_name).pattern}|{re.escape(self.run_name)}\.last\.pt"
        for folder in (self.folder, self.archive):
            remove_temporaries(folder, names)

"""Checkpoint files: written atomically, verified when read, loaded safely, named so that people find them."""

import hashlib
import json
import re
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.errors import UserError
from common.files import remove_temporaries, replacing, share
from configuration.values import RUN_NAME
from run_files.stored_values import note_once

FORMAT = "denoising-zoo-checkpoint-1"
KINDS: dict[str, Any] = {
    "network": dict, "ema": dict, "optimizer": dict, "schedule": dict, "scaler": dict, "window": dict, "step": int,
    "best": int | float, "waited": int, "elapsed": int | float, "run_name": str, "second_time": str | None, "config": dict,
}  # fmt: skip
KEYS = tuple(KINDS)

ASYNC_BYTES = 64 * 2**20  # a smaller save is written in less time than a thread is worth

# What zipfile, torch, its unpickler and safetensors raise at files that anyone may have written.
BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    SafetensorError, TypeError, UnpicklingError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """torch.save, in one step, with a digest of the payload.

    OSError when the disk refuses; torch's writer hides that in an error of its own.
    """
    with replacing(path) as file:
        try:
            torch.save(payload | {"digest": digest_of(payload)}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def digest_of(node: Any) -> str:
    """SHA-256 of nested dicts and lists: of every plain value, and of the type, shape and bytes of every tensor."""
    digest = hashlib.sha256()
    add_to_digest(digest, node)
    return digest.hexdigest()


def add_to_digest(digest: Any, node: Any) -> None:
    if isinstance(node, torch.Tensor):
        digest.update(f"{node.dtype} {list(node.shape)};".encode())
        digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(node, dict):
        add_to_digest(digest, sorted(node.items(), key=lambda item: repr(item[0])))
    elif isinstance(node, list | tuple):
        digest.update(f"{len(node)};".encode())
        for inner in node:
            add_to_digest(digest, inner)
    else:
        digest.update(f"{type(node).__name__} {node!r};".encode(errors="surrogatepass"))


def check_digest(path: Path, stored: Any, content: Any) -> None:
    """Raise UserError unless what was read is what was written: two readers of one damaged file may see
    different archives.
    """
    if stored is None:
        note_once(f"{path} has no digest, as files of earlier versions; whether it is undamaged cannot be told")
    elif stored != digest_of(content):
        raise UserError(f"{path} is damaged: what is read from it is not what was written; use another save")


def write_export(path: Path, payload: dict[str, Any]) -> None:
    """The EMA weights of a payload as safetensors, with its configuration, and what load_checkpoint wants, as metadata."""
    weights = {name: tensor.contiguous().cpu() for name, tensor in payload["ema"].items()}
    facts = {key: payload[key] for key in ("run_name", "step", "second_time")}
    words = {"config": json.dumps(payload["config"]), "facts": json.dumps(facts)}
    with replacing(path) as file:
        file.write(save(weights, words | {"digest": digest_of([weights, words])}))


def read_export(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Return the payload of what write_export wrote: a checkpoint with the EMA weights as its only ones, which no run
    resumes.
    """
    with safe_open(path, "pt", device=str(device)) as opened:
        words, weights = dict(opened.metadata() or {}), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    check_digest(path, words.pop("digest", None), [weights, words])
    config = json.loads(words["config"])
    loss = config["loss"]
    facts = {"step": 0, "second_time": None if "cross_entropy" in loss["_target_"] else loss.get("second_time", "state")}
    facts |= {"run_name": config["run_name"]} | json.loads(words.get("facts", "{}"))
    state = {key: {} for key in KINDS} | {"best": 0.0, "waited": 0, "elapsed": 0.0, "format": FORMAT}
    return state | facts | {"network": weights, "ema": weights, "config": config}


def check_archive(path: Path) -> None:
    """Raise UserError unless every byte is as torch.save wrote it: each entry's CRC-32 holds, which torch.load does not
    check.

    torch.save stores entries as they are. One that says it is compressed, or larger than the file, is a bomb, not a save.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(
                f"{path} would unpack to more than it holds, which no save of this project does; use another file"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the payload of a checkpoint of this project, or of a run's model.safetensors, verified, tensors only
    (weights_only).

    UserError for anything else.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; `python scripts/runs.py list` shows the runs there are")
    try:
        if path.suffix == ".safetensors":
            payload = read_export(path, device)
            check_payload(path, payload)
            return payload
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # what torch suspects of a foreign file is said below, in a sentence
            payload = torch.load(path, map_location=device, weights_only=True)
        check_payload(path, payload)
        content = dict(payload)
        check_digest(path, content.pop("digest", None), content)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path} cannot be read as a checkpoint (it is damaged or not one); use another save") from error
    return content


def check_payload(path: Path, payload: Any) -> None:
    """Raise UserError for no checkpoint of this project, one of another version, or one with parts missing or of another
    kind.
    """
    name, _, version = FORMAT.rpartition("-")
    written = payload.get("format") if isinstance(payload, dict) else None
    if not isinstance(written, str) or not re.fullmatch(rf"{name}-\d+", written):
        raise UserError(f"{path} was not written by this project; give a checkpoint from outputs/ckpts")
    if written != FORMAT:
        theirs = written.rpartition("-")[2]
        raise UserError(
            f"{path} has checkpoint format {theirs}, and this version of the project reads format {version}; "
            "use the version that wrote it (its git_commit is in the file)"
        )
    lacking = [key for key in KEYS if key not in payload]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}, so it is no whole checkpoint; use another save")
    for key, kind in KINDS.items():
        if not isinstance(payload[key], kind) or (kind is int and payload[key] < 0):
            raise UserError(f"{path} holds {str(payload[key])[:60]!r} as its {key}, which no save does; use another save")
    if not RUN_NAME.fullmatch(payload["run_name"]):
        raise UserError(f"{path} names its run {payload['run_name'][:60]!r}, which cannot name files; use another save")
    for weights in (payload["network"], payload["ema"]):
        for name, value in weights.items():
            if not isinstance(name, str) or not is_stored_weight(value):
                raise UserError(f"{path} holds something else than real numbers as {str(name)[:60]!r}; use another save")


def is_stored_weight(value: Any) -> bool:
    """Whether it is a tensor of real numbers that are there, each in its place."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout is torch.strided and not (value.is_meta or value.is_complex() or value.is_quantized)


def tensor_bytes(node: Any) -> int:
    """Return bytes of all tensors in nested dicts and lists."""
    if isinstance(node, torch.Tensor):
        return node.nbytes
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return sum(map(tensor_bytes, inner))


def frozen(node: Any) -> Any:
    """Return a copy of nested dicts and lists whose tensors, on the CPU, training cannot change any more."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: frozen(inner) for key, inner in node.items()}
    return type(node)(map(frozen, node)) if isinstance(node, list | tuple) else node


class CheckpointFolder:
    """outputs/ckpts/<arch>: archive/<run>_epoch_XXXX.pt, <run>_last.pt, <run>_best.pt, and last.pt for people.

    keep: how many epoch saves of this run stay in archive/ (0 keeps all). One save is one file under several names (hard
    links). last.pt is the newest save of the architecture; nothing reads it.
    in_background: whether a thread writes while training goes on, from a copy of the state; None: where it is large.
    """

    def __init__(self, output_dir: Path, arch: str, run_name: str, keep: int, in_background: bool | None = None):
        self.folder, self.run_name, self.keep = output_dir / "ckpts" / arch, run_name, keep
        self.archive = self.folder / "archive"
        self.in_background = in_background
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self.pending: Future[None] | None = None
        self.saved_step: int | None = None  # of the newest save that this object has on the disk

    @property
    def last(self) -> Path:
        return self.folder / f"{self.run_name}_last.pt"

    @property
    def best(self) -> Path:
        return self.folder / f"{self.run_name}_best.pt"

    def epoch_saves(self) -> list[Path]:
        """Return this run's archived saves, oldest first; never those of a run whose name merely begins alike."""
        pattern = re.compile(re.escape(self.run_name) + r"_epoch_(\d{4,})\.pt")
        found = [(int(m[1]), p) for p in self.archive.glob("*.pt") if (m := pattern.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def all_files(self) -> list[Path]:
        return [*self.epoch_saves(), *(path for path in (self.last, self.best) if path.exists())]

    def save(self, payload: dict[str, Any], epoch: int | None, best: bool) -> None:
        """Save the state, once the save before has ended: at once, or as a thread's work that `settle` waits for."""
        self.settle()
        large = tensor_bytes(payload) >= ASYNC_BYTES
        if large if self.in_background is None else self.in_background:
            self.pending = self.writer.submit(self.write, frozen(payload), epoch, best)
        else:
            self.write(payload, epoch, best)

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

    def prune(self) -> None:
        """Drop the oldest archived saves beyond `keep`, but none while no newer one can be read back."""
        kept, dropped = self.epoch_saves()[-self.keep :], self.epoch_saves()[: -self.keep]
        if self.keep and dropped and any(readable(path) for path in reversed(kept)):
            for path in dropped:
                path.unlink()

    def saves(self) -> list[Path]:
        """Return what this run can go on from, the best first: its last save, the archived ones from the newest, the best
        one.
        """
        return [path for path in (self.last, *reversed(self.epoch_saves()), self.best) if path.exists()]

    def newest(self) -> tuple[Path, dict[str, Any]]:
        """Return this run's newest save that is whole, and its payload; one line says so when a newer one is damaged.

        UserError when there is none.
        """
        damaged = []
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
        if damaged:
            raise UserError(
                f"none of the {len(damaged)} saves of {self.run_name} in {self.folder} can be read; "
                "start it anew with overwrite=true, which moves them aside"
            )
        raise UserError(f"run_name={self.run_name} has no save in {self.folder}; start it anew with overwrite=true")

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run left half-written. The run's lock is held."""
        names = rf"{re.escape(self.run_name)}(_last|_best|_epoch_\d{{4,}}|\.last)\.pt"
        for folder in (self.folder, self.archive):
            remove_temporaries(folder, names)


def saves_of(output_dir: Path, run_name: str) -> list[Path]:
    """Return every save of the run, of whatever architecture."""
    folders = [
        CheckpointFolder(output_dir, arch.name, run_name, keep=0) for arch in sorted((output_dir / "ckpts").glob("*"))
    ]
    return [path for folder in folders for path in folder.all_files()]


class SilentCheckpointFolder(CheckpointFolder):
    """The saves as the other processes of a run see them: they read, and write none."""

    def save(self, payload: dict[str, Any], epoch: int | None, best: bool) -> None:
        self.saved_step = payload["step"]

    def remove_temporaries(self) -> None: ...


def readable(path: Path) -> bool:
    """Whether the file is a zip archive whose every entry has its checksum."""
    try:
        check_archive(path)
    except (UserError, *BROKEN):
        return False
    return True

"""A checkpoint file: written atomically, verified when read, loaded safely."""

import hashlib
import json
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.errors import UserError
from common.files import replacing, require
from configuration.values import RUN_NAME
from run_files.stored_values import note_once

FORMAT = "denoising-zoo-checkpoint-1"
MOST_VALUES = 5 * 10**6  # in a save: numbers, texts and tensors
METADATA = "__metadata__"  # of a .npz: no weight's name, and what safetensors calls its own
KINDS: dict[str, Any] = {
    "network": dict, "ema": dict, "optimizer": dict, "schedule": dict, "scaler": dict, "window": dict, "step": int,
    "best": int | float, "waited": int, "elapsed": int | float, "run_name": str, "second_time": str | None, "config": dict,
}  # fmt: skip

# What zipfile, torch, its unpickler and safetensors raise at files that anyone may have written.
BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    SafetensorError, TypeError, UnpicklingError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Store a payload in one step, with its digest. OSError when the disk refuses, which torch hides in one of its own."""
    with replacing(path) as file:
        try:
            torch.save(payload | {"digest": digest_of(payload)}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def digest_of(node: Any) -> str:
    """Return the SHA-256 of nested dicts and lists: of plain values, and of type, shape and bytes of every tensor."""
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


def write_export(path: Path, payload: dict[str, Any]) -> None:
    """Store the EMA weights of a payload as .safetensors or, by that ending, as .npz: under their names, each as an array,
    and as metadata the configuration and what load_checkpoint needs. UserError for weights that NumPy has no type for.
    """
    weights = {name: tensor.contiguous().cpu() for name, tensor in payload["ema"].items()}
    facts = {key: payload[key] for key in ("run_name", "step", "second_time")}
    words = {"config": json.dumps(payload["config"]), "facts": json.dumps(facts)}
    words["digest"] = digest_of([weights, words])
    with replacing(path) as file:
        if path.suffix == ".npz":
            write_arrays(file, weights, words)
        else:
            file.write(save(weights, words))


def write_arrays(file: BinaryIO, weights: dict[str, torch.Tensor], words: dict[str, str]) -> None:
    """Write weights as np.savez does, whatever their names, and the words as JSON in bytes, which MLX can load too."""
    lost = next((name for name, tensor in weights.items() if tensor.dtype is torch.bfloat16), None)
    if lost is not None:
        raise UserError(f"NumPy has no bfloat16, which {lost} is; use a file that ends in .safetensors")
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    arrays[METADATA] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def read_export(path: Path, device: torch.device | str) -> tuple[Any, Any, Any]:
    """Return the payload of what write_export wrote, which no run resumes, its digest, and what that is of."""
    if path.suffix == ".npz":
        weights, words = read_arrays(path)
    else:
        with safe_open(path, "pt") as opened:
            words, weights = dict(opened.metadata() or {}), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    digest, config = words.pop("digest", None), json.loads(words["config"])
    loss, content = config["loss"], [weights, words]
    facts = {"step": 0, "second_time": None if "cross_entropy" in loss["_target_"] else loss.get("second_time", "state")}
    facts |= {"run_name": config["run_name"]} | json.loads(words.get("facts", "{}"))
    state = {key: {} for key in KINDS} | {"best": 0.0, "waited": 0, "elapsed": 0.0, "format": FORMAT}
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    return state | facts | {"network": weights, "ema": weights, "config": config}, digest, content


def read_arrays(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the weights of a .npz and the words that write_export put beside them. UserError where there are none."""
    check_archive(path)
    arrays = arrays_of(path)
    if METADATA not in arrays:
        raise UserError(
            f"{path} holds no weights with their configuration; write them by `python scripts/export.py ckpt=... "
            "form=weights out=x.npz`, which takes those of another file by weights="
        )
    words = json.loads(arrays.pop(METADATA).tobytes())
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, words


def arrays_of(path: Path) -> dict[str, Any]:
    """Return the arrays of a .npz; ValueError where one is pickled."""
    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def read_archive(path: Path, device: torch.device | str) -> tuple[Any, Any, Any]:
    """Return the payload of what write_checkpoint wrote, its digest, and what that is of."""
    check_archive(path)
    with warnings.catch_warnings(action="ignore"):  # what torch suspects of a foreign file is said by wrong_payload
        payload = torch.load(path, map_location=device, weights_only=True)
    digest = payload.pop("digest", None) if isinstance(payload, dict) else None
    return payload, digest, payload


def check_archive(path: Path) -> None:
    """Raise BadZipFile unless each entry's CRC-32 holds, which torch.load does not check.

    UserError for an entry that says it is compressed, or larger than the file: torch.save stores entries as they are.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} would unpack to more than it holds, which no save does; use another file")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


def endless(node: Any) -> bool:
    """Return whether nested dicts and lists are more than MOST_VALUES: a few lists, shared at each of their depths, are."""
    left, seen = [node], 0
    while left and seen + len(left) <= MOST_VALUES:
        inner, seen = left.pop(), seen + 1
        left += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return bool(left)


def is_readable(path: Path) -> bool:
    """Return whether the file is a zip archive whose every entry has its checksum."""
    try:
        check_archive(path)
    except (UserError, *BROKEN):
        return False
    return True


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the verified payload of a checkpoint, or of what write_export wrote. UserError for anything else."""
    require(path, "`python scripts/runs.py list` shows the runs and their checkpoints")
    payload: dict[str, Any] = {}
    try:
        read = read_export if path.suffix in (".safetensors", ".npz") else read_archive
        payload, digest, content = read(path, device)
        wrong = "holds lists within lists without end" if endless(payload) else wrong_payload(payload)
        if wrong is None and digest is None:
            note_once(f"{path} has no digest, as files of earlier versions; whether it is undamaged is not known")
        elif wrong is None and digest != digest_of(content):  # two readers of one damaged file may see different archives
            wrong = "is damaged: what is read from it is not what was written"
    except BROKEN:
        wrong = "cannot be read as a checkpoint (it is damaged or not one)"
    if wrong:
        raise UserError(f"{path} {wrong}" + ("" if ";" in wrong else "; use another save"))
    return payload


def wrong_payload(payload: Any) -> str | None:
    """Return why a payload is not a checkpoint of this project and version, whole and of plain values, or None."""
    name, _, version = FORMAT.rpartition("-")
    written = payload.get("format") if isinstance(payload, dict) else None
    if not isinstance(written, str) or not re.fullmatch(rf"{name}-\d+", written):
        return "was not written by this project; give a checkpoint from outputs/ckpts"
    if written != FORMAT:
        return (
            f"has checkpoint format {written.rpartition('-')[2]}, and this version of the project reads format {version}; "
            "use the version that wrote it (its git_commit is in the file)"
        )
    lacking = [key for key in KINDS if key not in payload]
    if lacking:
        return f"lacks {', '.join(lacking)}, so it is not a whole checkpoint"
    for key, kind in KINDS.items():
        if not isinstance(payload[key], kind) or (kind is int and payload[key] < 0):
            return f"holds {str(payload[key])[:60]!r} as its {key}, which no save does"
    if not RUN_NAME.fullmatch(payload["run_name"]):
        return f"names its run {payload['run_name'][:60]!r}, which cannot name files"
    for name, value in (*payload["network"].items(), *payload["ema"].items()):
        real = isinstance(value, torch.Tensor) and not (value.is_meta or value.is_complex() or value.is_quantized)
        if not (isinstance(name, str) and real and value.layout is torch.strided):
            return f"holds something else than real numbers as {str(name)[:60]!r}"
    return None

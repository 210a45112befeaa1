"""Snapshots of the averages of a run's weights: outputs/runs/<run_name>/averages/step_XXXXXXXX.pt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import AverageLength
from run_files.checkpoint import BROKEN, digest_of, read_archive, write_checkpoint


def write_averages(path: Path, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Store the weights of each length, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {"averages": {length: dict(weights) for length, weights in averages.items()}})


def read_averages(path: Path) -> dict[float, dict[str, Tensor]]:
    """Return the weights by length, on the CPU. UserError for a file that is damaged or another."""
    try:
        payload, digest, content = read_archive(path, "cpu")
        whole = digest == digest_of(content) and is_averages(payload)
    except BROKEN:
        whole = False
    if not whole:
        raise UserError(f"{path} cannot be read as averages of weights (it is damaged, or another file); remove it")
    return payload["averages"]


def is_averages(payload: Any) -> bool:
    """Return whether a payload is one that write_averages wrote."""
    averages = payload.get("averages") if isinstance(payload, dict) else None
    return isinstance(averages, dict) and all(
        isinstance(length, float) and get_args(AverageLength)[1].holds(length)
        and isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
        for length, weights in averages.items()
    )  # fmt: skip

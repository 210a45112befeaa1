"""The saves preset of dev/benchmark.py: how long a save holds training up, written at once and in the background."""

import statistics
import time
from pathlib import Path
from typing import Any

from run_files.checkpoint_folder import CheckpointFolder, tensors_in

SAVED_RUN = "dataloaders=photos model=unet batch_size=8 device=cpu num_workers=0"  # 50 million parameters


def saves_seconds(payload: dict[str, Any], place: Path, rounds: int) -> dict[str, float]:
    """Return seconds until training may go on, by the way of saving, and until the file is whole; medians of interleaved
    rounds.

    payload: what a checkpoint holds; it is written below `place`.
    """
    ways = {"at once": False, "in the background": True}
    folders = {way: CheckpointFolder(place, "unet", f"saved_{later}", 1, later) for way, later in ways.items()}
    held: dict[str, list[float]] = {f"seconds held up, {way}": [] for way in ways}
    held |= {f"seconds until it is written, {way}": [] for way in ways}
    for _ in range(rounds + 1):
        for way, folder in folders.items():
            begun = time.perf_counter()
            folder.save(payload, epoch=None, best=False)
            held[f"seconds held up, {way}"].append(time.perf_counter() - begun)
            folder.settle()
            held[f"seconds until it is written, {way}"].append(time.perf_counter() - begun)
    megabytes = sum(tensor.nbytes for tensor in tensors_in(payload)) / 2**20
    return {"size of a save, MiB": megabytes} | {what: statistics.median(seconds[1:]) for what, seconds in held.items()}

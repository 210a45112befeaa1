"""The devices preset of dev/benchmark.py: the same run in one process and in several, each with one thread."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common.command_line import ROOT
from common.errors import UserError

LAUNCHER = ROOT / "launcher.py"
BATCH = 64  # of the recipe photos, whose shape and model these are
RUN = f"dataloaders=random_images dataloaders.state_shape=[3,32,32] model=unet_small batch_size={BATCH} device=cpu"
QUIET = "evaluation=loss_only callbacks=none trackio.enabled=false"


def devices_rates(place: Path, counts: tuple[int, ...], rounds: int, steps: int, common: str) -> dict[str, float]:
    """Return samples a second by number of processes, and the ratio of the last to the first.

    Real runs, below `place`, of the small U-Net on the same global batch. A figure is the median over `rounds` windows of
    `steps` steps, a first window not counted. UserError when a run fails.
    """
    figures: dict[str, list[float]] = {}
    rows = 7 * -(-BATCH * steps * (rounds + 1) // 7)  # one epoch: no evaluation in between
    for count in counts:
        words = [
            f"run_name=devices_{count}", f"devices={count}", f"output_dir={place}", f"max_steps={steps * (rounds + 1)}",
            f"log_every={steps}", f"dataloaders.epoch_size={rows}", *RUN.split(), *QUIET.split(), *common.split(),
        ]  # fmt: skip
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(LAUNCHER), *words]
        result = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(f"the run with devices={count} failed: {result.stderr.strip().splitlines()[-1]}")
        lines = map(json.loads, (place / f"runs/devices_{count}/metrics.jsonl").read_text().splitlines())
        rates = [line["train/samples_per_second"] for line in lines if "train/samples_per_second" in line]
        figures[f"devices={count}"] = rates[1:]
    medians = {name: statistics.median(rates) for name, rates in figures.items()}
    first, *_, last = medians.values()
    return medians | {"ratio": last / first}

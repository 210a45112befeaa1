#!/usr/bin/env python
"""How long a training step takes, how much of it is data, and how fast samples come, for several settings side by side.

    python dev/benchmark.py                                          # the default run
    python dev/benchmark.py "model=mlp" "model=mlp model.width=512" "dataloaders=digits model=cnn"
    python dev/benchmark.py --rounds 20 --json benchmark.json "precision=fp32" "precision=bf16"

    python dev/benchmark.py --preset jvp               # what MeanFlow's derivative costs, by engine and share
    python dev/benchmark.py --preset jvp --and compile=true   # words for every row
    python dev/benchmark.py --preset data --steps 5 --rounds 3   # what feeding a step costs: device, files, latents
    python dev/benchmark.py --preset devices --steps 4   # two processes against one, a thread each, as real runs
    python dev/benchmark.py --preset saves --rounds 3    # how long a save holds training up, two ways

Each argument is one row: launcher overrides in quotes. Rounds are interleaved (row 1, row 2, row 1, ...), so a machine that
slows down slows all rows; figures are medians over rounds. gflop: floating-point operations of a step (matrix products and
convolutions, forward and backward). The last columns are the ratios of step time and of gflop to the first row; a preset
compares each model with its own first row. peak_memory_mb is the whole process's: all rows stay loaded side by side.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import front
from common.errors import UserError
from common.files import write_atomically
from dev.devices_benchmark import devices_rates
from dev.loader_benchmark import data_preset, loader_rates
from dev.saves_benchmark import SAVED_RUN, saves_seconds

COLUMNS = ("step_ms", "data_ms", "data_share", "train_samples_per_second", "generated_per_second", "peak_memory_mb", "gflop")
JVP_MODELS = {
    "unet_small, batch 32": "dataloaders=random_images dataloaders.state_shape=[1,8,8] model=unet_small batch_size=32",
    "dit_s, batch 8": "dataloaders=random_images model=dit_s batch_size=8",
}
ENGINES = ("func", "separate", "finite_difference")


def jvp_preset() -> dict[str, list[str]]:
    """Flow matching and MeanFlow of the same network, each engine at a share of 25 % and 100 %; by model."""
    flow = ["loss=mse loss.second_time=state loss.training.time_frequencies=[1,2,4]"]
    engines = [f"loss=meanflow loss.time_sampler.ratio={share} loss.jvp={e}" for e in ENGINES for share in ("0.25", "1.0")]
    return {name: [f"{model} {loss}" for loss in flow + engines] for name, model in JVP_MODELS.items()}


def tables_of(preset: str | None, rows: list[str], place: Path) -> dict[str, list[str]]:
    """Return the rows of each table, by its title; files that a preset needs are written below `place`."""
    if preset == "data":
        return data_preset(place)
    if preset in ("devices", "saves"):
        return {}  # their figures are no rows of steps
    return jvp_preset() if preset else {"": rows}


class Contestant:
    """One row: an assembled run that is stepped and sampled, never saved."""

    def __init__(self, overrides: str):
        from backends.submission import prepare
        from training.assemble import assemble

        fixed = ["run_name=benchmark", "trackio.enabled=false", "callbacks=none", "overwrite=true"]
        self.name = overrides or "default"
        self.run = assemble(prepare([*fixed, *overrides.split()]))
        self.groups = self.endless_groups()
        self.gflop = self.count_operations()

    def count_operations(self) -> float:
        """1e9 floating-point operations of one uncompiled step, forward and backward."""
        from torch.utils.flop_counter import FlopCounterMode

        objective, batch = self.run.state.objective, next(self.groups)[0]
        objective.train()
        with FlopCounterMode(display=False) as counter:
            objective(batch, self.run.state.teacher)["loss"].backward()
        objective.zero_grad(set_to_none=True)
        return counter.get_total_flops() / 1e9

    def endless_groups(self) -> Iterator[Any]:
        from training.loop import epoch_groups

        while True:
            self.run.state.step = 0
            yield from epoch_groups(self.run)

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        import torch

        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.run.device.type == "mps":
            torch.mps.synchronize()

    def timed(self, work: Any) -> tuple[float, Any]:
        self.wait()
        begun = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - begun, result

    def round(self, steps: int) -> dict[str, float]:
        """Return one round's figures: `steps` training steps, then one batch carried through the solver."""
        import torch

        from evaluation.generate import generate
        from training.loop import train_step

        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        data_seconds, groups = self.timed(lambda: [next(self.groups) for _ in range(steps)])
        step_seconds, _ = self.timed(lambda: [train_step(self.run, group) for group in groups])
        rows = sum(len(batch) for group in groups for batch in group)
        flow = self.run.inputs.flow
        if flow is None:
            raise UserError("this times generators, and a classifier makes no samples; leave loss=cross_entropy out")
        noise = self.run.source.sample(self.run.settings.batch_size, torch.Generator(self.run.device).manual_seed(0))
        with torch.no_grad():
            sample_seconds, _ = self.timed(
                lambda: generate(flow, self.run.inputs.solver, noise, None, lambda k, first, count: noise[:count])
            )
        total = data_seconds + step_seconds
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.run.device.type == "cuda" else resident_megabytes()
        return {
            "step_ms": 1e3 * total / steps,
            "data_ms": 1e3 * data_seconds / steps,
            "data_share": data_seconds / total,
            "train_samples_per_second": rows / total,
            "generated_per_second": len(noise) / sample_seconds,
            "peak_memory_mb": memory,
            "gflop": self.gflop,
        }


def resident_megabytes() -> float:
    """Peak resident memory of this process in MiB (all rows together)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def benchmark(rows: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Medians over interleaved rounds, one dict per row, the first of each row's rounds being a warm-up."""
    contestants = [Contestant(overrides) for overrides in rows]
    figures: list[list[dict[str, float]]] = [[] for _ in contestants]
    for _ in range(rounds + 1):
        for contestant, measured in zip(contestants, figures, strict=True):
            measured.append(contestant.round(steps))
    medians = [{c: statistics.median(m[c] for m in measured[1:]) for c in COLUMNS} for measured in figures]
    first = medians[0]
    return [
        {
            "row": contestant.name,
            **median,
            "ratio": median["step_ms"] / first["step_ms"],
            "gflop_ratio": median["gflop"] / max(first["gflop"], 1e-12),
        }
        for contestant, median in zip(contestants, medians, strict=True)
    ]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    columns = [*COLUMNS, "ratio", "gflop_ratio"]
    lines = ["| settings | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    return "\n".join([*lines, *(f"| `{r['row']}` | " + " | ".join(f"{r[c]:.4g}" for c in columns) + " |" for r in results)])


def two_columns(title: str, figures: dict[str, float]) -> str:
    """Figures by name, as a table."""
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value:,.4g} |" for name, value in figures.items())])


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=[""], help="launcher overrides, one quoted argument a row")
    parser.add_argument("--preset", choices=["jvp", "data", "devices", "saves"], help="rows made ready, instead of your own")
    parser.add_argument("--and", dest="common", default="", help="launcher overrides that every row gets")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds of each row")
    parser.add_argument("--steps", type=int, default=20, help="training steps in a round")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.steps < 1:
        raise UserError("--rounds and --steps take whole numbers of at least 1")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json} lies in a folder that does not exist; make it first")
    return options


def figures_of(options: argparse.Namespace, place: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what a preset measures besides rows of steps: its title and its figures by name."""
    if options.preset == "devices":
        yield (
            "samples a second, one thread a process",
            devices_rates(place, (1, 2), options.rounds, options.steps, options.common),
        )
    if options.preset == "saves":
        saved = Contestant(f"{SAVED_RUN} output_dir={place} {options.common}".strip())
        saved.round(1)  # the optimizer has its state after a step
        yield "saves of the large U-Net", saves_seconds(saved.run.payload(), place, options.rounds)
    if options.preset == "data":
        yield "loaders alone, rows a second on one core", loader_rates(place)


def carry_out(words: list[str]) -> None:
    """Carry out the command: print each table once it is measured, and write all figures where that is asked for."""
    options, results = parse(words), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        for title, rows in tables_of(options.preset, options.rows, Path(place)).items():
            found = benchmark([f"{row} {options.common}".strip() for row in rows], options.rounds, options.steps)
            print((f"\n{title}\n" if title else "") + markdown(found), flush=True)
            results += found
        for title, figures in figures_of(options, Path(place)):
            results.append({"row": title, **figures})
            print(f"\n{two_columns(title, figures)}", flush=True)
    if options.json:
        write_atomically(options.json, json.dumps(results, indent=2) + "\n")


def main(words: list[str]) -> int:
    return front(words, None, carry_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

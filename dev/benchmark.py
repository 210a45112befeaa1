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
    python dev/benchmark.py --preset operations          # what a step dispatches beside its network, by objective
    python dev/benchmark.py --preset peers               # beside torchcfm, flow_matching and torchdiffeq, where installed
    python dev/benchmark.py --preset gpu --markdown gpu.md   # all that a new accelerator should be asked, in 20 minutes

Each argument is one row: launcher overrides in quotes. Rounds are interleaved (row 1, row 2, row 1, ...), so a machine that
slows down slows all rows; figures are medians over rounds. gflop: floating-point operations of a step (matrix products and
convolutions, forward and backward). The last columns are the ratios of step time and of gflop to the first row; a preset
compares each model with its own first row. peak_memory_mb is the whole process's: all rows stay loaded side by side;
live_mb is what the tensors of one uncompiled step, forward and backward, hold at once.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import Parser, check_place, count, front
from common.files import write_atomically
from dev.contestant import ENGINES, Contestant
from dev.devices_benchmark import devices_rates
from dev.gpu_benchmark import gpu_tables
from dev.loader_benchmark import data_preset, loader_rates
from dev.operations_benchmark import operations_rows
from dev.peers_benchmark import peer_tables
from dev.saves_benchmark import SAVED_RUN, saves_seconds
from run_files.result import markdown

COLUMNS = (
    "step_ms", "data_ms", "data_share", "train_samples_per_second", "generated_per_second", "peak_memory_mb", "live_mb",
    "gflop",
)  # fmt: skip
JVP_MODELS = {
    "unet_small, batch 32": "dataloaders=random_images dataloaders.state_shape=[1,8,8] model=unet_small batch_size=32",
    "dit_s, batch 8": "dataloaders=random_images model=dit_s batch_size=8",
}
PRESETS = ("jvp", "data", "devices", "saves", "operations", "peers", "gpu")


def jvp_preset() -> dict[str, list[str]]:
    """Flow matching and MeanFlow of the same network, each engine at a share of 25 % and 100 %; by model."""
    flow = ["loss=mse loss.second_time=state loss.training.time_frequencies=[1,2,4]"]
    engines = [f"loss=meanflow loss.time_sampler.ratio={share} loss.jvp={e}" for e in ENGINES for share in ("0.25", "1.0")]
    return {name: [f"{model} {loss}" for loss in flow + engines] for name, model in JVP_MODELS.items()}


def tables_of(preset: str | None, rows: list[str], place: Path) -> dict[str, list[str]]:
    """Return the rows of each table, by its title; files that a preset needs are written below `place`."""
    if preset == "data":
        return data_preset(place)
    if preset == "jvp":
        return jvp_preset()
    return {} if preset else {"": rows}


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


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=[""], help="launcher overrides, one quoted argument a row")
    parser.add_argument("--preset", choices=PRESETS, help="rows made ready, instead of your own")
    parser.add_argument("--and", dest="common", default="", help="launcher overrides that every row gets")
    parser.add_argument("--rounds", type=count, default=10, help="counted rounds of each row")
    parser.add_argument("--steps", type=count, default=20, help="training steps in a round")
    parser.add_argument("--quick", action="store_true", help="with --preset gpu: sizes that only show that it runs")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(words)
    for key in ("json", "markdown"):
        if file := getattr(options, key):
            check_place(f"--{key}", file)
    return options


def figures_of(options: argparse.Namespace, place: Path) -> Iterator[tuple[str, list[dict[str, Any]] | dict[str, float]]]:
    """Yield each table of a preset once it is measured: its title, and its rows or its figures by name."""
    for title, rows in tables_of(options.preset, options.rows, place).items():
        yield title, benchmark([f"{row} {options.common}".strip() for row in rows], options.rounds, options.steps)
    if options.preset == "operations":
        yield "operations dispatched by a training step", operations_rows(options.common)
    if options.preset == "gpu":
        yield from gpu_tables(options.common, options.quick)
    if options.preset == "peers":
        yield from peer_tables(options.rounds, options.steps, options.common)
    if options.preset == "devices":
        figures = devices_rates(place, (1, 2), options.rounds, options.steps, options.common)
        yield "samples a second, one thread a process", figures
    if options.preset == "saves":
        saved = Contestant(f"{SAVED_RUN} output_dir={place} {options.common}".strip())
        saved.round(1)  # the optimizer has its state after a step
        yield "saves of the large U-Net", saves_seconds(saved.run.payload(), place, options.rounds)
    if options.preset == "data":
        yield "loaders alone, rows a second on one core", loader_rates(place)


def carry_out(words: list[str]) -> None:
    """Carry out the command: print each table once it is measured, and write all figures where that is asked for."""
    options, results, text = parse(words), list[dict[str, Any]](), ""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        for title, figures in figures_of(options, Path(place)):
            results += [{"row": title, **figures}] if isinstance(figures, dict) else figures
            part = block(title, figures)
            print(part, flush=True)
            text += part + "\n"
    if options.json:
        write_atomically(options.json, json.dumps(results, indent=2) + "\n")
    if options.markdown:
        write_atomically(options.markdown, text)


def block(title: str, figures: list[dict[str, Any]] | dict[str, float]) -> str:
    """Return a table under its title, of rows or of figures by name; the title alone where there are no rows."""
    if isinstance(figures, dict):
        return "\n" + markdown((title, ""), ((name, f"{value:,.4g}") for name, value in figures.items()))
    if not figures:
        return f"\n{title}"
    columns = [name for name in figures[0] if name != "row"]
    rows = ([f"`{row['row']}`", *(f"{row[name]:.4g}" for name in columns)] for row in figures)
    return (f"\n{title}\n\n" if title else "") + markdown(("settings", *columns), rows)


def main(words: list[str]) -> int:
    return front(words, None, carry_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The gpu preset of dev/benchmark.py: what this machine's accelerator computes, and how fast, as one block of Markdown.

First whether it is right (gpu_correctness.py). Then the rate of its matrix products, and against it training steps in each
mode, forward mode's share and samplers. What the device cannot do is one line, and the rest goes on.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.device import device_name, pick_device
from dev.contestant import ENGINES, Contestant, wait
from dev.gpu_correctness import Table, attempted, correctness

MODES = {"eager": "", "bf16": "precision=bf16", "compiled": "compile=true",
         "reduce-overhead": "compile=true compile_mode=reduce-overhead",
         "bf16, compiled": "precision=bf16 compile=true",
         "bf16, recomputed": "precision=bf16 checkpoint_activations=true"}  # fmt: skip
SHORT = "solver=euler solver.steps=1"  # where samplers are not what is measured
PRODUCTS = {kind: kind for kind in ("float32", "bfloat16")}


@dataclass(frozen=True)
class Sizes:
    """What is measured: words and rows by model, the side of square products, rounds and their steps, rounds before them."""

    models: dict[str, tuple[str, int]]
    side: int
    rounds: int
    steps: int
    warm_up: int = 2  # what compiles and tunes
    modes: tuple[str, ...] = tuple(MODES)
    solvers: tuple[str, ...] = ("euler", "midpoint", "rk4", "dopri5")
    compared: int | None = None  # how many objectives, None for all


FULL = Sizes({
    "mlp": ("model=mlp", 4096),
    "unet_small": ("dataloaders=random_images dataloaders.state_shape=[3,32,32] model=unet_small", 256),
    "dit_s": ("dataloaders=random_images model=dit_s", 64),
}, 8192, 5, 20)  # fmt: skip
TINY = {"mlp": ("model=mlp model.width=8 model.depth=1", 16)}
QUICK = Sizes(TINY, 64, 1, 1, 0, ("eager", "compiled"), ("euler", "dopri5"), 4)
SHARE = {"cuda": 1.0, "mps": 1 / 8, "cpu": 1 / 64}  # of the rows of FULL


def gpu_tables(common: str, quick: bool) -> Iterator[Table]:
    """Yield each table once it is measured, and a line, with no rows, for what is no table or cannot be done.

    common: words for every run; quick: sizes that only show that everything runs.
    """
    device, sizes = pick_device("auto"), QUICK if quick else FULL
    share = 1.0 if quick else SHARE.get(device.type, 1.0)
    models = {name: f"{one} batch_size={max(2, int(rows * share))} {common}" for name, (one, rows) in sizes.models.items()}
    yield f"## {device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", []
    yield from correctness(f"{QUICK.models['mlp'][0]} batch_size=64 {common}", common, sizes.compared)
    best = 1e-12
    for title, found in attempted("matrix products", PRODUCTS, lambda kind: matrix_rate(device, kind, sizes)):
        best = max(best, *(row["gflop_per_second"] for row in found), 0)
        yield title, found
    trained = {name: f"{words} {SHORT}" for name, words in models.items()}
    rows = {
        f"{name}, {mode}": f"{words} {MODES[mode]}"
        for name, words in trained.items()
        for mode in sizes.modes
        if name != "mlp" or "recomputed" not in mode  # which has no blocks
    }
    yield from attempted("training steps", rows, lambda words: training_figures(words, sizes, best))
    for name in list(trained)[-2:]:
        yield from derivatives(name, trained[name], sizes)
    image = next(reversed(models.values())) if quick else models["unet_small"]
    rows = {f"solver={solver}": f"{image} solver={solver}" for solver in sizes.solvers}
    pace = "generated_per_second"
    yield from attempted("samplers", rows, lambda words: {pace: rounds_of(Contestant(words), sizes)[pace]})


def matrix_rate(device: torch.device, kind: str, sizes: Sizes) -> dict[str, float]:
    """Return GFLOP/s of square products of a type, the best of the rounds; float32 as runs compute it: TF32 on CUDA."""
    side = max(64, int(sizes.side * SHARE.get(device.type, 1.0) ** 0.5))
    a = torch.randn(side, side, device=device).to(getattr(torch, kind))  # ones are faster: they switch fewer transistors
    seconds = []
    for _ in range(sizes.rounds + 1):
        wait(device)
        begun = time.perf_counter()
        for _ in range(sizes.steps):
            a @ a
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return {"side": side, "gflop_per_second": sizes.steps * 2 * side**3 / min(seconds) / 1e9}


def rounds_of(contestant: Contestant, sizes: Sizes) -> dict[str, float]:
    """Return the medians over the rounds that count."""
    found = [contestant.round(sizes.steps) for _ in range(sizes.warm_up + sizes.rounds)][sizes.warm_up :]
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def training_figures(words: str, sizes: Sizes, best: float) -> dict[str, float]:
    """Return the rate of steps, and what share of the best matrix rate (GFLOP/s) their operations reach."""
    median = rounds_of(Contestant(words), sizes)
    rate = 1e3 * median["gflop"] / median["step_ms"]
    kept = ("step_ms", "data_share", "train_samples_per_second", "peak_memory_mb")
    return {name: median[name] for name in kept} | {"gflop_per_second": rate, "share_of_matrix_rate": rate / best}


def derivatives(model: str, words: str, sizes: Sizes) -> Iterator[Table]:
    """Yield what MeanFlow's derivative costs: a step over a flow-matching one, by engine, and compiled."""
    flow = f"{words} loss=mse loss.second_time=state loss.training.time_frequencies=[1,2,4]"
    for mode in ("eager", "compiled"):
        base: list[float] = []

        def ratio(row: str, base: list[float] = base) -> dict[str, float]:
            step = rounds_of(Contestant(row), sizes)["step_ms"]
            base.append(step)
            return {"step_ms": step, "ratio": step / base[0]}

        engines = ENGINES if mode == "eager" else ("auto",)
        rows = {f"flow matching, {mode}": f"{flow} {MODES[mode]}"} | {
            f"meanflow, {engine}, {percent} %, {mode}":
            f"{words} loss=meanflow loss.jvp={engine} loss.time_sampler.ratio={percent / 100} {MODES[mode]}"
            for engine in engines for percent in (25, 100)
        }  # fmt: skip
        yield from attempted(f"{model}: derivatives, {mode}", rows, ratio)

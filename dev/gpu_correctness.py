"""The first part of the gpu preset of dev/benchmark.py: whether a device computes what the CPU computes.

Losses of a few steps of every objective and model, samples by every solver, and a run that goes on from its save; then how
often the host waits for the device in a step. Weights and draws are the same on both sides, products in full precision.
Scores are not compared, as the real states that they hold samples against are each device's own draws.
"""

import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import launcher
from common.device import full_products
from common.errors import UserError
from configuration.compose import groups
from dev.contestant import ENGINES, NOT_ON_POINTS, Contestant
from run_files.checkpoint import load_checkpoint
from training.loop import after_step, train_step

Table = tuple[str, list[dict[str, Any]]]
UNABLE = (RuntimeError, NotImplementedError, TypeError, AssertionError, UserError)  # how a device says that it cannot
STEPS, AGREES = 4, 1e-3  # steps compared with the CPU's, and the largest relative difference of a loss
SAMPLES_AGREE = 1e-3  # largest difference of a number of a sample, in standard deviations
DIGITS = "dataloaders=digits batch_size=16"
SMALL = {
    "cnn": "model.width=8 model.inner_width=16 model.embedding=16",
    "unet_small": "model.width=16 model.multipliers=[1,1]",
    "dit_s": "model.hidden_size=32 model.depth=2 model.heads=2",
    "resnet9": "model.width=8",
    "vit_tiny": "model.width=16 model.depth=2",
}
LEARNS = dict.fromkeys(("cnn", "unet_small", "dit_s"), "loss=meanflow conditional=true")
CLASSIFIES = "loss=cross_entropy evaluation=classifier"
MODELS = {name: f"{DIGITS} model={name} {words} {LEARNS.get(name, CLASSIFIES)}" for name, words in SMALL.items()}
LEARNED_FOR = {"flow_map": "loss=meanflow", "ascent": "loss=equilibrium_matching"}  # solvers of not every loss
READ = "loss=mse, its loss read"
SAMPLED = "evaluation=loss_only evaluation.samples=64"
GOING_ON = {"mlp": "model=mlp batch_size=64", "cnn": MODELS["cnn"]}
IN_SILENCE = "trackio.enabled=false callbacks=none evaluation=loss_only overwrite=true deterministic=true"


def attempted(title: str, rows: dict[str, str], measure: Callable[[str], dict[str, float]]) -> Iterator[Table]:
    """Yield a line for each row that the device cannot do, then the table of the others."""
    table = []
    for name, words in rows.items():
        torch._dynamo.reset()  # a row is compiled as it is in a run of its own
        try:
            table.append({"row": name, **measure(words)})
            print(f"measured: {title}, {name}", file=sys.stderr, flush=True)
        except UNABLE as error:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:150]
            yield f"- {title}, {name}: not on this device: {type(error).__name__}: {said}", []
    if table:
        yield title, table


def correctness(points: str, common: str, count: int | None = None) -> Iterator[Table]:
    """Yield each table, and after it whether all of it agrees.

    points: words of a small run on points; common: words of every run; count: of few rows each, None for all.
    """
    losses = {f"loss={loss}": f"{points} loss={loss}" for loss in groups()["loss"] if loss not in NOT_ON_POINTS}
    losses |= {f"meanflow by {engine}": f"{points} loss=meanflow loss.jvp={engine}" for engine in ENGINES}
    models, going = ({name: f"{row} {common}" for name, row in rows.items()} for rows in (MODELS, GOING_ON))
    solvers = {f"solver={name}": f"{points} solver={name} {LEARNED_FOR.get(name, '')}" for name in groups()["solver"]}
    solvers["pictures, guided"] = f"{models['cnn']} guidance=cfg"
    yield from judged(f"losses of {STEPS} steps", few(losses | (models if count is None else {}), count), compared, AGREES)
    yield from judged("samples", few(solvers, count), sampled, SAMPLES_AGREE)
    yield from judged("weights of a run that goes on from its save", few(going, count and 1), going_on, AGREES)
    if torch.cuda.is_available():
        read = {READ: f"{points} loss=mse"}
        yield from attempted(
            "times a step waits for the device, one number of it being read", read, lambda w: waits(w, True)
        )
        yield from attempted("times a step waits for the device", few(losses, count), waits)


def few(rows: dict[str, str], count: int | None) -> dict[str, str]:
    return rows if count is None else dict(list(rows.items())[-count:])


def judged(title: str, rows: dict[str, str], measure: Callable[[str], dict[str, float]], agrees: float) -> Iterator[Table]:
    """Yield a table of what the device and the CPU give, and a line: whether all differences are small."""
    table = []
    for heading, found in attempted(title, rows, measure):
        table += found
        yield heading if not found else f"{title}, on the device and on the CPU", found
    wrong = [row["row"] for row in table if not row["difference"] <= agrees]
    equal = f"all {len(table)} agree to {agrees:g}" if table else "nothing was compared"
    verdict = f"NOT EQUAL: {', '.join(wrong)}" if wrong else equal
    yield f"Device against CPU, {title}: {verdict}", []


def alike(words: str) -> tuple[Contestant, Contestant]:
    """Return the same run on the CPU and on the device, with the same weights."""
    device = Contestant(words)
    cpu = Contestant(words, device.config | {"device": "cpu"})
    for part in ("objective", "ema_objective"):
        theirs, ours = getattr(cpu.run.state, part), getattr(device.run.state, part)
        ours.network.load_state_dict(theirs.network.state_dict())
    return cpu, device


def compared(words: str) -> dict[str, float]:
    """Return the last loss on both, and the largest relative difference over the steps."""
    cpu, device = alike(words)
    losses, differences = (0.0, 0.0), [0.0]
    with full_products():
        for _ in range(STEPS):
            (batch,) = next(cpu.groups)
            moved = {name: value.to(device.run.device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
            pairs = ((cpu, batch), (device, replace(batch, **moved)))
            losses = tuple(train_step(one.run, [part])["loss"].item() for one, part in pairs)  # type: ignore[assignment]
            differences.append(abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12))
    return {"cpu": losses[0], "device": losses[1], "difference": max(differences)}


def sampled(words: str) -> dict[str, float]:
    """Return the mean of samples from the same noise on both, and their largest difference in standard deviations."""
    cpu, device = alike(f"{words} {SAMPLED}")
    with full_products():
        theirs, ours = (samples_of(one) for one in (cpu, device))
    return {
        "cpu": theirs.mean().item(), "device": ours.mean().item(),
        "difference": ((ours - theirs).abs().max() / theirs.std()).item(),
    }  # fmt: skip


def samples_of(contestant: Contestant) -> Tensor:
    contestant.run.evaluate(final=False)
    found: Any = contestant.run.evaluation
    return found.generation.samples.cpu()


def going_on(words: str) -> dict[str, float]:
    """Return the largest relative difference of the weights of two runs: one goes on from its save half way."""
    with tempfile.TemporaryDirectory(prefix="going-on-") as place, redirect_stdout(io.StringIO()):
        common = [*words.split(), *IN_SILENCE.split(), f"output_dir={place}", f"log.file={place}/LOG.md"]
        launcher.run("run_name=whole", *common, f"max_steps={STEPS}", "schedule=constant")
        launcher.run("run_name=parts", *common, f"max_steps={STEPS // 2}", "schedule=constant")
        launcher.run("run_name=parts", f"output_dir={place}", "resume=true", f"max_steps={STEPS}")
        whole, parts = (network_of(next(Path(place).rglob(f"{name}_last.pt"))) for name in ("whole", "parts"))
    distances = [(parts[n] - whole[n]).abs().max() / whole[n].abs().max().clamp(min=1e-12) for n in whole]
    return {"tensors": len(whole), "difference": max(distances).item()}


def network_of(checkpoint: Path) -> dict[str, Tensor]:
    return {name: value.double() for name, value in load_checkpoint(checkpoint)["network"].items()}


def waits(words: str, reads: bool = False) -> dict[str, float]:
    """Return how often the host waits for a CUDA device in a step between two log lines, as torch itself counts.

    reads: whether each step's loss is read, which is a wait: so one sees that they are counted.
    """
    contestant = Contestant(f"{words} log_every=1000")
    groups = [next(contestant.groups) for _ in range(2 * STEPS)]
    for group in groups[:STEPS]:
        after_step(contestant.run, train_step(contestant.run, group))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for group in groups[STEPS:]:
                values = train_step(contestant.run, group)
                after_step(contestant.run, values)
                if reads:
                    values["loss"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum("synchroniz" in str(warning.message) for warning in said) / STEPS}

"""The device contract on the emulated device, in its own process: python -m tests.emulated.contract KIND PLACE [PART ...]

Each case trains, samples or scores on the CPU and on the device, which draws the same random numbers, and compares. Prints
one line of JSON a case: [name, "" or what differs]. What the CPU gave is kept in the folder PLACE, for the other kind.
"""

import importlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache

from tests.emulated import device, disguise
from tests.emulated.comparisons import (
    CONFIGS,
    FEW,
    FEW_DRAWS,
    IMAGES,
    KIND,
    PLACE,
    POINTS,
    SCORED,
    SHARED,
    SMALL_MODELS,
    TINY,
    TRAINING,
    adaptive_steps_under_tf32,
    config_of,
    difference_under_tf32,
    from_the_cpu,
    going_on,
    same_curve,
    same_samples,
    same_scores,
    same_weights,
    saved_weights,
    waits_of,
    weights_after,
)
from tests.emulated.faults import planted_cases
from tests.emulated.surroundings import (
    CNN,
    PHOTOS,
    STREAMED,
    layouts,
    left_out,
    pictures,
    pinned_saves,
    read_by_this_process,
    streamed,
    tuned_shapes,
    waits_its_turn,
)

LOSS_OF_SOLVER = {"flow_map": ["loss=meanflow"], "ascent": ["loss=equilibrium_matching"]}  # not every loss
CLASSIFIERS = {"small_cnn_classifier", "resnet9", "vit_tiny"}


@cache
def losses() -> dict[str, list[str]]:
    """Return the derivative engines of each flow objective in configs/loss, one name "" where it has none."""
    found = {}
    for file in sorted((CONFIGS / "loss").glob("*.yaml")):
        if file.stem not in ("cross_entropy", "reflow", "distillation"):  # a classifier's; two with a teacher: see below
            engines = {"terminal_velocity": ["func", "finite_difference"]}.get(
                file.stem, ["func", "separate", "finite_difference"]
            )
            found[file.stem] = engines if "\njvp:" in file.read_text() else [""]
    return found


def objective_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Each objective by each engine; every other one with dropout, as MPS those that have none as CUDA."""
    cases = [(loss, engine) for loss, engines in losses().items() for engine in engines]
    for index, (loss, engine) in enumerate(cases):
        words = [*POINTS, *TRAINING, f"loss={loss}", *([f"loss.jvp={engine}"] * bool(engine))]
        words.append(f"model.dropout={0.3 if (index + (KIND == 'mps')) % 2 else 0.0}")
        yield f"{loss} {engine}".strip(), lambda words=words: same_curve(config_of(*words))


def model_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    for name, words in SMALL_MODELS.items():
        if name != "mlp":
            loss = ["loss=meanflow", "conditional=true"]
            if name in CLASSIFIERS:
                loss = ["loss=cross_entropy", "evaluation=classifier"]
            words = [*IMAGES, *TRAINING, *loss, f"model={name}", *words]
            yield name, lambda words=words: same_curve(config_of(*words), 1e-3)
    yield ("unet_small on augmented pictures", lambda: same_curve(config_of(*PHOTOS, *TRAINING), 1e-3))
    for fused in ("true", "null"):
        yield f"a step left out, fused={fused}", lambda fused=fused: left_out(f"optimizer.fused={fused}")


FEATURES = ["evaluation.metrics.features.replicates=2", "evaluation.metrics.features.k=2"]
CLASSIFIER = [*IMAGES, "model=small_cnn_classifier", "model.width=8", "loss=cross_entropy", "evaluation=classifier"]


def run_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Full evaluations, and what surrounds training."""
    runs = {
        "points, few-step scores and oracles": [*POINTS, "dataloaders=gaussian", "loss=meanflow", *SCORED, *FEW_DRAWS],
        "minibatch_ot and likelihood": [
            *POINTS, "dataloaders=kmeans", "loss/coupling=minibatch_ot", *SCORED, *FEW_DRAWS, "~callbacks.pictures"
        ],
        "images, features": [*CNN, *SCORED, *FEATURES],
        "deterministic, with guidance": [
            *CNN, "conditional=true", "guidance=cfg", "deterministic=true", *SCORED, "~callbacks.pictures",
            "evaluation.metrics.features.network=null",
        ],
        "classifier": [*CLASSIFIER, *FEW, "max_steps=2"],
        "asynchronous saves": [*POINTS, *TRAINING, "async_save=always", "max_steps=3", "keep_saves=0"],
    }  # fmt: skip
    for name, words in runs.items():
        yield name, lambda words=words: same_scores(*words)
    for file in sorted((CONFIGS / "solver").glob("*.yaml")):
        words = [*POINTS, *FEW, f"solver={file.stem}", *LOSS_OF_SOLVER.get(file.stem, [])]
        words += ["solver.rtol=1e-2", "solver.atol=1e-2"] if file.stem == "dopri5" else ["solver.steps=3"]
        yield f"solver {file.stem}", lambda words=words: same_samples(*words)


def from_a_checkpoint() -> str:
    import launcher

    weights_after([KIND], "start")
    start = PLACE / "start/ckpts/mlp/x_last.pt"
    words = [*POINTS, *TRAINING, f"init_from={start}", "max_steps=2", "overwrite=true"]
    for where in (KIND, "cpu"):
        launcher.run(*TINY, f"output_dir={PLACE / f'from-{where}'}", f"device={where}", *words)
    return same_weights(saved_weights(f"from-{KIND}"), saved_weights("from-cpu"))


def reflow() -> str:
    teacher = [f"loss.coupling.teacher={from_the_cpu()}", "loss.coupling.count=64"]
    return same_scores(*POINTS, *TRAINING, "loss=reflow", *teacher, "max_steps=2") or same_scores(
        *POINTS, *TRAINING, "loss=distillation", *teacher, "loss.coupling.points=3", "max_steps=2"
    )


def latents() -> str:
    """Latents, and pictures of them through a small autoencoder."""
    import numpy as np
    from diffusers import AutoencoderKL

    shape = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    place, vae = SHARED / "latents.npy", SHARED / "vae"  # a noise floor hangs on where its data lie
    if not vae.exists():
        AutoencoderKL(**shape, down_block_types=down, up_block_types=up).save_pretrained(vae)
        np.save(place, np.random.default_rng(0).normal(size=(64, 4, 2, 2)).astype("float32"))
    data = ["dataloaders=array", f"dataloaders.path={place}", "vae=stable_diffusion", f"vae.path={vae}"]
    return same_scores(*data, "model=cnn", *SMALL_MODELS["cnn"], "batch_size=32", *SCORED)


def samples_and_pictures() -> str:
    """scripts/sample.py and the visualizers, with a checkpoint that was trained on the CPU."""
    from scripts import sample
    from visualizers.scene import scene

    checkpoint = f"ckpt={from_the_cpu()}"
    if sample.main([checkpoint, "n=16", f"out={PLACE / 'samples.npz'}"]):
        return "scripts/sample.py failed"
    for name in ("particles", "velocity_field", "density", "trajectories"):
        drawing = importlib.import_module(f"visualizers.{name}")
        drawing.draw(scene([checkpoint, f"out={PLACE / name}", "n=20", "frames=2"], n=1, frames=2))
    return ""


def other_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    if KIND == "mps":
        yield "wait=true", waits_its_turn
    yield "resume from CPU to device and back", going_on
    yield "init_from", from_a_checkpoint
    yield "reflow", reflow
    yield "latents through an autoencoder", latents
    yield "streamed pictures with a worker", streamed
    yield "streamed pictures without one", read_by_this_process
    yield "layouts", layouts
    yield "tuned shapes", tuned_shapes
    yield "a save", pinned_saves
    yield "sample.py and pictures", samples_and_pictures


def wait_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    kinds = {loss: [*POINTS, f"loss={loss}"] for loss in losses()} | {
        "bf16": [*POINTS, "precision=bf16"],
        "accumulation": [*POINTS, "gradient_accumulation_steps=2"],
        "dropout": [*POINTS, "loss=meanflow", "model.dropout=0.3"],
        "images": [*CNN, "loss=meanflow", "conditional=true"],
        "classifier": [
            *CLASSIFIER, "balanced=true"
        ],
        "augmentation": PHOTOS,
        "a stream": ["dataloaders=image_folder", f"dataloaders.root={pictures()}", *STREAMED],
        "on_nan=skip": [*POINTS, "on_nan=skip"],
        "on_nan=skip, no fused optimizer": [*POINTS, "on_nan=skip", "optimizer=sgd", "optimizer.fused=null"],
    }  # fmt: skip
    for name, words in kinds.items():
        yield name, lambda words=words: waits_of(*words)


def tf32_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "central difference", difference_under_tf32
    yield "adaptive steps", adaptive_steps_under_tf32


def gpu_day() -> str:
    """dev/benchmark.py --preset gpu, from start to end."""
    from dev import benchmark

    with redirect_stdout(io.StringIO()) as text:
        failed = benchmark.main(["--preset", "gpu", "--quick", "--json", str(PLACE / "gpu.json")])
    tables = ("agree to 0.001", "bfloat16", "mlp, eager", "meanflow, func, 100 %", "solver=dopri5")
    missing = [words for words in tables if words not in text.getvalue()]
    return f"status {failed}, without {missing}: {text.getvalue()[-2000:]}" if failed or missing else ""


def gpu_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "the whole preset", gpu_day


PARTS = {
    "objectives": objective_cases, "models": model_cases, "runs": run_cases, "others": other_cases, "waits": wait_cases,
    "tf32": tf32_cases, "planted": planted_cases, "gpu": gpu_cases,
}  # fmt: skip


def main(parts: list[str]) -> None:
    disguise.prepare(KIND)
    device.RULES.rounds = False
    for part in parts or [name for name in PARTS if KIND == "cuda" or name not in ("tf32", "gpu")]:
        for name, case in PARTS[part]():
            with device.Watch():
                try:
                    answer = case()
                except Exception:
                    answer = traceback.format_exc()
            print(json.dumps([f"{part}: {name}", answer]), flush=True)


if __name__ == "__main__":
    main(sys.argv[3:])

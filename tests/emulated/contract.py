"""The device contract on the emulated device, in its own process: python -m tests.emulated.contract KIND PLACE [PART ...]

Each case trains, samples or scores on the CPU and on the device, which draws the same random numbers, and compares. Prints
one line of JSON a case: [name, "" or what differs]. What the CPU gave is kept in the folder PLACE, for the other kind.
"""

import copy
import hashlib
import importlib
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.emulated import device, disguise

torch.set_num_threads(1)
KIND: device.Kind = sys.argv[1]  # type: ignore[assignment]
PLACE = Path(tempfile.mkdtemp(prefix="emulated-"))
SHARED = Path(sys.argv[2])
CONFIGS = disguise.ROOT / "configs"
TINY = [f"output_dir={PLACE}", f"log.file={PLACE / 'LOG.md'}", "run_name=x", "trackio.enabled=false", "num_workers=0"]
POINTS = ["model.width=16", "model.depth=2", "dataloaders.epoch_size=640", "batch_size=64"]
IMAGES = ["dataloaders=digits", "batch_size=16"]
FEW = ["evaluation.samples=16", "evaluation.final_samples=16"]
TRAINING = ["evaluation=loss_only", "callbacks=none", *FEW]
SMALL_MODELS = {  # what makes a model of configs/model small; images but for mlp
    "mlp": POINTS, "cnn": ["model.width=8", "model.inner_width=16", "model.embedding=16"],
    "unet_small": ["model.width=8", "model.multipliers=[1,1]"], "small_cnn_classifier": ["model.width=8"],
}  # fmt: skip
CLASSIFIERS = {"small_cnn_classifier", "resnet18"}
STEPS = 4


def config_of(*words: str) -> dict[str, Any]:
    from backends.submission import prepare

    return prepare([*TINY, *words])


def on_the_cpu(key: Any, compute: Callable[[], Any]) -> Any:
    """Return compute(), or what it gave for the same key to the other kind of device."""
    file = SHARED / f"{hashlib.sha256(json.dumps(key, default=str).replace(str(PLACE), '').encode()).hexdigest()}.json"
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


def assembled(config: dict[str, Any], where: str) -> Any:
    from training.assemble import assemble

    run = assemble(copy.deepcopy(config) | {"device": where})
    run.clock.start(run.state.step)
    return run


def steps(run: Any, count: int = STEPS) -> Iterator[float]:
    """Train; yield each step's loss."""
    from training.loop import after_step, epoch_groups, train_step

    while True:
        for group in epoch_groups(run):
            values = train_step(run, group)
            loss = values["loss"].item()
            after_step(run, values)
            yield loss
            if run.state.step >= count:
                return


def same_curve(config: dict[str, Any], tolerance: float = 1e-4) -> str:
    """Return "" where the losses of a few steps agree with the CPU's."""
    ours = list(steps(assembled(config, KIND)))
    theirs = on_the_cpu(["curve", config], lambda: list(steps(assembled(config, "cpu"))))
    agree = torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=1e-6)
    return "" if agree else f"on the device {ours}, on the CPU {theirs}"


@cache
def losses() -> dict[str, list[str]]:
    """Return the derivative engines of each flow objective in configs/loss, one name "" where it has none."""
    found = {}
    for file in sorted((CONFIGS / "loss").glob("*.yaml")):
        if file.stem not in ("cross_entropy", "reflow"):  # a classifier's, and one that needs a teacher: see below
            engines = {"terminal_velocity": ["func", "finite_difference"]}.get(
                file.stem, ["func", "separate", "finite_difference"]
            )
            found[file.stem] = engines if "\njvp:" in file.read_text() else [""]
    return found


def objective_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    for loss, engines in losses().items():
        for engine in engines:
            yield f"{loss} {engine}".strip(), lambda loss=loss, engine=engine: curve_of(loss, engine)


def curve_of(loss: str, engine: str) -> str:
    """The objective by one engine, with dropout and without."""
    words = [*POINTS, *TRAINING, f"loss={loss}", *([f"loss.jvp={engine}"] * bool(engine))]
    answers = {dropout: same_curve(config_of(*words, f"model.dropout={dropout}")) for dropout in (0.0, 0.3)}
    return "; ".join(f"dropout {dropout}: {answer}" for dropout, answer in answers.items() if answer)


PHOTOS = [
    "dataloaders=photos", "dataloaders.crops=128", "dataloaders.held_out_crops=64", "batch_size=8", "model=unet_small",
    *SMALL_MODELS["unet_small"], "dataloaders.augment=0.5", "dataloaders.flip=true", "dataloaders.crop_padding=2",
]  # fmt: skip


def model_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    for name, words in SMALL_MODELS.items():
        if name != "mlp":
            loss = ["loss=meanflow", "conditional=true"]
            if name in CLASSIFIERS:
                loss = ["loss=cross_entropy", "evaluation=classifier"]
            words = [*IMAGES, *TRAINING, *loss, f"model={name}", *words]
            yield name, lambda words=words: same_curve(config_of(*words), 1e-3)
    yield (
        "unet_small on augmented pictures",
        lambda: same_curve(config_of(*PHOTOS, *TRAINING), 1e-3),
    )


SCORED = ["max_steps=2", "solver.steps=2", "evaluation.loss_samples=32", *FEW]
FEATURES = ["evaluation.metrics.features.replicates=2", "evaluation.metrics.features.k=2"]
FEW_DRAWS = [
    "+evaluation.metrics.velocity.draws=200", "+evaluation.metrics.velocity.final_draws=200",
    "+evaluation.metrics.log_prob.points=20",
]  # fmt: skip
CNN = [*IMAGES, "model=cnn", *SMALL_MODELS["cnn"]]
CLASSIFIER = [*IMAGES, "model=small_cnn_classifier", "model.width=8", "loss=cross_entropy", "evaluation=classifier"]


def scores_of(where: str, words: list[str], output: str) -> dict[str, float]:
    """Run the launcher to the end; return its scores."""
    import launcher

    return launcher.run(*TINY, f"output_dir={PLACE / output}", f"device={where}", "overwrite=true", *words).scores


def same_scores(*words: str, tolerance: float = 2e-3) -> str:
    """Return "" where a run's scores agree with those of the run on the CPU."""
    ours = scores_of(KIND, list(words), KIND)
    theirs = on_the_cpu(["scores", words], lambda: scores_of("cpu", list(words), "cpu"))
    if ours.keys() != theirs.keys():
        return f"scored on one of the two only: {sorted(ours.keys() ^ theirs.keys())}"
    far = [n for n in ours if abs(ours[n] - theirs[n]) > tolerance * max(abs(theirs[n]), 0.02) and "seconds" not in n]
    return "; ".join(f"{name}: {ours[name]} on the device, {theirs[name]} on the CPU" for name in far)


def run_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Full evaluations, and what surrounds training."""
    runs = {
        "points, few-step scores and oracles": [*POINTS, "dataloaders=gaussian", "loss=meanflow", *SCORED, *FEW_DRAWS],
        "minibatch_ot and likelihood": [
            *POINTS, "dataloaders=kmeans", "loss/coupling=minibatch_ot", *SCORED, *FEW_DRAWS, "~callbacks.pictures"
        ],
        "images, features": [*CNN, *SCORED, *FEATURES],
        "deterministic, with guidance": [
            *CNN, "conditional=true", "guidance=cfg", "deterministic=true", *SCORED, *FEATURES, "~callbacks.pictures"
        ],
        "classifier": [*CLASSIFIER, *FEW, "max_steps=2"],
        "asynchronous saves": [*POINTS, *TRAINING, "async_save=always", "max_steps=3", "keep_saves=0"],
    }  # fmt: skip
    for name, words in runs.items():
        yield name, lambda words=words: same_scores(*words)
    for file in sorted((CONFIGS / "solver").glob("*.yaml")):
        words = [*POINTS, *FEW, f"solver={file.stem}", *["loss=meanflow"] * (file.stem == "flow_map")]
        words += ["solver.rtol=1e-2", "solver.atol=1e-2"] if file.stem == "dopri5" else ["solver.steps=3"]
        yield f"solver {file.stem}", lambda words=words: same_samples(*words)


def samples_of(where: str, words: list[str]) -> list[list[float]]:
    """Return what a fresh run's evaluation draws."""
    run = assembled(config_of("evaluation=generator", "evaluation.metrics={}", *words), where)
    run.evaluate(final=False)
    return run.evaluation.generation.samples.cpu().tolist()


def same_samples(*words: str) -> str:
    """Return "" where the samples of an evaluation agree with those on the CPU."""
    ours = samples_of(KIND, list(words))
    theirs = on_the_cpu(["samples", words], lambda: samples_of("cpu", list(words)))
    agree = torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)
    return "" if agree and len(ours) == 16 else f"on the device {ours}, on the CPU {theirs}"


def weights_after(places: list[str], output: str, each: int = 2) -> dict[str, torch.Tensor]:
    """Train so many steps in each place, going on from the last; return the weights."""
    import launcher

    for i, where in enumerate(places):
        words = [f"output_dir={PLACE / output}", f"device={where}", f"max_steps={each * (i + 1)}"]
        if i == 0:
            words += [*POINTS, *TRAINING, "solver.steps=2", "schedule=constant", "overwrite=true"]
        launcher.run(*TINY, *words, *["resume=true"] * (i > 0))
    return saved_weights(output)


@cache
def from_the_cpu() -> Path:
    """Return the save of a run that was trained on the CPU."""
    weights_after(["cpu"], "teacher")
    return PLACE / "teacher/ckpts/mlp/x_last.pt"


def saved_weights(output: str) -> dict[str, torch.Tensor]:
    from run_files.checkpoint import load_checkpoint

    return load_checkpoint(PLACE / output / "ckpts/mlp/x_last.pt")["network"]


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    far = [name for name in theirs if not torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)]
    return f"other weights: {far}" if far else ""


def going_on() -> str:
    ours = weights_after(["cpu", KIND, "cpu"], "there-and-back")
    return same_weights(ours, weights_after(["cpu"], "stays", each=6))


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
    return same_scores(*POINTS, *TRAINING, "loss=reflow", *teacher, "max_steps=2")


def streamed() -> str:
    """Pictures from disk, read ahead by a worker process."""
    from PIL import Image

    folder = PLACE / "pictures"
    for i in range(40):
        file = folder / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * i, 90, 255 - 6 * i)).save(file)
    return same_scores(
        "dataloaders=image_folder", f"dataloaders.root={folder}", "dataloaders.size=16", "model=cnn", *SMALL_MODELS["cnn"],
        "batch_size=8", *TRAINING, "max_steps=3", "num_workers=1",
    )  # fmt: skip


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
    yield "resume from CPU to device and back", going_on
    yield "init_from", from_a_checkpoint
    yield "reflow", reflow
    yield "latents through an autoencoder", latents
    yield "streamed pictures with a worker", streamed
    yield "sample.py and pictures", samples_and_pictures


def waits_of(*words: str) -> str:
    """Return where the host waited for the device in three steps between log lines; "" for nowhere."""
    run = assembled(config_of(*TRAINING, "log_every=1000", *words), KIND)
    training = steps_without_reading(run, 5)
    for _ in range(2):
        next(training)
    with device.WAITED.traced():
        for _ in training:
            pass
    return "; ".join(f"{count} x {place}" for place, count in device.WAITED.places.most_common(4))


def steps_without_reading(run: Any, count: int) -> Iterator[None]:
    from training.loop import after_step, epoch_groups, train_step

    while True:
        for group in epoch_groups(run):
            after_step(run, train_step(run, group))
            yield
            if run.state.step >= count:
                return


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
    }  # fmt: skip
    for name, words in kinds.items():
        yield name, lambda words=words: waits_of(*words)
    yield "on_nan=skip, once a step", lambda: "" if waits_of(*POINTS, "on_nan=skip").startswith("3 x") else "not once a step"


@cache
def trained(*words: str, count: int = 60) -> Any:
    """Return a run on the device with the weights that some steps on the CPU give."""
    config = config_of(*TRAINING, "dataloaders=gaussian", "batch_size=64", "model.width=64", *words)
    run, on_cpu = (assembled(config, where) for where in (KIND, "cpu"))
    for _ in steps(on_cpu, count):
        pass
    run.state.objective.network.load_state_dict(on_cpu.state.objective.network.state_dict())
    return run


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let the device round its products, where the project allows TF32."""
    device.RULES.rounds, torch.backends.cuda.matmul.allow_tf32 = on, True
    yield
    device.RULES.rounds = False


def difference_under_tf32() -> str:
    """The central difference stays as near to forward mode as without TF32."""
    run = trained("dataloaders.epoch_size=6400", "loss=meanflow")
    objective, batch = run.state.objective.eval(), next(iter_groups(run))[0]
    with torch.no_grad():
        objective.jvp = "func"
        truth = objective.derivative(batch, batch.conditional_velocity).cpu()
        objective.jvp = "finite_difference"
        with tf32(True):
            found = objective.derivative(batch, batch.conditional_velocity).cpu()
    error = ((found - truth).norm() / truth.norm()).item()
    return "" if error < 1e-3 else f"the derivative is off by {error:.2g}"


def iter_groups(run: Any) -> Iterator[Any]:
    from training.loop import epoch_groups

    return epoch_groups(run)


def adaptive_steps_under_tf32() -> str:
    """Dopri5 and the likelihood take as many evaluations as without TF32."""
    from solvers.dopri5 import Dopri5
    from solvers.likelihood import log_likelihood

    run = trained("dataloaders.epoch_size=6400")
    field, counts = run.state.objective.eval().velocity, []
    for on in (False, True):
        x = torch.randn(32, 2, device=run.device, generator=torch.Generator(device=run.device).manual_seed(0))
        with tf32(on), torch.no_grad():
            sampler, likelihood = Dopri5(), Dopri5()
            sampler.solve(field, x)
            log_likelihood(field, x, run.source.log_prob, likelihood)
        counts.append((sampler.evaluations, likelihood.evaluations))
    return "" if counts[0] == counts[1] else f"evaluations without TF32 {counts[0]}, with it {counts[1]}"


def tf32_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "central difference", difference_under_tf32
    yield "adaptive steps", adaptive_steps_under_tf32


@contextmanager
def planted(where: str, name: str, fault: Any) -> Iterator[None]:
    """Put a fault in the place of a name of a module or class, given as module or module:Class."""
    module, _, part = where.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, part) if part else owner
    kept = vars(owner)[name]
    setattr(owner, name, fault)
    yield
    setattr(owner, name, kept)


def found(case: Callable[[], str], sign: str, where: str, name: str, fault: Any) -> str:
    """Return "" where a case sees a planted fault: by its answer, or by an error, that has `sign` in it."""
    with planted(where, name, fault):
        try:
            answer = case()
        except Exception as error:
            answer = str(error)
    return "" if sign in answer else f"not seen as {sign!r}: {answer!r}"


def planted_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Each check can fail."""
    import training.loop
    from evaluation.metrics.wasserstein import SlicedWasserstein
    from losses.paths import ProbabilityPath
    from losses.total_derivative import DerivativeObjective
    from solvers.dopri5 import Dopri5

    after_step, torch_load, distance = training.loop.after_step, torch.load, SlicedWasserstein.distance
    state = ProbabilityPath.state
    simple = [*TRAINING, *POINTS]
    scored = [*POINTS, "dataloaders=gaussian", *SCORED, *FEW_DRAWS, "~evaluation.metrics.log_prob"]
    difference = [*simple, "loss=meanflow", "loss.jvp=finite_difference", "model.dropout=0.3"]

    def waiting(run: Any, values: dict[str, torch.Tensor]) -> None:
        values["loss"].item()
        after_step(run, values)

    def of_the_cpu(self: Any, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(count, *self.state_shape, generator=torch.Generator(), device=device.NAME)

    def forgetting(self: Any, outer: list[torch.Tensor] | None) -> None:
        kept = self.kept or []
        self.left, self.kept = [mask for mask in kept if mask.device.type == "cpu"], outer

    def in_double(self: Any, x: torch.Tensor, y: torch.Tensor) -> float:
        return distance(self, x.double(), y)

    yield "a tensor on the CPU in a path", lambda: found(
        lambda: same_curve(config_of(*simple)), "at least two devices", "losses.paths:ProbabilityPath", "state",
        lambda self, x0, x1, t: state(self, x0, x1, t) + torch.zeros(x0.shape),
    )  # fmt: skip
    seen = {
        "a generator of the CPU in a source": (
            lambda: same_curve(config_of(*simple)), "device type for generator",
            "dataloaders.sources:GaussianSource", "sample", of_the_cpu,
        ),
        "a wait in the loop": (lambda: waits_of(*POINTS), "3 x ", "training.loop", "after_step", waiting),
        "no map_location": (
            going_on, "can be read; start it again",  # as if the file were damaged
            "torch", "load", lambda file, map_location=None, **options: torch_load(file, **options),
        ),
        "masks of dropout that are not used again": (
            lambda: same_curve(config_of(*difference)), "on the device",
            "models.layers:ReplayedDropout", "replay", forgetting,
        ),
    }  # fmt: skip
    if KIND == "mps":
        seen["float64 in a metric"] = (
            lambda: same_scores(*scored), "float64",
            "evaluation.metrics.wasserstein:SlicedWasserstein", "distance", in_double,
        )  # fmt: skip
    else:
        derivative, solver = "losses.total_derivative:DerivativeObjective", "solvers.dopri5:Dopri5"
        rounded = DerivativeObjective.central_difference.__wrapped__  # type: ignore[attr-defined]
        solve = Dopri5.solve.__wrapped__  # type: ignore[attr-defined]
        seen["TF32 left on in the difference"] = (
            difference_under_tf32, "the derivative is off", derivative, "central_difference", rounded
        )  # fmt: skip
        seen["TF32 left on in the adaptive solver"] = (adaptive_steps_under_tf32, "evaluations", solver, "solve", solve)
    for name, (case, *fault) in seen.items():
        yield name, lambda case=case, fault=fault: found(case, *fault)


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

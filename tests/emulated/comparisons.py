"""Runs, scores, samples and waits on the emulated device held against those on the CPU, in a process of their own.

The process's first two words are the kind of the device and a folder that keeps what the CPU gave, for the other kind."""

import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.emulated import device, disguise
from tests.emulated.rules import Kind

torch.set_num_threads(1)
KIND: Kind = sys.argv[1]  # type: ignore[assignment]
PLACE = Path(tempfile.mkdtemp(prefix="emulated-"))
tempfile.tempdir = str(PLACE)  # where a run on MPS holds its lock
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
    "resnet9": ["model.width=8"], "vit_tiny": ["model.width=16", "model.depth=2"],
}  # fmt: skip
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


SCORED = ["max_steps=2", "solver.steps=2", "evaluation.loss_samples=32", *FEW]

FEW_DRAWS = [
    "+evaluation.metrics.velocity.draws=200", "+evaluation.metrics.velocity.final_draws=200",
    "+evaluation.metrics.log_prob.points=20",
]  # fmt: skip


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


def samples_of(where: str, words: list[str]) -> list[list[float]]:
    """Return what a fresh run's evaluation draws."""
    run = assembled(config_of("evaluation=loss_only", *words), where)
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

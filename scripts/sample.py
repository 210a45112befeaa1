#!/usr/bin/env python
"""Samples of a checkpoint, as a picture or as numbers.

    python scripts/sample.py ckpt=outputs/ckpts/mlp/first_flow_last.pt n=2000
    python scripts/sample.py ckpt=... n=64 solver=rk4 solver.steps=8 seed=1 out=samples.png
    python scripts/sample.py ckpt=... n=10000 out=samples.npz            # array `x`, with classes `y`
    python scripts/sample.py ckpt=... n=50000 out=samples.npz images=true     # arr_0: uint8, N x H x W x 3, for evaluators
    python scripts/sample.py ckpt=... n=50000 out=pictures/              # a folder of PNGs, one for each sample
    python scripts/sample.py ckpt=... label=3                            # of a model trained with conditional=true
    python scripts/sample.py ckpt=... label=all n=100                    # a row, or several, for each class
    python scripts/sample.py ckpt=... label=all n=100 guidance=cfg guidance.scale=3
    python scripts/sample.py ckpt=... condition=y.npy                    # of a model with conditions: one, or n of them
    python scripts/sample.py ckpt=... nfe=1                              # one evaluation a sample (loss=meanflow)
    python scripts/sample.py ckpt=... solver=flow_map solver.steps=4 solver.renoise=true
    python scripts/sample.py ckpt=... observed=part.npy                  # samples of which a part is known: see below

observed= gives samples of the data given a part of them (inpainting, super-resolution, imputation), in the units of the
data: a .npy of one state, NaN where it is not known, or of an image that is k times smaller in both directions, the means of
k x k pixels; observed_noise (0.05) is its standard deviation.

Keys: ckpt (required), n (64), seed (0), label (a class, or all), condition (a
.npy; else those of held-out rows in turn), nfe (so many steps of one evaluation each), device (auto),
out (outputs/samples/<checkpoint>.png; .npz and .npy write numbers, a path ending in / a folder of PNGs), images (false;
true: a .npz of images as bytes, arr_0, and classes, arr_1), real (true; false draws no real images beside
them), trust (modules, as a,b.c, that the checkpoint may build parts from), and any solver or guidance setting
(guidance=none: not the run's own). Pictures of a latent model are decoded,
numbers are its latents.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import Tensor

from common.command_line import check_ends, check_place, front, outputs
from common.errors import UserError
from common.files import replacing
from common.ranges import Count, Positive, Seed, Steps
from configuration.settings import read_settings
from dataloaders.array_dataset import load_numbers
from evaluation.image_sets import write_arrays, write_pictures
from evaluation.metrics.base_metric import to_bytes
from evaluation.sample import TrainedModel, load
from models.inputs import classes_in

SUFFIXES = (".png", ".npz", ".npy")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    ckpt: Path = field(metadata={"example": "ckpt=outputs/ckpts/mlp/last.pt"})
    n: Count = 64
    seed: Seed = 0
    label: Seed | Literal["all"] | None = None
    condition: Path | None = None
    observed: Path | None = None
    observed_noise: Positive = 0.05
    nfe: Steps | None = None
    device: str = "auto"
    out: str | None = None
    real: bool = True
    images: bool = False
    trust: str | None = None

    @property
    def is_folder(self) -> bool:
        return str(self.out).endswith("/")


def read_words(words: list[str]) -> tuple[Settings, list[str]]:
    """Own settings, and solver and guidance overrides, of a command line. UserError for anything else."""
    settings, overrides = read_settings(words, Settings, ("solver", "guidance"))
    if settings.images and not str(settings.out).endswith(".npz"):
        raise UserError("images=true writes a .npz; give out=samples.npz, or a path ending in / for a folder of pictures")
    if settings.nfe and any(word.startswith("solver") for word in overrides):
        raise UserError("nfe= takes so many steps without a solver; give nfe or solver settings, not both")
    if settings.nfe and settings.observed:
        raise UserError("observed= is sampled by the run's solver, or another of ODEs; leave nfe out")
    alone = [word for word in overrides if word.startswith("guidance.")]
    if alone and not any(word.startswith("guidance=") for word in overrides):
        raise UserError(f"{alone[0]} needs to know which guidance; add guidance=cfg or guidance=autoguidance")
    return settings, overrides


def output_path(settings: Settings) -> Path:
    """Return where the samples go. UserError for a form we do not write, or a folder that is not there."""
    path = Path(settings.out or outputs() / "samples" / f"{settings.ckpt.stem}.png")
    if settings.is_folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"out={path}/ is not empty; give a new folder, so that no other pictures mix with these")
    else:
        check_ends("out", path, *SUFFIXES, others=", or in / for a folder of pictures")
    if settings.out:
        check_place("out", path)
    return path


def sample(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, overrides = read_words(words)
    path = output_path(settings)
    model = load(settings.ckpt, settings.device, overrides, settings.trust or "")
    condition = read_array(settings.condition, "condition", "give the condition, or one for each sample, as one")
    labels = model.labels(settings.n, settings.label, condition)
    observed = read_array(settings.observed, "observed", "give a state with NaN where it is not known", nan=True)
    if observed is None:
        states = model.sample(settings.n, settings.seed, labels, evaluations=settings.nfe)
    else:
        states = model.posterior(settings.n, observed, settings.observed_noise, settings.seed, labels)
    if settings.is_folder or settings.images:
        export(path, states, classes_in(labels, model.objective.network.num_classes), model)
    elif path.suffix == ".png":
        from evaluation.state_pictures import draw

        chosen = [f"{key} {value}" for key, value in (("label", settings.label), ("nfe", settings.nfe)) if value is not None]
        title = ", ".join([model.config["run_name"], f"seed {settings.seed}", *chosen, *overrides])
        draw(path, states, labels, model, title, settings.real)
    else:
        write_numbers(path, states, labels, model)
    return path


def read_array(path: Path | None, key: str, what: str, nan: bool = False) -> Tensor | None:
    """Return the numbers in a .npy. UserError, which says what it should hold, for a file that is none. nan: allowed."""
    if path is not None and (path.suffix != ".npy" or not path.is_file()):
        raise UserError(f"{key}={path} is no .npy file that is there; {what}")
    return None if path is None else load_numbers(path, key, nan)


def export(path: Path, states: Tensor, labels: Tensor | None, model: TrainedModel) -> None:
    """The samples as images, rounded to bytes: a folder of PNGs, or a .npz. UserError for states that are no images."""
    images = model.images(states)
    if images.ndim != 4:
        raise UserError(f"states of shape {list(states.shape[1:])} are no images; use out=samples.npz without images=true")
    low_high = None if model.config.get("vae") else model.config["dataloaders"]["value_range"]
    as_bytes = to_bytes(images, None if low_high is None else (low_high[0], low_high[1]))
    if path.suffix == ".npz":
        write_arrays(path, as_bytes, labels)
    else:
        write_pictures(path, as_bytes)


def write_numbers(path: Path, states: Tensor, labels: Tensor | None, model: TrainedModel) -> None:
    """Write the samples as a .npy, or with their classes and conditions as a .npz."""
    with replacing(path) as file:
        if path.suffix == ".npy":
            np.save(file, states.numpy())
        else:
            arrays: dict[str, Any] = {"x": states.numpy()}
            classes, shape = classes_in(labels, model.objective.network.num_classes), model.objective.network.condition_shape
            if classes is not None:
                arrays["y"] = classes.numpy()
            if labels is not None and shape is not None:
                arrays["condition"] = labels[:, 2:].unflatten(1, shape).numpy()
            np.savez(file, **arrays)


def main(words: list[str]) -> int:
    return front(words or ["--help"], __doc__, sample)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
    python scripts/sample.py ckpt=... nfe=1                              # one evaluation a sample (loss=meanflow)
    python scripts/sample.py ckpt=... solver=flow_map solver.steps=4 solver.renoise=true

Keys: ckpt (required), n (64), seed (0), label (a class, or all), nfe (so many steps of one evaluation each), device (auto),
out (outputs/samples/<checkpoint>.png; .npz and .npy write numbers, a path ending in / a folder of PNGs), images (false;
true: a .npz of images as bytes, arr_0, and classes, arr_1), real (true; false draws no real images beside
them), trust (modules, as a,b.c, that the checkpoint may build parts from), and any solver or guidance setting
(guidance=none: not the run's own). Pictures of a latent model are decoded,
numbers are its latents.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import front, outputs
from common.errors import UserError
from common.files import replacing
from configuration.values import COUNT, NOT_NEGATIVE, RANGES, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.sample import TrainedModel

DEFAULTS: dict[str, Any] = {
    "ckpt": None, "n": 64, "seed": 0, "label": None, "nfe": None, "device": "auto", "out": None, "real": "true",
    "images": "false", "trust": None,
}  # fmt: skip
NUMBERS = {"n": COUNT, "seed": NOT_NEGATIVE, "label": NOT_NEGATIVE, "nfe": RANGES["evaluations"]}
GROUPS = ("solver", "guidance")
SUFFIXES = (".png", ".npz", ".npy")


def read_words(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Own settings, and solver and guidance overrides, of a command line. UserError for anything else."""
    settings, overrides = dict(DEFAULTS), []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (key not in DEFAULTS and key.split(".")[0].split("/")[0] not in GROUPS):
            known = ", ".join(DEFAULTS)
            raise UserError(f"cannot use {word!r}; the keys are {known}, and solver and guidance settings, as key=value")
        if key not in DEFAULTS:
            overrides.append(word)
        elif (isinstance(DEFAULTS[key], int) or key in ("label", "nfe")) and word != "label=all":
            settings[key] = whole_number(key, value, NUMBERS[key], ", or all" if key == "label" else "")
        else:
            settings[key] = value
    if settings["ckpt"] is None:
        raise UserError("ckpt is missing; add it to the command, such as ckpt=outputs/ckpts/mlp/last.pt")
    for key in ("real", "images"):
        if settings[key] not in ("true", "false"):
            raise UserError(f"{key} takes true or false, not {settings[key]!r}")
    if settings["images"] == "true" and not str(settings["out"]).endswith(".npz"):
        raise UserError("images=true writes a .npz; give out=samples.npz, or a path ending in / for a folder of pictures")
    if settings["nfe"] and any(word.startswith("solver") for word in overrides):
        raise UserError("nfe= takes so many steps without a solver; give nfe or solver settings, not both")
    alone = [word for word in overrides if word.startswith("guidance.")]
    if alone and not any(word.startswith("guidance=") for word in overrides):
        raise UserError(f"{alone[0]} needs to know which guidance; add guidance=cfg or guidance=autoguidance")
    return settings, overrides


def is_folder(settings: dict[str, Any]) -> bool:
    return str(settings["out"]).endswith("/")


def output_path(settings: dict[str, Any]) -> Path:
    """Return where the samples go. UserError for a form we do not write, or a folder that is not there."""
    path = Path(settings["out"] or outputs() / "samples" / f"{Path(settings['ckpt']).stem}.png")
    if is_folder(settings):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"out={path}/ is not empty; give a new folder, so that no other pictures mix with these")
    elif path.suffix not in SUFFIXES:
        raise UserError(f"out={path} must end in {', '.join(SUFFIXES)}, or in / for a folder of pictures")
    if settings["out"] and not path.absolute().parent.is_dir():
        raise UserError(f"out={path} lies in a folder that does not exist; make it or choose another")
    return path


def sample(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, overrides = read_words(words)
    path = output_path(settings)
    from configuration.stored import allow
    from evaluation.sample import load, settings_from_overrides

    allow(settings["trust"])
    model = load(settings["ckpt"], settings["device"])
    model.config |= settings_from_overrides(overrides)
    states = model.sample(settings["n"], settings["seed"], settings["label"], evaluations=settings["nfe"])
    labels = model.labels(settings["n"], settings["label"])
    if is_folder(settings) or settings["images"] == "true":
        export(path, states, labels, model)
        return path
    told = [f"{key} {settings[key]}" for key in ("label", "nfe") if settings[key] is not None]
    title = ", ".join([model.config["run_name"], f"seed {settings['seed']}", *told, *overrides])
    write(path, states, labels, model, title, settings["real"] == "true")
    return path


def export(path: Path, states: "Tensor", labels: "Tensor | None", model: "TrainedModel") -> None:
    """The samples as images, rounded to bytes: a folder of PNGs, or a .npz. UserError for states that are no images."""
    from evaluation.image_sets import write_arrays, write_pictures
    from evaluation.metrics.base_metric import to_bytes

    images = model.images(states)
    if images.ndim != 4:
        raise UserError(f"states of shape {list(states.shape[1:])} are no images; use out=samples.npz without images=true")
    low_high = None if model.config.get("vae") else model.config["dataloaders"]["value_range"]
    as_bytes = to_bytes(images, None if low_high is None else (low_high[0], low_high[1]))
    if path.suffix == ".npz":
        write_arrays(path, as_bytes, labels)
    else:
        write_pictures(path, as_bytes)


def write(
    path: Path, states: "Tensor", labels: "Tensor | None", model: "TrainedModel", title: str, beside_real: bool
) -> None:
    """The samples in the form the file's ending asks for. UserError for a picture of states that have none."""
    import numpy as np

    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"x": states.numpy()} | ({} if labels is None else {"y": labels.numpy()})
        with replacing(path) as file:
            np.savez(file, **arrays)
    elif path.suffix == ".npy":
        with replacing(path) as file:
            np.save(file, states.numpy())
    else:
        from evaluation.state_pictures import draw

        draw(path, states, labels, model, title, beside_real)


def main(words: list[str]) -> int:
    return front(words or ["--help"], __doc__, sample)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

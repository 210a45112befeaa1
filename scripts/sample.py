#!/usr/bin/env python
"""Samples of a checkpoint, as a picture or as numbers.

    python scripts/sample.py ckpt=outputs/ckpts/mlp/first_flow_last.pt n=2000
    python scripts/sample.py ckpt=... n=64 solver=rk4 solver.steps=8 seed=1 out=samples.png
    python scripts/sample.py ckpt=... n=10000 out=samples.npz            # array `x`
    python scripts/sample.py ckpt=... label=3
    python scripts/sample.py ckpt=... nfe=1                              # one evaluation a sample (loss=meanflow)

Keys: ckpt (required), n (64), seed (0), label, nfe, device (auto), out (<checkpoint>_samples.png; .npz and .npy
write numbers), and any solver setting.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import UserError

if TYPE_CHECKING:
    from evaluation.sample import TrainedModel

DEFAULTS: dict[str, Any] = {"ckpt": None, "n": 64, "seed": 0, "label": None, "nfe": None, "device": "auto", "out": None}
SUFFIXES = (".png", ".npz", ".npy")


def read_words(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Own settings and solver overrides of a command line. UserError for anything else."""
    settings, solver = dict(DEFAULTS), []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (key not in DEFAULTS and key.split(".")[0].split("/")[0] != "solver"):
            raise UserError(f"cannot use {word!r}; the keys are {', '.join(DEFAULTS)} and solver settings, as key=value")
        if key not in DEFAULTS:
            solver.append(word)
        elif isinstance(DEFAULTS[key], int) or key in ("label", "nfe"):
            settings[key] = whole_number(key, value)
        else:
            settings[key] = value
    if settings["ckpt"] is None:
        raise UserError("ckpt is missing; add it to the command, such as ckpt=outputs/ckpts/mlp/last.pt")
    for key in ("n", "nfe"):
        if settings[key] == 0:
            raise UserError(f"{key} takes a whole number of at least 1, not 0")
    if settings["nfe"] and solver:
        raise UserError("nfe= samples by the learned flow map, without a solver; give nfe or solver settings, not both")
    return settings, solver


def whole_number(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{key} takes a whole number of at least 0, not {text!r}")
    return int(text)


def output_path(settings: dict[str, Any]) -> Path:
    """Where the samples go. UserError for a form we do not write, or a folder that is not there."""
    path = Path(settings["out"] or f"{Path(settings['ckpt']).stem}_samples.png")
    if path.suffix not in SUFFIXES:
        raise UserError(f"out={path} must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"out={path} lies in a folder that does not exist; make it or choose another")
    return path


def sample(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, solver_words = read_words(words)
    path = output_path(settings)
    from evaluation.sample import load, solver_from_overrides

    model = load(settings["ckpt"], settings["device"])
    solver = solver_from_overrides(solver_words) if solver_words else None
    states = model.sample(settings["n"], settings["seed"], settings["label"], solver, settings["nfe"])
    write(path, states.numpy(), model, f"{model.config['run_name']}, seed {settings['seed']}")
    return path


def write(path: Path, states: Any, model: "TrainedModel", title: str) -> None:
    """The samples in the form the file's ending asks for. UserError for a picture of states that have none."""
    import numpy as np

    if path.suffix == ".npz":
        np.savez(path, x=states)
    elif path.suffix == ".npy":
        np.save(path, states)
    else:
        from visualizers.pictures import image_grid_picture, scatter_picture

        if states.ndim == 4:
            value_range = model.config["dataloaders"]["value_range"] or (-1.0, 1.0)
            image_grid_picture(path, states, tuple(value_range), max(1, round(len(states) ** 0.5)), title=title)
        elif states.shape[1] == 2:
            scatter_picture(path, states, model.real(len(states)).numpy(), title)
        else:
            raise UserError(f"states of dimension {states.shape[1]} have no picture; use out=samples.npz")


def main(words: list[str]) -> int:
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        print(sample(words))
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

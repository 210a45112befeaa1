"""The recipes for real data run end to end, made small, on files in the official formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Official = Callable[[str], dict[str, Any]]
FEW = ["batch_size=16", "max_steps=3", "evaluation.samples=8", "evaluation.final_samples=8"]
SMALL = {
    "photos": ("photos", "unet_small", ["model.width=8", "model.multipliers=[1,1]"]),
    "mnist_one_step": (
        "mnist",
        "unet_small",
        [
            "model.width=8",
            "loss.coupling.count=20",
            "solver.steps=1",
            "teacher='loss=mse conditional=true model.patch_size=2 "
            "model.multipliers=[1,2] guidance=cfg solver=dpm_solver_2m solver.steps=2 batch_size=16 max_steps=2'",
        ],
    ),
    "cifar10_meanflow": ("cifar10", "unet", ["model.width=8", "model.multipliers=[1,1,1]", "model.blocks=1"]),
    "imagenet_meanflow": (
        "imagenet",
        "dit_b4",
        ["model.hidden_size=32", "model.heads=2", "model.depth=1", "model.patch_size=2"],
    ),
}


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_runs_end_to_end(recipe: str, official: Official, small_run: Callable[..., Path]) -> None:
    data, model, words = SMALL[recipe]
    settings = official(data) | {"epoch_size": None}
    typed = [f"dataloaders.{key}={'null' if value is None else value}" for key, value in settings.items()]
    if data == "imagenet":
        typed += ["vae=stable_diffusion", f"vae.path={Path(settings['path']).parent / 'vae'}"]
    folder = small_run("x", f"experiment={recipe}", f"model={model}", *words, *typed, *FEW)
    status = json.loads((folder / "runs/x/status.json").read_text())
    assert status["state"] == "finished" and status["step"] == 3 and "eval/loss" in str(status)

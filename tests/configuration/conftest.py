"""Checkpoints and runs for tests to change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.submission import prepare
from training.assemble import assemble


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checkpoint of a small run holds, before its first step."""
    words = [f"output_dir={tmp_path_factory.mktemp('whole')}", "trackio.enabled=false", "callbacks=none", "device=cpu"]
    return assemble(prepare(["run_name=x", *words, "model.width=16", "model.depth=2"])).payload()


@pytest.fixture
def changed(whole: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """changed(change): a file of that checkpoint, changed; every byte of it is as torch.save wrote it."""

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        payload = copy.deepcopy(whole)
        change(payload)
        torch.save(payload, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return write


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two tiny runs, of which one is a sweep's job."""
    import launcher

    folder = tmp_path_factory.mktemp("two") / "outputs"
    for name in ("x", "y"):
        launcher.run(
            f"run_name={name}", f"output_dir={folder}", "max_steps=2", "device=cpu", "model.width=8", "model.depth=1",
            "evaluation=loss_only", "evaluation.samples=16", "evaluation.final_samples=16", "dataloaders.epoch_size=64",
            "trackio.enabled=false", "log_every=1", "num_workers=0",
        )  # fmt: skip
    return folder

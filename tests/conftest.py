"""Before any test imports trackio: its files go to a temporary folder, never to the user's dashboard."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

TRACKIO_FOLDER = tempfile.TemporaryDirectory(prefix="trackio-tests-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = TRACKIO_FOLDER.name
os.environ["OMP_NUM_THREADS"] = "1"  # tests are small: one thread is faster, and numbers do not hang on the machine
torch.set_num_threads(1)
for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_STORAGE_MODE", "TRACKIO_WEBHOOK_URL"):
    os.environ.pop(remote, None)

SMALL = [
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=64",
    "model.width=16", "model.depth=2", "dataloaders.epoch_size=1000", "batch_size=128", "epochs=3", "log_every=2",
    "solver.steps=4", "~callbacks.pictures",
]  # fmt: skip


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., Path]:
    """launch(name, *overrides) trains a tiny kmeans run under tmp_path/outputs, in this process; returns that folder."""

    def launch(name: str, *overrides: str, output: str = "outputs") -> Path:
        import launcher

        folder = tmp_path / output
        arguments = [f"run_name={name}", f"output_dir={folder}", f"log.file={tmp_path / 'EXPERIMENT_LOG.md'}"]
        resumed = any(word.startswith(("resume=", "eval_checkpoint=")) for word in overrides)
        image = any(word.startswith("model=") for word in overrides)
        small = [] if resumed else [word for word in SMALL if not (image and word.startswith("model."))]
        launcher.run(*arguments, *small, *overrides)
        return folder

    return launch


@pytest.fixture(autouse=True)
def restore_global_state() -> Iterator[None]:
    """Runs seed torch's global generator and set numerics; tests must not see each other's."""
    python, torch_state = random.getstate(), torch.get_rng_state()
    yield
    random.setstate(python)
    torch.set_rng_state(torch_state)
    torch.use_deterministic_algorithms(False)

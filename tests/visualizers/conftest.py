"""Hardly trained models for the pictures of this folder."""

from pathlib import Path

import numpy as np
import pytest

SMALL = [
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "max_steps=3", "batch_size=32", "~callbacks.pictures"
]  # fmt: skip
NARROW = ["model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8"]  # of model=cnn


class Trained(dict[str, Path]):
    """Checkpoints by name, each trained when it is first asked for; `folder` holds them."""

    def __init__(self, folder: Path, vae: Path):
        self.folder, self.vae = folder, vae

    def __missing__(self, name: str) -> Path:
        import launcher

        words, architecture = getattr(self, name)()
        launcher.run(f"run_name={name}", f"output_dir={self.folder}", f"log.file={self.folder / 'LOG.md'}", *SMALL, *words)
        self[name] = self.folder / f"ckpts/{architecture}/{name}_last.pt"
        return self[name]

    def points(self) -> tuple[list[str], str]:
        return ["model.width=16", "loss=meanflow"], "mlp"

    def classes(self) -> tuple[list[str], str]:
        return ["model.width=16", "conditional=true"], "mlp"

    def images(self) -> tuple[list[str], str]:
        return ["dataloaders=digits", "model=cnn", "conditional=true", *NARROW], "cnn"

    def latents(self) -> tuple[list[str], str]:
        np.save(self.folder / "latents.npy", np.random.default_rng(0).normal(size=(64, 4, 2, 2)).astype("float32"))
        data = ["dataloaders=array", f"dataloaders.path={self.folder / 'latents.npy'}", "model=cnn", *NARROW]
        return [*data, "vae=stable_diffusion", f"vae.path={self.vae}"], "cnn"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path) -> Trained:
    """Hardly trained models: points, points by class, images by class, and latents of images."""
    return Trained(tmp_path_factory.mktemp("trained"), vae_folder)

"""Data sets that stream, built from their configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.seeds import generator_for
from configuration.compose import compose_config, resolved
from dataloaders.base_dataloaders import EpochPlan
from dataloaders.image_stream import ImageStream
from evaluation.parts import build_dataset

Official = Callable[[str], dict[str, Any]]


def build(name: str, settings: dict[str, Any], *more: str, model: str = "cnn") -> Any:
    words = [f"dataloaders.{key}={'null' if value is None else value}".replace(" ", "") for key, value in settings.items()]
    chosen = ["run_name=x", f"model={model}", f"dataloaders={name}", "num_workers=0"]
    config = resolved(compose_config([*chosen, *words, *more]))
    return build_dataset(config, torch.device("cpu"))


def refusal(name: str, settings: dict[str, Any], *more: str) -> str:
    with pytest.raises(UserError) as caught:
        build(name, settings, *more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder(root: Path, **more: Any) -> dict[str, Any]:
    return {"root": root, "size": 10, "held_out_fraction": 0.25, "flip": "false"} | more


def pixels_of(dataset: ImageStream, epoch: int = 0, start: int = 0, batch: int = 4) -> tuple[Tensor, Tensor]:
    """All pictures of an epoch as bytes, and their labels."""
    order = generator_for(0, "order", epoch)
    parts = list(dataset.epoch(EpochPlan(batch, order, torch.Generator().manual_seed(0), start)))
    return torch.cat([(x + 1) * 127.5 for x, _ in parts]).round().long(), torch.cat([label for _, label in parts])  # type: ignore[misc]

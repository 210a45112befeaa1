"""Models as configs/model has them, of full size without memory or small."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from configuration.build import build
from configuration.compose import compose_config, resolved
from models.velocity_model import VelocityModel

LARGE = 20_000_000  # parameters
SHALLOW = {"depth": 1, "hidden_size": 96, "width": 16, "blocks": 1}  # those that a large model has make it small
ROWS = 4


@cache
def model_node(name: str, dataset: str, *overrides: str) -> dict[str, Any]:
    """configs/model/<name>.yaml as a run on `dataset` resolves it."""
    return resolved(compose_config(["run_name=x", f"dataloaders={dataset}", f"model={name}", *overrides]))["model"]


@cache
def suits(name: str) -> list[str]:
    """The datasets whose states the model takes, one of points and one of images."""
    found = []
    for dataset in ("kmeans", "digits"):
        with suppress(UserError):
            model_node(name, dataset)
            found.append(dataset)
    return found


@cache
def full_size(name: str, *overrides: str) -> int:
    """Parameters of the model as configured, without their memory."""
    with torch.device("meta"):
        return build(model_node(name, suits(name)[0], *overrides)).parameter_count()


def shallow(name: str) -> list[str]:
    """Overrides that take the dropout away and make a large model small."""
    node = model_node(name, suits(name)[0])
    overrides = ["model.dropout=0.0"] if "dropout" in node else []
    if full_size(name) > LARGE:
        overrides += [f"model.{key}={value}" for key, value in SHALLOW.items() if key in node]
    return overrides


def fresh_model(name: str, conditional: bool = False) -> VelocityModel:
    """The model or its shallow variant, without dropout, as training starts it."""
    torch.manual_seed(0)
    model = build(model_node(name, suits(name)[0], f"conditional={conditional}".lower(), *shallow(name)))
    model.init_weights()
    return model


@contextmanager
def all_in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a model insists on fp32 by x.float(), let it have fp64, so that differences can be compared."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield

"""Makes the project take the emulated device for CUDA or MPS: its own branches for them run, on a machine without either."""

import importlib
import sys
import types
from pathlib import Path

import torch

from tests.emulated import device
from tests.emulated.registration import MODULE, enable
from tests.emulated.rules import NAME, Kind

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "common", "models", "dataloaders", "losses", "solvers", "helpers_cfg", "run_files", "evaluation", "training", "train",
    "visualizers", "scripts", "dev",
)  # fmt: skip
PLAIN = ("run_files.telemetry", "run_files.checks", "scripts.modal_app")  # they ask for a machine's own library


def prepare(kind: Kind) -> None:
    """Enable the device and disguise it as `kind`, for the rest of this process."""
    enable(kind)
    modules = [importlib.import_module(name) for name in module_names() if name not in PLAIN]
    for module in modules:
        rename(module, kind)
        if "pick_device" in vars(module):
            module.pick_device = lambda name: torch.device("cpu" if name == "cpu" else NAME)  # type: ignore[attr-defined]
    real = getattr(torch, kind)
    for name in vars(type(MODULE)):
        if not name.startswith("_") and name in vars(real):
            setattr(real, name, getattr(MODULE, name))


def module_names() -> list[str]:
    paths = (path for room in ROOMS for path in (ROOT.glob(f"{room}.py"), (ROOT / room).rglob("*.py")) for path in path)
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


def rename(module: types.ModuleType, kind: Kind) -> None:
    """Exchange the constant "cuda" or "mps" for the device's name in the code of all of a module's functions."""

    def exchanged(constant: object) -> object:
        if isinstance(constant, types.CodeType):
            return renamed(constant)
        if isinstance(constant, tuple | frozenset):
            return type(constant)(NAME if part == kind else part for part in constant)
        return NAME if constant == kind else constant

    def renamed(code: types.CodeType) -> types.CodeType:
        return code.replace(co_consts=tuple(map(exchanged, code.co_consts)))

    for value in list(vars(module).values()):
        mine = isinstance(value, type) and value.__module__ == module.__name__
        for member in vars(value).values() if mine else [value]:
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                function.__code__ = renamed(function.__code__)


if __name__ == "__main__":  # python -m tests.emulated.disguise cuda run_name=x dataloaders=gaussian ...: the launcher itself
    prepare(sys.argv[1])  # type: ignore[arg-type]
    import launcher

    with device.Watch():
        launcher.run(f"device={sys.argv[1]}", *sys.argv[2:])
    print(dict(device.WAITED.causes))

"""What code made a file."""

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common.command_line import ROOT

COMMIT_VARIABLE = "DENOISING_ZOO_COMMIT"  # says the commit where the files were sent without their history


@cache
def git_commit() -> str:
    """Return the checked-out commit of the project, with -dirty when files differ from it; "unknown" outside git."""
    if COMMIT_VARIABLE in os.environ or shutil.which("git") is None:
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


@cache
def package_versions() -> dict[str, str]:
    """Return versions of what the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in ("denoising-zoo", "torch", "numpy", "scipy", "hydra-core", "trackio", "torchdiffeq"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def made_with(device: str) -> dict[str, str]:
    """Return what the numbers of a run depend on beside its settings; device: its name, of which the kind counts."""
    return {"torch": package_versions()["torch"], "device": device.partition(" ")[0]}


def weights_in_words(config: dict[str, Any], step: int) -> str:
    """Return what a run of this configuration keeps as its average after so many steps, for provenance."""
    settings = config.get("ema")
    settings = settings if isinstance(settings, dict) else {}
    decay, lengths = settings.get("decay"), settings.get("lengths")
    if lengths:
        return f"the average of length {lengths[0]} at step {step:,}"
    if decay == 0:
        return f"the weights themselves (no EMA) at step {step:,}"
    return "the EMA weights" + ("" if decay is None else f" (decay {decay})") + f" at step {step:,}"

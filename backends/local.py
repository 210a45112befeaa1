"""This machine: this process for one device, a process each for several."""

from typing import Any

from backends.base_backend import Backend
from backends.torchrun import TorchrunBackend


class LocalBackend(Backend):
    """Runs at once and returns when the run has ended."""

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        if config["devices"] > 1:
            return TorchrunBackend().submit(overrides, config)
        from train import carry_out

        return carry_out(config)

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        if config["devices"] > 1:
            return TorchrunBackend().describe(overrides, config)
        return {"where": f"this machine, in this process, device={config['device']}"}

"""This process, on this machine."""

from typing import Any

from backends.base_backend import Backend


class LocalBackend(Backend):
    """Runs at once and returns when the run has ended."""

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        from train import carry_out

        return carry_out(config)

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        return {"where": f"this machine, in this process, device={config['device']}"}

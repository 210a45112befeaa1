"""What scripts/report.py knows of a run, and the pictures it shows."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from run_files.run_folder import RunFolder
from scripts.runs import find_run, read_config


@dataclass(frozen=True)
class Figure:
    """A picture of the page. kind: png or svg+xml."""

    kind: str
    content: bytes
    alt: str
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.content).decode()


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run."""

    folder: RunFolder
    status: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def scores(self) -> dict[str, float | None]:
        return self.status.get("scores", {})

    @property
    def command(self) -> str:
        return str(self.config.get("command", "python launcher.py " + " ".join(self.folder.read_overrides().split("\n"))))

    @property
    def made(self) -> dict[str, str]:
        """Return the kind of its device, as milestones know it."""
        return {"device": str(self.status.get("device", "")).split(" ")[0]}

    def figures(self, kind: str, alt: str) -> list[Figure]:
        """Return the run's own pictures of a kind, samples or neighbours, by step; one that cannot be read is left out."""
        found = []
        for name, path, step in self.folder.pictures():
            if name == kind:
                try:
                    content = self.folder.read_picture(path)
                except UserError as error:
                    print(f"note: {error}; it is left out of the page", file=sys.stderr)
                    continue
                words = f"{alt.format(self.name)}, at step {step}"
                found.append(Figure("png", content, words, f"{self.name}, step {step:,}"))
        return found


def record_of(output_dir: Path, name: str) -> RunRecord:
    folder = find_run(output_dir, name)
    return RunRecord(folder, folder.status.read(), read_config(folder), folder.metrics.read())

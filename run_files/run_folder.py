"""outputs/runs/<run_name>/: what a run leaves on disk, written so that a crash at any moment leaves it readable."""

import re
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.files import read_own, remove_temporaries, write_atomically
from run_files.metrics_file import MetricsFile
from run_files.run_lock import RunLock
from run_files.status_file import StatusFile
from run_files.stored_values import CONFIG_REMEDY, parsed_config, read_text

MOST_PICTURE_BYTES = 2**26


class RunFolder:
    """The files of one run. Only the first process of a run writes; anyone may read.

    config.yaml      resolved configuration
    overrides.txt    what was typed, one override per line
    status.json      see StatusFile
    metrics.jsonl    see MetricsFile
    samples/*.png    pictures
    log.md           the run's own section of the experiment log
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.config_path, self.overrides_path, self.log_path = (
            path / name for name in ("config.yaml", "overrides.txt", "log.md")
        )
        self.lock = RunLock(path)
        self.status = StatusFile(path / "status.json", self.lock)
        self.metrics = MetricsFile(path / "metrics.jsonl", self.lock)

    def sample_picture(self, step: int, kind: str = "") -> Path:
        """Return where the picture of a step goes; whoever draws it makes the folder."""
        return self.path / "samples" / f"step_{step:08d}{kind}.png"

    def neighbours_picture(self, step: int) -> Path:
        """Return where the picture of samples beside their nearest training images goes."""
        return self.sample_picture(step, "_neighbours")

    def pictures(self) -> list[tuple[str, Path, int]]:
        """Return what was drawn on the way, by step: ("samples" or "neighbours", picture, step)."""
        found = [(re.fullmatch(r"step_(\d+)(_neighbours)?", path.stem), path) for path in self.path.glob("samples/*.png")]
        named = [("neighbours" if match[2] else "samples", path, int(match[1])) for match, path in found if match]
        return sorted(named, key=lambda picture: (picture[2], picture[0]))

    def read_picture(self, path: Path) -> bytes:
        """Return the bytes of one of its pictures. UserError for what read_own refuses, or is not a PNG."""
        content = read_own(path, self.path, MOST_PICTURE_BYTES) or b""
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise UserError(f"{path} is not a PNG; remove it, or draw it again")
        return content

    def write_config(self, config: str, overrides: list[str]) -> None:
        """Store the resolved configuration (YAML text) and the overrides as typed."""
        write_atomically(self.config_path, config)
        write_atomically(self.overrides_path, "".join(f"{override}\n" for override in overrides))

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml, of which nothing is worked out or built. UserError when it is missing or
        damaged.
        """
        text = read_text(self.config_path)
        if text is None:
            raise UserError(f"there is no {self.config_path}; {CONFIG_REMEDY}")
        return parsed_config(text, str(self.config_path))

    def read_overrides(self) -> str:
        """Return the overrides as typed, one a line; empty where none are stored."""
        return printable(read_text(self.overrides_path) or "").rstrip()

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run left half-written. The folder is locked."""
        for folder in (self.path, self.path / "samples"):
            remove_temporaries(folder)

    def clear(self) -> None:
        """Remove what a run that ended before its first step has left. The folder is locked."""
        for path in (self.status.path, self.metrics.path, *(picture for _, picture, _ in self.pictures())):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Close the files and release the lock: the run has ended."""
        self.metrics.close()
        self.lock.release()


def run_folder_of(config: dict[str, Any]) -> RunFolder:
    return RunFolder(Path(config["output_dir"]) / "runs" / config["run_name"])

"""What a run came to: its scores, state and paths."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from run_files.metrics_file import best_monitored, higher_is_better
from run_files.run_folder import run_folder_of

OF_ANOTHER = "trained by another process"  # state of a run that is held right now


class RunResult(float):
    """What a run came to. As a number it is the best monitored value, infinite where none is known.

    scores: the last value of each metric of its evaluations; state: as in its status.json, OF_ANOTHER while another process
    trains it, "submitted" where nothing of it is on this machine; path: its folder (of a scored checkpoint: the file of its
    scores); checkpoint: its newest save, None before the first.
    """

    name: str
    monitor: str
    higher: bool  # whether a larger value of it is better
    scores: dict[str, float]
    state: str
    path: Path
    checkpoint: Path | None


def result_of(config: dict[str, Any], best: float | None = None) -> RunResult:
    """Return what the files of a run say of it; best: its best monitored value where that is known."""
    folder, outputs, name = run_folder_of(config), Path(config["output_dir"]), config["run_name"]
    if config["eval_checkpoint"]:
        path, checkpoint = scores_file(config), Path(config["eval_checkpoint"])
        scores = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        state, logged = "finished" if scores else "submitted", iter([scores])
    else:
        path, checkpoint = folder.path, outputs / "ckpts" / config["choices"]["model"] / f"{name}_last.pt"
        status = folder.status.read()
        scores, logged = status.get("scores", {}), folder.metrics.rows()
        state = OF_ANOTHER if folder.lock.is_held() else status.get("state", "submitted")
    if best is None:
        best = best_monitored(logged, config)
    result = RunResult(math.inf if best is None else best)
    result.higher = higher_is_better(config["monitor"], config.get("monitor_mode", "min"))
    result.name, result.monitor, result.scores, result.state, result.path = name, config["monitor"], scores, state, path
    result.checkpoint = checkpoint if checkpoint.exists() else None
    return result


def scores_file(config: dict[str, Any]) -> Path:
    """Return where the scores of a checkpoint (eval_checkpoint) go, beside their picture."""
    return Path(config["output_dir"]) / "evaluations" / f"{config['run_name']}.json"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows below their heads as a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def table(rows: list[list[str]]) -> str:
    """Return the rows in columns as wide as their widest cell, the last as it comes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

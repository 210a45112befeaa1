#!/usr/bin/env python
"""Every picture of one checkpoint, to outputs/pictures/<run_name>/.

    visualizers/vis_all.sh                                        # of the newest checkpoint
    visualizers/vis_all.sh outputs/ckpts/mlp/x_last.pt format=png # of another; key=value words go to every script

metrics=NAME,NAME chooses the curves. A drawing that does not fit the checkpoint's states (points or images) says so and is
left out; the exit status is 1 when none was drawn.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import front
from visualizers.scene import newest_checkpoint, scene

HERE = Path(__file__).resolve().parent
DRAWINGS = (
    "samples", "one_step", "particles", "trajectories", "velocity_field", "density", "denoising", "interpolation",
    "memorisation", "error_budget", "curves",
)  # fmt: skip


def status(script: str, words: list[str]) -> int:
    """Return the exit status of a script as a program, in this process: what all of them import is imported once."""
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def draw_all(words: list[str]) -> int:
    if words and "=" not in words[0]:
        words = [f"ckpt={words[0]}", *words[1:]]
    if not any(word.startswith("ckpt=") for word in words):
        words = [f"ckpt={newest_checkpoint()}", *words]
    about_samples = [word for word in words if not word.startswith("metrics=")]
    scene(about_samples, n=1, frames=2)  # what is wrong for every drawing is said once
    about_runs = [word for word in words if word.startswith(("ckpt=", "out=", "metrics="))]  # curves know no samples
    drawn = sum(status(f"{name}.py", about_runs if name == "curves" else about_samples) == 0 for name in DRAWINGS)
    print(f"{drawn} of {len(DRAWINGS)} drawings")
    return 0 if drawn else 1


def main(words: list[str]) -> int:
    return front(words, __doc__, draw_all)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

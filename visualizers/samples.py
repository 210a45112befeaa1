#!/usr/bin/env python
"""Samples beside real data: points, an image grid, or a grid by class of a conditional model.

    python visualizers/samples.py
    python visualizers/samples.py n=100 label=all guidance=cfg guidance.scale=2

Writes samples.png; scripts/sample.py draws the same and also writes numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.state_pictures import draw as draw_states
from visualizers.scene import Scene, main


def draw(scene: Scene) -> list[Path]:
    scene.show_all_classes()
    path = scene.folder / "samples.png"
    labels = scene.model.labels(scene.n, scene.label)
    draw_states(path, scene.samples(), labels, scene.model, f"{scene.heading}: samples", True)
    return [path]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or "", draw, n=100, points=2000))

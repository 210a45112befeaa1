"""Curves of what runs logged, with the floors of their scores."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from evaluation import pictures
from run_files.run_folder import RunFolder
from visualizers import curves


def evaluated(*floors: tuple[int, float]) -> list[dict[str, Any]]:
    """Rows of a run that was evaluated at these steps with these floors."""
    name = "eval/energy_distance"
    return [{"step": step, name: 1.0, f"{name}_floor": floor, f"{name}_floor_sd": 0.25} for step, floor in floors]


def band(rows: list[dict[str, Any]], at: float) -> tuple[float, float]:
    """The lowest and highest value of the floor's band at a step, off the drawn outline."""
    axes = pictures.new_figure(300, "", "").subplots()
    curves.draw_metric(axes, "eval/energy_distance", {"x": rows})
    (outline,) = axes.collections[0].get_paths()
    inside = [level for level in np.linspace(-1, 3, 401) if outline.contains_point((at, level))]
    return min(inside), max(inside)


def test_the_floor_of_one_evaluation_reaches_across_the_panel() -> None:
    for step in (1, 300, 599, 620):
        assert band(evaluated((600, 1.0)), step) == pytest.approx((0.5, 1.5), abs=0.02)


def test_the_band_ends_where_99_percent_of_real_sets_do() -> None:
    (row,) = evaluated((600, 1.0))
    assert band([row | {"eval/energy_distance_floor_q99": 2.2}], 300) == pytest.approx((0.5, 2.2), abs=0.02)


def test_each_evaluation_has_its_own_floor_without_a_slope_between() -> None:
    rows = evaluated((100, 1.0), (200, 1.0), (300, 0.0))
    for step, floor in ((1, 1.0), (200, 1.0), (245, 1.0), (255, 0.0), (310, 0.0)):
        assert band(rows, step) == pytest.approx((floor - 0.5, floor + 0.5), abs=0.02), step


def test_panels_that_are_left_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_figure = Mock(wraps=pictures.new_figure)
    monkeypatch.setattr(curves, "new_figure", new_figure)
    folder = RunFolder(tmp_path / "runs" / "many")
    scores = {f"eval/score_{index:02}": 1.0 for index in range(14)}
    folder.metrics.append(1, 1, 1.0, scores | {f"{name}_train": 0.5 for name in scores})
    curves.draw([f"output_dir={tmp_path}"])
    caption = " ".join(new_figure.call_args.args[2].split())
    assert caption.endswith("Not drawn: eval/score_12, eval/score_13 (metrics=NAME,NAME draws them).")
    curves.draw([f"output_dir={tmp_path}", "metrics=eval/score_13"])
    assert "Not drawn" not in new_figure.call_args.args[2]

"""What the leaderboard's tables say, against numpy, and where they are written."""

import math
from dataclasses import replace

import numpy as np
import pytest

from common.errors import UserError
from evaluation.leaderboard_table import (
    START,
    STOP,
    Row,
    cell,
    dataset_table,
    floor_cell,
    overview_table,
    rounded,
    score_record,
    seeds_in_words,
    taught_table,
    write_between,
)


def scored(*one_step: float, **further: float) -> Row:
    return Row([{"eval/energy_distance_1nfe": value, **further} for value in one_step], planned=3)


def test_cells_are_means_and_standard_deviations():
    values = [0.0031, 0.0042, 0.0038]
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert cell(scored(*values), "eval/energy_distance_1nfe") == f"{mean:.4f} ± {deviation:.4f}" == "0.0037 ± 0.0006"
    assert cell(scored(0.0031), "eval/energy_distance_1nfe") == "0.0031"
    assert cell(scored(*values), "eval/energy_distance_1nfe", best=True) == "**0.0037 ± 0.0006**"
    record = score_record(values)
    assert record["standard_deviation"] == pytest.approx(deviation) and record["mean"] == pytest.approx(mean)
    assert record["standard_error"] == pytest.approx(deviation / math.sqrt(3)) and record["values"] == values
    what = ": mean ± standard deviation over them"
    assert (seeds_in_words({"a": 1}), seeds_in_words({"a": 3, "b": 3})) == ("one seed", f"3 seeds{what}")
    assert seeds_in_words({"a": 5, "b": 3, "c": 3}) == f"5 seeds of a; 3 seeds of b, c{what}"


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.00371, 0.00023, "0.0037 ± 0.0002"),
        (0.00371, 0.00014, "0.00371 ± 0.00014"),
        (118.34, 3.2, "118 ± 3"),
        (-0.00001, 0.0004, "0.0000 ± 0.0004"),
        (2.5, 0.0, "2.5000"),
        (118.34, None, "118"),
        (0.00371, None, "0.0037"),
        (0.000012, None, "0.00001"),
        (0.2, 0.0199, "0.20 ± 0.02"),
    ],
)
def test_numbers_stop_where_their_spread_begins(value, spread, text):
    assert rounded(value, spread) == text


def test_a_map_to_data_has_no_samples_by_a_solver_and_a_generator_none_by_several_steps():
    row = replace(scored(0.1, **{"eval/energy_distance": 0.1}), learns="generator")
    found = [cell(row, f"eval/energy_distance{suffix}") for suffix in ("", "_1nfe", "_2nfe")]
    assert (
        found == ["-", "0.1000", "-"] and cell(replace(row, learns="flow_map"), "eval/energy_distance_2nfe") == "not finite"
    )


def test_a_score_stands_beside_the_one_with_the_exact_teacher():
    rows = {"meanflow": scored(0.4, 0.6), "meanflow_exact_teacher": scored(0.2), "mse": scored(0.9)}
    header, _, floor, line = taught_table(rows).splitlines()
    assert header.startswith("| objective | energy distance | with the exact teacher | flow-map error | with the exact")
    assert line.startswith("| meanflow (2 of 3 seeds) | 0.50 ± 0.14 | 0.2000 | - |") and "mse" not in floor + line


def test_cells_without_a_number_say_why():
    assert cell(Row([], 3), "eval/w2") == "not run"
    assert cell(Row([], 3, failed=1), "eval/w2") == "failed"
    assert cell(Row([], 3, stale=2), "eval/w2") == "stale"
    assert cell(scored(0.1), "oracle/flow_map_error") == "-"
    assert cell(scored(0.1), "eval/w2") == "not finite"
    assert cell(scored(0.1, **{"oracle/velocity_error": 0.1}), "oracle/flow_map_error") == "not finite"
    diverged = Row([{"eval/w2": 0.5}, {}], planned=2)
    assert cell(diverged, "eval/w2") == "0.5000 (1 of 2)"
    assert replace(scored(0.1, 0.2), failed=1).remark == " (2 of 3 seeds, 1 failed)" and scored(1, 2, 3).remark == ""
    assert scored(0.1).remark == " (one of 3 seeds)"


def test_a_table_has_its_floor_its_best_and_every_row():
    floor = {"eval/energy_distance_floor": 0.0001, "eval/energy_distance_floor_sd": 0.0004}
    ends = ("floor", "floor_sd")
    names = {f"eval/energy_distance_1nfe_{end}": floor[f"eval/energy_distance_{end}"] for end in ends}
    rows = {"a": scored(0.02, 0.03, **names), "b": scored(0.01, 0.011, **names), "c": Row([], 3)}
    text = dataset_table(rows, ["eval/energy_distance_1nfe"], 50)
    lines = text.splitlines()
    assert lines[0] == "| objective | energy distance, 1 |" and len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| floor (real against real) | 0.0001 ± 0.0004 |"
    assert lines[3].startswith("| a (2 of 3 seeds) | 0.025") and "**" not in lines[3]
    assert lines[4].startswith("| b (2 of 3 seeds) | **0.0105") and lines[5] == "| c | not run |"
    exact = {"a": scored(0.1, **{"oracle/flow_map_error_exact_field": 0.0376})}
    assert floor_cell(exact, "oracle/flow_map_error") == "0.0376 (exact field)"
    assert floor_cell(exact, "oracle/flow_map_error_1nfe") == "-"
    overview = overview_table({"x": rows, "y": {name: Row([], 3) for name in rows}}, ["x", "y"], 50).splitlines()
    assert overview[0] == "| energy distance | x, 1 | x, 50 | y, 1 | y, 50 |" and overview[5].count("not run") == 4


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\nwords \\1\n\n{START}\nold\n{STOP}\n\n## After\n")
    for body in ("new \\1 \\g<0>\ntable", "newer"):
        write_between(path, body)
        assert path.read_text() == f"# Title\n\nwords \\1\n\n{START}\n{body}\n{STOP}\n\n## After\n"
    path.write_text("# Title\n\nno markers\n")
    write_between(path, "x")
    assert path.read_text() == f"# Title\n\nno markers\n\n## Leaderboard\n\n{START}\nx\n{STOP}\n"
    for damaged in (START, STOP, f"{STOP}\n{START}", f"{START}{STOP}{START}"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="once each"):
            write_between(path, "y")
        assert path.read_text() == damaged

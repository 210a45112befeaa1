"""The table of a sweep: sorted, the seeds of a configuration in one row with mean and interval, verdicts, best command."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from evaluation.run_table import RunOfTable, closing_table
from run_files.result import OF_ANOTHER, RunResult


def run(lr: str, seed: int, value: float, state: str = "finished", monitor: str = "eval/energy_distance") -> RunOfTable:
    result = RunResult(value)
    result.name, result.monitor, result.higher, result.state = f"x_lr={lr}_seed={seed}", monitor, False, state
    result.scores, result.path, result.checkpoint = {"eval/energy_distance": value, "eval/loss": value}, Path(), None
    words = (f"run_name=x_lr={lr}_seed={seed}", "epochs=2", f"optimizer.lr={lr}", f"seed={seed}", "resume=true")
    return RunOfTable(result, {"optimizer.lr": lr}, seed, words)


def seeds(lr: str, values: list[float], first: int = 0) -> list[RunOfTable]:
    return [run(lr, seed, value) for seed, value in enumerate(values, start=first)]


def row_of(text: str, start: str) -> str:
    return next(line.strip() for line in text.splitlines() if line.strip().startswith(start))


def test_rows_are_sorted_and_have_mean_and_interval_of_their_seeds():
    rng = np.random.default_rng(0)
    parts = {lr: rng.normal(mean, 0.1, 5).tolist() for lr, mean in (("0.1", 3.0), ("0.2", 1.0), ("0.3", 2.0))}
    runs = [one for lr, values in parts.items() for one in seeds(lr, values)]
    text = closing_table(runs[::-1], "sweep: 15 jobs", "x_best")
    lines = text.splitlines()
    assert lines[0] == "sweep: 15 jobs, * the lowest eval/energy_distance in the mean of those that finished"
    assert [part for line in lines[2:5] for part in line.split() if part.startswith("x_lr")] == [
        f"x_lr={lr}_seed=*" for lr in ("0.2", "0.3", "0.1")
    ]
    for lr, values in parts.items():
        low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
        shown = f"{np.mean(values):.4g} ± {(high - low) / 2:.2g}"
        assert shown in text and f"{lr}           0, 1, 2, 3, 4  finished" in text
    assert text.endswith("best: python launcher.py run_name=x_best epochs=2 optimizer.lr=0.2")


def test_a_verdict_needs_a_p_that_holds_over_all_pairs():
    rng = np.random.default_rng(1)
    best, near, far = (rng.normal(mean, 0.1, 5).tolist() for mean in (1.0, 1.01, 3.0))
    text = closing_table([*seeds("1", best), *seeds("2", near, 5), *seeds("3", far, 5)], "runs", "b")
    p = scipy.stats.permutation_test(
        (best, far), lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)), vectorized=True, n_resamples=np.inf,
        alternative="greater",
    ).pvalue  # fmt: skip
    assert f"worse by {np.mean(far) - np.mean(best):.2g} (p = {p:.2g})" in row_of(text, "x_lr=3")
    assert "inconclusive" in row_of(text, "x_lr=2") and "worse at p <= 0.017 (0.05 over all pairs of 3" in text
    few = closing_table([*seeds("1", best[:3]), *seeds("3", far[:3], 3)], "runs", "b")
    assert "inconclusive (p = 0.1)" in few and "cannot reach it (least possible p = 0.1): train more" in few


def test_false_alarms_of_equal_configurations_are_rare_and_large_differences_are_found():
    rng = np.random.default_rng(2)
    alarms = found = 0
    for _ in range(150):
        values = [rng.normal(0, 1, 5).tolist() for _ in range(3)]
        shifted = [*values[:2], (rng.normal(6, 1, 5)).tolist()]
        alarms += "worse by" in closing_table([r for k, v in enumerate(values) for r in seeds(str(k), v, 9 * k)], "", "b")
        found += "worse by" in closing_table([r for k, v in enumerate(shifted) for r in seeds(str(k), v, 9 * k)], "", "b")
    assert alarms <= 0.05 * 150 + 3 * math.sqrt(0.05 * 0.95 * 150) and found >= 0.9 * 150


@pytest.mark.parametrize("state", ["failed", "interrupted", OF_ANOTHER])
def test_unfinished_runs_are_last_and_not_in_the_mean(state):
    runs = [run("1", 0, -5.0, state), run("2", 0, 2.0), run("2", 1, 4.0, state), run("3", 0, 2.5)]
    text = closing_table(runs, "runs", "b")
    lines = text.splitlines()[2:5]
    assert [line.split("x_lr=")[1][0] for line in lines] == ["2", "3", "1"] and lines[0].startswith("*")
    assert f"1 finished, 1 {state}" in lines[0] and "2  " in lines[0] and "against the best" not in text
    none = closing_table([run("1", 0, math.inf, state)], "runs", "b")
    assert "*" not in none.splitlines()[2] and "best: " not in none


def test_of_a_score_to_be_made_large_the_highest_is_the_best_and_the_others_are_worse():
    runs = [*seeds("1", [0.1, 0.2, 0.3, 0.15, 0.25]), *seeds("2", [5.1, 5.2, 5.3, 5.15, 5.25], 5)]
    for one in runs:
        one.result.higher = True
    text = closing_table(runs, "runs", "b")
    lines = text.splitlines()
    assert "* the highest eval/energy_distance" in lines[0] and lines[2].startswith("*  x_lr=2") and text.endswith("lr=2")
    assert "worse by 5 (p = 0.0079)" in lines[3]


def test_seeds_are_paired_where_they_are_the_same_on_the_same_source():
    """From 8 pairs on: 2 of 2^8 signs are as far off, of unpaired splits many more."""
    base = [10.0 * place for place in range(8)]
    near = [value + 1 + 0.01 * place for place, value in enumerate(base)]
    paired = closing_table([*seeds("1", base), *seeds("2", near)], "runs", "b")
    assert "worse by 1 (p = 0.0078)" in paired
    others = closing_table([*seeds("1", base), *seeds("2", near, 8)], "runs", "b")
    sources = [replace(one, settings={"source": f"s{k}"}) for k, v in enumerate((base, near)) for one in seeds(str(k), v)]
    for text in (others, closing_table(sources, "runs", "b")):
        assert "inconclusive" in text


def test_runs_of_different_groups_are_two_rows_though_what_is_shown_of_them_is_the_same():
    runs = [replace(one, group=name) for name in "ab" for one in seeds("1", [1.0, 2.0])]
    assert len(closing_table(runs, "runs", "b").split("x_lr=1")) == 3 and "p =" in closing_table(runs, "runs", "b")


def test_losses_of_different_objectives_get_no_verdict():
    runs = [
        RunOfTable(run(k, s, v, monitor="eval/loss").result, {"loss": k}, s, ("a=1",))
        for k, values in {"mse": [1.0, 1.1, 1.2, 1.3], "meanflow": [9.0, 9.1, 9.2, 9.3]}.items()
        for s, v in enumerate(values)
    ]
    assert "against the best" not in closing_table(runs, "runs", "b")

"""Golden section over a sampler's settings: against closed forms, and on a trained model against a dense grid."""

import math
from functools import partial

import numpy as np
import pytest

import launcher
from evaluation.sample import load
from searches import golden


def points_of(function, low, high, evaluations, whole=False):
    found = {}
    golden.golden_section(lambda x: found.setdefault(x, function(x)), low, high, evaluations, whole)
    return found


@pytest.mark.parametrize("least", [1.0, 1.2, 2.718, 4.5, 7.99, 8.0])
@pytest.mark.parametrize(
    "function", [lambda x, m: (x - m) ** 2, lambda x, m: abs(x - m), lambda x, m: -math.exp(-((x - m) ** 2))]
)
def test_the_minimum_is_found_within_the_last_interval(function, least):
    """After k points inside, the interval is 0.618^(k - 1) of the first; the best point is no farther from the minimum."""
    for evaluations in (6, 12, 20):
        found = points_of(partial(function, m=least), 1.0, 8.0, evaluations)
        best = min(found, key=found.get)
        assert len(found) <= evaluations and all(1 <= x <= 8 for x in found)
        assert abs(best - least) <= max(7 * golden.RATIO ** (evaluations - 3), 2e-3)


def test_whole_numbers_are_scored_once_each_and_the_best_is_found():
    for least in range(1, 41):
        found = points_of(lambda x, m=least: abs(x - m) ** 1.5, 1, 40, 13, whole=True)
        assert min(found, key=found.get) == least and all(x == int(x) for x in found) and len(found) <= 13


@pytest.fixture
def checkpoint(shared_run):
    return shared_run("g", "conditional=true", "epochs=6", "model.width=32") / "ckpts/mlp/g_last.pt"


def searched(checkpoint, *words):
    own = ["key=guidance.scale", "solver.steps=4", "n=60", "repeats=3", "device=cpu"]
    search = golden.search_of([f"ckpt={checkpoint}", *own, *words])
    return golden.scored(search, load(checkpoint, "cpu")), search


def test_the_best_scale_is_that_of_a_dense_grid_within_its_error(checkpoint, capsys):
    section, _ = searched(checkpoint, "low=0.5", "high=4")
    grid = np.linspace(0.5, 4, 8)
    dense, _ = searched(checkpoint, "values=" + ",".join(f"{x:g}" for x in grid))
    least = min(dense, key=lambda text: golden.mean(dense[text]))
    equal = [float(text) for text in golden.equal_to_best(dense)]
    best = min(section, key=lambda value: golden.mean(section[value]))
    assert len(section) <= 12 and min(equal) - 0.5 <= best <= max(equal) + 0.5, (best, least, equal)
    assert golden.mean(section[best]) <= golden.mean(dense[least]) + golden.error(dense[least])


def test_settings_share_their_noise_so_that_the_curve_is_smooth(checkpoint, capsys):
    near, _ = searched(checkpoint, "values=2,2.001")
    first, second = near.values()
    gaps = np.subtract(first, second)
    assert np.std(gaps) < 0.01 * np.std(first) and searched(checkpoint, "values=2,3")[0]["2"] == first
    apart = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.1001], "c": [1.5, 1.5, 3.2]}
    assert golden.equal_to_best(apart) == ["a", "c"]


def test_the_command_draws_and_says_how_to_sample(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["key=solver.steps", "low=1", "high=6", "evaluations=5", "repeats=2", "n=50", f"ckpt={checkpoint}", "out=p.png"]
    assert launcher.main(["--search", "golden", *words[:-1], "out=/proc/p.png"]) == 1
    said = capsys.readouterr()
    assert "out=/proc cannot be written" in said.err and not said.out  # nothing was scored in vain
    assert launcher.main(["--search", "golden", *words, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"python scripts/sample.py ckpt={checkpoint} solver.steps=" in out and (tmp_path / "p.png").is_file()
    assert launcher.main(["--search", "golden", *words, "metric=eval/fid"]) == 1
    assert "metric=eval/fid does not exist" in capsys.readouterr().err

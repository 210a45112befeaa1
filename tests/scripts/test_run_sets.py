"""runs.py compare of two sets of seeds: its statistics against other implementations, its level and power, its refusals."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from omegaconf import OmegaConf

from evaluation.seed_comparison import compared, least_p
from run_files.run_folder import RunFolder
from scripts import runs

SCORES = ["eval/loss", "eval/energy_distance", "eval/w2", "oracle/velocity_error", "eval/accuracy", "eval/copies"]
CONFIG = {
    "monitor": "eval/loss", "monitor_mode": "auto", "optimizer": {"lr": 0.001}, "loss": {"p": 1}, "source": {"std": 1.0},
    "dataloaders": {"std": 0.1, "training": {"lr": 0.1}}, "evaluation": {"samples": 10, "final_samples": 20},
}  # fmt: skip


def write_run(folder: Path, name: str, seed: int, scores: dict[str, float], **settings: Any) -> None:
    run, config = RunFolder(folder / "runs" / name), OmegaConf.create(CONFIG | {"run_name": name, "seed": seed})
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    run.write_config(OmegaConf.to_yaml(config), [])
    run.metrics.append(1, 1, 1.0, {"eval/loss": -9.0, "eval/energy_distance": -1.0})
    run.metrics.append(2, 2, 2.0, scores)
    run.status.write("finished", 2, 2, 2.0, scores)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Two sets of five seeds, the second 3 standard deviations worse in the energy distance alone."""
    rng = np.random.default_rng(0)
    for name, first, lr in (("a", 0, 0.001), ("b", 5, 0.002)):
        for seed in range(first, first + 5):
            scores = dict(zip(SCORES, rng.normal(size=len(SCORES)).tolist(), strict=True))
            scores["eval/energy_distance"] += 6.0 * (name == "b")
            more = {"eval/energy_distance_floor": 0.0, "eval/energy_distance_floor_sd": 0.1, "eval/nfe": 50.0}
            write_run(tmp_path, f"{name}_seed={seed}", seed, scores | more, optimizer__lr=lr)
    return tmp_path


def compare(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    code = runs.main(["compare", *words, "--output-dir", str(folder)])
    return (code, *capsys.readouterr())


def test_p_and_intervals_are_those_of_scipy():
    rng = np.random.default_rng(1)
    for n, m, paired in ((5, 5, False), (3, 6, False), (8, 8, True), (5, 5, True)):
        a, b = rng.normal(size=(n, 1)), rng.normal(0.8, 2.0, size=(m, 1))
        flips = paired and n >= 8
        reference = scipy.stats.permutation_test(
            (a[:, 0], b[:, 0]), lambda x, y, axis: np.abs(x.mean(axis) - y.mean(axis)), vectorized=True, n_resamples=np.inf,
            permutation_type="samples" if flips else "independent", alternative="greater",
        )  # fmt: skip
        test = scipy.stats.ttest_rel(a, b) if paired else scipy.stats.ttest_ind(a, b, equal_var=False)
        interval = test.confidence_interval(0.95)
        (found,) = compared(a, b, paired)
        assert found.p == found.p_all == pytest.approx(reference.pvalue)
        assert found.interval == pytest.approx((interval.low[0], interval.high[0]))
        assert found.p >= least_p(n, m, paired) - 1e-12
    assert [least_p(3, 3), least_p(5, 5), least_p(2, 3), least_p(8, 8, True)] == pytest.approx([0.1, 1 / 126, 0.1, 1 / 128])


def test_ten_seeds_of_one_configuration_are_inconclusive_in_95_of_100_splits():
    """Of all 252 splits, by whichever of six scores that hang together, one of them with outliers."""
    values = np.random.default_rng(2).normal(size=(10, 6)) + np.random.default_rng(3).normal(size=(10, 1))
    values[:, 2] **= 3
    chosen = [list(first) for first in combinations(range(10), 5)]
    told = [any(one.significant for one in compared(values[f], np.delete(values, f, 0), False)) for f in chosen]
    assert len(told) == 252 and 0 < sum(told) <= 12


@pytest.mark.parametrize("paired", [False, True])
def test_one_of_six_scores_three_deviations_apart_is_told_in_80_of_100_sets(paired):
    rng, count, told = np.random.default_rng(2), 8 if paired else 5, 0
    for _ in range(100):
        seeds = 0.7 * rng.normal(size=(2, count, 1)) + 0.7 * rng.normal(size=(2, count, 6))
        seeds[1, :, 0] += 3.0
        told += compared(*seeds, paired)[0].significant
    assert told >= 80, told


def test_a_difference_is_told_with_its_setting_and_the_rest_is_inconclusive(sets, capsys):
    code, out, _ = compare(capsys, sets, "a_seed=.*", "b_seed=.*")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == 0 and lines["optimizer.lr"].split() == ["optimizer.lr", "0.001", "0.002"]
    assert "a is better by" in lines["eval/energy_distance"] and "(p = 0.0079)" in lines["eval/energy_distance"]
    assert all("inconclusive (p = " in lines[name] for name in SCORES if name != "eval/energy_distance")
    assert "5 + 5 seeds: least possible p = 0.0079" in out and "eval/nfe" not in out and "_floor" not in out
    _, out, _ = compare(capsys, sets, "a_seed=.*", "b_seed=.*", "--score", "eval/w2")
    assert "eval/w2" in out and "eval/energy_distance" not in out
    _, out, _ = compare(capsys, sets, "a_seed=[012]", "b_seed=[567]")
    assert "is better" not in out and "no difference can be significant; 4 + 4 are the fewest" in out
    _, out, _ = compare(capsys, sets, "a_seed=.*", "b_seed=.*", "--best", "--score", "eval/energy_distance")
    assert "-1 ± 0" in out and "inconclusive (p = 1)" in out


def test_equal_seeds_are_pairs_and_a_larger_accuracy_is_better(tmp_path, capsys):
    for seed in range(8):
        for name, shift in (("a", 0.0), ("b", 0.01)):
            write_run(
                tmp_path, f"{name}{seed}", seed, {"eval/accuracy": seed + shift + 0.001 * (seed % 3)}, optimizer__lr=shift
            )
    _, out, _ = compare(capsys, tmp_path, "a.*", "b.*")
    assert "b is better by 0.01 (p = 0.0078)" in out and "signs of the differences within pairs" in out


def test_runs_that_each_train_a_teacher_of_their_own_are_one_configuration(tmp_path, capsys):
    for seed in range(4):
        for name, shift in (("first", 0.0), ("other", 5.0)):
            own = {"teacher": "loss=mse", "loss__teacher": f"ckpts/mlp/{name}{seed}_teacher_last.pt", "optimizer__lr": shift}
            write_run(tmp_path, f"{name}{seed}", seed, {"eval/accuracy": seed / 10 + shift}, **own)
    code, out, err = compare(capsys, tmp_path, "first.*", "other.*")
    assert code == 0 and "b is better by 5 " in out and "loss.teacher" not in out, err
    write_run(tmp_path, "other0", 0, {"eval/accuracy": 1.0}, loss__teacher="ckpts/mlp/shared_last.pt", teacher="loss=mse")
    assert "differ in" in compare(capsys, tmp_path, "first.*", "other.*")[2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataloaders__std": 0.2}, "not of the same thing: dataloaders.std is 0.1"),
        ({"evaluation__final_samples": 40}, "evaluation.final_samples is 20"),
        ({"loss__p": 2, "seed": 4}, "the runs of 'b_seed=.*' differ in"),
        ({"seed": 6}, "have the seed 6"),
    ],
    ids=str,
)
def test_sets_that_cannot_be_compared_are_refused_in_one_sentence(settings, said, sets, capsys):
    names = [f"b_seed={seed}" for seed in range(5, 10)] if len(settings) == 1 and "seed" not in settings else ["b_seed=5"]
    for seed, name in enumerate(names, 5):
        scores = dict.fromkeys(SCORES, 0.0)
        write_run(sets, name, **({"seed": seed, "scores": scores, "optimizer__lr": 0.002} | settings))
    code, _, said_of = compare(capsys, sets, "a_seed=.*", "b_seed=.*")
    assert code == 1 and said in said_of and said_of.count("\n") == 1


def test_other_refusals_are_one_sentence(sets, capsys):
    RunFolder(sets / "runs/c_seed=1").status.write("interrupted", 1, 1, 1.0)
    RunFolder(sets / "runs/c_seed=2").status.write("finished", 1, 1, 1.0)
    for words, said in (
        (["a.*", "b_seed=5.*"], "matches one run"), (["a.*", "c.*"], "is not finished"), (["a.*", "a_.*"], "in both sets"),
        (["a.*", "nothing"], "no run named nothing"), (["a_seed=0", "b_seed=5", "--best"], "two sets of seeds"),
        (["a.*", "b.*", "--score", "eval/x"], "choices: eval/loss"), (["a(.*", "b.*"], "not a regular expression"),
    ):  # fmt: skip
        code, _, err = compare(capsys, sets, *words)
        assert code == 1 and said in err and err.count("\n") == 1, (words, err)


def test_scores_that_stand_beside_other_floors_or_other_losses_are_left_out(sets, capsys):
    for seed in range(5, 10):
        more = {"eval/energy_distance_floor": 0.3, "eval/energy_distance_floor_sd": 0.1}
        write_run(sets, f"b_seed={seed}", seed, dict.fromkeys(SCORES, 0.1 * seed) | more, loss__p=2)
    code, out, _ = compare(capsys, sets, "a_seed=.*", "b_seed=.*")
    assert code == 0 and "eval/loss (the losses differ)" in out
    assert "eval/energy_distance (the noise floors differ: other counts of samples)" in out


def test_table_has_a_row_for_each_configuration(sets, capsys):
    for folder in (sets / "runs").iterdir():
        run = RunFolder(folder)
        config = run.read_config()
        words = [f"optimizer.lr={config['optimizer']['lr']}", f"seed={config['seed']}", "device=cpu"]
        run.write_config(
            OmegaConf.to_yaml(OmegaConf.create(config | {"overrides": words, "choices": {"model": "mlp"}})), words
        )
    assert runs.main(["table", "[ab]_.*", "--output-dir", str(sets)]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("10 runs, * the lowest eval/loss") and "optimizer.lr" in out and "device" not in out.splitlines()[1]
    )
    assert (
        "a_seed=*  0.001" in out
        and "b_seed=*  0.002" in out
        and "best: python launcher.py run_name=best optimizer.lr=" in out
    )
    assert runs.main(["table", "c_.*", "--output-dir", str(sets)]) == 1
    (sets / "runs/a_seed=0/config.yaml").write_text("seed: 0\n")
    assert runs.main(["table", "a.*", "--output-dir", str(sets)]) == 0
    said = capsys.readouterr()
    assert "a_seed=0 is left out: " in said.err and "config.yaml is cut: it lacks monitor, choices, overrides" in said.err
    assert "a_seed=*" in said.out
    assert runs.main(["table", "a_seed=0", "--output-dir", str(sets)]) == 1

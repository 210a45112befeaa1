"""Milestones: how often a run is called behind, what it says, and that the files beside the recipes are of the recipes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from configuration.compose import CONFIG_DIR, compose_config, resolved
from configuration.overrides import meaningful
from evaluation import milestones
from evaluation.milestones import Milestone, Milestones, milestones_for, plain, read, standing
from run_files.run_folder import RunFolder
from scripts import milestones as script

FILES = sorted(CONFIG_DIR.rglob("*.milestones.json"))
HERE = {"torch": "2.0", "device": "cpu"}


def composed(*words: str) -> dict[str, Any]:
    return resolved(compose_config(["run_name=x", *words]))


def of_seeds(values: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Milestones:
    """Milestones at step 100 of values (seeds,) by score."""
    scores = {name: [Milestone(100, float(v.mean()), float(v.std(ddof=1)))] for name, v in values.items()}
    count = len(next(iter(values.values())))
    return Milestones("command", list(range(count)), HERE, plain(meaningful(config)) if config else {}, scores)


def test_one_run_of_its_recipe_in_a_hundred_is_called_behind_and_a_bad_one_is_found():
    rng, said, bad = np.random.default_rng(0), 0, 0
    for _ in range(3000):
        made = of_seeds({"eval/loss": rng.normal(3, 0.1, 5), "eval/accuracy": rng.normal(0.9, 0.01, 5)})
        loss, accuracy = rng.normal(3, 0.1), rng.normal(0.9, 0.01)
        said += made.said(100, {"eval/loss": loss, "eval/accuracy": accuracy}, HERE) is not None
        bad += made.said(100, {"eval/loss": loss, "eval/accuracy": accuracy - 0.1}, HERE) is not None
    assert 12 <= said <= 48 and bad >= 2700  # of 3,000: 30 are expected


def test_what_a_run_behind_is_told():
    made = of_seeds({"eval/loss": np.array([1.0, 2.0, 3.0]), "eval/w2": np.zeros(3)})
    words = made.said(100, {"eval/loss": 42.0, "eval/w2": 9.0}, HERE | {"torch": "2.1"})
    assert words is not None and words.startswith(
        "40.0 sd behind at step 100: eval/loss 42, where 3 seeds had 2 ± 1; usual reasons: "
    )
    assert "torch 2.1 instead of 2.0" in words and "in 1 run of 100" in words
    rows = [{"step": 50, "eval/loss": 99.0}, {"step": 100, "eval/loss": 2.5}]
    assert made.verdict(rows, HERE).startswith("on track at all 1 evaluations; at the last, eval/loss 0.5 sd behind (of")
    assert "(1 of 1 evaluations behind)" in made.verdict([{"step": 100, "eval/loss": 42.0}], HERE)
    assert made.verdict(rows[:1], HERE).startswith("not judged")
    assert made.said(100, {"eval/loss": -99.0}, HERE) is None  # far ahead
    assert made.verdict(rows, HERE | {"device": "cuda"}).startswith("not judged"), "eval/loss is of a device's own draws"


def test_a_run_with_another_setting_is_not_judged(tmp_path, monkeypatch):
    """Seeds, devices, folders and logs do not matter; a setting newer than the file is that of the recipe as it is now."""
    monkeypatch.setattr(milestones, "path_of", lambda experiment: tmp_path / f"{experiment}.json")
    assert standing(composed(), [], HERE) == ""
    made = of_seeds({"eval/loss": np.array([1.0, 2.0])}, composed())
    del made.settings["grad_clip"]
    made.write(tmp_path / "None.json")
    assert read(tmp_path / "None.json") == made
    assert milestones_for(composed("seed=7", "device=cpu", "output_dir=/tmp/x", "log.expect=x", "callbacks=none"))[0] == made
    for words, said in (
        (["optimizer.lr=0.1"], "not judged: optimizer.lr is 0.1, that of the milestones 0.005"),
        (["grad_clip=3"], "not judged: grad_clip is 3, that of the milestones 1.0"),
        (["dataloaders=moons"], ""),
    ):
        assert standing(composed(*words), [], HERE) == said
    made.write(tmp_path / "digits.json")
    assert re.match(r"not judged: .* and \d+ more$", standing(composed("experiment=digits"), [], HERE))
    (tmp_path / "None.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged; scripts/milestones.py makes it again"):
        milestones_for(composed())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_of_the_recipe_as_it_is(path: Path):
    """A recipe whose settings changed needs new milestones: the command is the first line of the file."""
    made, name = read(path), path.name.removesuffix(".milestones.json")
    experiment = [] if name == "train" else [f"experiment={name}"]
    now = plain(meaningful(composed(*experiment)))
    stale = [key for key, value in made.settings.items() if key in now and now[key] != value and key != "optimizer.fused"]
    assert not stale and len(made.seeds) >= 5 and " ".join(["scripts/milestones.py", *experiment]) in made.command
    assert made.by_step and all(at.sd >= 0 for found in made.scores.values() for at in found)
    assert not [value for value in made.settings.values() if str(value).startswith("/")], "no place of one machine"


def test_a_run_with_a_teacher_of_its_own_is_judged_wherever_that_lies():
    config = composed("experiment=kmeans_one_step")
    config["loss"]["coupling"] |= {"teacher": "/elsewhere/ckpts/mlp/x_teacher_last.pt"}
    assert milestones_for(config)[0] is not None
    config["loss"]["coupling"]["teacher"] = "/elsewhere/ckpts/mlp/other_last.pt"
    assert milestones_for(config)[1].startswith("not judged: loss.coupling.teacher is /elsewhere")


def test_the_script_collects_what_all_seeds_scored(small_run, tmp_path, monkeypatch, capsys):
    """Trained here in the place of the launcher's process, once: a second time nothing is left to train."""
    trained: list[str] = []

    def train(name: str, settings: script.Settings) -> None:
        for seed in range(settings.seeds):
            if not (tmp_path / f"outputs/runs/{name}_seed={seed}").exists():
                small_run(f"{name}_seed={seed}", f"seed={seed}", "epochs=2")
                trained.append(name)

    file = tmp_path / "train.milestones.json"
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "path_of", lambda experiment: file)
    monkeypatch.setattr(milestones, "path_of", lambda experiment: file)
    words = ["seeds=2", f"output_dir={tmp_path / 'outputs'}"]
    assert script.main(words) == script.main(words) == 0 and len(trained) == 2
    runs = [RunFolder(tmp_path / f"outputs/runs/milestones_default_seed={seed}") for seed in (0, 1)]
    logged = [[row["eval/loss"] for row in run.metrics.read() if "eval/loss" in row] for run in runs]
    found = json.loads(file.read_text())["scores"]["eval/loss"]
    assert [step for step, _, _ in found] == [8, 16]
    assert [[mean, sd] for _, mean, sd in found] == [
        pytest.approx([np.mean(pair), np.std(pair, ddof=1)], rel=1e-5) for pair in zip(*logged, strict=True)
    ]
    capsys.readouterr()
    small_run("again", "seed=3", "epochs=2")
    assert "milestones  " in capsys.readouterr().out
    small_run("milestones_default_seed=2", "seed=2", "epochs=2", "batch_size=64")
    assert script.main(["seeds=3", words[1]]) == 1 and "with another batch_size" in capsys.readouterr().err

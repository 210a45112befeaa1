"""A wrong search is one sentence, before anything is begun."""

from pathlib import Path

import pytest

import launcher
from common.errors import UserError
from dev.invalid_commands import GOLDENS, RATE, SEARCHES
from tests.searches.fake_runs import carried_out

NAMED = {  # words of the sentence, by a word of the command
    "n=0": "n takes a whole number of at least 1, not 0", "jobs=x": "jobs takes", "sampler=simplex": "sampler takes",
    "metric=nothing": "is not the name of a score", "n=99": "more than the 2 combinations", "sampler=cmaes": "two intervals",
    "optimizer.lr=interval(1e-2,1e-4)": "the first below the second", "optimizer.lr=interval(-1,1)": "above 0, not -1",
    "model.width=interval(0,8)": "at least 1, not 0", "device=cpu,cuda": "one for all trials", "-m": "leave -m out",
    "resume=true": "the same command goes on", "modal": "use backend=slurm",
    "backend.nodes=3": "batch_size",
    "seed=range(0,1e9)": "more than 1000",
    "model=choice(mlp,cnn)": "takes images", "model.colour=interval(0,1)": "there is no setting model.colour",
}  # fmt: skip


QUEUED = [
    ["--backend", "slurm", "backend.gpus_per_node=0", RATE, *words]
    for words in (
        ["backend.nodes=0"], ["backend.nodes=3"], ["devices=3", "backend.nodes=2"], ["backend.time_minutes=1"],
        ["backend.partition='a b'"], ["backend.setup=['#SBATCH -x']"], ["backend.container="], ["device=cuda"],
        ["backend.nodes=1,2"], ["backend.gpu=H100"], ["jobs=0"], ["backend.nodes=2", "batch_size=choice(128,127)"],
        ["backend.cpus_per_node=interval(1,4)"], ["--backend", "slrum"], ["backend.memory_gb=4G"],
        ["backend.time_minutes=2.5"], ["backend.save_seconds=3"], ["backend.gpus_per_node=1", "device=cpu"],
        ["backend.constraint='$(id)'"], ["backend.account='a b'"],
    )
]  # fmt: skip


@pytest.mark.parametrize("words", SEARCHES + QUEUED, ids=" ".join)
def test_a_wrong_search_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["run_name=s", "--search", "optuna", *words]) == 1
    out, said = capsys.readouterr()
    assert said.startswith("launcher.py: ") and said.count("\n") == 1 and not out and not list(Path().iterdir())
    assert all(sentence in said for word, sentence in NAMED.items() if word in words), said


@pytest.mark.parametrize("words", GOLDENS, ids=" ".join)
def test_a_wrong_search_of_sampling_settings_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["--search", "golden", *words]) == 1
    out, said = capsys.readouterr()
    assert said.startswith("launcher.py: ") and said.count("\n") == 1 and not out and not list(Path().iterdir())


def test_sentences_that_hang_on_the_machine_or_on_runs(planned, runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["-m", "run_name=s", RATE]) == 1
    assert f"`--search optuna {RATE}` searches" in capsys.readouterr().err
    monkeypatch.setattr("common.errors.find_spec", lambda name: None if name == "optuna" else name)
    assert launcher.main(["--search", "optuna", "run_name=s", RATE]) == 1
    assert "needs optuna, which is not installed; install it by `uv sync --extra search`" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("searches.search.started", runs.start)
    with pytest.raises(UserError, match="metric=eval/nothing is not among the scores of these runs; use one of eval/loss"):
        carried_out(planned("metric=eval/nothing"))


def test_a_dry_run_says_what_would_be_searched_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["--search", "optuna", "n=7", "run_name=s", RATE, "model.width=interval(8,64)", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "7 trials for the lowest eval/loss" in out and "numbers from 0.0001 to 0.01, log scale" in out
    assert "whole numbers from 8 to 64" in out and not list(Path().iterdir())

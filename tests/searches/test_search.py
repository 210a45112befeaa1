"""A search chooses, carries out, judges and goes on: with fake runs, whose scores are a formula of their parameters."""

import csv
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from common.errors import UserError
from run_files.run_folder import RunFolder
from searches.report import outcome
from searches.samplers import generation_size
from searches.search import Trial
from tests.searches.fake_runs import Crash, FakeRun, carried_out, moved

QUADRATIC = "model.depth=interval(2,5)"


def values(search) -> list[tuple]:
    return [(trial.number, trial.state, trial.params, trial.values) for trial in search.study.trials()]


def test_random_parameters_are_uniform_in_log_and_hang_on_seed_and_number_alone(planned, runs):
    plan = planned("n=60", "jobs=3", "sampler=random")
    more = carried_out(plan)
    first = carried_out(moved(replace(plan, count=9, jobs=1), "b"))
    other = carried_out(moved(replace(plan, count=4, config=plan.config | {"seed": 1}), "c"))
    assert values(more)[:9] == values(first) and values(other) != values(first)[:4]
    rates = np.log10([trial.params["optimizer.lr"] for trial in more.study.trials()])
    assert abs(rates.mean() + 3) < 3 * 2 / math.sqrt(12 * 60) and rates.min() < -3.8 and rates.max() > -2.2
    depths = Counter(trial.params["model.depth"] for trial in more.study.trials())
    assert sorted(depths) == [2, 3, 4, 5] and min(depths.values()) > 4


def test_a_grid_has_every_combination_once(planned, runs):
    search = carried_out(planned("sampler=grid", "optimizer.lr=choice(1e-3,2e-3)", "model.depth=2,3", "jobs=2"))
    found = {tuple(trial.params.values()) for trial in search.study.trials()}
    assert len(search.study.trials()) == len(found) == 12
    assert (
        search.study.optuna.best_params["optimizer.lr"] == "0.002" and search.study.optuna.best_params["model.depth"] == "3"
    )


def test_samplers_that_learn_find_the_minimum_more_closely_than_chance(planned, runs):
    space = ("space=own", "optimizer.lr=interval(1e-4,1e-2)", "model.dropout=interval(0,0.9)")
    plan = planned("n=60", "sampler=random", *space)
    found = [carried_out(moved(replace(plan, sampler=kind), kind)) for kind in ("random", "tpe", "cmaes")]
    by_chance, *learned = ([trial.values[0] for trial in search.study.trials()] for search in found)
    assert all(np.median(scores[-15:]) < 0.3 * np.median(by_chance) for scores in learned)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_a_search_killed_at_any_operation_loses_nothing_and_repeats_nothing(planned, runs, sampler):
    """One job at a time: then TPE, too, is a function of the seed and what came before."""
    plan = planned("n=8", f"sampler={sampler}", folder="alone")
    alone = carried_out(plan)
    assert runs.endings == dict.fromkeys([f"s_{number:04d}" for number in range(8)], 1)
    for at in range(1, runs.operations + 1, 5):
        runs.endings.clear()
        runs.operations, runs.until = 0, at
        killed = moved(plan, f"killed_{at}")
        with pytest.raises(Crash):
            carried_out(killed)
        runs.until = -1
        again = carried_out(killed)
        assert values(again) == values(alone)
        assert set(runs.endings.values()) == {1} and len(runs.endings) == 8


def test_a_journal_torn_at_any_byte_goes_on(planned, runs):
    plan = planned("n=3", "sampler=random")
    whole = carried_out(plan)
    journal = plan.folder / "journal.jsonl"
    content = journal.read_bytes()
    for cut in range(0, len(content), 337):
        journal.write_bytes(content[:cut])
        assert values(carried_out(plan)) == values(whole)
    assert runs.endings == dict.fromkeys(["s_0000", "s_0001", "s_0002"], 1)


def test_generations_of_cmaes_wait_for_the_one_before(planned, runs):
    plan = planned("n=14", "sampler=cmaes")
    one, many = (carried_out(moved(replace(plan, jobs=jobs), str(jobs))) for jobs in (1, 5))
    assert values(one) == values(many) and generation_size(plan.space) == 6


def test_failed_trials_are_told_once_another_has_ended_well_and_are_not_begun_again(planned, runs, capsys):
    runs.fails = lambda name: name in ("s_0000", "s_0002")
    plan = planned("n=5", "sampler=random")
    search = carried_out(plan)
    states = [trial.state.name for trial in search.study.trials()]
    assert states == ["FAIL", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "failed (it diverged)" in outcome(plan, search.study.optuna)
    before = runs.operations
    carried_out(plan)
    assert runs.operations == before


def test_a_search_whose_first_trials_fail_stops_and_tries_them_again(planned, runs):
    runs.fails = lambda name: True
    plan = planned("n=5", "sampler=random")
    with pytest.raises(UserError, match=r"first 3 trial.*same command tries them again.*it diverged"):
        carried_out(plan)
    runs.fails = lambda name: False
    assert all(trial.state == TrialState.COMPLETE for trial in carried_out(plan).study.trials())
    runs.fails = lambda name: True
    with pytest.raises(UserError, match="first 2 trial"):
        carried_out(moved(replace(plan, count=2), "two"))


def test_the_table_is_sorted_and_the_best_command_gives_the_best_trial(planned, runs):
    plan = planned("n=25", "sampler=random", "jobs=2")
    search = carried_out(plan)
    text = outcome(plan, search.study.optuna)
    lines = text.splitlines()
    scores = [float(line.split()[-1]) for line in lines[2:22]]
    best = min(trial.values[0] for trial in search.study.trials())
    assert scores == sorted(scores) and scores[0] == float(f"{best:.4g}") and lines[2].startswith("*")
    with (plan.folder / "trials.csv").open() as file:
        assert len(list(csv.reader(file))) == 26
    assert "25 trials" in lines[0] and (plan.folder / "search.png").read_bytes().startswith(b"\x89PNG")
    command = lines[-1].removeprefix("best: python launcher.py ")
    assert (
        command.startswith("run_name=s_best ")
        and f"optimizer.lr={search.study.optuna.best_params['optimizer.lr']!r}" in command
    )
    shares = {key: float(share.rstrip("%")) for key, share in (part.rsplit(" ", 1) for part in lines[-3][15:].split(", "))}
    assert shares["model.width"] < min(shares["optimizer.lr"], shares["model.depth"])


def test_a_worse_run_is_pruned_and_stays_so(planned, runs, monkeypatch):
    class Reported(type(runs.start([], Path("x")))):
        """A run that logs its lr at every look, and ends at the twentieth."""

        def poll(self):
            said = dict(word.split("=", 1) for word in self.words)
            folder = RunFolder(Path(said["output_dir"]) / "runs" / said["run_name"])
            if self.looks < 20:
                self.looks += 1
                folder.metrics.append(self.looks, 0, 1.0, {"eval/loss": float(said["optimizer.lr"])})
                folder.metrics.close()
                return None
            return super().poll()

        def terminate(self):
            ended.append(self.words[0])

    ended = []
    monkeypatch.setattr("searches.search.started", lambda words, printed, *_: Reported(runs, words, printed))
    plan = planned("n=10", "sampler=random", "pruner=median", "space=own", "optimizer.lr=interval(1e-4,1e-2)")
    search = carried_out(plan)
    pruned = [trial.number for trial in search.study.trials() if trial.state == TrialState.PRUNED]
    rates = [trial.params["optimizer.lr"] for trial in search.study.trials()]
    whole: list[float] = []
    for number, rate in enumerate(rates):
        worse = len(whole) >= 5 and rate > np.median(whole)
        assert worse == (number in pruned)
        whole += [] if worse else [rate]
    assert pruned and ended == [f"run_name=s_{number:04d}" for number in pruned]
    assert values(carried_out(plan)) == values(search)


def test_the_journal_can_be_read_by_optuna_alone(planned, runs):
    plan = planned("n=3", "sampler=tpe")
    search = carried_out(plan)
    backend = optuna.storages.journal.JournalFileBackend(str(plan.folder / "journal.jsonl"))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert [trial.params for trial in study.trials] == [trial.params for trial in search.study.trials()]


class Dies(FakeRun):
    """A run that is killed at every look; `further` says how many steps it has done by the look so many."""

    looked: Counter[str] = Counter()
    further = staticmethod(lambda look: 0)

    def poll(self):
        said = dict(word.split("=", 1) for word in self.words)
        self.looked[said["run_name"]] += 1
        look = self.looked[said["run_name"]]
        if self.further(look) is None:
            return super().poll()
        folder = RunFolder(Path(said["output_dir"]) / "runs" / said["run_name"])
        folder.write_config("overrides: []\n", [])
        folder.status.write("running", self.further(look), 0, 1.0)
        return -9


def test_a_trial_that_is_killed_goes_on_until_five_processes_in_a_row_come_no_further(planned, runs, monkeypatch):
    monkeypatch.setattr("searches.search.started", lambda words, printed, *_: Dies(runs, words, printed))
    monkeypatch.setattr("searches.search.begun_job", lambda words, config: [*words, "resume=true"])
    plan = planned("n=1", "sampler=random")
    Dies.looked.clear()
    with pytest.raises(UserError, match="5 processes of it ended with status -9 without a step forward"):
        carried_out(plan)
    assert Dies.looked == {"s_0000": 5}
    Dies.looked.clear()
    monkeypatch.setattr(Dies, "further", lambda self, look: look // 4 if look < 12 else None)
    moving = carried_out(moved(plan, "moving"))
    assert [trial.state for trial in moving.study.trials()] == [TrialState.COMPLETE]


def test_as_many_trials_run_at_once_as_are_asked_for_and_all_are_stopped_with_the_search(planned, runs, monkeypatch):
    live, most, stopped = set[str](), list[int](), list[str]()

    class Counted(FakeRun):
        def poll(self):
            live.add(self.words[0])
            most.append(len(live))
            ended = super().poll()
            if ended is not None:
                live.discard(self.words[0])
            return ended

        def send_signal(self, number):
            stopped.append(self.words[0])

    monkeypatch.setattr("searches.search.started", lambda words, printed, *_: Counted(runs, words, printed))
    plan = planned("n=7", "jobs=3", "sampler=random")
    carried_out(plan)
    assert max(most) == 3 and not stopped
    runs.operations, runs.until = 0, 12
    with pytest.raises(Crash):
        carried_out(moved(plan, "b"))
    assert stopped


def test_a_trial_lives_as_long_as_a_process_of_it_holds_its_lock(planned, runs, monkeypatch, tmp_path):
    held = []

    def start(words, printed, again, threads, kept):
        held.extend(map(os.dup, kept))
        return (again, threads)

    monkeypatch.setattr("searches.search.started", start)
    trial = Trial(0, [], {}, tmp_path / "lock", tmp_path / "log")
    assert not trial.is_alive()
    trial.start(["resume=true"], 3)
    assert trial.is_alive() and trial.process == (True, 3)
    left = Trial(0, [], {}, tmp_path / "lock", tmp_path / "log")  # the same trial in the next search, after a kill
    assert left.is_alive()
    with pytest.raises(BlockingIOError):
        left.start([], 1)
    os.close(held[0])
    assert not left.is_alive()
    left.start([], 1)
    assert left.process == (False, 1)
    os.close(held[1])


def test_the_highest_accuracy_is_the_best(planned, runs):
    plan = planned("n=5", "sampler=random", "metric=eval/loss", "monitor_mode=max")
    search = carried_out(plan)
    assert search.study.optuna.best_value == max(trial.values[0] for trial in search.study.trials())
    assert "* the highest eval/loss" in outcome(plan, search.study.optuna)

"""The trials of a search as jobs of Slurm, without Slurm: a stand-in for its commands carries out fake runs."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher
from backends import checkout, slurm, slurm_queue
from common.errors import UserError
from searches import search as module
from searches.plan import Plan
from tests.searches.fake_runs import Crash, FakeRun, FakeRuns, carried_out, moved
from tests.searches.test_search import values

ON_SLURM = ["backend=slurm", "backend.gpus_per_node=0", "backend.cpus_per_node=1"]


class FakeSlurm:
    """Runs each job, one step a look, until it ends; all that crash may come between are operations of `runs`."""

    def __init__(self, runs: FakeRuns) -> None:
        self.runs, self.jobs, self.scripts = runs, dict[str, FakeRun](), dict[str, str]()
        self.most, self.before_noted = 0, False

    def __call__(self, command: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> str:
        said = {"sinfo": lambda: "main\n", "sbatch": lambda: self.sbatch(command, given or ""), "squeue": self.squeue}
        return said[command[0]]()

    def sbatch(self, command: list[str], script: str) -> str:
        if "--parsable" not in command:
            return "sbatch: Job 8 to start at 2026-11-26T03:14:24\n"
        number = str(100 + len(self.scripts))
        self.runs.operate()
        self.scripts[number] = script
        (line,) = [line for line in script.splitlines() if ") run=(" in line]
        words = shlex.split(line[line.index("(") + 1 : line.rindex(")")])
        self.jobs[number] = self.runs.start(words, Path(self.option("output", number).replace("%j", number)))
        self.most = max(self.most, len(self.jobs))
        if self.before_noted:
            raise Crash
        return number

    def option(self, key: str, number: str) -> str:
        return re.findall(f"^#SBATCH --{key}=(.*)$", self.scripts[number], re.M)[0]

    def squeue(self) -> str:
        for number, run in list(self.jobs.items()):
            if run.poll() is not None:
                del self.jobs[number]
        rows = ((number, *(self.option(key, number) for key in ("job-name", "comment", "output"))) for number in self.jobs)
        return "".join(f"{number}|RUNNING|0|{name:<200}|{comment}|{log:<400}\n" for number, name, comment, log in rows)


@pytest.fixture
def cluster(runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(runs)
    for each in (slurm, slurm_queue):
        monkeypatch.setattr(each, "lacking_slurm", lambda: None)
        monkeypatch.setattr(each, "asked", fake)
    monkeypatch.setattr(slurm_queue, "LOOK", 0)
    monkeypatch.setattr(module, "QUEUE_PAUSE", 0)
    for each in (checkout, slurm):
        monkeypatch.setattr(each, "code", lambda: {"launcher.py": Path(launcher.__file__)})
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def queued(planned: Callable[..., Plan], cluster: FakeSlurm) -> Callable[..., Plan]:
    return lambda *words: planned("sampler=random", *ON_SLURM, *words)


def test_a_search_in_the_queue_tries_what_one_here_does_as_many_at_a_time(planned, queued, cluster, runs):
    plan = queued("n=7", "jobs=3", "backend.partition=main")
    search = carried_out(plan)
    assert cluster.most == 3 and len(cluster.scripts) == 7 and set(runs.endings.values()) == {1}
    assert cluster.option("job-name", "104") == "s_0004" and cluster.option("partition", "104") == "main"
    assert len({line for script in cluster.scripts.values() for line in script.splitlines() if "code=" in line}) == 1
    assert values(search) == values(carried_out(planned("n=7", "sampler=random", folder="here")))
    before = len(cluster.scripts)
    carried_out(plan)
    assert len(cluster.scripts) == before


def test_a_killed_search_submits_nothing_twice(queued, cluster, runs):
    plan = queued("n=5", "jobs=2")
    alone = carried_out(plan)
    for at in range(1, runs.operations + 1, 7):
        runs.endings.clear()
        cluster.jobs.clear()
        cluster.scripts.clear()
        runs.operations, runs.until = 0, at
        killed = moved(plan, f"killed_{at}")
        with pytest.raises(Crash):
            carried_out(killed)
        runs.until = -1
        assert values(carried_out(killed)) == values(alone)
        assert len(runs.endings) == len(cluster.scripts) == 5 and set(runs.endings.values()) == {1}


def test_a_job_whose_number_was_not_noted_before_the_kill_is_found_by_its_log(queued, cluster, runs, capsys):
    plan = queued("n=2")
    cluster.before_noted = True
    with pytest.raises(Crash):
        carried_out(plan)
    cluster.before_noted = False
    (note,) = (plan.folder.parents[1] / "submitted/jobs").iterdir()
    assert note.stem == cluster.option("comment", "100") and len(cluster.jobs) == 1
    note.unlink()
    carried_out(plan)
    assert len(cluster.scripts) == 2 and runs.endings == {"s_0000": 1, "s_0001": 1}


def test_a_search_that_stops_leaves_its_jobs_in_the_queue(queued, cluster, runs, capsys):
    plan = queued("n=4", "jobs=2")
    runs.until = 6
    with pytest.raises(Crash):
        carried_out(plan)
    assert (
        "2 job(s) stay in the queue, and the same command goes on; to end them: scancel 100 101" in capsys.readouterr().err
    )


def test_a_run_that_fails_in_its_job_fails_its_trial_with_the_last_line_of_its_log(queued, cluster, runs, capsys):
    runs.fails = lambda name: name == "s_0001"
    search = carried_out(queued("n=3"))
    assert [trial.state.name for trial in search.study.trials()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "s_0001: FAILED: it diverged" in capsys.readouterr().out and len(cluster.scripts) == 3


def test_a_job_that_was_cancelled_is_submitted_again_five_times_without_a_step_forward(queued, cluster, monkeypatch):
    monkeypatch.setattr(FakeRun, "poll", lambda self: -15)
    with pytest.raises(UserError, match=r"5 processes of it ended with status -1 without a step forward .*104.log"):
        carried_out(queued("n=1"))
    assert len(cluster.scripts) == 5


def test_a_queue_that_does_not_answer_is_asked_again_for_a_while(queued, cluster, monkeypatch):
    squeue, silent = cluster.squeue, iter([False, True] * 40)

    def sometimes() -> str:
        if next(silent):
            raise UserError("Slurm's controller does not answer")
        return squeue()

    monkeypatch.setattr(cluster, "squeue", sometimes)
    carried_out(queued("n=2"))
    monkeypatch.setattr(slurm_queue, "PATIENCE", -1)
    with pytest.raises(UserError, match="does not answer"):
        carried_out(moved(queued("n=2"), "impatient"))

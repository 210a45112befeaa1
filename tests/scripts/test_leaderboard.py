"""The leaderboard: what is trained, skipped, resumed or stale, and what is said of it."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import launcher
from backends import processes
from common.errors import UserError
from run_files.run_folder import RunFolder
from scripts import job_pool
from scripts import leaderboard as board_script
from tests.forked import Forked, run
from training import loop

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model=mlp model.width=8 model.depth=1 device=cpu max_steps=20 batch_size=64 dataloaders.epoch_size=640 solver.steps=2 "
    "evaluation=leaderboard evaluation.final_samples=40 eval_every=1000000 save_every=1 keep_saves=1 callbacks=none "
    "trackio.enabled=false log_every=5 +evaluation.metrics.velocity.final_draws=200"
)
OBJECTIVES = {"mse": "loss=mse", "reflow": "loss=reflow loss.coupling.teacher={mse} loss.coupling.count=50"}


class InProcess:
    """In place of subprocess.Popen: the launcher's command, carried out here and now."""

    commands: list[list[str]] = []

    def __init__(self, command, stdout, env, **_):
        assert env["OMP_NUM_THREADS"].isdecimal()
        self.commands.append(command[2:])
        self.returncode = launcher.main(command[2:])
        if self.returncode:
            stdout.write(b"something else\nlauncher.py: it went wrong\n")

    def poll(self):
        return self.returncode


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run(*words, objectives=..., seeds=..., datasets=..., common=...) in tmp_path, its runs in this process."""
    InProcess.commands = []
    fake = SimpleNamespace(Popen=InProcess, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(processes, "subprocess", fake)
    monkeypatch.setattr(job_pool, "time", SimpleNamespace(sleep=lambda _: None))

    def run(*words: str, objectives=None, seeds=(0,), datasets=("gaussian",), common=TINY) -> int:
        config = write_board(tmp_path, objectives or OBJECTIVES, seeds, datasets, common)
        return board_script.main([*places(tmp_path, config), *words])

    return run


def write_board(folder: Path, objectives, seeds, datasets, common=TINY) -> Path:
    board = {"jobs": 1, "seeds": {name: list(seeds) for name in datasets}, "common": common, "objectives": objectives}
    (folder / "board.yaml").write_text(yaml.safe_dump(board, sort_keys=False))
    return folder / "board.yaml"


def places(folder: Path, config: Path) -> list[str]:
    return [f"config={config}", f"output_dir={folder / 'out'}", f"page={folder / 'R.md'}", f"log={folder / 'L.md'}"]


def status(folder: Path, objective: str, seed: int = 0, dataset: str = "gaussian") -> dict:
    return json.loads((folder / f"out/runs/leaderboard_{objective}_{dataset}_seed={seed}/status.json").read_text())


def names(commands: list[list[str]]) -> list[str]:
    return [next(word for word in words if word.startswith("run_name=")).removeprefix("run_name=") for words in commands]


@pytest.mark.slow
def test_everything_is_trained_once_teachers_first(command, tmp_path, capsys):
    objectives = {"mse": "loss=mse", "meanflow": "loss=meanflow"}
    assert command(objectives=objectives, seeds=(0, 1)) == 0
    assert names(InProcess.commands) == [f"leaderboard_{o}_gaussian_seed={s}" for s in (0, 1) for o in objectives]
    said = capsys.readouterr().out
    assert "4 run(s) to carry out\n1 of 4  mse gaussian seed 0: begins\n" in said
    assert re.search(r"2 of 4 .* one-step energy distance [-0-9.]+, about .* s left\n", said)
    assert re.search(r"4 of 4  meanflow gaussian seed 1: \d+ s, one-step energy distance [-0-9.]+\n", said)
    text = (tmp_path / "R.md").read_text()
    assert text.count("| mse |") == 1 and "±" in text and "2 seeds" in text and "Euler steps for mse)" in text
    assert "| W2, 4 | W2, 4 | flow-map error, 1 | flow-map error, 2 |" in (tmp_path / "L.md").read_text().replace(
        "W2, 4 (solver)", "W2, 4"
    )
    rows = json.loads((tmp_path / "out/leaderboard.json").read_text())["rows"]
    found = next(row["scores"]["eval/energy_distance_1nfe"]["values"] for row in rows if row["objective"] == "meanflow")
    assert found == [status(tmp_path, "meanflow", s)["scores"]["eval/energy_distance_1nfe"] for s in (0, 1)]
    assert command(objectives=objectives, seeds=(0, 1)) == 0
    assert len(InProcess.commands) == 4, "a finished run is not run again"


def test_a_student_waits_for_its_teacher_and_brings_it_along(command, tmp_path):
    assert command("only=reflow", seeds=(3,)) == 0
    assert names(InProcess.commands) == ["leaderboard_mse_gaussian_seed=3", "leaderboard_reflow_gaussian_seed=3"]
    teacher = tmp_path / "out/ckpts/mlp/leaderboard_mse_gaussian_seed=3_last.pt"
    assert f"loss.coupling.teacher='{teacher}'" in InProcess.commands[1] and teacher.exists()


def test_a_failed_run_is_told_and_the_others_go_on(command, tmp_path, capsys):
    bad = "loss=mse optimizer.lr=1e30 grad_clip=null"
    objectives = {"bad": bad, "reflow": "loss=reflow loss.coupling.teacher={bad}", "mse": "loss=mse"}
    assert command(objectives=objectives) == 1
    said = capsys.readouterr()
    assert "bad gaussian seed 0: FAILED: launcher.py: it went wrong" in said.out
    assert "reflow gaussian seed 0: FAILED: it needs leaderboard_bad_gaussian_seed=0" in said.out
    assert re.search(r"mse gaussian seed 0: \d+ s", said.out) and "2 run(s) failed" in said.err
    text = (tmp_path / "L.md").read_text()
    assert "| bad | failed | failed |" in text and "| reflow | not run |" in text
    assert command("only=bad", objectives=objectives) == 1  # tried again, from the start
    assert InProcess.commands[-1][-1] == "overwrite=true"


def test_a_killed_run_goes_on_where_it_was_saved(command, tmp_path, monkeypatch):
    after_step = loop.after_step

    def killed(run, values):
        after_step(run, values)
        if run.state.step == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "after_step", killed)
    command("only=mse")
    path = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0/status.json"
    path.write_text(path.read_text().replace('"failed"', '"running"'))  # a killed process writes no last word
    monkeypatch.setattr(loop, "after_step", after_step)
    assert command("only=mse") == 0
    assert InProcess.commands[-1][-1] == "resume=true" and status(tmp_path, "mse")["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 20


def test_a_run_that_a_killed_command_has_left_is_waited_for(command, tmp_path, capsys, monkeypatch):
    assert command("only=mse") == 0
    folder = RunFolder(tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0")
    finished = folder.status.path.read_text()
    folder.status.path.write_text(finished.replace('"finished"', '"running"'))
    folder.lock.acquire()

    def ends(seconds: float) -> None:
        folder.status.path.write_text(finished)
        folder.lock.release()

    monkeypatch.setattr(job_pool.time, "sleep", ends)
    assert command("only=mse") == 0 and len(InProcess.commands) == 1
    said = capsys.readouterr().out
    assert re.search(r"another process trains it, which is waited for\n1 of 1  mse gaussian seed 0: \d+ s", said)


def test_a_stale_run_is_told_kept_out_and_redone_only_on_request(command, tmp_path, capsys):
    old, new = {"mse": "loss=mse optimizer.lr=1e-3"}, {"mse": "loss=mse optimizer.lr=2e-3"}
    assert command(objectives=old) == 0
    assert command(objectives=new) == 0
    said = capsys.readouterr().out
    assert "mse gaussian seed 0 is stale: optimizer.lr was 1e-3 and is now 2e-3; redo=true" in said
    assert len(InProcess.commands) == 1 and "| mse | stale | stale |" in (tmp_path / "R.md").read_text()
    assert command("redo=true", objectives=new) == 0
    assert InProcess.commands[-1][-1] == "overwrite=true" and "stale" not in (tmp_path / "R.md").read_text().replace(
        str(tmp_path), ""
    )
    assert len(list((tmp_path / "out/runs").glob("*.old-*"))) == 1
    assert command("redo=true", objectives=new) == 0 and len(InProcess.commands) == 2


def test_settings_behind_the_same_words_make_a_run_stale(command, tmp_path, capsys):
    assert command("only=mse") == 0
    stored = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0/config.yaml"
    text = stored.read_text()
    assert "depth: 1" in text and "label_dropout: 0.1" in text
    stored.write_text(text.replace("label_dropout: 0.1", "label_dropout: 0.2").replace("run_name:", "run_name:"))
    assert command("only=mse") == 0
    assert "loss.label_dropout, not among its words, was 0.2 and is now 0.1" in capsys.readouterr().out
    stored.write_text(text.replace("log_every: 5", "log_every: 6"))
    command("only=mse")
    assert "stale" not in capsys.readouterr().out


def test_what_learns_a_map_is_trained_with_the_exact_teacher_too(command, tmp_path, capsys):
    objectives = OBJECTIVES | {"split_meanflow": "loss=split_meanflow"}
    words = {"objectives": objectives, "datasets": ("moons", "gaussian")}
    assert (
        command("teacher=exact", "data=moons", **words) == 1 and "data=moons has no exact teacher" in capsys.readouterr().err
    )
    assert command("teacher=exact", "only=mse", **words) == 1 and "is for split_meanflow" in capsys.readouterr().err
    assert command("teacher=exact", **words) == 0
    assert names(InProcess.commands) == [
        f"leaderboard_split_meanflow{kind}_gaussian_seed=0" for kind in ("", "_exact_teacher")
    ]
    assert [("loss.teacher=exact" in words) for words in InProcess.commands] == [False, True]
    page = (tmp_path / "R.md").read_text()
    assert "| split_meanflow | " in page and "leaderboard.py teacher=exact output_dir=" in page and "moons" not in page
    row = next(line for line in page.splitlines() if line.startswith("| split_meanflow"))
    assert not (tmp_path / "L.md").exists() and "-" not in row.split(" | ")[1:5]
    assert command("teacher=exact", **words) == 0 and len(InProcess.commands) == 2


def test_a_teacher_trained_again_makes_its_student_stale(command, tmp_path, capsys):
    assert command() == 0
    path = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0/status.json"
    later = json.loads(path.read_text()) | {"updated": "2999-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(later))
    assert command("redo=false") == 0
    assert (
        "reflow gaussian seed 0 is stale: leaderboard_mse_gaussian_seed=0, which it starts from" in capsys.readouterr().out
    )


def test_a_trial_leaves_the_tables_in_the_files_alone(command, tmp_path, capsys):
    assert command("only=mse", "--", "max_steps=10") == 0
    assert status(tmp_path, "mse")["step"] == 10 and not (tmp_path / "R.md").exists()
    assert "### gaussian" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["only=ms"], "only=ms does not exist (did you mean mse?)"),
        (["data=moon"], "data=moon does not exist"),
        (["seeds=7"], "seeds=7 does not exist; choices: 0"),
        (["jobs=0"], "jobs takes"),
        (["table=no"], "table takes true, false or only"),
        (["max_steps=3"], "come after --"),
        (["redo"], "cannot use 'redo'"),
        (["config=/nowhere.yaml"], "there is no file /nowhere.yaml"),
        (["--", "optimizer.lrr=1"], "mse on gaussian: there is no setting optimizer.lrr"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, command, capsys):
    assert command(*words) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not InProcess.commands


def test_a_placeholder_must_stand_higher_up(command, capsys):
    assert command(objectives=dict(reversed(OBJECTIVES.items()))) == 1
    assert "{mse} in the words of reflow names no objective above it" in capsys.readouterr().err


def test_each_data_set_has_its_seeds(tmp_path):
    config = write_board(tmp_path, {"mse": "loss=mse"}, (0, 1), ("gaussian",))
    text = config.read_text().replace("seeds:", "seeds:\n  moons: [1, 2]")
    config.write_text(text)
    entries = board_script.read_board(config).entries(tmp_path)
    assert [(e.dataset, e.seed) for e in entries] == [("moons", 1), ("gaussian", 1), ("moons", 2), ("gaussian", 0)]
    older = {**yaml.safe_load(text), "seeds": [0, 1], "datasets": ["moons", "gaussian"]}
    config.write_text(yaml.safe_dump(older))
    assert board_script.read_board(config).seeds == {"moons": [0, 1], "gaussian": [0, 1]}
    config.write_text(yaml.safe_dump({**older, "datasets": None, "seeds": {"moons": 3}}))
    with pytest.raises(UserError, match="seeds names the seeds of each data set, such as"):
        board_script.read_board(config)
    for wrong, sentence in (
        ({"jobs": -3}, "jobs takes 1 or more"), ({"seeds": {"moons": ["a"]}, "datasets": None}, "seeds whole numbers"),
        ({"common": "a='b"}, "cannot be read .no closing quotation."),
    ):  # fmt: skip
        config.write_text(yaml.safe_dump({**older, **wrong}))
        with pytest.raises(UserError, match=sentence):
            board_script.read_board(config)


def test_as_many_runs_at_once_as_asked_for(command, monkeypatch):
    live: set[int] = set()
    most = []

    class Slow(InProcess):
        def __init__(self, command, **settings):
            super().__init__(command, **settings)
            self.polls = 0
            live.add(id(self))
            most.append(len(live))

        def poll(self):
            self.polls += 1
            if self.polls < 3:
                return None
            live.discard(id(self))
            return self.returncode

    monkeypatch.setattr(processes.subprocess, "Popen", Slow)
    assert command("jobs=2", "table=false", "only=mse", seeds=(0, 1, 2)) == 0
    assert max(most) == 2 and names(InProcess.commands)[:2] == [f"leaderboard_mse_gaussian_seed={s}" for s in (0, 1)]


@pytest.mark.slow
@pytest.mark.process
def test_stopping_saves_and_the_same_command_goes_on(tmp_path):
    """The real thing: a process of its own, Ctrl-C, and once more."""
    common = TINY.replace("=20", "=400", 1).replace("save_every=1", "save_every=100")
    config = write_board(tmp_path, {"mse": "loss=mse"}, [0], ["gaussian"], common)
    line = [ROOT / "scripts/leaderboard.py", *places(tmp_path, config), "table=false"]
    process = Forked(*line, cwd=tmp_path)
    log = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0/metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "waiting for 1 run(s) to save" in said and "the same command goes on" in said
    stopped = status(tmp_path, "mse")
    assert stopped["state"] == "interrupted" and 0 < stopped["step"] < 400
    again = run(*line, cwd=tmp_path)
    assert again.returncode == 0 and "1 of 1  mse gaussian seed 0:" in again.stdout, again.stderr
    assert status(tmp_path, "mse")["state"] == "finished"
    printed = (tmp_path / "out/leaderboard/leaderboard_mse_gaussian_seed=0.log").read_text()
    assert "stopping after this step" in printed and f"from step {stopped['step']:,}" in printed


def test_seconds_are_of_training_alone(command, tmp_path):
    assert command("only=mse") == 0
    run = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "out/leaderboard.json").read_text())["rows"][0]["scores"]["training seconds"]["mean"]
    (evaluated,) = [row for row in rows if "eval/seconds" in row]
    assert found == pytest.approx(evaluated["elapsed_seconds"] - evaluated["eval/seconds"]) and found > 0
    shutil.rmtree(run)
    assert command("table=only") == 0 and "| mse | not run |" in (tmp_path / "R.md").read_text()


@pytest.mark.slow
def test_the_committed_table_composes():
    options, _ = board_script.read_words(["output_dir=/nowhere"])
    board = board_script.read_board(options.config)
    entries = replace(board, seeds={board.datasets[0]: [0]}).entries(options.output_dir)
    assert {entry.settings()["evaluation"]["final_samples"] for entry in entries} == {10_000}
    assert [entry.objective for entry in entries] == list(board.objectives)

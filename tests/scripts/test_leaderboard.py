"""The leaderboard: what is trained, skipped, resumed or stale; and what its tables say, against numpy."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import launcher
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
    write_between,
)
from scripts import leaderboard as board_script
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
    monkeypatch.setattr(board_script, "subprocess", fake)
    monkeypatch.setattr(board_script, "time", SimpleNamespace(sleep=lambda _: None))

    def run(*words: str, objectives=None, seeds=(0,), datasets=("gaussian",), common=TINY) -> int:
        config = write_board(tmp_path, objectives or OBJECTIVES, seeds, datasets, common)
        return board_script.main([*places(tmp_path, config), *words])

    return run


def write_board(folder: Path, objectives, seeds, datasets, common=TINY) -> Path:
    board = {"jobs": 1, "seeds": list(seeds), "datasets": list(datasets), "common": common, "objectives": objectives}
    (folder / "board.yaml").write_text(yaml.safe_dump(board, sort_keys=False))
    return folder / "board.yaml"


def places(folder: Path, config: Path) -> list[str]:
    return [f"config={config}", f"output_dir={folder / 'out'}", f"page={folder / 'R.md'}", f"log={folder / 'L.md'}"]


def status(folder: Path, objective: str, seed: int = 0, dataset: str = "gaussian") -> dict:
    return json.loads((folder / f"out/runs/leaderboard_{objective}_{dataset}_seed={seed}/status.json").read_text())


def names(commands: list[list[str]]) -> list[str]:
    return [next(word for word in words if word.startswith("run_name=")).removeprefix("run_name=") for words in commands]


def test_everything_is_trained_once_teachers_first(command, tmp_path, capsys):
    objectives = {"mse": "loss=mse", "meanflow": "loss=meanflow"}
    assert command(objectives=objectives, seeds=(0, 1)) == 0
    assert names(InProcess.commands) == [f"leaderboard_{o}_gaussian_seed={s}" for s in (0, 1) for o in objectives]
    said = capsys.readouterr().out
    assert "4 of 4  meanflow gaussian seed 1:" in said and "one-step energy distance" in said
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
    assert "mse gaussian seed 0: 0 s" in said.out and "2 run(s) failed" in said.err
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
        (["only=ms"], "only=ms is not in the table (did you mean mse?)"),
        (["data=moon"], "data=moon is not in the table"),
        (["seeds=7"], "seeds=7 is not in the table; it has 0"),
        (["jobs=0"], "jobs takes"),
        (["table=no"], "table takes true, false or only"),
        (["max_steps=3"], "come after --"),
        (["redo"], "cannot use 'redo'"),
        (["config=/nowhere.yaml"], "is not a file"),
        (["--", "optimizer.lrr=1"], "mse on gaussian: there is no setting optimizer.lrr"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, command, capsys):
    assert command(*words) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not InProcess.commands


def test_a_placeholder_must_stand_higher_up(command, capsys):
    assert command(objectives=dict(reversed(OBJECTIVES.items()))) == 1
    assert "{mse} in the words of reflow names no objective higher up" in capsys.readouterr().err


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

    monkeypatch.setattr(board_script.subprocess, "Popen", Slow)
    assert command("jobs=2", "table=false", seeds=(0, 1, 2)) == 0
    assert max(most) == 2 and names(InProcess.commands)[:2] == [f"leaderboard_mse_gaussian_seed={s}" for s in (0, 1)]


def test_stopping_saves_and_the_same_command_goes_on(tmp_path):
    """The real thing: a process of its own, Ctrl-C, and once more."""
    common = TINY.replace("=20", "=1000", 1).replace("save_every=1", "save_every=100")
    config = write_board(tmp_path, {"mse": "loss=mse"}, [0], ["gaussian"], common)
    line = [sys.executable, str(ROOT / "scripts/leaderboard.py"), *places(tmp_path, config), "table=false"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0/metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "waiting for 1 run(s) to save" in said and "the same command goes on" in said
    stopped = status(tmp_path, "mse")
    assert stopped["state"] == "interrupted" and 0 < stopped["step"] < 1000
    again = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "1 of 1  mse gaussian seed 0:" in again.stdout, again.stderr
    assert status(tmp_path, "mse")["state"] == "finished"
    printed = (tmp_path / "out/leaderboard/leaderboard_mse_gaussian_seed=0.log").read_text()
    assert "stopping after this step" in printed and f"from step {stopped['step']:,}" in printed


# ---- the tables


def scored(*one_step: float, **further: float) -> Row:
    return Row([{"eval/energy_distance_1nfe": value, **further} for value in one_step], planned=3)


def test_cells_are_means_and_standard_errors():
    values = [0.0031, 0.0042, 0.0038]
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(3)
    assert cell(scored(*values), "eval/energy_distance_1nfe") == f"{mean:.4f} ± {error:.4f}" == "0.0037 ± 0.0003"
    assert cell(scored(0.0031), "eval/energy_distance_1nfe") == "0.0031"
    assert cell(scored(*values), "eval/energy_distance_1nfe", best=True) == "**0.0037 ± 0.0003**"


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


def test_a_table_has_its_floor_its_best_and_every_row():
    floor = {"eval/energy_distance_floor": 0.0001, "eval/energy_distance_floor_sd": 0.0004}
    names = {
        f"eval/energy_distance_{n}nfe_{end}": floor[f"eval/energy_distance_{end}"]
        for n in (1,)
        for end in ("floor", "floor_sd")
    }
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


def test_seconds_are_of_training_alone(command, tmp_path):
    assert command("only=mse") == 0
    run = tmp_path / "out/runs/leaderboard_mse_gaussian_seed=0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "out/leaderboard.json").read_text())["rows"][0]["scores"]["training seconds"]["mean"]
    (evaluated,) = [row for row in rows if "eval/seconds" in row]
    assert found == pytest.approx(evaluated["elapsed_seconds"] - evaluated["eval/seconds"]) and found > 0
    shutil.rmtree(run)
    assert command("table=only") == 0 and "| mse | not run |" in (tmp_path / "R.md").read_text()


def test_the_committed_table_composes():
    options = board_script.read_words(["output_dir=/nowhere"])
    board = board_script.read_board(options.config)
    entries = board_script.entries_of(replace(board, seeds=[0]), options)
    for entry in entries.values():
        if entry.dataset == board.datasets[0]:
            assert board_script.settings_of(entry)["evaluation"]["final_samples"] == 10_000
    assert len(entries) == len(board.objectives) * len(board.datasets)

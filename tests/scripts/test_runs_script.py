"""scripts/runs.py: what it prints, what it refuses, and from where it runs."""

import csv
import os
import platform
import subprocess
import sys
import tracemalloc
import uuid
from pathlib import Path

import pytest

from common.command_line import Parser, count
from common.errors import UserError
from run_files.run_folder import RunFolder
from run_files.trackio_tracker import run_names
from scripts import modal_app, runs, trackio_delete, trackio_rebuild

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    first = RunFolder(tmp_path / "runs" / "moons_mlp")
    first.write_config("run_name: moons_mlp\nepochs: 10\noptimizer: {lr: 0.001}\nmodel: {width: 64}\n", ["epochs=10"])
    first.metrics.append(100, 1, 1.0, {"train/loss": 0.9, "eval/energy_distance": 0.011, "eval/accuracy": 0.9})
    first.metrics.append(200, 2, 2.0, {"train/loss": 0.8, "eval/energy_distance": 0.022, "eval/accuracy": 0.8})
    first.status.write("finished", 200, 2, 90.0, {"eval/energy_distance": 0.022}, epochs=10)
    second = RunFolder(tmp_path / "runs" / "moons_cnn")
    second.write_config("run_name: moons_cnn\nepochs: 10\noptimizer: {lr: 0.002}\nloss: {p: 1}\n", [])
    second.metrics.append(50, 1, 1.0, {"train/loss": float("nan")})
    second.status.write("failed", 50, 1, 30.0, why="the loss is not finite")
    return tmp_path


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    code = runs.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out.rstrip("\n").split("\n"), err


def cells(lines: list[str], first: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[:1] == [first]]
    return line.split()


def test_list_tells_state_and_best_scores(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = run_main(capsys, "list", "--output-dir", output_dir)
    assert (code, len(lines)) == (0, 3)
    row = ["moons_mlp", "finished", "200", "2/10", "1.5", "energy_distance", "0.011,", "accuracy", "0.9"]
    assert cells(lines, "moons_mlp") == row
    assert cells(lines, "moons_cnn") == ["moons_cnn", "failed", "50", "1", "0.5", "-"]


def test_metrics_as_comma_separated_values(output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = '=HYPERLINK("x"),\n\x1b[2J'
    RunFolder(output_dir / "runs" / "moons_mlp").metrics.append(300, 3, 3.0, {hostile: 1e-300, "train/loss": float("inf")})
    out = tmp_path / "a, b.csv"
    out.write_text("old")
    code, lines, _ = run_main(capsys, "show", "moons_mlp", f"output_dir={output_dir}", f"csv={out}")
    assert (code, lines) == (0, [f"{out}: 3 rows of 7 columns"])
    with out.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["step", "epoch", "elapsed_seconds"] and head[3] == '\'=HYPERLINK("x"), \\x1b[2J'
    assert head[4:] == ["eval/accuracy", "eval/energy_distance", "train/loss"]
    assert rows[0] == ["100", "1", "1.0", "", "0.9", "0.011", "0.9"] and rows[2] == [
        "300",
        "3",
        "3.0",
        "1e-300",
        "",
        "",
        "nan",
    ]


@pytest.mark.parametrize("name, words, sentence", [
    ("moons_mlp", ["csv=x.txt"], "csv=x.txt must end in .csv"),
    ("moons_mlp", ["csv="], "csv takes a path"),
    ("moons_mlp", ["cvs=x.csv"], "cannot use 'cvs=x.csv' (did you mean csv?); the keys are csv"),
    ("moons_mlp", ["csv=no/x.csv"], "lies in a folder that does not exist"),
    ("moons_mlp", ["csv=folder.csv"], "folder.csv is not a regular file"),
    ("moons_none", ["csv=x.csv"], "no run named moons_none"),
    ("empty", ["csv=x.csv"], "the run empty has no metrics yet"),
])  # fmt: skip
def test_a_table_that_cannot_be_written_is_one_sentence(name, words, sentence, output_dir, tmp_path, monkeypatch, capsys):
    RunFolder(output_dir / "runs" / "empty").status.write("failed", 0, 0, 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    code, _, err = run_main(capsys, "show", name, *words, "--output-dir", output_dir)
    assert code == 1 and sentence in err and not (tmp_path / "x.csv").exists()


def test_long_metrics_are_read_a_line_at_a_time(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever prints a few numbers of a run holds no more of its file than those."""
    path = output_dir / "runs" / "moons_cnn" / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {k}, "filler": "{"x" * 200}", "eval/loss": 0.5}}\n' for k in range(4000)))
    for words in (["list"], ["show", "moons_cnn"], ["show", "moons_cnn", f"csv={output_dir / 'x.csv'}"]):
        run_main(capsys, *words, "--output-dir", output_dir)  # which imports
        tracemalloc.start()
        assert run_main(capsys, *words, "--output-dir", output_dir)[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < path.stat().st_size / 4


@pytest.mark.parametrize("main, words, wrong", [
    (runs.main, [], "arguments are required: list, show"),
    (runs.main, ["lsit"], "invalid choice: 'lsit' (choose from 'list'"),
    (runs.main, ["list", "--foo\n\x1b[2J"], "unrecognized arguments: --foo"),
    (trackio_delete.main, ["--foo"], "unrecognized arguments: --foo"),
    (trackio_rebuild.main, ["--project"], "--project: expected one argument"),
    (modal_app.main, ["logs"], "arguments are required: RUN"),
])  # fmt: skip
def test_wrong_usage_is_one_sentence(main, words, wrong, capsys):
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert wrong in err and "; usage: " in err and len(err.splitlines()) <= 2 and "\x1b" not in out + err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "9" * 30, "\u0663"])
def test_a_count_of_a_parser_is_at_least_one(text):
    parser = Parser(prog="x.py")
    parser.add_argument("--jobs", type=count)
    assert parser.parse_args(["--jobs", "3"]).jobs == 3
    with pytest.raises(UserError, match="argument --jobs: takes a whole number of at least 1, not"):
        parser.parse_args([f"--jobs={text}"])


def test_every_parser_raises_user_errors() -> None:
    for path in (path for folder in ("scripts", "dev", "visualizers") for path in (ROOT / folder).glob("*.py")):
        assert "argparse.ArgumentParser(description" not in path.read_text(encoding="utf-8"), path


def test_list_of_nothing_says_how_to_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = run_main(capsys, f"output_dir={tmp_path}", "list")
    assert code == 0 and "python launcher.py run_name=" in lines[0]


def test_run_whose_folder_nobody_holds_is_lost(
    output_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have its number by now, as this one has here."""
    alive, killed = (RunFolder(output_dir / "runs" / name) for name in ("alive", "killed"))
    for folder in (alive, killed):
        folder.lock.acquire()
        folder.status.write("running", 1, 0, 0.0)
    killed.release()
    monkeypatch.setattr("run_files.run_lock.platform.node", lambda: "another-machine")
    RunFolder(output_dir / "runs" / "away").status.write("running", 1, 0, 0.0)
    monkeypatch.undo()
    _, lines, _ = run_main(capsys, "list", "--output-dir", output_dir)
    assert [cells(lines, name)[1] for name in ("alive", "killed", "away")] == ["running", "lost", "running"]


def test_values_of_another_kind_are_left_out(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = RunFolder(output_dir / "runs" / "odd")
    odd.path.mkdir()
    odd.metrics.path.write_text('{"step": 1, "eval/loss": {"a": 1}, "eval/fid": "x", "eval/accuracy": 0.5}\n')
    odd.status.path.write_text(f'{{"state": "running", "host": "{platform.node()}", "scores": {{"eval/loss": "x"}}}}')
    worse = RunFolder(output_dir / "runs" / "worse")
    for text in ('{"seconds": "x"}', '{"step": null}', '{"state": "running", "seconds": 60.0'):
        worse.path.mkdir(exist_ok=True)
        worse.status.path.write_text(text)
        code, lines, _ = run_main(capsys, "list", "--output-dir", output_dir)
        assert code == 0 and cells(lines, "worse")[1] == "-" and cells(lines, "moons_mlp")[1] == "finished"
        assert cells(lines, "odd") == ["odd", "lost", "-", "-", "0.0", "accuracy", "0.5"]
    assert run_main(capsys, "show", "odd", "--output-dir", output_dir)[0] == 0
    assert run_main(capsys, "compare", "odd", "moons_mlp", "--output-dir", output_dir)[0] == 0


def test_show_tells_overrides_metrics_and_files(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = run_main(capsys, "show", "moons_mlp", "--output-dir", output_dir)
    assert lines[0] == "moons_mlp: finished at step 200, epoch 2/10, 1.5 minutes"
    assert "  epochs=10" in lines
    assert cells(lines, "eval/accuracy") == ["eval/accuracy", "0.8", "0.9"]
    assert cells(lines, "train/loss") == ["train/loss", "0.8"]
    assert any("metrics.jsonl" in line and "KiB" in line for line in lines)
    scores = {"eval/w2": 0.5, "eval/w2_floor": 0.7, "eval/nfe": 50.0}
    RunFolder(output_dir / "runs/moons_mlp").metrics.append(200, 2, 90.0, scores)
    _, lines, _ = run_main(capsys, "show", "moons_mlp", "--output-dir", output_dir)
    assert cells(lines, "eval/w2")[1:] == ["0.5", "0.5"]
    assert [cells(lines, name)[1:] for name in ("eval/w2_floor", "eval/nfe")] == [["0.7"], ["50"]]
    _, lines, _ = run_main(capsys, "show", "moons_cnn", "--output-dir", output_dir)
    assert "the loss is not finite" in lines
    assert cells(lines, "train/loss") == ["train/loss", "nan"]


def test_compare_tells_only_the_settings_that_differ(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = run_main(capsys, "compare", "moons_mlp", "moons_cnn", "--output-dir", output_dir)
    assert cells(lines, "optimizer.lr") == ["optimizer.lr", "0.001", "0.002"]
    assert cells(lines, "model.width") == ["model.width", "64", "-"]
    assert cells(lines, "loss.p") == ["loss.p", "-", "1"]
    assert not [line for line in lines if line.startswith(("epochs", "run_name"))]
    assert cells(lines, "eval/energy_distance") == ["eval/energy_distance", "0.022", "-"]
    assert cells(lines, "train/loss") == ["train/loss", "0.8", "nan"]


def test_unknown_run_is_one_sentence_with_the_nearest_name(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(capsys, "show", "moon_mlp", "--output-dir", output_dir)
    assert code == 1 and "did you mean moons_mlp?" in err and err.count("\n") == 1
    code, _, err = run_main(capsys, "compare", "moons_mlp", "moons_mlp", "--output-dir", output_dir)
    assert code == 1 and "two different runs" in err


def test_a_run_of_another_user_is_not_called_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs/theirs").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="runs/theirs may not be read by this user"):
        runs.find_run(tmp_path, "theirs")


@pytest.mark.process
def test_runs_from_any_folder_without_the_libraries(output_dir: Path) -> None:
    """-S hides site-packages: the script finds the repository by itself and needs nothing else."""
    command = [sys.executable, "-S", str(ROOT / "scripts/runs.py"), "show", "moons_mlp", "--output-dir", "."]
    done = subprocess.run(command, cwd=output_dir, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moons_mlp: finished")


def test_delete_takes_a_runs_three_places_and_nothing_of_its_neighbours(small_run, tmp_path, capsys) -> None:
    """Neither of one whose name begins alike, nor of one that a process trains."""
    project = f"deleted-{uuid.uuid4().hex[:6]}"
    tracked = ["trackio.enabled=true", f"trackio.project={project}"]
    for name in ("x", "x_epoch_0001", "y"):
        folder = small_run(name, "max_steps=2", *tracked)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    code, lines, _ = run_main(capsys, "delete", "x", "--dry-run", "--output-dir", folder)
    assert (code, lines[0]) == (0, "would delete") and "3 saves, 1 dashboard runs" in lines[1]
    assert sorted(folder.rglob("*")) == before and "x" in run_names(project)
    held = RunFolder(folder / "runs/y")
    held.lock.acquire()
    code, _, said = run_main(capsys, "delete", "x", "y", "--output-dir", folder)
    assert code == 1 and "run y is being trained by another process right now (process" in said
    held.release()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "archive")
        code, _, said = run_main(capsys, "delete", "x", "--output-dir", folder)
    assert code == 1 and "archive may not be read by this user, and saves may lie there; nothing was deleted" in said
    assert sorted(folder.rglob("*")) == before and "x" in run_names(project)
    assert run_main(capsys, "delete", "x", "--output-dir", folder)[0] == 0
    gone = {path.relative_to(folder) for path in set(before) - set(folder.rglob("*"))}
    saves = {Path("ckpts/mlp") / name for name in ("x_last.pt", "x_best.pt", "archive/x_epoch_0001.pt")}
    assert saves <= gone and all(path in saves or path.parts[:2] == ("runs", "x") for path in gone)
    assert run_names(project) == ["x_epoch_0001", "y"]


def test_names_of_several_lines_invent_no_rows(small_run, capsys):
    folder = small_run("x", "max_steps=2")
    with (folder / "runs/x/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval/a\\nfake  finished": 1.0}\n')
    for words in (("show", "x"), ("list",), ("table", "x")):
        code, lines, _ = run_main(capsys, *words, "--output-dir", folder)
        assert code == 0 and not any(line.startswith("fake") for line in lines)
    assert any("eval/a fake  finished" in row for row in RunFolder(folder / "runs/x").metrics.read())


@pytest.mark.parametrize("left", ["metrics.jsonl", "config.yaml", "status.json"])
def test_a_deletion_that_was_killed_can_be_finished_and_lends_nothing_to_a_new_run(left, small_run, capsys):
    folder = small_run("x", "max_steps=2") / "runs/x"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval/ghost": 1.0}\n')
    for path in (*folder.parents[1].glob("ckpts/**/*.pt"), *folder.glob("*.*")):
        if path.name != left:
            path.unlink()
    if left != "config.yaml":  # which says what was trained, so that a new run asks first
        small_run("x", "max_steps=2")
        assert not any("eval/ghost" in row for row in RunFolder(folder).metrics.read())
        return
    assert run_main(capsys, "delete", "x", "--output-dir", folder.parents[1])[0] == 0 and not folder.exists()

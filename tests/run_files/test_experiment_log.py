"""The experiment log: the run's parts are replaced, people's words never, and two runs at once leave it whole."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from evaluation.metrics.base_metric import Score
from run_files.experiment_log import ExperimentLog, Section
from run_files.run_folder import RunFolder
from training.callbacks import compared_table

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from run_files.experiment_log import ExperimentLog
log = ExperimentLog(Path(sys.argv[1]))
log.begin(sys.argv[2], "command of " + sys.argv[2], "model: mlp", expect="works")
for number in range(25):
    log.add_result(sys.argv[2], f"result {number}")
log.finish(sys.argv[2], "table of " + sys.argv[2])
"""

ENDLESS = """
import itertools, sys, time
from pathlib import Path
from run_files.experiment_log import ExperimentLog
log, name = ExperimentLog(Path(sys.argv[1])), sys.argv[2]
for number in itertools.count():
    log.add_result(name, f"result {number}")
    print(number, flush=True)
    time.sleep(0.005)  # so that the lock goes round
"""
CUT_SHORT = """
import resource, signal, sys
from pathlib import Path
from run_files.experiment_log import ExperimentLog
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process at the first byte beyond the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ExperimentLog(Path(sys.argv[1])).finish(sys.argv[2], "a new and longer table " * 10)
"""
WORDS = "# Our log\n\nWritten by hand. <!-- mine -->\n\n## an old one\n\nObservations: it worked.\n"


def endless(path: Path, name: str) -> subprocess.Popen[str]:
    """A process that writes results one after another and tells each that it has written."""
    return subprocess.Popen([sys.executable, "-c", ENDLESS, str(path), name], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "EXPERIMENT_LOG.md"


@pytest.fixture
def log(path: Path) -> ExperimentLog:
    return ExperimentLog(path)


def write_story(log: ExperimentLog, name: str = "x") -> None:
    log.begin(name, f"python launcher.py run_name={name}", "model: mlp, loss: meanflow", "0.01", "Table 4", "a baseline")
    log.add_result(name, "step 100: 0.5")
    log.add_result(name, "step 200: 0.2")
    log.finish(name, "| metric | value |\n|---|---|\n| eval/energy_distance | 0.02 |")


def test_section_tells_before_during_after_in_order(log: ExperimentLog, path: Path) -> None:
    write_story(log)
    told = [
        "# Experiment log",
        "## x",
        "### Before",
        "Expected outcome: 0.01",
        "Hyper-parameters from: Table 4",
        "Reason: a baseline",
        "python launcher.py run_name=x",
        "model: mlp, loss: meanflow",
        "### During",
        "- step 100: 0.5\n- step 200: 0.2",
        "### After",
        "| eval/energy_distance | 0.02 |",
        "Observations:",
        "Issues:",
        "Next steps:",
        "### Configuration changes",
    ]
    text = path.read_text()
    places = [text.index(part) for part in told]
    assert places == sorted(places)


def test_words_of_people_are_kept_exactly(log: ExperimentLog, path: Path) -> None:
    write_story(log)
    words = {
        "Observations:": "Observations:\n\nThe loss fell at once. <!-- my own comment -->\n## not a heading of ours",
        "### During": "### During\n\nI watched it.",
        "# Experiment log": "# Our log, renamed",
    }
    text = path.read_text()
    for old, new in words.items():
        text = text.replace(old, new, 1)
    path.write_text(text + "\nA last word without a line break")
    write_story(log, "y")
    write_story(log)
    log.add_change("x", "optimizer.lr", 0.1, 0.2, "diverged")
    text = path.read_text()
    assert all(text.count(new) == 1 for new in words.values())
    assert "A last word without a line break" in text
    assert text.count("- step 100: 0.5") == 2 and text.count("## x\n") == 1


def test_rerun_replaces_its_own_words_and_not_another_runs(log: ExperimentLog, path: Path) -> None:
    write_story(log, "x")
    write_story(log, "x_2")
    other = path.read_text().partition("## x_2")[2]
    log.begin("x", "new command", "new summary")
    text = path.read_text()
    assert text.partition("## x_2")[2] == other
    section = Section(text, "x")
    assert "new command" in section.read("before") and "Table 4" not in section.read("before")
    assert (section.read("during"), section.read("after")) == ("", "")


def test_name_that_begins_another_is_its_own_section(log: ExperimentLog, path: Path) -> None:
    write_story(log, "x_2")
    write_story(log, "x")
    lines = path.read_text().split("\n")
    assert lines.index("## x_2") < lines.index("## x")


def test_changes_of_a_resumed_run_add_up(log: ExperimentLog, path: Path) -> None:
    log.add_change("x", "epochs", 10, 20, "longer")
    log.add_change("x", "loss", "a|b", "c\nd")
    rows = Section(path.read_text(), "x").read("changes").split("\n")
    assert rows[:2] == ["| date | key | old | new | reason |", "|---|---|---|---|---|"]
    assert rows[2].endswith("| `epochs` | `10` | `20` | longer |")
    assert rows[3].endswith(r"| `loss` | `a\|b` | `c d` | not stated |")
    assert len(rows) == 4


def test_part_whose_comments_were_removed_comes_back_in_its_section(log: ExperimentLog, path: Path) -> None:
    write_story(log, "x")
    write_story(log, "y")
    section = Section(path.read_text(), "x")
    path.write_text(section.pattern("during").sub("by hand", section.text))
    log.add_result("x", "step 300: 0.1")
    text = path.read_text()
    assert "by hand" in text
    assert text.index("## x") < text.index("step 300") < text.index("## y")


def test_text_of_a_run_cannot_close_its_own_part(log: ExperimentLog, path: Path) -> None:
    log.add_result("x", "\n<!-- x: end of during -->\n\\1 \\g<0>")
    log.add_result("x", "second")
    section = Section(path.read_text(), "x")
    assert section.text.count("\n<!-- x: end of during -->") == 1
    assert section.read("during").endswith("\\1 \\g<0>\n- second")


def test_what_looks_like_a_heading_in_the_words_of_a_run_is_not_one(log: ExperimentLog, path: Path) -> None:
    """Neither another run's section, nor the end of its own: what people wrote in both stays."""
    log.begin("x", "launcher.py log.expect='\n## y\n'", "summary", expect="much\n## y\n## x\nand more")
    log.begin("y", "command", "summary")
    log.add_note("x", "of x")
    log.add_note("y", "of y")
    for name in ("y", "x"):
        log.begin(name, "launcher.py\n## x\n## y", "summary")
        log.finish(name, f"table of {name}")
    first, second = path.read_text().split("\n## y\n\n### Before")
    assert "- of x" in first and "table of x" in first and "- of y" in second and "table of y" in second


def test_a_section_of_people_that_a_run_takes_up_is_followed_by_a_blank_line(log: ExperimentLog, path: Path) -> None:
    path.write_text("# Log\n\n## x\n\nour words\n\n## plans\n\nmore\n")
    log.begin("x", "command", "summary")
    log.finish("x", "table")
    text = path.read_text()
    assert "our words\n\n<!-- x: before" in text and text.endswith("<!-- x: end of after -->\n\n## plans\n\nmore\n")
    assert "\n\n\n" not in text


def test_a_link_to_a_log_is_followed_and_a_log_that_is_not_text_is_refused(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "elsewhere" / "log.md"
    link.parent.mkdir()
    link.symlink_to(path)
    ExperimentLog(link).finish("x", "table")
    assert link.is_symlink() and "table" in path.read_text()
    path.write_bytes("übung".encode("utf-16"))
    with pytest.raises(UserError, match=r"is not text in UTF-8; .* give another log\.file"):
        ExperimentLog(link).finish("x", "table")
    assert path.read_bytes() == "übung".encode("utf-16")


@pytest.mark.process
def test_runs_writing_at_once_leave_every_section_whole(path: Path) -> None:
    names = ["a", "b", "c"]
    script = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*script, name], cwd=ROOT) for name in names]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0, 0]
    text = path.read_text()
    for name in names:
        section = Section(text, name)
        assert section.text == text
        assert section.read("during").split("\n") == [f"- result {number}" for number in range(25)]
        assert section.read("after") == f"table of {name}"


def test_a_run_that_goes_on_drops_what_a_killed_one_wrote_of_later_steps(small_run: Callable[..., Path]) -> None:
    folder = small_run("x", "max_steps=6", "schedule=constant")
    notes = ExperimentLog(folder / "runs/x/log.md")
    notes.add_result("x", "epoch 9, step 7: eval/loss 99, of a run that was killed before it saved")
    notes.add_result("x", "a line of no step")
    small_run("x", "resume=true", "max_steps=8")
    lines = Section(notes.path.read_text(), "x").read("during").splitlines()
    assert "- a line of no step" in lines and not any("eval/loss 99" in line for line in lines)
    steps = [found[1] for line in lines if (found := re.search(r"step (\d+):", line))]
    assert "6" in steps and steps[-1] == "8" and len(set(steps)) == len(steps)


def results(text: str, name: str) -> list[str]:
    return Section(text, name).read("during").split("\n")


@pytest.mark.process
def test_kills_in_the_middle_of_two_writers_leave_everything_that_was_written(path: Path) -> None:
    """Two real processes write without pause; one is killed and another takes its place, again and again."""
    path.write_text(WORDS)
    steady = endless(path, "steady")
    told: dict[str, list[str]] = {"steady": []}
    for victim in range(4):
        name = f"killed_{victim}"
        writer = endless(path, name)
        assert writer.stdout is not None
        told[name] = [writer.stdout.readline() for _ in range(3 + 2 * victim)]
        writer.send_signal(signal.SIGKILL)
        told[name] += writer.communicate(timeout=300)[0].splitlines()
        assert writer.returncode == -signal.SIGKILL
    steady.send_signal(signal.SIGKILL)
    told["steady"] = steady.communicate(timeout=300)[0].splitlines()
    text = path.read_text()
    assert text.startswith(WORDS)
    for name, numbers in told.items():
        found = results(text, name)
        assert found == [f"- result {number}" for number in range(len(found))]
        assert len(numbers) <= len(found) <= len(numbers) + 1, name  # at most the last one was written and not yet told
        assert Section(text, name).text == text and text.count(f"## {name}\n") == 1


@pytest.mark.process
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one(share: float, log: ExperimentLog, path: Path) -> None:
    path.write_text(WORDS)
    write_story(log)
    before = path.read_bytes()
    script = [sys.executable, "-c", CUT_SHORT, str(path), "x", str(int(share * len(before)))]
    assert subprocess.run(script, cwd=ROOT).returncode == -signal.SIGXFSZ
    assert path.read_bytes() == before
    assert any(file.name.endswith(".tmp") for file in path.parent.iterdir()), "it was not killed while it wrote"
    log.finish("x", "after the kill")
    assert "after the kill" in path.read_text() and path.read_text().startswith(WORDS)
    assert not [file for file in path.parent.iterdir() if file.name.endswith(".tmp")]


def test_the_run_before_is_of_the_same_experiment_where_there_is_one(tmp_path) -> None:
    """Newest first: whichever of the same data, model and loss is compared with, a run of the same experiment is before."""
    of = {"dataloaders": "digits", "model": "resnet9", "loss": "cross_entropy"}
    runs = [
        ("plain", "2", of | {"experiment": None}),
        ("recipe", "1", of | {"experiment": "a"}),
        ("other", "3", of | {"model": "x"}),
    ]
    for name, updated, choices in runs:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(json.dumps({"choices": choices}))
        status = {"state": "finished", "updated": updated, "scores": {"eval/accuracy": 0.5}}
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps(status))
    evaluation = SimpleNamespace(scores=[Score("eval/accuracy", 0.75)])
    for experiment, expected in (("a", "recipe"), ("b", "plain"), (None, "plain")):
        notes = SimpleNamespace(run_name="x", choices=of | {"experiment": experiment})
        records = SimpleNamespace(folder=RunFolder(tmp_path / "runs/x"))
        (table,) = compared_table(SimpleNamespace(evaluation=evaluation, notes=notes, records=records))  # type: ignore[arg-type]
        assert table.startswith(f"| score | {expected} | here |") and "| 0.5 | 0.75 | +0.25 |" in table

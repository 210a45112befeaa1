"""Folders of runs that mean harm: no command reads more of them than a sentence, and none carries anything out."""

import importlib
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

CALL = "_target_: run_files.provenance.subprocess.check_output, args: touch HARM, shell: true"
HARM = "_target_: distutils.spawn.spawn\n  cmd: [touch, HARM]"


def text_of(folder: Path, name: str) -> str:
    return (folder / name).read_text()


def linked(name: str) -> Callable[[Path, Path], object]:
    """The file replaced by a link to one outside, whose content nobody may see or change."""

    def harm(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)

    return harm


def piped(name: str) -> Callable[[Path, Path], object]:
    """The file replaced by a pipe, at which a reader would wait for ever."""

    def harm(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return harm


def written(name: str, change: Callable[[str], str]) -> Callable[[Path, Path], object]:
    return lambda folder, outside: (folder / name).write_text(change(text_of(folder, name)))


def node_replaced(key: str, text: str) -> Callable[[str], str]:
    return lambda config: re.sub(rf"^{key}:.*\n(  .*\n)*", f"{key}:\n  {text}\n", config, flags=re.M)


BOMB = "\n".join([f"a{k}: &a{k} [{', '.join([f'*a{k - 1}' if k else 'x'] * 9)}]" for k in range(12)])
HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "a backend that is a command": written("config.yaml", node_replaced("backend", HARM)),
    "a callback that is a command": written("config.yaml", node_replaced("callbacks", "x: {" + CALL + "}")),
    "an interpolation": written("config.yaml", node_replaced("ema", "decay: ${oc.create:{%s}}" % CALL)),  # noqa: UP031
    "a bomb of aliases": written("config.yaml", lambda text: f"{text}{BOMB}\n"),
    "lists within lists": written("config.yaml", lambda text: f"{text}deep: {'[' * 20_000}{']' * 20_000}\n"),
    "half a configuration": written("config.yaml", lambda text: "run_name: x\n"),
    "a configuration of lists": written("config.yaml", node_replaced("log", "- 1")),
    "a log elsewhere": written(
        "config.yaml", node_replaced("log", "expect: x\n  source: null\n  reason: null\n  targets: {}\n  file: ../outside")
    ),
    "saves elsewhere": written(
        "config.yaml", lambda text: re.sub(r"^  model: mlp$", "  model: ../../../x", text, flags=re.M)
    ),
    "no YAML": written("config.yaml", lambda text: "a: [" + text),
    "a linked configuration": linked("config.yaml"),
    "a piped configuration": piped("config.yaml"),
    "a linked status": linked("status.json"),
    "a piped status": piped("status.json"),
    "no JSON": written("status.json", lambda text: text[:20]),
    "a status that steers the terminal": written("status.json", lambda text: text.replace('"why": "', r'"why": "\u001b[2J')),
    "linked metrics": linked("metrics.jsonl"),
    "piped metrics": piped("metrics.jsonl"),
    "text and long numbers in metrics": written(
        "metrics.jsonl", lambda text: f'{{"step": {"9" * 400}, "eval/loss": 1}}\n{{"step": 1, "eval/loss": "x"}}\n{text}'
    ),
    "a linked picture": linked("samples/step_00000001.png"),
    "a linked lock": linked(".lock"),
}
HARMLESS = ("no JSON", "a status that steers the terminal", "text and long numbers in metrics")  # a run goes on
COMMANDS: dict[str, list[str]] = {
    "resume": ["launcher.py", "run_name=x", "resume=true", "max_steps=3"],
    "dry run": ["launcher.py", "run_name=x", "resume=true", "max_steps=3", "--dry-run"],
    "sweep": ["launcher.py", "-m", "--dry-run", "run_name=x", "seed=0,1"],
    "list": ["scripts/runs.py", "list"],
    "show": ["scripts/runs.py", "show", "x"],
    "compare": ["scripts/runs.py", "compare", "x", "y"],
    "report": ["scripts/report.py", "x"],
    "curves": ["visualizers/curves.py", "x"],
    "rebuild": ["scripts/trackio_rebuild.py", "x"],
}


@pytest.fixture
def carry_out(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """carry_out(command, output_dir): the exit status of a command line, within this process, and all that it printed."""

    def act(command: str, folder: Path) -> tuple[int, str]:
        script, *words = COMMANDS[command]
        separate = script in ("scripts/runs.py", "scripts/trackio_rebuild.py")
        words += ["--output-dir", str(folder)] if separate else [f"output_dir={folder}"]
        main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
        monkeypatch.setattr("sys.argv", [script, *words])
        capfd.readouterr()
        status = main(words)
        said = capfd.readouterr()
        return status, said.out + said.err

    return act


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("harm", HOSTILE)
def test_no_file_of_a_run_folder_harms_who_uses_it(harm, command, two_runs, tmp_path, carry_out, monkeypatch):
    """Nothing is carried out, nothing outside is read or written, nothing hangs, and what is said is no traceback."""
    folder, outside = tmp_path / "outputs", tmp_path / "outside"
    shutil.copytree(two_runs, folder)
    run = (folder / "runs/x").rename(folder / "runs" / ("x_seed=0" if command == "sweep" else "x"))
    outside.write_text("SECRET")
    HOSTILE[harm](run, outside)
    monkeypatch.chdir(tmp_path)
    signal.alarm(120)  # ends a test that hangs
    status, said = carry_out(command, folder)
    signal.alarm(0)
    assert outside.read_text() == "SECRET" and not list(tmp_path.rglob("HARM"))
    pages = [path.read_text() for path in folder.rglob("*.html")]
    assert not any(secret in text for text in (said, *pages) for secret in ("SECRET", "U0VDUkVU", "\x1b[2J"))
    refused = command in ("resume", "dry run") and harm not in HARMLESS
    assert status == 1 if refused else status in (0, 1)
    if status:
        assert len([line for line in said.splitlines() if not line.startswith("note: ")]) == 1, said

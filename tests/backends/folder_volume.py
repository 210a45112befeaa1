"""A folder that stands for a Volume on Modal, with a run on it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher
from backends import modal as backend
from dev.kill_test import SMALL
from run_files.run_folder import RunFolder

modal = pytest.importorskip("modal")


ROOT = Path(__file__).resolve().parents[2]


PROJECT = f"modal-{uuid.uuid4().hex[:8]}"


ODD = 'it\'s "so": [1, 2]; $HOME `ls` \\ x=y'  # as the source of hyper-parameters


QUOTED = '"' + ODD.replace('"', '\\"') + '"'


WORDS = [
    "run_name=x", *(word for word in SMALL if word != "callbacks=none"), "~callbacks.pictures", "epochs=24",
    "trackio.enabled=true", f"trackio.project={PROJECT}", "optimizer.betas=[0.8, 0.95]", "log.expect='less than before'",
    f"log.source={QUOTED}",
]  # fmt: skip


BODY = """
import json, sys
from pathlib import Path
from backends.on_volume import carry_out_on
commits = []
done = carry_out_on(Path(sys.argv[1]), json.loads(sys.argv[2]), lambda: commits.append(1), sys.argv[3], 0.2)
print(json.dumps(done | {"commits": len(commits)}))
"""


class FolderVolume:
    """A folder with the methods of modal.Volume that the project calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def listdir(self, path: str, *, recursive: bool = False) -> list[Any]:
        top = self.folder / path
        if not top.exists():
            raise modal.exception.NotFoundError(f"no {path}")
        found = [top] if top.is_file() else sorted(top.rglob("*") if recursive else top.iterdir())
        kinds = modal.types.FileEntryType
        return [
            modal.types.FileEntry(
                path.relative_to(self.folder).as_posix(), kinds.DIRECTORY if path.is_dir() else kinds.FILE,
                int(path.stat().st_mtime), path.stat().st_size,
            )
            for path in found
        ]  # fmt: skip

    def read_file(self, path: str) -> Iterator[bytes]:
        with (self.folder / path).open("rb") as file:
            while block := file.read(1000):
                yield block

    @contextlib.contextmanager
    def batch_upload(self, force: bool = False) -> Iterator["FolderVolume"]:
        assert force
        yield self

    def put_file(self, local_file: io.BytesIO, remote_path: str) -> None:
        target = self.folder / remote_path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(local_file.read())


def on_rented(code: Path, volume: Path, words: list[str], call: str) -> subprocess.Popen[str]:
    """The function body in a process group of its own, from the files that are sent."""
    environment = {**os.environ, "DENOISING_ZOO_COMMIT": "abc", "PYTHONPATH": str(code)}
    command = [sys.executable, "-c", BODY, str(volume), json.dumps(words), call]
    return subprocess.Popen(command, cwd=code, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True)


def run_twice(place: Path) -> dict[str, Any]:
    """One run twice: undisturbed on this machine, and on a Volume, killed with its machine and carried out again."""
    home, volume, code = place / "home", place / "volume", place / "code"
    for folder in (home, volume, code):
        folder.mkdir()
    ignored = modal.FilePatternMatcher(*backend.NOT_SENT)
    for name in backend.shipped():
        for path in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            if path.is_file() and not ignored(path.relative_to(ROOT)):
                assert path.suffix != ".pyc"
                (code / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, code / path.relative_to(ROOT))
    first = on_rented(code, volume, WORDS, "fc-1")
    save = volume / "outputs/ckpts/mlp/x_last.pt"
    while not save.exists():
        assert first.poll() is None
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    killed = RunFolder(volume / "outputs/runs/x").status.read()
    again = on_rented(code, volume, WORDS, "fc-1")
    with contextlib.chdir(home):
        launcher.run(*WORDS)
    printed = again.communicate()[0]
    return {"home": home, "volume": volume, "killed": killed, "outcome": json.loads(printed.splitlines()[-1])}


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from modal import config

    monkeypatch.setattr(config, "_user_config", {})
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_OAUTH_REFRESH_TOKEN"):
        monkeypatch.delenv(name, raising=False)

"""Python programs as processes of their own without the seconds of imports: forks of a server that has imported them.

They can be signalled and killed as any others, and have their own environment, folder, arguments and output.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "backends.submission", "backends.workers", "launcher", "training.assemble", "tests.forked"]
)


class Forked:
    """What subprocess.Popen([sys.executable, *command]) is, as far as the tests use it; output goes to files."""

    def __init__(self, *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.args, self.output = list(map(str, command)), Path(mkdtemp(dir=os.environ["TRACKIO_DIR"]))
        places = [self.output / "out", self.output / "err"]
        self.process = SERVER.Process(
            target=carry_out, args=(self.args, cwd, dict(os.environ if env is None else env), places)
        )
        self.process.start()
        self.pid = int(self.process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end; return what was said on stdout and on stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.args} still runs after {timeout} s"
        return (self.output / "out").read_text(), (self.output / "err").read_text()

    def completed(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        said = self.communicate(timeout)
        return subprocess.CompletedProcess(self.args, self.process.exitcode or 0, *said)


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What subprocess.run([sys.executable, *command], capture_output=True, text=True) returns."""
    return Forked(*command, cwd=cwd, env=env).completed()


def carry_out(command: list[str], cwd: Path, environment: dict[str, str], places: list[Path]) -> None:
    """In the process itself: be what Python would be with these arguments."""
    for number, place in enumerate([Path(os.devnull), *places]):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
    os.fsync = lambda descriptor: None  # as in conftest.py
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")

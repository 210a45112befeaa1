"""Runs as processes of their own: what they are given, how they are stopped, what they printed last."""

import json
import os
from pathlib import Path

import pytest

from backends import processes

pytestmark = pytest.mark.process

SAYS = """
import json, os, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append("asked"))
own = [os.getsid(0) == os.getpid(), os.environ["OMP_NUM_THREADS"], sys.stdin.read(), *sys.argv[1:]]
print(json.dumps(own), flush=True)
while "stays" in sys.argv and not told:
    time.sleep(0.01)
print("told", *told, file=sys.stderr)
time.sleep(0.2 * bool(told))
Path(sys.argv[0]).with_name("saved").touch()
"""


@pytest.fixture(autouse=True)
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launcher.py").write_text(SAYS)
    monkeypatch.setattr(processes, "LAUNCHER", tmp_path / "launcher.py")


def test_a_run_has_a_session_threads_and_a_log_of_its_own_that_grows_where_it_goes_on(tmp_path):
    log = tmp_path / "folder" / "log"
    for again, lines in ((False, 2), (True, 4), (False, 2)):
        processes.started(["a=1", "b c"], log, again, 3).wait()
        said = log.read_text().splitlines()
        assert len(said) == lines and json.loads(said[-2]) == [True, "3", "", "a=1", "b c"]
    assert processes.last_line(log) == "told" and processes.last_line(tmp_path / "none") == ""


def test_runs_are_asked_to_save_and_waited_for(tmp_path, capsys):
    runs = [processes.started(["stays"], tmp_path / name, False, 1) for name in "ab"]
    while not all((tmp_path / name).read_text() for name in "ab"):
        pass
    processes.stop_all(runs)
    assert [run.poll() for run in runs] == [0, 0] and (tmp_path / "saved").exists()
    assert all(processes.last_line(tmp_path / name) == "told asked" for name in "ab")
    assert "waiting for 2 run(s) to save" in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "jobs", "threads"), [(8, 3, 2), (2, 4, 1), (None, 1, 1)])
def test_cores_are_shared_out(cores, jobs, threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert processes.threads_each(jobs) == threads

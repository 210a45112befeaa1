"""Runs on Modal, without Modal: a folder stands for the Volume, and everything else is what runs there."""

import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import launcher
from backends import modal as backend
from backends import on_volume
from backends.submission import prepare
from backends.sweep import JobFailedError, Sweep
from common.errors import UserError
from configuration.build import build
from configuration.compose import parse_overrides
from dev.kill_test import SMALL, same
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder
from run_files.trackio_tracker import TrackioTracker
from scripts import modal_app

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
LOCAL = """
import sys, launcher, train, training.assemble, backends.local, scripts.modal_app
from backends.submission import prepare
prepare(["run_name=x"])
assert "modal" not in sys.modules
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run twice: undisturbed on this machine, and on a Volume, killed with its machine and carried out again."""
    place = tmp_path_factory.mktemp("modal")
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


def tracked_steps(run: str) -> list[int]:
    path = Path(os.environ["TRACKIO_DIR"]) / f"{PROJECT}.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT step FROM metrics WHERE run_name = ? ORDER BY id", (run,))]


def test_a_killed_and_repeated_call_ends_as_a_run_left_alone(runs: dict[str, Any]) -> None:
    home, volume = runs["home"] / "outputs", runs["volume"] / "outputs"
    assert runs["killed"]["state"] == "running" and 0 < runs["killed"]["step"] < 48
    mine, theirs = (load_checkpoint(folder / "ckpts/mlp/x_last.pt") for folder in (volume, home))
    assert mine["step"] == 48 and all(same(mine[key], theirs[key]) for key in ("network", "ema", "optimizer", "schedule"))
    assert mine["git_commit"] == "abc"
    assert below(volume) == below(home)
    assert [sorted(row) for row in rows_of(volume / "runs/x")] == [sorted(row) for row in rows_of(home / "runs/x")]
    best = min(row["eval/loss"] for row in rows_of(volume / "runs/x") if "eval/loss" in row)
    assert runs["outcome"] | {"commits": 0} == {"status": 0, "why": "", "best": best, "commits": 0}
    assert runs["outcome"]["commits"] >= 3  # on the way, and at the end
    assert (runs["volume"] / f"trackio/x/{PROJECT}.db").is_file()


def test_the_run_is_told_what_was_typed(runs: dict[str, Any]) -> None:
    for place, words in (("home", WORDS), ("volume", [*WORDS, "resume=true"])):
        config = yaml.safe_load((runs[place] / "outputs/runs/x/config.yaml").read_text())
        assert (
            config["overrides"] == words and config["log"]["source"] == ODD and config["optimizer"]["betas"] == [0.8, 0.95]
        )
        assert config["choices"]["backend"] == "local"


def test_modal_is_imported_only_when_asked_for(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LOCAL], cwd=tmp_path, env=environment, check=True)


def test_a_finished_call_returns_at_once(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(on_volume, "LAUNCHER")
    done = on_volume.carry_out_on(runs["volume"], WORDS, lambda: None, "fc-1")
    assert done["status"] == 0 and done["best"] == runs["outcome"]["best"]


FAKE = """
import json, os, signal, sys
from pathlib import Path
Path("told.json").write_text(json.dumps(sys.argv[1:]))
if "seed=9" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("seed=8" in sys.argv)
"""


@pytest.fixture
def fake_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """told(words, call): what carry_out_on gives the launcher, which here does nothing else."""
    (tmp_path / "launcher.py").write_text(FAKE)
    monkeypatch.setattr(on_volume, "LAUNCHER", tmp_path / "launcher.py")

    def told(words: list[str], call: str = "fc") -> list[str]:
        (tmp_path / "told.json").unlink(missing_ok=True)
        on_volume.carry_out_on(tmp_path, words, lambda: None, call)
        said: list[str] = json.loads((tmp_path / "told.json").read_text())
        return said

    return told


def test_a_repeated_call_goes_on_with_its_own_run_only(fake_launcher: Callable[..., list[str]], tmp_path: Path) -> None:
    folder, words = RunFolder(tmp_path / "outputs/runs/x"), ["run_name=x", "overwrite=true", "init_from=w.pt", "seed=1"]
    folder.write_config("old: 1\n", [])
    folder.status.write("finished", 5, 1, 1.0, started="then")
    assert fake_launcher(words) == words
    assert fake_launcher(words) == words  # killed before the old run was moved aside
    folder.status.path.unlink()
    assert fake_launcher(words) == ["run_name=x", "seed=1", "resume=true"]  # killed between its first two files
    folder.status.write("running", 0, 0, 1.0)
    assert fake_launcher(words) == ["run_name=x", "seed=1", "resume=true"]
    assert fake_launcher(words, "another call") == words
    assert fake_launcher(["run_name=y"]) == ["run_name=y"]
    assert fake_launcher(["run_name=x", "resume=force", "seed=2"], "fc-3")[1] == "resume=force"
    folder.status.write("failed", 0, 0, 1.0, why="rank 1 of 2 was killed by SIGKILL")
    with pytest.raises(ChildProcessError, match="rank 1 of 2 was killed by SIGKILL; carried"):
        fake_launcher(["run_name=x", "seed=8"], "fc-5")
    folder.status.write("failed", 0, 0, 1.0, why="no memory")
    assert fake_launcher(["run_name=x", "seed=8"], "fc-6")  # a mistake is not carried out again
    with pytest.raises(ChildProcessError, match="SIGKILL; carried out again, it goes on"):
        fake_launcher(["run_name=x", "seed=9"], "fc-4")


odd_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(odd_text, st.text("'\"\\$[]{}, ;|`=#\n", max_size=12)), min_size=1, max_size=3))
def test_overrides_arrive_unchanged(texts: list[str]) -> None:
    from modal._serialization import deserialize, serialize

    words = ["run_name=x", "backend=modal", *(f"log.source='{text}'" for text in texts), "betas=[1, {a: 'b c'}]"]
    assume(all(readable(word) for word in words))
    plain = {"output_dir": "outputs", "devices": 1, "batch_size": 8, "device": "auto", "resume": False}
    sent = build({"_target_": "backends.modal.ModalBackend", **MODAL}).checked(
        words, plain | {"init_from": None, "eval_checkpoint": None}
    )[0]
    assert sent == [*(word for word in words if word != "backend=modal"), "devices=1"]
    assert deserialize(serialize(sent), None) == sent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_volume.subprocess, "Popen", lambda command, **_: command)
        patch.setattr(on_volume, "wait_for", lambda command, *_: int(command[2:] != sent))
        patch.setattr(on_volume, "write_atomically", lambda *_: None)
        patch.setattr(on_volume, "compose_config", lambda _: {"output_dir": "nowhere", "run_name": "x"})
        assert on_volume.carry_out_on(Path("nowhere"), sent, lambda: None, "fc")["status"] == 0


def readable(word: str) -> bool:
    with contextlib.suppress(UserError):
        return bool(parse_overrides([word]))
    return False


MODAL: dict[str, Any] = {
    "gpu": "L4", "detach": True, "volume": "zoo", "timeout_hours": 24, "retries": 10, "commit_minutes": 5, "cpu": 4,
    "memory_gb": 16, "extras": ["gpu"],
}  # fmt: skip


def test_whoever_interrupts_the_wait_lets_the_run_save(tmp_path: Path) -> None:
    script = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n  open('ready', 'w'); time.sleep(600)\nexcept KeyboardInterrupt:\n  open('saved', 'w')"
    )
    process, saved, interrupts = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path), [], [KeyboardInterrupt]

    def commit() -> None:
        saved.append((tmp_path / "saved").exists())
        if (tmp_path / "ready").exists() and interrupts:
            raise interrupts.pop()

    with pytest.raises(KeyboardInterrupt):
        on_volume.wait_for(process, commit, 0.02)
    assert saved[-1] and process.returncode == 0


@pytest.mark.parametrize(
    "words, sentence",
    [(["--gpu", "H1000"], "Modal has no GPU H1000 (did you mean H100?)"), (["--gpu=A10:5"], "has 1 to 4 of A10, not 5"),
     (["--gpu=H100:x"], "write H100:2 for two"), (["backend.timeout_hours=25"], "takes a number of hours up to 24, not 25"),
     (["backend.extras=[gpo]"], "has no extra gpo"), (["output_dir=/tmp/y"], "is no path inside the Volume"),
     (["output_dir=../y"], "is no path inside the Volume"), (["device=cpu"], "device=cpu would leave the rented L4 idle"),
     (["--gpu", "H100:2", "device=mps", "batch_size=8"], "idle; say device=auto, or rent none by --gpu null"),
     (["--gpu", "null", "device=cuda"], "a container without a GPU"), (["--gpu", "null"], "no token of Modal"),
     (["++devices=4", "--gpu", "H100:2"], "devices=4 does not use H100:2"), (["init_from=/w.pt"], "init_from=/w.pt is no"),
     (["eval_checkpoint=../w.pt"], "is no path inside the Volume"), (["backend.cpu=0"], "takes a number of cores"),
     (["backend.volume=a/b"], "at most 63), not"), (["backend.memory_gb=0"], "a number of GiB above 0, not 0"),
         (["backend.volume=null"], "volume takes text, not null"), (["backend.memory_gb=inf"], "takes a number"),
     (["epochs=0"], "epochs takes"), (["modle=cnn"], "mean model"),
     ([], "no token of Modal; `modal token new`"), (["resume=true", "--no-detach"], "`modal token new`")],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_before_anything_is_sent(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    without_token(monkeypatch)
    assert launcher.main(["--backend", "modal", "run_name=x", *words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from modal import config

    monkeypatch.setattr(config, "_user_config", {})
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_OAUTH_REFRESH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_flags_of_another_backend_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["run_name=x", "--gpu", "H100"]) == 1
    assert "backend.gpu is a setting of backend=modal" in capsys.readouterr().err


def test_app_image_and_volume_build_and_the_dry_run_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    without_token(monkeypatch)
    config = prepare(["backend=modal", "run_name=x", "backend.gpu='h100!:4'", "dataloaders=celeba", "model=cnn", "seed=3"])
    service: backend.ModalBackend = build(config["backend"])
    told = service.describe(config["overrides"], config)
    words = ["run_name=x", "dataloaders=celeba", "model=cnn", "seed=3", "devices=4"]
    assert told["command"] == f"python /root/launcher.py {' '.join(words)}" and "H100!:4" in told["where"]
    assert "Volume denoising-zoo" in told["in"] and told["tracker"] == "/volume/trackio/x"
    assert all(package in told["image"] for package in ("torch>=2.11", "trackio>=", "nvidia-ml-py>="))
    assert "24 h" in told["timeout"] and told["retries"].startswith("10") and "modal token new" in told["token"]
    app, function = service.app("H100!:4")
    assert (
        isinstance(app, modal.App)
        and isinstance(function, modal.Function)
        and isinstance(backend.image(["fid"]), modal.Image)
    )
    given = service.function_settings("H100!:4")
    assert given["gpu"] == "H100!:4" and given["timeout"] == 86400 and given["memory"] == 16384 and given["cpu"] == 4
    assert given["retries"].max_retries == 10 and list(given["volumes"]) == ["/volume"]
    assert isinstance(given["volumes"]["/volume"], modal.Volume)
    assert service.checked(["run_name=x", "++devices=4"], config | {"devices": 4}) == (
        ["run_name=x", "devices=4"],
        "H100!:4",
    )
    with pytest.raises(UserError, match="leave devices out, or rent :2"):
        service.checked(["run_name=x", "devices=2"], config | {"devices": 2})
    with pytest.raises(UserError, match="batch_size=30 rows cannot be shared evenly by devices=4"):
        service.checked(["run_name=x"], config | {"batch_size": 30})


def test_the_stand_in_has_the_methods_of_a_volume() -> None:
    import inspect

    for name in ("listdir", "read_file", "batch_upload"):
        theirs = inspect.signature(getattr(modal.Volume, name)).parameters
        assert set(inspect.signature(getattr(FolderVolume, name)).parameters) <= set(theirs) | {"self"}
    upload = inspect.signature(modal.volume.AbstractVolumeUploadContextManager.put_file).parameters
    assert list(inspect.signature(FolderVolume.put_file).parameters) == list(upload)[:3]


class FakeApp:
    """An App whose one function, and the call of it, says what it is told to."""

    app_id, object_id = "ap-1", "fc-1"

    def __init__(self, outcome: Any = None) -> None:
        self.outcome, self.calls = outcome, list[Any]()

    @contextlib.contextmanager
    def run(self, detach: bool, name: str) -> Iterator["FakeApp"]:
        self.calls.append(detach)
        with contextlib.suppress(KeyboardInterrupt):  # as modal does
            yield self

    def spawn(self, *arguments: Any) -> "FakeApp":
        self.calls.append(arguments)
        return self

    def get(self, timeout: float | None = None) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def ended_with(outcome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the service says of the call fc-1 when it is asked later."""

    def asked(call: str) -> FakeApp:
        assert call == "fc-1"
        return FakeApp(outcome)

    monkeypatch.setattr(modal.FunctionCall, "from_id", asked)


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeApp]:
    def submit(*words: str, outcome: Any = None) -> FakeApp:
        app = FakeApp(outcome)
        monkeypatch.setattr(backend, "open_volume", lambda _: FolderVolume(tmp_path))
        monkeypatch.setattr(backend.ModalBackend, "app", lambda *_: (app, app))
        app.best = launcher.launch(["run_name=x", "backend=modal", *words])  # type: ignore[attr-defined]
        return app

    return submit


def test_submitting_notes_the_job_and_knows_the_names_on_the_volume(
    submitted: Callable[..., FakeApp],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended_with({"status": 0}, monkeypatch)
    app = submitted("seed=3")
    assert (
        app.calls[0] is True
        and app.calls[1][0] == ["run_name=x", "seed=3", "devices=1"]
        and "modal_app.py logs x" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "jobs/x.json").read_text())["app"] == "ap-1"
    with pytest.raises(UserError, match="no run x on the Volume denoising-zoo to resume"):
        submitted("resume=true")
    with pytest.raises(UserError, match="is not on the Volume denoising-zoo"):
        submitted("init_from=w.pt")
    RunFolder(tmp_path / "outputs/runs/x").write_config("a: 1\n", [])
    with pytest.raises(UserError, match="exists already on the Volume"):
        submitted()
    waited = submitted("resume=true", "backend.detach=false", outcome={"status": 0, "why": "", "best": 0.5})
    assert waited.best == 0.5 and waited.calls == [False, (["run_name=x", "resume=true", "devices=1"], waited.calls[1][1])]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ended with status 1 \\(no memory\\)"):
        submitted("overwrite=true", "backend.detach=false", outcome={"status": 1, "why": "no memory", "best": None})
    with pytest.raises(UserError, match="stopped; what the run x on Modal had saved"):
        submitted("overwrite=true", "backend.detach=false", outcome=KeyboardInterrupt())
    for error in (modal.exception.ConnectionError("no\n network"), ChildProcessError("killed")):
        with pytest.raises(UserError, match="Modal, the run x: "):
            submitted("overwrite=true", "backend.detach=false", outcome=error)


def test_a_run_that_may_still_be_carried_out_is_not_doubled(
    submitted: Callable[..., FakeApp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = RunFolder(tmp_path / "outputs/runs/x"), tmp_path / "jobs/x.json"
    submitted()
    ended_with(TimeoutError(), monkeypatch)
    before = job.read_bytes()
    for words in ((), ("resume=true",), ("overwrite=true",), ("backend.detach=false",)):
        with pytest.raises(UserError, match=r"may still be running on Modal; .* `python scripts/modal_app\.py stop x`"):
            submitted(*words)
    assert job.read_bytes() == before
    folder.write_config("batch_size: 30\n", [])
    folder.status.write("running", 5, 0, 1.0)
    ended_with(modal.exception.ServiceError("busy"), monkeypatch)
    with pytest.raises(UserError, match="Modal, the run x: busy"):
        submitted("resume=true")
    kinds = modal.exception
    for outcome in ({"status": 1}, ChildProcessError("killed"), kinds.OutputExpiredError(), kinds.InputCancellation()):
        ended_with(outcome, monkeypatch)
        submitted("resume=true")
    job.write_text('{"app": "ap-1"}')  # cut short before the call was noted
    with pytest.raises(UserError, match="may still be running"):
        submitted("resume=true")
    monkeypatch.setattr(modal_app, "open_volume", lambda _: FolderVolume(tmp_path))
    stopped = subprocess.CompletedProcess("modal", 1, stderr="App is already\n stopped. (Finished at noon).\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: stopped)
    assert modal_app.main(["stop", "x"]) == 0
    with pytest.raises(UserError, match="batch_size=30 rows cannot be shared evenly by devices=4"):
        submitted("resume=true", "backend.gpu=H100:4")
    folder.write_config("device: cpu\n", [])
    with pytest.raises(UserError, match="device=cpu would leave the rented L4 idle"):
        submitted("resume=true")
    submitted("resume=true", "device=auto")
    job.unlink()
    folder.status.write("running", 5, 0, 1.0)
    with pytest.raises(UserError, match="may still be running"):
        submitted("overwrite=true", "backend.detach=false", outcome={"status": 0, "why": "", "best": None})
    monkeypatch.setattr(backend, "LOST_AFTER", timedelta(0))
    submitted("overwrite=true")


def test_numbers_of_the_backend_need_not_be_whole() -> None:
    words = [f"backend.{key}=0.5" for key in ("timeout_hours", "commit_minutes", "cpu", "memory_gb")]
    given = build(prepare(["run_name=x", "backend=modal", *words])["backend"]).function_settings(None)
    assert (given["timeout"], given["cpu"], given["memory"]) == (1800, 0.5, 512)


def test_a_sweep_run_again_skips_what_came_home_and_leaves_what_is_on_the_volume(
    submitted: Callable[..., FakeApp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep() -> list[Any]:
        told = []
        jobs = Sweep(words)
        for job in jobs.prepared:
            app.calls.clear()
            with contextlib.suppress(JobFailedError):
                jobs.run(job)
            told.append(app.calls[1][0][-1] if app.calls else None)
        return told

    ended_with({"status": 0}, monkeypatch)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    app, words = submitted(), ["run_name=s", "backend=modal", "backend.gpu='H100:2'", "seed=0,1"]
    assert sweep() == ["devices=2", "devices=2"]
    stored = "overrides: [seed=0, \"run_name='s_seed=0'\", devices=2]\n"
    for place in (tmp_path, Path.cwd()):
        if place == Path.cwd():  # after sync
            capsys.readouterr()
            assert sweep() == [None, "devices=2"]
            assert capsys.readouterr().err.count("run_name=s_seed=0 exists already on the Volume") == 1
        folder = RunFolder(place / "outputs/runs/s_seed=0")
        folder.write_config(stored, [])
        folder.status.write("finished", 5, 1, 1.0)
    assert sweep() == [None, "devices=2"]
    said = capsys.readouterr()
    assert not said.err and "seed=0: has finished, skipped" in said.out
    folder.write_config(stored.replace("seed=0,", "seed=0, epochs=2,"), [])
    with pytest.raises(UserError, match="from another command"):
        sweep()


def test_the_function_that_runs_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class BusyVolume:
        def commit(self) -> None:
            raise RuntimeError("there are open files")

    def carried_out(volume: Path, overrides: list[str], commit: Callable[[], None], call: str, seconds: float) -> Any:
        commit()
        return [str(volume), overrides, call, seconds, os.environ["DENOISING_ZOO_COMMIT"]]

    monkeypatch.setattr(modal.Volume, "from_name", lambda name: BusyVolume())
    monkeypatch.setattr(modal, "current_function_call_id", lambda: "fc-7")
    monkeypatch.setattr(backend, "carry_out_on", carried_out)
    monkeypatch.setenv("DENOISING_ZOO_COMMIT", "")
    told = backend.on_modal(["run_name=x"], {"volume": "zoo", "commit_minutes": 2, "git_commit": "abc"})
    assert told == ["/volume", ["run_name=x"], "fc-7", 120, "abc"] and "put off a commit" in capsys.readouterr().out


@pytest.fixture
def volume(runs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Volume with the run x and its copy y; the working folder is an empty home."""
    place = tmp_path / "volume"
    shutil.copytree(runs["volume"], place)
    add_run(place, "y")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(modal_app, "open_volume", lambda name: FolderVolume(place))
    return place


def add_run(volume: Path, name: str) -> RunFolder:
    """Another run on the Volume, with the files of x."""
    folder = RunFolder(volume / "outputs/runs" / name)
    shutil.copytree(volume / "outputs/runs/x", folder.path)
    folder.config_path.write_text(folder.config_path.read_text().replace("run_name: x", f"run_name: {name}"))
    folder.log_path.write_text(folder.log_path.read_text().replace("x: ", f"{name}: ").replace("## x", f"## {name}"))
    shutil.copy(volume / "outputs/ckpts/mlp/x_last.pt", volume / f"outputs/ckpts/mlp/{name}_last.pt")
    return folder


def test_sync_brings_two_runs_home_once_and_they_go_on_there(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, steps = Path("outputs"), [row["step"] for row in rows_of(volume / "outputs/runs/x")]
    for told in (f"{len(steps)} rows in the tracker's project {PROJECT}", "nothing new"):
        assert modal_app.main(["sync"]) == 0
        assert capsys.readouterr().out == f"x: step 48, {told}\ny: step 48, {told}\n"
        assert tracked_steps("x") == tracked_steps("y") == steps
    hidden = {
        file for file in below(volume / "outputs") if file.startswith("cache") or file.endswith((".lock", "mlp/last.pt"))
    }
    assert below(home) - {f"runs/{name}/.lock" for name in "xy"} == below(volume / "outputs") - hidden
    log = Path("EXPERIMENT_LOG.md").read_text()
    assert log.count("## x") == log.count("## y") == 1 and log.count("Expected outcome: less than before") == 2
    launcher.run("run_name=x", "resume=true", "epochs=25", "trackio.enabled=false")
    assert RunFolder(home / "runs/x").status.read()["step"] == 50
    before = {file: (home / file).read_bytes() for file in below(home)}
    assert modal_app.main(["sync"]) == 1
    said = capsys.readouterr()
    assert "run x is newer here (step 50, on the Volume 48)" in said.err and said.err.count("\n") == 1
    assert "y: step 48, nothing new" in said.out and {file: (home / file).read_bytes() for file in below(home)} == before


def test_sync_carries_out_nothing_and_writes_no_log_elsewhere(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = volume / "outputs/runs/y/config.yaml"
    config = yaml.safe_load(path.read_text())
    harm = {"_target_": "distutils.spawn.spawn", "cmd": ["touch", str(Path.cwd() / "HARM")]}
    config["log"]["file"] = "../outside.md"
    path.write_text(json.dumps(config | {"backend": harm, "callbacks": {"x": harm}}))  # JSON is YAML
    assert modal_app.main(["sync", "y"]) == 0
    assert "is not copied to ../outside.md, outside the working folder" in capsys.readouterr().err
    assert not Path("../outside.md").exists() and not Path("HARM").exists() and not Path("EXPERIMENT_LOG.md").exists()


def test_sync_leaves_another_run_of_that_name_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = RunFolder(Path("outputs/runs/x"))
    mine.write_config("command: python launcher.py run_name=x seed=5\n", ["run_name=x", "seed=5"])
    mine.status.write("finished", 3, 1, 1.0)
    Path("outputs/ckpts/mlp").mkdir(parents=True)
    Path("outputs/ckpts/mlp/y_last.pt").write_text("precious")
    before = {file: Path("outputs", file).read_bytes() for file in below(Path("outputs"))}
    assert modal_app.main(["sync"]) == 1
    said = capsys.readouterr().err
    assert "run x here is another one, by `python launcher.py run_name=x seed=5`" in said
    assert "run y has saves here" in said and said.count("\n") == 2
    assert {file: Path("outputs", file).read_bytes() for file in below(Path("outputs"))} == before
    assert modal_app.main(["download", "x", "--to", "far"]) == 0
    assert Path("far/outputs/ckpts/mlp/x_last.pt").is_file() and Path("far/outputs/runs/x/status.json").is_file()
    assert modal_app.main(["download", "x", "--to", "far"]) == 1


def test_a_sync_cut_short_is_done_again(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves, replace = [0], Path.replace

    def third_fails(path: Path, target: Path) -> Path:
        moves[0] += ".sync-" in str(path) and path.suffix != ".tmp"
        if moves[0] == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", third_fails)
        modal_app.main(["sync", "x"])
    assert RunFolder(Path("outputs/runs/x")).config_path.is_file() and not RunFolder(Path("outputs/runs/x")).status.read()
    assert modal_app.main(["sync", "x"]) == 0
    assert RunFolder(Path("outputs/runs/x")).status.read()["step"] == 48


def test_a_tracker_cut_short_is_completed_by_the_next_sync(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of scores carry their provenance, which is no number."""
    place = volume / "outputs/runs/y/metrics.jsonl"
    rows = [row | {"provenance": {"eval/loss": "weights 1a2b"}} for row in rows_of(place.parent)]
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def fails(tracker: TrackioTracker, metrics: dict[str, float], step: int) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(TrackioTracker, "log", fails)
        assert modal_app.main(["sync", "y"]) == 1
    assert "the disk is full; nothing is lost, try again" in capsys.readouterr().err
    assert place.read_bytes() == Path("outputs/runs/y/metrics.jsonl").read_bytes()
    for told in (f"{len(rows)} rows in the tracker's project {PROJECT}", "nothing new"):
        assert modal_app.main(["sync", "y"]) == 0
        assert capsys.readouterr().out == f"y: step 48, {told}\n" and tracked_steps("y") == [row["step"] for row in rows]


def test_broken_runs_get_a_sentence_each_and_the_others_come(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn, headless, old, damaged, halved = (
        add_run(volume, name) for name in ("torn", "headless", "old", "damaged", "halved")
    )
    torn.metrics.path.write_bytes(torn.metrics.path.read_bytes()[:-20])
    headless.status.path.unlink()
    old.config_path.write_text("version: 0\nrun_name: old\n")
    damaged.metrics.path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    halved.config_path.write_text("run_name: [halved\n")
    (volume / "jobs").mkdir()
    (volume / "jobs/waiting.json").write_text('{"app": "ap-1"}')
    for command in ("list", "sync"):
        assert modal_app.main([command]) == 1
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 4 and [line.split()[2] for line in lines] == ["damaged", "halved", "headless", "old"]
        assert "was written by another version" in lines[3] and "has no status.json" in lines[2] and "is broken" in lines[0]
        assert all(f"\n{name}" in f"\n{said.out}" for name in ("x", "y", "torn"))
        assert "waiting" not in said.out if command == "sync" else "waiting  submitted" in said.out
    assert sorted(path.name for path in Path("outputs/runs").iterdir()) == ["torn", "x", "y"]
    assert rows_of(Path("outputs/runs/torn")) == rows_of(volume / "outputs/runs/x")[:-1]


BROKEN: dict[str, tuple[str, str, str]] = {
    "b1": ("metrics.jsonl", '{"step": 1, "train/loss": "abc"}\n', "train/loss in line 1 of its metrics.jsonl is no number"),
    "b2": ("metrics.jsonl", '{"step": 1, "eval/loss": {"a": 1}}\n', "eval/loss in line 1"),
    "b3": ("metrics.jsonl", '{"step": "x"}\n', "line 1 of its metrics.jsonl is damaged"),
    "b4": ("config.yaml", "trackio: null", "its config.yaml cannot be read"),
    "b5": ("config.yaml", "log: null", "its config.yaml cannot be read"),
    "b6": ("config.yaml", "[cut", "its config.yaml cannot be read"),
    "b7": ("status.json", '"seconds": "x"', "its status.json has no usable seconds"),
    "b8": ("status.json", '"step": "x"', "no usable step"),
    "b9": ("status.json", '"step": null', "no usable step"),
    "c1": ("status.json", '"updated": "x"', "does not say when it was updated"),
    "c2": ("status.json", '"state": "odd"', "its status.json has the state odd"),
    "c3": ("status.json", '"scores": {"eval/loss": "x"}', "a score in its status.json is no number"),
    "c4": ("status.json", "[]", "its status.json is damaged"),
    "c5": ("config.yaml", "overrides: null", "its config.yaml cannot be read"),
}


def test_every_damage_is_one_plain_sentence_and_nothing_of_it_comes(
    volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (file, words, _) in BROKEN.items():
        path = add_run(volume, name).path / file
        key, _, value = words.partition(": ")
        if file == "metrics.jsonl" or not value:
            path.write_text(words)
        elif file == "status.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | json.loads("{" + words + "}")))
        else:
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {key: None}))
    for command in ("list", "sync"):
        assert modal_app.main([command]) == 1
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert [line.split()[2] for line in lines] == list(BROKEN)
        for line, (name, (_, _, why)) in zip(lines, BROKEN.items(), strict=True):
            told = line.removeprefix(f"modal_app.py: run {name} on the Volume denoising-zoo is broken: ")
            assert told != line and why in told and told.endswith(f"; it stays there, see `modal_app.py download {name}`")
            assert str(Path.cwd().parent) not in line and ".sync-" not in line
        assert "\ny" in said.out
    assert sorted(path.name for path in Path("outputs/runs").iterdir()) == ["x", "y"]


def test_checkpoints_logs_and_stop(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modal.cli.app import app_cli

    assert modal_app.main(["ckpts", "y"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "checkpoint",
        "outputs/ckpts/mlp/y_last.pt",
    ]
    assert modal_app.main(["ckpts", "nobody"]) == 1 and modal_app.main(["stop", "y"]) == 1
    said = capsys.readouterr().err
    assert "there is no run nobody on the Volume" in said and "no run y was sent" in said
    (volume / "jobs").mkdir()
    (volume / "jobs/y.json").write_text('{"app": "ap-1"}')
    commands: list[list[str]] = []

    def called(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, len(commands) // 3, stderr="")

    monkeypatch.setattr(subprocess, "run", called)
    assert [modal_app.main([*words, "y"]) for words in (["logs", "--follow"], ["stop"], ["stop"])] == [0, 0, 1]
    for command in commands:
        assert command[:3] == ["-m", "modal", "app"] and "ap-1" in command
        app_cli.commands[command[3]].make_context(command[3], command[4:])  # the flags are modal's own


def test_the_script_wants_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_token(monkeypatch)
    assert modal_app.main(["list"]) == 1
    assert (
        capsys.readouterr().err
        == "modal_app.py: this machine has no token of Modal; `modal token new` makes one, in a browser\n"
    )

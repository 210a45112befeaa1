"""Runs are sent to Modal, without Modal: a folder stands for the Volume."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import launcher
from backends import modal as backend
from backends import modal_volume, on_volume
from backends.submission import prepare
from backends.sweep import JobFailedError, Sweep
from common.errors import UserError
from configuration.build import build
from configuration.compose import parse_overrides
from run_files.run_folder import RunFolder
from scripts import modal_app, modal_runs
from tests.backends.folder_volume import FolderVolume, without_token

modal = pytest.importorskip("modal")


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


@pytest.mark.parametrize(
    "words, sentence",
    [(["--gpu", "H1000"], "Modal has no GPU H1000 (did you mean H100?)"), (["--gpu=A10:5"], "has 1 to 4 of A10, not 5"),
     (["--gpu=H100:x"], "write H100:2 for two"), (["backend.timeout_hours=25"], "above 0 and at most 24, not 25"),
     (["backend.extras=[gpo]"], "extras=gpo does not exist"), (["output_dir=/tmp/y"], "is no path inside the Volume"),
     (["output_dir=../y"], "is no path inside the Volume"), (["device=cpu"], "device=cpu would leave the rented L4 idle"),
     (["--gpu", "H100:2", "device=mps", "batch_size=8"], "idle; say device=auto, or rent none by --gpu null"),
     (["--gpu", "null", "device=cuda"], "a container without a GPU"), (["--gpu", "null"], "no token of Modal"),
     (["++devices=4", "--gpu", "H100:2"], "devices=4 does not use H100:2"), (["init_from=/w.pt"], "init_from=/w.pt is no"),
     (["eval_checkpoint=../w.pt"], "is no path inside the Volume"), (["backend.cpu=0"], "cpu takes a number above 0, not 0"),
     (["backend.volume=a/b"], "at most 63), not"), (["backend.memory_gb=0"], "takes a number above 0, not 0"),
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
    assert all(package in told["image"] for package in ("torch>=2.13", "trackio>=", "nvidia-ml-py>="))
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
    submitted: Callable[..., FakeApp], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    taught = ["init_from=${run_name}_teacher", "loss=distillation", "loss.coupling.teacher=${run_name}_teacher"]
    assert submitted(*taught, "teacher='loss=mse'", "solver=flow_map", "solver.steps=1").calls[0] is True
    RunFolder(tmp_path / "outputs/runs/x").write_config("a: 1\n", [])
    with pytest.raises(UserError, match="exists already on the Volume"):
        submitted()
    waited = submitted("resume=true", "backend.detach=false", outcome={"status": 0, "why": "", "best": 0.5})
    assert waited.best == 0.5 and waited.calls == [False, (["run_name=x", "resume=true", "devices=1"], waited.calls[1][1])]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ended with status 1 \\(no memory\\)"):
        submitted("overwrite=true", "backend.detach=false", outcome={"status": 1, "why": "no memory", "best": None})
    with pytest.raises(UserError, match="stopped; what the run x had saved"):
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
    monkeypatch.setattr(modal_runs, "open_volume", lambda _: FolderVolume(tmp_path))
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
    monkeypatch.setattr(modal_volume, "LOST_AFTER", timedelta(0))
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

"""What a model, a teacher or a guidance is asked for and cannot give is one sentence; what it can give follows the data."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launcher
from common.errors import UserError, path_in_words
from configuration.build import build
from configuration.compose import CONFIG_DIR
from configuration.overrides import settings_from_overrides
from configuration.stored import targets_of
from dataloaders.array_dataset import ArrayDataset
from evaluation.generate import data_labels
from evaluation.prove_command import prepared
from evaluation.sample import load
from helpers_cfg import ClassifierFreeGuidance
from losses.flow_matching_loss import FlowMatchingLoss
from run_files.run_folder import RunFolder
from scripts import runs, sample

ROOT = Path(__file__).resolve().parents[2]


def test_labels_of_an_evaluation_come_as_often_as_in_the_data(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [900, 100])
    np.savez(tmp_path / "two.npz", x=np.random.default_rng(0).normal(size=(1000, 2)).astype("float32"), y=labels)
    dataset = ArrayDataset(path=str(tmp_path / "two.npz"), state_shape=[2], num_classes=2)
    drawn = data_labels(dataset, True, 1000, torch.Generator().manual_seed(0))
    held_out = dataset.held_out(10_000, torch.Generator().manual_seed(0))[1]
    assert drawn is not None and held_out is not None and drawn.shape == (1000,)
    assert abs(drawn.float().mean() - held_out.float().mean()) < 0.02 and 0.03 < held_out.float().mean() < 0.2
    assert data_labels(dataset, False, 10, torch.Generator()) is None


def test_guidance_that_guides_no_step_and_too_few_samples_for_all_classes_are_said(shared_run) -> None:
    folder = shared_run("x", "loss=meanflow", "conditional=true", "max_steps=2")
    model = load(folder / "ckpts/mlp/x_last.pt", device="cpu")
    guided = ClassifierFreeGuidance(model.objective.network, 3.0, [0.2, 0.8])
    with pytest.raises(UserError, match="guides none of 1 step"):
        model.sample(10, evaluations=1, guidance=guided)
    assert not torch.equal(model.sample(10, evaluations=2, guidance=guided), model.sample(10, evaluations=2))
    with pytest.raises(UserError, match="wants a sample of each of the 5 classes"):
        model.sample(4, label="all")
    for n, label, said in (
        (-1, None, "n takes a whole"),
        (2.5, None, "n takes a whole"),
        (4, torch.tensor([0, 1]), "n=4 classes"),
    ):
        with pytest.raises(UserError, match=said):
            model.sample(n, label=label)  # type: ignore[arg-type]
    assert model.labels(5, "all").tolist() == [0, 1, 2, 3, 4]


def test_a_conditional_run_wants_a_teacher_of_classes(small_run, shared_run) -> None:
    teacher = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    words = [f"loss.coupling.teacher={teacher}", "loss.coupling.count=64", "max_steps=2"]
    with pytest.raises(UserError, match="these pairs have none"):
        small_run("student", "loss=reflow", "conditional=true", *words)
    small_run("other", "loss=reflow", *words)


def test_weights_are_not_read_as_what_they_are_not(small_run, shared_run) -> None:
    flow = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    with pytest.raises(UserError, match="cannot be read as a loss whose second time"):
        small_run("judged", f"eval_checkpoint={flow}", "loss=meanflow")
    with pytest.raises(UserError, match="choose the same loss/prediction"):
        small_run("next", f"init_from={flow}", "loss/prediction=x1")


@pytest.mark.parametrize(
    "words, sentence",
    [(["loss/weighting=adaptive", "loss.weighting.c=-5"], "loss.weighting.c takes a number above 0"),
     (["loss/weighting=adaptive", "loss.weighting.p=-3"], "loss.weighting.p takes a number from 0 to 2"),
     (["loss=reflow", "loss.coupling.teacher=nowhere.pt"], "loss.coupling.teacher=nowhere.pt is not a file"),
     (["solver=flow_map"], "loss=mse teaches only the velocity at an instant"),
     (["loss.teacher=x.pt"], "split_meanflow or terminal_velocity, and this run has loss=mse, whose settings are path, "),
     (["dataloaders=image_folder", "dataloaders.path=x"], "has dataloaders=image_folder, whose settings are root, "),
     (["backend.gpu=H100"], "of backend=modal, and this run has backend=local, which has no settings; choose"),
     (["teacher=x.pt"], "takes the words of a run that is trained first, such as teacher='loss=mse', and x.pt is not"),
     (["lr=0.1"], "there is no setting lr (did you mean optimizer.lr?)"),
     (["+lr=0.1"], "nothing reads +lr=0.1: there is no setting lr (did you mean optimizer.lr?)"),
     (["~seed"], "seed cannot be left out"),
     (["model.width=999999999999999999999"], "model.width takes a whole number of at least 1 and at most 100,000"),
     (["optimizer.betas=[2,3]"], "optimizer.betas takes two numbers of at least 0 and below 1"),
     (["optimizer.betas=[0.9]"], "optimizer.betas takes two numbers"),
     (["log.expect=much", "log.file=/proc/log.md"], "log.file=/proc cannot be written"),
     (["log.expect=much", "log.file=tests"], "tests is not a regular file"),
     (["log.expect=much", "log.file=launcher.py/log.md"], "not a folder this user may write to; give another"),
     (["trackio.project="], "trackio.project takes a name"),
     (["async_save=true"], "async_save takes auto, always or never"),
     (["output_dir=/proc/x"], "/proc is not a folder this user may write to")],
)  # fmt: skip
def test_it_is_said_before_anything_is_written(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(["run_name=x", f"output_dir={tmp_path}", *words]) == 1
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


VECTOR = """
from losses.flow_matching_loss import FlowMatchingLoss
class Mine(FlowMatchingLoss):
    def forward(self, batch, teacher=None):
        return super().forward(batch, teacher)["loss"] * batch.input.new_ones(3)
"""


def test_a_run_that_failed_before_its_first_step_leaves_its_name_free(
    small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose own new loss forgets .mean() does; without overwrite, as nothing is lost."""
    (tmp_path / "own_loss.py").write_text(VECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["loss._target_=own_loss.Mine", "max_steps=2", "log_every=1"]
    with pytest.raises(UserError, match=r"loss has shape \[3\], and a loss is one number.*add \.mean\(\)"):
        small_run("x", *words)
    folder = RunFolder(tmp_path / "outputs/runs/x")
    assert not folder.path.exists()  # it was only tried
    monkeypatch.setattr("own_loss.Mine.forward", FlowMatchingLoss.forward)

    def fail(*_: Any) -> None:
        raise UserError("of the first step")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="of the first step"):
        patched.setattr("training.loop.train_step", fail)
        small_run("x", *words)
    status = folder.status.read()
    assert (status["state"], status["step"], status["why"]) == ("failed", 0, "of the first step")
    folder.metrics.append(0, 0, 0.0, {"stale": 1.0})
    folder.metrics.close()
    small_run("x", *words)
    assert folder.status.read()["state"] == "finished" and "stale" not in folder.metrics.path.read_text()
    assert [path.name for path in folder.path.parent.iterdir()] == ["x"]
    for save in (tmp_path / "outputs/ckpts").rglob("x_*.pt"):
        save.unlink()
    folder.status.write("failed", 3, 0, 0.0)  # before its first save: the name is free, and what was logged is kept
    small_run("x", *words)
    names = sorted(path.name for path in folder.path.parent.iterdir())
    assert len(names) == 2 and names[0] == "x" and names[1].startswith("x.old-")
    folder.status.write("failed", 3, 0, 0.0)  # but saves are never written over
    with pytest.raises(UserError, match="run_name=x exists already"):
        small_run("x", *words)


def test_a_new_model_that_names_no_learning_rate_is_told_where_to(tmp_path: Path, monkeypatch, capsys) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    text = (configs / "model/mlp.yaml").read_text().partition("training:")[0]
    (configs / "model/own.yaml").write_text(text)
    for module in ("compose", "nodes"):
        monkeypatch.setattr(f"configuration.{module}.CONFIG_DIR", configs)
    assert launcher.main(["run_name=x", "model=own", f"output_dir={tmp_path}"]) == 1
    assert capsys.readouterr().err == (
        "launcher.py: optimizer.lr is taken from model.training.lr, which configs/model/own.yaml lacks; add "
        "`training: {lr: 1e-3}` there, or give optimizer.lr=VALUE\n"
    )


@pytest.mark.parametrize(
    "word",
    ["trackio.project=${oc.env:OWN_KEY}", "log.reason='of ${ oc.env:OWN_KEY}'", "+callbacks.own={a: ['${oc.env:OWN_KEY}']}",
     "trackio.project='${oc.decode:${oc.env:OWN_KEY}}'"],
)  # fmt: skip
def test_what_the_environment_holds_is_stored_nowhere(word: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OWN_KEY", "SECRET")
    assert launcher.main(["run_name=x", f"output_dir={tmp_path}", word, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert f"{word.split('=')[0].strip('+')}" in said and "SECRET" not in said and said.count("\n") == 1
    assert "reads the environment by ${oc.env:...}" in said


def test_an_interrupt_is_one_whatever_error_becomes_of_it(monkeypatch, capsys) -> None:
    """omegaconf, among others, catches KeyboardInterrupt where it looks for errors of its own."""

    def busy(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise ValueError("something about flags") from error

    monkeypatch.setattr(launcher, "launch", busy)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert launcher.main(["run_name=x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "launcher.py: stopped before anything was begun\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's folder")
@pytest.mark.parametrize("shut", ["", "runs", "ckpts", "ckpts/mlp", "ckpts/mlp/archive"])
def test_a_folder_of_another_user_is_one_sentence_before_training(shut: str, capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as place:  # tmp_path lies in a folder that other users may not even pass through
        (Path(place) / shut).mkdir(parents=True, exist_ok=True)
        for folder in (Path(place), *Path(place).rglob("*")):
            folder.chmod(0o755 if folder == Path(place) / shut else 0o777)
        os.chown(Path(place) / shut, 12345, 12345)
        words = ["run_name=y", "max_steps=2", f"output_dir={place}", "trackio.enabled=false"]
        assert launcher.main([*words, "--dry-run"]) == 0  # imports what another user may not be able to read
        capfd.readouterr()
        child = os.fork()
        if not child:
            status = 2
            try:
                os.setuid(54321)
                status = launcher.main(words)
                sys.stdout.flush()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "output_dir" in err and f"{Path(place) / shut}" in err


EARLY = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def importing(name, *rest):
    if name == "common.errors":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)
builtins.__import__ = importing
sys.argv = ["launcher.py", "run_name=x"]
runpy.run_path("launcher.py", run_name="__main__")
"""


@pytest.mark.process
def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "launcher.py: stopped before anything was begun\n")


def test_what_a_resumed_run_cannot_change_even_by_force(small_run) -> None:
    small_run("x", "epochs=1", "max_steps=2")
    with pytest.raises(UserError, match="leave conditional out"):
        small_run("x", "resume=force", "conditional=true", "max_steps=4")
    with pytest.raises(UserError, match="holds the state of another schedule than plateau"):
        small_run("x", "resume=force", "schedule=plateau", "max_steps=4")


@pytest.mark.parametrize(
    "target, said",
    [
        ("losses.flow_matching_loss.Mistyped", "cannot be imported"),
        ("losses.paths.LinearPath", "is no class of a loss"),
    ],
)
def test_a_new_file_in_configs_that_names_no_class_of_its_group_is_one_sentence(
    target: str, said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    text = (configs / "loss/mse.yaml").read_text()
    (configs / "loss/own.yaml").write_text(text.replace("losses.flow_matching_loss.FlowMatchingLoss", target))
    for module in ("compose", "nodes", "stored"):
        monkeypatch.setattr(f"configuration.{module}.CONFIG_DIR", configs)
    targets_of.cache_clear()
    assert launcher.main(["run_name=x", "loss=own", f"output_dir={tmp_path}", "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"launcher.py: loss._target_={target} ") and said in error and error.count("\n") == 1
    targets_of.cache_clear()


MLP = {"_target_": "models.flow_matching.mlp.MLP", "state_shape": [2], "width": 8, "depth": 1, "time_frequencies": [1.0]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"widht": 8}, r"^models\.flow_matching\.mlp\.MLP takes no widht \(did you mean width\?\); its settings are "),
     ({"state_shape": ...}, r"^models\.flow_matching\.mlp\.MLP needs state_shape, which nothing gives; add it to its"),
     ({"_target_": "torch.optim.SGD", "lrr": 1}, r"^torch\.optim\.SGD takes no .*; its settings are lr, momentum")],
)  # fmt: skip
def test_a_constructors_argument_that_is_unknown_or_missing_is_named(changes: dict[str, Any], sentence: str) -> None:
    node = {key: value for key, value in (MLP | changes).items() if value is not ...}
    with pytest.raises(UserError, match=sentence):
        build(node, **({"params": []} if "optim" in str(node["_target_"]) else {}))


def test_a_file_without_a_function_is_answered_with_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def first(network, x0, x1): ...\ndef second(network, x0, x1): ...\n")
    for end in ("", ":"):
        with pytest.raises(UserError, match=r"mine\.py:? names no function; write .*mine\.py:first or second$"):
            prepared([f"{tmp_path / 'mine.py'}{end}"])


@pytest.mark.parametrize(
    ("front", "words"),
    [
        (launcher, ["run_name=x", "output_dir={}"]),
        (launcher, ["run_name=x", "loss=meanflow", "loss.teacher={}"]),
        (launcher, ["--search", "golden", "key=solver.steps", "low=1", "high=8", "ckpt={}"]),
        (sample, ["ckpt={}"]),
        (runs, ["list", "output_dir={}"]),
    ],
)
def test_a_path_that_the_file_system_does_not_take_is_one_sentence(front, words, tmp_path, capsys) -> None:
    assert front.main([word.format(tmp_path / ("n" * 300)) for word in words]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nnn... is too long for this file system; give a shorter one" in said


def test_a_path_is_named_that_an_error_comes_from() -> None:
    """A library's error on the way, as Hydra's around a constructor, hides it."""
    cause = PermissionError(errno.EACCES, "Permission denied", "/shut/x.npy")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("cannot make it") from cause
    assert str(path_in_words(caught.value)).startswith("/shut/x.npy may not be reached by this user; ")
    assert path_in_words(RuntimeError("own")) is None and path_in_words(OSError(errno.EACCES, "no name")) is None


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("os.system", "is not a class"), ("collections.Counter", "is no class of a solver; give one that is a")],
)
def test_what_samples_a_checkpoint_is_a_solver(target: str, sentence: str) -> None:
    with pytest.raises(UserError, match=rf"solver\._target_={target} {sentence}"):
        settings_from_overrides([f"solver._target_={target}"])

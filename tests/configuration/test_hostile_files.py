"""Checkpoints whose content means harm: each is refused in one sentence, and nothing of it is carried out."""

import copy
import os
import re
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.submission import prepare
from common.errors import UserError
from configuration.build import build
from dataloaders.cifar import Cifar
from evaluation.feature_networks import classifier_features
from evaluation.sample import load
from run_files.checkpoint import load_checkpoint
from scripts import eval_fid, report, sample, trackio_delete
from visualizers import curves, scene, vis_all


@pytest.mark.parametrize("part", ["model", "loss.path", "dataloaders", "solver", "evaluation"])
def test_a_configuration_in_a_checkpoint_calls_nothing_but_what_configs_name(small_run, shared_run, tmp_path, part):
    """weights_only guards the pickle; the configuration beside it names what is built, and could name anything."""
    folder = shared_run("x", "epochs=1")
    payload = load_checkpoint(folder / "ckpts/mlp/x_last.pt")
    node = payload["config"]
    for key in part.split("."):
        node = node[key]
    node.clear()
    node |= {"_target_": "run_files.provenance.subprocess.check_output", "shell": True, "args": f"touch {tmp_path / 'harm'}"}
    torch.save(payload, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"wants run_files\.provenance\.subprocess\.check_output called"):
        load(tmp_path / "hostile.pt", device="cpu")
    for key in ("eval_checkpoint", "init_from", "loss=meanflow loss.teacher"):
        with pytest.raises(UserError, match="which no file in configs/ names"):
            small_run("y", *f"{key}={tmp_path / 'hostile.pt'}".split(), "device=cpu")
    with pytest.raises(UserError, match="which no file in configs/ names"):
        classifier_features(str(tmp_path / "hostile.pt"))
    assert not (tmp_path / "harm").exists()


def one_sentence(path: Path, act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        act()
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


def test_the_checkpoint_that_is_changed_below_is_good(changed):
    assert load(changed(lambda payload: None), device="cpu").sample(3).shape == (3, 2)


def weights(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, Any]], object]:
    return lambda payload: payload["ema"].update({name: change(value) for name, value in payload["ema"].items()})


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "ema of no dict": (lambda payload: payload.update(ema=5), "as its ema"),
    "ema of a list": (lambda payload: payload.update(ema=[1]), "as its ema"),
    "ema of numbers": (weights(lambda _: 3.0), "something else than real numbers as 'layers.0.weight'"),
    "sparse": (weights(lambda value: value.to_sparse()), "something else than real numbers"),
    "meta": (weights(lambda value: value.to("meta")), "something else than real numbers"),
    "complex": (weights(lambda value: value.to(torch.complex64)), "something else than real numbers"),
    "whole numbers": (weights(lambda value: value.to(torch.int8)), r"as torch\.int8"),
    "NaN": (weights(lambda value: value * torch.nan), "NaN or infinite"),
    "infinite": (weights(lambda value: value + torch.inf), "NaN or infinite"),
    "step of text": (lambda payload: payload.update(step="abc"), "as its step"),
    "step below 0": (lambda payload: payload.update(step=-3), "as its step"),
    "a second time of its own": (lambda payload: payload.update(second_time={"a": 1}), "as its second_time"),
    "a name that is a list": (lambda payload: payload.update(run_name=["x"]), "as its run_name"),
    "a name that is a path": (lambda payload: payload.update(run_name="../x"), "cannot name files"),
    "configuration of text": (lambda payload: payload.update(config="x"), "as its config"),
    "no choices": (lambda payload: payload["config"].update(choices={}), "no whole configuration"),
    "a model chosen by a path": (
        lambda payload: payload["config"]["choices"].update(model="../../x"),
        "no whole configuration",
    ),
    "a model of nothing": (lambda payload: payload["config"]["model"].pop("_target_"), "no whole configuration"),
    "a seed of text": (lambda payload: payload["config"].update(seed="x"), "no whole configuration"),
    "a shape of text": (lambda payload: payload["config"]["dataloaders"].update(state_shape="zz"), "no whole configuration"),
}


@pytest.mark.parametrize("contents", CONTENTS)
def test_contents_of_another_kind_are_one_sentence(changed, contents):
    change, said = CONTENTS[contents]
    path = changed(change)
    assert re.search(said, one_sentence(path, lambda: load(path, device="cpu")))


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


CALL = "_target_: run_files.provenance.subprocess.check_output, args: touch HARM, shell: true"
CALLED = {"_target_": "run_files.provenance.subprocess.check_output", "args": "touch HARM", "shell": True}


@pytest.mark.parametrize("out", ["taken", "file/below"])
@pytest.mark.parametrize("front", ["sample", "eval_fid", "drawing", "curves", "report"])
def test_an_out_that_cannot_be_written_is_one_sentence(changed, two_runs, tmp_path, monkeypatch, capsys, front, out):
    """A folder where a file is to be, or the other way round, and a path below a file."""
    monkeypatch.chdir(tmp_path)
    end = {"sample": ".png", "eval_fid": ".json", "drawing": "", "curves": ".png", "report": ".html"}[front]
    (tmp_path / "file").write_text("precious")
    (tmp_path / f"taken{end}").mkdir() if end else (tmp_path / "taken").touch()
    of_runs = front in ("curves", "report")
    words = ["x", f"output_dir={two_runs}"] if of_runs else [f"ckpt={changed(lambda payload: None)}", "n=12"]
    main = report.main if front == "report" else READERS[front]
    assert main([*words, f"out={tmp_path / out}{end}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and str(tmp_path) in lines[0] and "room" not in lines[0]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_pattern_that_never_ends_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(trackio_delete, "run_names", lambda project: ["a" * 40 + "!"])
    monkeypatch.setattr("common.command_line.MATCH_SECONDS", 1)
    assert trackio_delete.main(["(a+)+$", "--dry-run"]) == 1
    assert "takes too long to compare with the names" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def harmful(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], object]:
    def write(path: Path, payload: dict[str, Any]) -> None:
        change(payload)
        torch.save(payload, path)

    return write


HARMFUL: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "a pickle that runs code": harmful(lambda payload: payload.update(config=Harm())),
    "a model that is a command": harmful(lambda payload: payload["config"].update(model=CALLED)),
    "a solver that is a command": harmful(lambda payload: payload["config"].update(solver=CALLED)),
    "a text that is a command": harmful(lambda payload: payload["config"]["ema"].update(decay="${oc.create:{%s}}" % CALL)),  # noqa: UP031
    "a name that is a path": harmful(lambda payload: payload.update(run_name="../../x")),
    "a pipe": lambda path, payload: os.mkfifo(path),
    "a folder": lambda path, payload: path.mkdir(),
    "text": lambda path, payload: path.write_text("weights"),
}
READERS: dict[str, Callable[[list[str]], int]] = {
    "sample": sample.main, "eval_fid": eval_fid.main, "curves": curves.main, "vis_all": vis_all.main,
    "drawing": lambda words: scene.main(words, "", lambda _: [], n=9),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", HARMFUL)
def test_no_checkpoint_harms_who_reads_it(harm, reader, whole, tmp_path, monkeypatch, capsys):
    """Nothing is carried out, nothing is written but where pictures belong, nothing hangs, and what is said is one line."""
    place = tmp_path / "a/b/outputs/ckpts/mlp"
    place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    HARMFUL[harm](place / "x_last.pt", copy.deepcopy(whole))
    before = sorted(tmp_path.rglob("*"))
    signal.alarm(60)
    status, said = READERS[reader]([f"ckpt={place / 'x_last.pt'}"]), capsys.readouterr()
    signal.alarm(0)
    assert status == 1 and "harm" not in said.out
    assert len([line for line in said.err.splitlines() if not line.startswith("note: ")]) == 1, said.err
    assert sorted(tmp_path.rglob("*")) == before


SMUGGLED = {
    "in a text": ("model", "depth", "${oc.create:{%s}}" % CALL),  # noqa: UP031
    "in a text in a list": ("model", "time_frequencies", ["${oc.create:{%s}}" % CALL]),  # noqa: UP031
    "in a text of a nested node": ("evaluation", "metrics", {"a": {"b": "${oc.create:{%s}}" % CALL}}),  # noqa: UP031
    "in a text of another node": ("ema", "decay", "${oc.create:{%s}}" % CALL),  # noqa: UP031
    "in a list": ("model", "depth", [CALLED]),
    "in a tuple": ("model", "depth", (CALLED,)),
    "by no text": ("model", "depth", {"_target_": ["x"]}),
    "in what is no plain value": ("model", "depth", {1: CALLED}),
    "too deep to walk": ("model", "depth", eval("[" * 90 + "]" * 90)),
    "in a tensor": ("model", "depth", torch.ones(2)),
}


@pytest.mark.parametrize("way", SMUGGLED)
def test_no_call_is_smuggled_past_the_check_of_targets(changed, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    part, key, value = SMUGGLED[way]
    path = changed(lambda payload: payload["config"][part].__setitem__(key, value))
    one_sentence(path, lambda: load(path, device="cpu"))
    assert not (tmp_path / "HARM").exists()


@pytest.mark.parametrize("front", ["sample", "eval_fid", "scene"])
@pytest.mark.parametrize("trusted", ["own_parts,elsewhere", "'elsewhere,own_parts'", "[own_parts,elsewhere]"])
def test_what_a_checkpoint_wants_called_is_called_once_it_is_trusted(changed, tmp_path, monkeypatch, capsys, front, trusted):
    """The sentence that refuses it says how; the next command trusts nothing by itself."""
    (tmp_path / "own_parts.py").write_text("from models.flow_matching.mlp import MLP\nclass Own(MLP): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(lambda payload: payload["config"]["model"].update(_target_="own_parts.Own"))
    words = [f"ckpt={path}", "n=12", f"out={tmp_path}{'/s.npz' * (front != 'scene')}"]
    drawing = lambda words: scene.main(words, "", lambda _: [], n=9)  # noqa: E731
    main = {"sample": sample.main, "eval_fid": eval_fid.main, "scene": drawing}[front]
    assert main([*words, f"trust={trusted}"]) == (1 if front == "eval_fid" else 0)
    assert front != "eval_fid" or "names no feature network" in capsys.readouterr().err
    assert main([*words, "trust=elsewhere"]) == 1
    assert "add trust=elsewhere,own_parts if you trust" in capsys.readouterr().err
    assert main(words) == 1 and "add trust=own_parts if you trust" in capsys.readouterr().err
    prepare(["run_name=y", f"trust={trusted}", f"output_dir={tmp_path}"])
    assert load(path, device="cpu").sample(2).shape == (2, 2)


def test_no_text_is_worked_out_while_an_object_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no value"):
        build({"_target_": "torch.optim.SGD", "params": [], "lr": ["${oc.create:{%s}}" % CALL]})  # noqa: UP031
    assert not (tmp_path / "HARM").exists()


CIFAR: dict[str, Any] = {
    "_target_": "dataloaders.cifar.Cifar", "root": "there", "archive": "a", "folder": "f", "train_files": ["b"],
    "test_file": "t", "label_key": "labels", "url": "https://example.org/a", "md5": None, "num_classes": 10,
    "download": True, "state_shape": [3, 32, 32],
}  # fmt: skip


def test_a_configuration_in_a_checkpoint_fetches_nothing(changed, tmp_path, monkeypatch):
    """Neither as its data nor as any other part; typed anew, a download comes from where configs/ says, or not at all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("fetched"))
    path = changed(lambda payload: payload["config"]["loss"].update(path=CIFAR))
    with pytest.raises(UserError, match="there is no file"):
        load(path, device="cpu")
    model = load(changed(lambda payload: payload["config"].update(dataloaders=CIFAR)), device="cpu")
    with pytest.raises(UserError, match="there is no file"):
        model.real(5)
    with pytest.raises(UserError, match=r"dataloaders.url= is no web address"):
        build(model.config["dataloaders"] | {"download": True})
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("key", ["archive", "folder", "train_files", "test_file"])
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ""])
def test_the_files_of_a_data_set_lie_in_its_own_folder(tmp_path, key, name):
    settings = CIFAR | {"root": str(tmp_path / "there"), key: [name] if key == "train_files" else name}
    with pytest.raises(UserError, match="give its bare name"):
        Cifar(**{name: value for name, value in settings.items() if name != "_target_"})


def test_an_array_file_that_would_run_code_or_escape_is_refused(small_run, tmp_path):
    """Object arrays are pickles; names in an archive are never paths to write to, for nothing is unpacked."""
    np.save(tmp_path / "objects.npy", np.array([[Harm()]] * 20), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "escape.npz", "w") as archive:
        archive.writestr("../../escaped.npy", b"x")
    for name in ("objects.npy", "escape.npz"):
        with pytest.raises(UserError):
            small_run("x", "dataloaders=array", f"dataloaders.path={tmp_path / name}", "dataloaders.epoch_size=null")
    assert not list(tmp_path.parent.rglob("escaped.npy"))

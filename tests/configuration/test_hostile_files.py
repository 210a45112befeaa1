"""Files that lie or mean harm: each is refused in one sentence, and nothing of it is carried out."""

import copy
import importlib
import io
import os
import pickle
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.submission import prepare
from common.errors import UserError
from configuration.build import build
from dataloaders.cifar import Cifar
from evaluation.feature_networks import classifier_features
from evaluation.sample import load
from run_files.checkpoint import FORMAT, KEYS, load_checkpoint, write_checkpoint, write_export
from scripts import eval_fid, report, sample, trackio_delete
from training.assemble import assemble
from visualizers import curves, scene, vis_all

BLANK = {key: {} for key in KEYS} | {
    "step": 0, "best": 0.0, "waited": 0, "elapsed": 0.0, "run_name": "x", "second_time": None, "format": FORMAT,
}  # fmt: skip
PAYLOAD: dict[str, Any] = BLANK | {"step": 3, "network": {"w": torch.arange(64.0), "b": torch.ones(9)}}


def saved(payload: object) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def rebuilt(content: bytes, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with some entries replaced (by the end of their name), every checksum right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            replaced = [data for end, data in change.items() if entry.filename.endswith(end)]
            new.writestr(entry.filename, replaced[0] if replaced else old.read(entry.filename))
    return target.getvalue()


def entry(content: bytes, end: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith(end))


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_that_would_run_code_does_not(tmp_path, capsys):
    whole = saved(PAYLOAD)
    assert "cannot be read" in refusal(tmp_path / "a.pt", rebuilt(whole, {"data.pkl": pickle.dumps(Harm())}))
    assert "cannot be read" in refusal(tmp_path / "b.pt", saved(PAYLOAD | {"config": Harm()}))
    assert "harm" not in capsys.readouterr().out


def test_a_zip_bomb_is_refused_unopened(tmp_path, monkeypatch):
    """Compressed zeros, and one stored entry listed many times: neither is unpacked."""
    bomb = rebuilt(saved(PAYLOAD), {"data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    assert "would unpack to more than it holds" in refusal(tmp_path / "bomb.pt", bomb)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a/data.pkl", bytes(10_000))
        archive.filelist += archive.filelist * 99
    assert "would unpack to more than it holds" in refusal(tmp_path / "overlap.pt", target.getvalue())


def test_sizes_and_strides_that_lie_are_refused(tmp_path):
    """torch's own guards; without them memory behind the tensor would be read."""
    whole = saved(PAYLOAD)
    pickled = entry(whole, "data.pkl")
    counts = pickled.replace(b"K\x40t", b"J\xff\xff\xff\x0ft")  # 64 numbers stored, 2^28 claimed
    sizes = pickled.replace(b"K\x40\x85", b"J\xff\xff\xff\x0f\x85")  # a shape of 2^28
    assert counts != pickled and sizes != pickled and counts != sizes
    (tmp_path / "x.pt").write_bytes(rebuilt(whole, {"data.pkl": pickled}))
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 3
    for lie in (counts, sizes):
        assert "cannot be read" in refusal(tmp_path / "x.pt", rebuilt(whole, {"data.pkl": lie}))


def same(left: Any, right: Any) -> bool:
    """Whether nested dicts hold the same values, tensors bit for bit."""
    if isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], value) for key, value in right.items())
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_no_changed_byte_changes_what_is_read(tmp_path, name):
    """Wherever one byte differs, the file is refused, or means the same as before (padding, dates)."""
    path = tmp_path / name
    config = {"run_name": "x", "loss": {"_target_": "x"}}
    payload = PAYLOAD | {"config": config, "ema": {"w": torch.arange(6.0), "n": torch.tensor(3)}}
    write_checkpoint(path, payload) if name == "x.pt" else write_export(path, payload)
    content, whole, read = path.read_bytes(), load_checkpoint(path), 0
    for position in range(len(content)):
        for change in (1, 16, 128, 255):
            path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
            try:
                found = load_checkpoint(path)
            except UserError as refused:
                assert "\n" not in str(refused) and str(path) in str(refused)
                continue
            assert same(found, whole), (position, change)
            read += 1
    assert 0 < read < 2 * len(content)


def test_files_of_earlier_versions_have_no_digest_and_are_read_with_a_line(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(saved(PAYLOAD))
    assert same(load_checkpoint(tmp_path / "x.pt"), PAYLOAD)
    assert capsys.readouterr().err.count("has no digest, as files of earlier versions") == 1


def test_an_archive_that_two_readers_read_differently_is_damaged(tmp_path):
    """Every checksum is right, and the weights are others."""
    write_checkpoint(tmp_path / "x.pt", PAYLOAD)
    whole = (tmp_path / "x.pt").read_bytes()
    other = rebuilt(whole, {"data/0": torch.zeros(64).numpy().tobytes()})
    assert "what is read from it is not what was written" in refusal(tmp_path / "x.pt", other)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_changed_pickle_is_more_than_one_sentence(tmp_path_factory, data):
    """The pickle cut, or with bytes changed, under right checksums: refused as a checkpoint, or read as one."""
    whole = saved(PAYLOAD)
    pickled = bytearray(entry(whole, "data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    pickled = pickled[: data.draw(st.integers(1, len(pickled)))] if data.draw(st.booleans()) else pickled
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    path.write_bytes(rebuilt(whole, {"data.pkl": bytes(pickled)}))
    try:
        load_checkpoint(path)
    except UserError as refused:
        assert "\n" not in str(refused)


def test_other_versions_projects_and_parts_are_told_apart(tmp_path):
    assert "checkpoint format 2" in refusal(tmp_path / "n.pt", saved(PAYLOAD | {"format": "denoising-zoo-checkpoint-2"}))
    assert "not written by this project" in refusal(tmp_path / "o.pt", saved({"model_state_dict": {}, "epoch": 3}))
    assert "not written by this project" in refusal(tmp_path / "f.pt", saved(PAYLOAD | {"format": 7}))
    lacking = {key: value for key, value in PAYLOAD.items() if key != "optimizer"}
    assert "lacks optimizer" in refusal(tmp_path / "l.pt", saved(lacking))


def test_weights_of_another_architecture_are_named(small_run, tmp_path):
    folder = small_run("x", "epochs=1")
    payload = load_checkpoint(folder / "ckpts/mlp/x_last.pt")
    payload["ema"] = {"conv.weight": torch.ones(3)}
    torch.save(payload, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds another network than this model"):
        load(tmp_path / "other.pt", device="cpu")


@pytest.mark.parametrize("part", ["model", "loss.path", "dataloaders", "solver", "evaluation"])
def test_a_configuration_in_a_checkpoint_calls_nothing_but_what_configs_name(small_run, tmp_path, part):
    """weights_only guards the pickle; the configuration beside it names what is built, and could name anything."""
    folder = small_run("x", "epochs=1")
    payload = load_checkpoint(folder / "ckpts/mlp/x_last.pt")
    node = payload["config"]
    for key in part.split("."):
        node = node[key]
    node.clear()
    node.update(
        {"_target_": "run_files.provenance.subprocess.check_output", "args": f"touch {tmp_path / 'harm'}", "shell": True}
    )
    torch.save(payload, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"wants run_files\.provenance\.subprocess\.check_output called"):
        load(tmp_path / "hostile.pt", device="cpu")
    for words in (f"eval_checkpoint={tmp_path / 'hostile.pt'}", f"init_from={tmp_path / 'hostile.pt'}"):
        with pytest.raises(UserError, match="which no file in configs/ names"):
            small_run("y", words, "device=cpu")
    with pytest.raises(UserError, match="which no file in configs/ names"):
        classifier_features(str(tmp_path / "hostile.pt"))
    assert not (tmp_path / "harm").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checkpoint of a small run holds, before its first step."""
    words = [f"output_dir={tmp_path_factory.mktemp('whole')}", "trackio.enabled=false", "callbacks=none", "device=cpu"]
    return assemble(prepare(["run_name=x", *words, "model.width=16", "model.depth=2"])).payload()


@pytest.fixture
def changed(whole: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """changed(change): a file of that checkpoint, changed; every byte of it is as torch.save wrote it."""

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        payload = copy.deepcopy(whole)
        change(payload)
        torch.save(payload, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return write


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
    assert len(lines) == 1 and str(tmp_path) in lines[0] and (tmp_path / "file").read_text() == "precious"


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
    with pytest.raises(UserError, match="does not exist"):
        load(path, device="cpu")
    model = load(changed(lambda payload: payload["config"].update(dataloaders=CIFAR)), device="cpu")
    with pytest.raises(UserError, match="does not exist"):
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


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two tiny runs, of which one is a sweep's job."""
    import launcher

    folder = tmp_path_factory.mktemp("two") / "outputs"
    for name in ("x", "y"):
        launcher.run(
            f"run_name={name}", f"output_dir={folder}", "max_steps=2", "device=cpu", "model.width=8", "model.depth=1",
            "evaluation=loss_only", "evaluation.samples=16", "evaluation.final_samples=16", "dataloaders.epoch_size=64",
            "trackio.enabled=false", "log_every=1", "num_workers=0",
        )  # fmt: skip
    return folder


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

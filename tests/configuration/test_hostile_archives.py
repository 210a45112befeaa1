"""Checkpoints whose bytes lie: each is refused in one sentence, and nothing of it is carried out."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluation.sample import load
from run_files.checkpoint import FORMAT, KINDS, load_checkpoint, write_checkpoint, write_export

BLANK = {key: {} for key in KINDS} | {
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


def test_lists_that_share_lists_are_not_walked_without_end(tmp_path):
    shared: list[Any] = [0]
    for _ in range(18):
        shared = [shared] * 10
    said = refusal(tmp_path / "x.pt", saved(PAYLOAD | {"config": {"a": shared}}))
    assert "holds lists within lists without end" in said


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.npz"])
def test_no_changed_byte_changes_what_is_read(tmp_path, name):
    """Wherever one byte differs, in one of four ways, the file is refused or means the same as before (padding, dates)."""
    path = tmp_path / name
    config = {"run_name": "x", "loss": {"_target_": "x"}}
    payload = PAYLOAD | {"config": config, "ema": {"w": torch.arange(6.0), "n": torch.tensor(3)}}
    write_checkpoint(path, payload) if name == "x.pt" else write_export(path, payload)
    content, whole, read = path.read_bytes(), load_checkpoint(path), 0
    for position in range(len(content)):
        change = (1, 16, 128, 255)[position % 4]
        path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
        try:
            found = load_checkpoint(path)
        except UserError as refused:
            assert "\n" not in str(refused) and str(path) in str(refused)
            continue
        assert same(found, whole), (position, change)
        read += 1
    assert 0 < read < 0.5 * len(content)


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


def test_weights_of_another_architecture_are_named(shared_run, tmp_path):
    folder = shared_run("x", "epochs=1")
    payload = load_checkpoint(folder / "ckpts/mlp/x_last.pt")
    payload["ema"] = {"conv.weight": torch.ones(3)}
    torch.save(payload, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds another network than this model"):
        load(tmp_path / "other.pt", device="cpu")

"""Runs that are copied to a store while they train, and go on from there on a machine that has nothing of them."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launcher
from common import stores
from common.errors import UserError
from dev.kill_test import same
from evaluation.sample import load
from run_files.checkpoint import load_checkpoint
from run_files.mirror import Mirror, StoredRun
from run_files.run_folder import RunFolder


@pytest.fixture(autouse=True)
def own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


def below(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in RunFolder(folder).metrics.read()]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which the launcher refuses a command."""
    capsys.readouterr()
    assert launcher.main(list(words)) == 1
    said = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert said.startswith("launcher.py: ")
    return said


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_as_if_its_machine_had_not_been_lost(
    small_run: Callable[..., Path], tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, put = tmp_path / "kept", stores.put

    def lost(content: Any, address: str) -> None:
        if address.endswith("x_last.pt") and load_checkpoint(content)["step"] == 16:
            shutil.copytree(tmp_path / "store", kept)  # as a machine leaves it whose end comes between two files
        put(content, address)

    monkeypatch.setattr(stores, "put", lost)
    monkeypatch.setattr(Mirror, "offer", lambda mirror: (setattr(mirror, "waiting", mirror.pinned()), mirror.copy()))
    whole = small_run("x", f"mirror={store}")
    assert below(tmp_path / "store") == {
        "ckpts/mlp/x_best.pt", "ckpts/mlp/x_last.pt", "runs/x/config.yaml", "runs/x/metrics.jsonl", "runs/x/overrides.txt",
        "runs/x/status.json", "runs/x/model.safetensors", "runs/x/log.md",
    }  # fmt: skip
    for name in below(tmp_path / "store"):
        assert (tmp_path / "store" / name).read_bytes() == (whole / name).read_bytes(), name
    assert load_checkpoint(kept / "ckpts/mlp/x_last.pt")["step"] == 8 and rows(kept / "runs/x")[-1]["step"] == 16
    elsewhere = small_run("x", f"mirror=file://{kept}", "resume=true", output="elsewhere")
    mine, theirs = (load_checkpoint(folder / "ckpts/mlp/x_last.pt") for folder in (elsewhere, whole))
    assert mine["step"] == 24 and all(same(mine[key], theirs[key]) for key in ("network", "ema", "optimizer", "schedule"))
    assert rows(elsewhere / "runs/x") == rows(whole / "runs/x")
    assert not list(whole.rglob("*.mirror")) and not list(elsewhere.rglob("*.mirror"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a run x of two steps in outputs/, its mirror in store/; to be copied, not changed."""
    from tests.conftest import train_small

    place = tmp_path_factory.mktemp("mirrored")
    train_small(place, "x", "max_steps=2", f"mirror=file://{place / 'store'}")
    return place


@pytest.fixture
def stored(run: Path, tmp_path: Path) -> str:
    """The address of a copy of its mirror."""
    shutil.copytree(run / "store", tmp_path / "store")
    return f"file://{tmp_path / 'store'}"


def test_a_store_that_refuses_costs_a_line_and_is_tried_again(
    small_run: Callable[..., Path], store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, failures = stores.put, [1, 2]

    def fails(content: Any, address: str) -> None:
        if address.endswith("metrics.jsonl") and failures:
            failures.pop()
            raise UserError(f"{address} cannot be used (TimeoutError)")
        put(content, address)

    monkeypatch.setattr(stores, "put", fails)
    folder = small_run("x", f"mirror={store}")
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be used" in line]
    assert len(said) == 1 and said[0].startswith("note: ") and "the run goes on" in said[0] and not failures
    assert stores.read(f"{store}/ckpts/mlp/x_last.pt", 2**30) == (folder / "ckpts/mlp/x_last.pt").read_bytes()
    failures += range(1000)
    small_run("y", "max_steps=2", f"mirror={store}")
    assert f"{store} lacks the newest of the run y" in capsys.readouterr().err.splitlines()[-1]
    assert RunFolder(folder / "runs/y").status.read()["state"] == "finished"


def test_a_slow_store_does_not_stop_training_and_gets_the_newest_only(
    small_run: Callable[..., Path], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, close, trained, sent = stores.put, Mirror.close, threading.Event(), list[str]()

    def slow(content: Any, address: str) -> None:
        if not address.endswith("overrides.txt"):
            assert trained.wait(60)
        put(content, address)
        sent.append(address.rpartition("/")[2])

    monkeypatch.setattr(stores, "put", slow)
    monkeypatch.setattr(Mirror, "close", lambda mirror: (trained.set(), close(mirror)))
    folder = small_run("x", f"mirror={store}", "epochs=5")
    assert sent.count("x_last.pt") == 2  # the first, which was waiting, and the newest
    assert stores.read(f"{store}/ckpts/mlp/x_last.pt", 2**30) == (folder / "ckpts/mlp/x_last.pt").read_bytes()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_file_is_stored_whole_or_not_at_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{kind}://{tmp_path}/store/x.pt"
    (tmp_path / "new").write_bytes(b"new" * 1000)
    stores.put(b"old", address)
    seen, send = [], stores.sent

    def cut(system: Any, content: Any, place: str) -> None:
        send(system, b"ne", place)
        seen.append(stores.read(address, 10))
        raise OSError("the connection is gone")

    monkeypatch.setattr(stores, "sent", cut)
    with pytest.raises(UserError, match=r"cannot be used \(OSError: the connection is gone"):
        stores.put(tmp_path / "new", address)
    assert seen == [b"old"] and stores.names_below(f"{kind}://{tmp_path}/store") == ["x.pt"]
    monkeypatch.undo()
    stores.put(tmp_path / "new", address)
    assert stores.read(address, 3000) == b"new" * 1000 and stores.names_below(f"{kind}://{tmp_path}/store") == ["x.pt"]
    with pytest.raises(UserError, match="larger than the 2,999 bytes"):
        stores.read(address, 2999)


def test_what_a_store_holds_is_replaced_by_no_other_run(
    run: Path, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_run: Callable[..., Path]
) -> None:
    before = {name: (tmp_path / "store" / name).read_bytes() for name in below(tmp_path / "store")}
    place = f"output_dir={tmp_path / 'outputs'}"
    assert "has saves in" in refusal(capsys, "run_name=x", place, f"mirror={stored}")
    shutil.copytree(run / "outputs", tmp_path / "old")
    status = tmp_path / "store/runs/x/status.json"
    for change, words in (('"step": 2', "at step 9, and here it is at step 2"), ("20", "another run of this name")):
        status.write_text(status.read_text().replace(change, {'"step": 2': '"step": 9'}.get(change, "19"), 1))
        again = refusal(
            capsys, "run_name=x", f"output_dir={tmp_path / 'old'}", "resume=true", f"mirror={stored}", "max_steps=4"
        )
        assert words in again
        status.write_bytes(before["runs/x/status.json"])
    assert {name: (tmp_path / "store" / name).read_bytes() for name in below(tmp_path / "store")} == before
    small_run("x", "max_steps=2", f"mirror={stored}", "overwrite=true")
    aside = {re.sub(r"\.old-[\d-]+", ".old", name) for name in below(tmp_path / "store")}
    assert aside == set(before) | {re.sub(r"(runs/|mlp/)x", r"\1x.old", name) for name in before}


def test_settings_from_a_store_build_send_and_fetch_nothing_strange(
    run: Path, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "store/runs/x/config.yaml"
    whole, words = config.read_text(), ["run_name=x", f"output_dir={tmp_path / 'new'}", "resume=true", "max_steps=4"]
    config.write_text(whole.replace("_target_: losses.flow_matching_loss.FlowMatchingLoss", "_target_: os.system"))
    assert config.read_text() != whole
    assert "wants os.system called" in refusal(capsys, *words, f"mirror={stored}")
    shutil.rmtree(tmp_path / "new")
    config.write_text(whole.replace("  model: mlp", "  model: ../../../x"))
    assert "names no model" in refusal(capsys, *words, f"mirror={stored}")
    config.write_text(whole)
    assert "and stored settings neither fetch nor send" in refusal(
        capsys, "run_name=x", f"output_dir={run / 'outputs'}", "resume=true", "max_steps=4"
    )
    monkeypatch.setattr(
        stores, "names_below", lambda _: ["../../escaped.txt", "config.yaml", "samples/../../x.png", "run.sh"]
    )
    assert StoredRun(stored, "x").records() == ["config.yaml"]


def test_a_damaged_save_in_a_store_is_not_trained_on(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "store/ckpts/mlp/x_last.pt"
    content = bytearray(save.read_bytes())
    content[len(content) // 2] ^= 1
    save.write_bytes(content)
    words = ["run_name=x", f"output_dir={tmp_path / 'new'}", "resume=true", "max_steps=2", f"mirror={stored}"]
    assert launcher.main(words) == 0
    assert "x_last.pt cannot be read; going on from x_best.pt (step 2)" in capsys.readouterr().out


def test_checkpoints_are_read_from_addresses_and_fetched_again_when_they_change(
    stored: str, run: Path, tmp_path: Path, small_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, fetched, fetch = f"{stored}/ckpts/mlp/x_last.pt", list[str](), stores.fetch
    monkeypatch.setattr(stores, "fetch", lambda place, target: (fetched.append(place), fetch(place, target)))
    there = load(run / "outputs/ckpts/mlp/x_last.pt").sample(3)
    assert load(address).sample(3).equal(there) and load(address).sample(3).equal(there) and fetched == [address]
    shutil.copy(run / "outputs/ckpts/mlp/x_best.pt", tmp_path / "store/ckpts/mlp/x_last.pt")
    load(address)
    assert fetched == [address] * 2
    folder = small_run("y", f"init_from={address}", "max_steps=1", "optimizer.lr=1e-30")
    started, weights = (
        load_checkpoint(p / "ckpts/mlp" / n)["ema"] for p, n in ((folder, "y_last.pt"), (run / "outputs", "x_last.pt"))
    )
    assert all(started[key].allclose(weights[key]) for key in weights)
    small_run("z", f"eval_checkpoint={address}")
    assert (folder / "evaluations/z.json").is_file() and fetched == [address] * 2


@pytest.mark.parametrize("words, sentence", [
    (["mirror=http://bucket/x"], "http://bucket/x is no address of a store; give s3://BUCKET/FOLDER"),
    (["mirror=outputs"], "outputs is no address of a store"),
    (["mirror=s3://"], "names nothing in a store"),
    (["mirror=file:///tmp/../etc"], "names nothing in a store"),
    (["mirror=s3://bucket/*"], "names nothing in a store"),
    (["init_from=file:///nowhere/x.pt"], "there is no file file:///nowhere/x.pt"),
    (["eval_checkpoint=file:///nowhere/x.pt"], "there is no file file:///nowhere/x.pt"),
    (["resume=true", "mirror=memory://nowhere"], "to resume"),
    (["mirror=s3://bucket/x", "backend=modal", "output_dir=outputs"], "kept on its Volume"),
    (["dataloaders=imagenet", "model=dit_s", "dataloaders.path=memory://nowhere"], "no cached latents in memory://nowhere"),
])  # fmt: skip
def test_a_wrong_address_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(capsys, "run_name=x", f"output_dir={tmp_path / 'outputs'}", *words)
    assert not (tmp_path / "outputs/runs").exists()


def test_a_store_whose_package_is_missing_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stores.PACKAGES, "s3", "s3fs_that_is_missing")
    said = refusal(capsys, "run_name=x", f"output_dir={tmp_path}", "mirror=s3://bucket/x")
    assert "needs s3fs_that_is_missing, which is not installed" in said and "uv sync --extra remote" in said

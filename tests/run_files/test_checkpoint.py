"""Checkpoint files: what is refused, what is found, what is pruned."""

import pickle
import threading
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from run_files import checkpoint_folder
from run_files.checkpoint import FORMAT, KINDS, load_checkpoint
from run_files.checkpoint_folder import ASYNC_BYTES, CheckpointFolder
from run_files.run_folder import saves_of
from run_files.stored_values import parsed_config


class Harm:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("harm",))


def test_foreign_and_broken_files_are_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "abc.pt").write_text("abc" * 100)
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"format": FORMAT, "x": torch.zeros(1000)}, tmp_path / "torn.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:900])
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Harm()))
    torch.save({"format": FORMAT, "x": Harm()}, tmp_path / "hostile_zip.pt")
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.pt"]:
        with pytest.raises(UserError) as refused:
            load_checkpoint(path)
        assert "\n" not in str(refused.value) and path.name in str(refused.value)
    assert "harm" not in capsys.readouterr().out


def payload(step: int) -> dict[str, object]:
    numbers = {"step": step, "best": 0.0, "waited": 0, "elapsed": 0.0}
    return {key: {} for key in KINDS} | numbers | {"run_name": "x", "second_time": None, "format": FORMAT}


def test_pruning_keeps_the_newest_of_this_run_only(tmp_path):
    for name in ("x", "x_epoch_0001", "xy"):
        folder = CheckpointFolder(tmp_path, "mlp", name, keep=2)
        for epoch in (1, 2, 3, 10000):
            folder.save(payload(epoch), epoch, best=epoch == 2)
    kept = sorted(path.name for path in (tmp_path / "ckpts/mlp/archive").iterdir())
    assert kept == sorted(f"{name}_epoch_{e}.pt" for name in ("x", "x_epoch_0001", "xy") for e in ("0003", "10000"))
    for name in ("x", "x_epoch_0001", "xy"):
        folder = CheckpointFolder(tmp_path, "mlp", name, keep=2)
        assert folder.newest()[1]["step"] == 10000 and load_checkpoint(folder.best)["step"] == 2
        assert len(saves_of(tmp_path, name)) == 4


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, "mlp", "x", keep=3)
    folder.save(payload(1), 1, best=False)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        folder.save(payload(2), 2, best=False)
    assert folder.newest()[1]["step"] == 1


@pytest.mark.parametrize("in_background", [True, None], ids=["asked for", "for its size"])
def test_a_save_in_the_background_holds_the_state_of_its_moment(tmp_path, monkeypatch, in_background):
    """save() returns while the file is still unwritten, what training does to the weights meanwhile does not reach it, and
    the next save waits for it."""
    folder = CheckpointFolder(tmp_path, "mlp", "x", 3, in_background)
    weights = torch.zeros(8 if in_background else ASYNC_BYTES // 4)
    may_write, running, most = threading.Semaphore(0), [], []

    def slow_write(path, content):
        running.append(path)
        most.append(len(running))
        assert may_write.acquire(timeout=300)
        write(path, content)
        running.remove(path)

    write = checkpoint_folder.write_checkpoint
    monkeypatch.setattr(checkpoint_folder, "write_checkpoint", slow_write)
    folder.save(payload(1) | {"optimizer": {"w": [weights]}}, 1, best=True)
    assert folder.saved_step is None and not folder.last.exists()
    weights += 1
    threading.Timer(0.2, may_write.release).start()
    folder.save(payload(2) | {"optimizer": {"w": [weights]}}, 2, best=False)
    assert folder.saved_step == 1 and load_checkpoint(folder.last)["optimizer"]["w"][0].unique().tolist() == [0]
    may_write.release()
    folder.settle()
    assert folder.saved_step == 2 and load_checkpoint(folder.last)["optimizer"]["w"][0].unique().tolist() == [1]
    assert load_checkpoint(folder.best)["step"] == 1 and max(most) == 1


def test_a_save_in_the_background_that_fails_is_told_once(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, "mlp", "x", keep=3, in_background=True)
    monkeypatch.setattr(checkpoint_folder, "write_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    folder.save(payload(1), 1, best=False)
    with pytest.raises(OSError, match="No space"):
        folder.settle()
    folder.settle()
    assert folder.saved_step is None


def test_keep_zero_keeps_all(tmp_path):
    folder = CheckpointFolder(tmp_path, "mlp", "x", keep=0)
    for epoch in range(1, 8):
        folder.save(payload(epoch), epoch, best=False)
    assert len(folder.epoch_saves()) == 7


def test_nothing_to_resume_says_so(tmp_path):
    with pytest.raises(UserError, match="has no save"):
        CheckpointFolder(tmp_path, "mlp", "x", keep=3).newest()


def test_a_fault_of_a_configuration_is_said_with_its_line():
    with pytest.raises(UserError, match="cannot be read \\(found duplicate key seed in line 2\\)"):
        parsed_config("seed: 1\nseed: 2\n", "config.yaml")

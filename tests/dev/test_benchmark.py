"""The benchmark: its tables have what they promise; no test asks how long anything took."""

import importlib.util
import warnings

import pytest
import torch

from dev import benchmark, gpu_correctness, operations_benchmark, peers_benchmark


def test_benchmark_compares_rows_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = ["model.width=8 batch_size=64", "model.width=8 batch_size=64 dataloaders=moons"]
    assert benchmark.main(["--rounds", "1", "--steps", "2", *rows]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 4 and "data_share" in table and "moons" in table
    assert list(tmp_path.iterdir()) == []
    assert benchmark.main(["epochs=0"]) == 1


def test_a_step_dispatches_few_operations_beside_those_of_its_network(monkeypatch, capsys):
    monkeypatch.setattr(operations_benchmark, "groups", lambda: {"loss": ["mse", "meanflow", "cross_entropy"]})
    assert benchmark.main(["--preset", "operations", "--and", "model.width=8 batch_size=64"]) == 0
    mse, meanflow = (line for line in capsys.readouterr().out.splitlines() if "loss=" in line)
    difference = [float(line.split("|")[-2]) for line in (mse, meanflow)]
    assert 0 < difference[0] <= 25, f"a step of loss=mse dispatches {difference[0]:.0f} more than its network and optimizer"
    assert difference[1] > 2 * difference[0]


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_one_line(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there(name) if name == "torchdiffeq" else None)
    words = "model.inner_width=8 model.inner_blocks=1 model.embedding=8"
    monkeypatch.setattr(peers_benchmark, "DIGITS", f"{peers_benchmark.DIGITS} {words}")
    assert benchmark.main(["--preset", "peers", "--rounds", "1", "--steps", "1", "--and", "model.width=8"]) == 0
    text = capsys.readouterr().out
    assert text.count("is not installed") == 2 and "pip install 'denoising-zoo[peers]'" in text
    assert "| `torchdiffeq` |" in text and text.count("| `this project` |") == 2


def test_a_device_that_is_wrong_is_named_and_what_it_cannot_do_is_one_line():
    def compared(words: str) -> dict[str, float]:
        if "shortcut" in words:
            raise NotImplementedError("no such operation\nand much more")
        return {"cpu": 1.0, "device": 1.0, "difference": float("nan") if "func" in words else 0.0}

    rows = {name: f"loss={name}" for name in ("mse", "shortcut", "func")}
    unable, (_, table), (verdict, none) = gpu_correctness.judged("losses", rows, compared, 1e-3)
    line = "- losses, shortcut: not on this device: NotImplementedError: no such operation"
    assert unable == (line, []) and [row["row"] for row in table] == ["mse", "func"] and not none
    assert verdict == "Device against CPU, losses: NOT EQUAL: func"
    _, (verdict, _) = gpu_correctness.judged("losses", {"shortcut": "shortcut"}, compared, 1e-3)
    assert verdict == "Device against CPU, losses: nothing was compared"


@pytest.mark.slow
def test_a_run_that_does_not_go_on_as_it_would_have_is_found(monkeypatch):
    """On one device both are equal to the bit; a save whose optimizer is lost ends elsewhere."""
    words = "model=mlp model.width=8 model.depth=1 batch_size=64 device=cpu"
    assert gpu_correctness.going_on(words)["difference"] == 0
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert gpu_correctness.going_on(words)["difference"] > 1e-3


def test_other_weights_are_found(monkeypatch):
    words, measures = "model=mlp model.width=8 model.depth=1 batch_size=64 device=cpu", ("compared", "sampled")
    assert [getattr(gpu_correctness, name)(words)["difference"] for name in measures] == [0, 0]
    alike = gpu_correctness.alike

    def shifted(words):
        cpu, device = alike(words)
        for objective in (device.run.state.objective, device.run.state.ema_objective):
            for weight in objective.network.parameters():
                weight.data.mul_(1.02)
        return cpu, device

    monkeypatch.setattr(gpu_correctness, "alike", shifted)
    assert all(getattr(gpu_correctness, name)(words)["difference"] > 1e-3 for name in measures)


def test_waits_are_those_that_torch_warns_of(monkeypatch):
    """Its mode and its warning stood in for: reading a loss is one, a step's own are none."""
    mode = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    read = torch.Tensor.item

    def item(tensor):
        if mode[-1:] == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "item", item)
    words = "model=mlp model.width=8 model.depth=1 batch_size=64 device=cpu"
    own, counted = (gpu_correctness.waits(words, reads)["waits"] for reads in (False, True))
    assert (own, counted, mode) == (0, 1, ["warn", "default"] * 2)


@pytest.mark.gpu
def test_a_cuda_device_computes_what_the_cpu_computes_and_no_step_waits_for_it():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lines, waits = [], []
    for title, rows in gpu_correctness.correctness("model=mlp model.width=8 model.depth=1 batch_size=64", "device=cuda"):
        lines += [] if rows else [title]
        waits += [row["waits"] for row in rows if "waits" in row]
    assert len(lines) == 3 and all("agree to" in line for line in lines)
    assert len(waits) > 10 and waits[0] >= 1 and max(waits[1:]) == 0, "the first row reads a number each step"

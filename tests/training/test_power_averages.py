"""Averages of a length chosen after training: their profiles, how near stored ones come, and the run that stores them."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from evaluation.power_averages import Snapshots, gamma_of, profile, snapshots_of
from evaluation.sample import load
from run_files.averages import read_averages, write_averages
from run_files.checkpoint import write_checkpoint
from run_files.run_folder import RunFolder
from scripts import ema as script
from tests.training.helpers import assert_equal_runs
from tests.training.test_ema import flat, network, walk
from tests.training.test_resume import stopped
from training.ema import PowerEMA

STEPS = 400


def of_updates(length: float, end: int) -> np.ndarray:
    """What the average's own recursion gives each of STEPS steps after `end` of them."""
    ema, weights = PowerEMA([length]), np.zeros(STEPS)
    for step in range(1, end + 1):
        weights *= 1 - ema.share(step)
        weights[step - 1] = ema.share(step)
    return weights


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_profile_is_that_of_the_updates_and_has_its_length(length):
    for end in (1, 37, STEPS):
        assert np.abs(profile(length, end, STEPS) - of_updates(length, end)).max() < 1e-10
    steps = np.arange(1, 100_001) / 100_000
    weights = profile(length, 100_000, 100_000)
    deviation = np.sqrt(weights @ steps**2 - (weights @ steps) ** 2)
    assert weights.sum() == pytest.approx(1) and deviation == pytest.approx(length, rel=1e-3)


def test_lengths_follow_the_papers_table():
    assert [round(gamma_of(length), 2) for length in (0.05, 0.1)] == [16.97, 6.94]


def stored(tmp_path: Path, lengths: list[float], count: int = 32) -> tuple[Snapshots, dict[float, torch.Tensor]]:
    """Snapshots of a random walk of weights by PowerEMA, and the averages of six lengths by their own recursions."""
    net, ema = network(), PowerEMA(lengths, snapshots=count)
    kept = [(one, one.average_of(net)) for one in (ema, *ema.others())]
    lengths = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
    true = {length: (PowerEMA([length]), PowerEMA([length]).average_of(net)) for length in lengths}
    for step in walk(net, STEPS):
        for one, average in [*kept, *true.values()]:
            one.update(average, net, step)
        if ema.snapshot_is_due(step, STEPS):
            path = tmp_path / f"averages/step_{step:08d}.pt"
            write_averages(path, {one.lengths[0]: average.state_dict() for one, average in kept})
    names = [name for name, _ in net.named_parameters()]
    files = RunFolder(tmp_path).averages()
    assert len(files) == count and RunFolder.step_of(files[-1]) == STEPS
    return snapshots_of(files), {length: flat(average) for length, (_, average) in true.items()} | {0.0: names}


def test_any_length_is_near_the_average_that_was_not_tracked(tmp_path):
    """Relative errors of the weights of a random walk, and of the profile, 32 snapshots of .05 and .1."""
    snapshots, true = stored(tmp_path, [0.05, 0.1])
    names = true.pop(0.0)
    for length, bound, of_profile in [
        (0.03, 3e-4, 0.012), (0.05, 1e-6, 1e-8), (0.07, 3e-5, 1e-3), (0.1, 1e-6, 1e-8), (0.15, 6e-5, 3e-3), (0.2, 3e-4, 7e-3)
    ]:  # fmt: skip
        found = snapshots.average(length)
        error = torch.cat([found[name].flatten() for name in names]) - true[length]
        assert error.norm() / true[length].norm() < bound, length
        assert snapshots.error(length) < of_profile, length
    assert found["1.num_batches_tracked"] == STEPS


POWER = ["ema=power", "ema.lengths=[0.1,0.05]", "ema.snapshots=5", "schedule=constant"]


def test_a_run_stores_averages_resumes_bit_for_bit_and_is_swept_afterwards(small_run, monkeypatch, tmp_path, capsys):
    whole = small_run("x", *POWER, output="whole")
    stopped(small_run, monkeypatch, 11, *POWER)
    parts = whole.parent / "parts"
    stale = parts / "runs/x/averages/step_00000012.pt"
    stale.write_bytes(b"of a step that is taken again")
    small_run("x", "resume=true", "~callbacks.telemetry", output="parts")
    assert_equal_runs(whole, parts, "x")
    one, two = (RunFolder(folder / "runs/x").averages() for folder in (whole, parts))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 5 and not stale.exists()
    for first, second in zip(one, two, strict=True):
        a, b = read_averages(first), read_averages(second)
        assert list(a) == [0.1, 0.05] and all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])
    checkpoint = whole / "ckpts/mlp/x_last.pt"
    saved = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, saved["ema"][name]) for name, value in a[0.1].items())
    assert all(torch.equal(value, saved["ema_0.05"][name]) for name, value in a[0.05].items())
    words = [f"ckpt={checkpoint}", f"out={tmp_path / 'ema.png'}", "n=50", "device=cpu", f"cache={tmp_path / 'cache'}"]
    seen, scores_of = [], script.scores_of
    monkeypatch.setattr(
        script,
        "scores_of",
        lambda model, own: seen.append((model.config["solver"]["steps"], weights_of(model))) or scores_of(model, own),
    )
    assert script.main([*words, "solver.steps=3", "lengths=0.05", f"save={tmp_path / 'short.pt'}"]) == 0
    said = capsys.readouterr().out
    assert "length 0.05" in said and "eval/energy_distance" in said and (tmp_path / "ema.png").stat().st_size > 5000
    assert seen[0][0] == 3
    for found in (seen[0][1], weights_of(load(tmp_path / "short.pt", "cpu"))):
        torch.testing.assert_close(found, torch.cat([value.flatten() for value in saved["ema_0.05"].values()]))
    steps = [RunFolder.step_of(path) for path in one]
    for weights in (checkpoint, whole / "runs/x/model.safetensors"):
        assert script.stored_with(weights, SimpleNamespace(config={"run_name": "x"}, step=steps[2])).steps[-1] == steps[2]


def weights_of(model) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.objective.network.state_dict().values()])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lengths=0.5"], "lengths takes a list of numbers from 0.005 to 0.28, not [0.5]"),
        (["lengths=0.1,long"], "lengths takes a list of numbers from 0.005 to 0.28, not [0.1, 'long']"),
        (["out=x.jpg"], "must end in .png"),
        (["save=x.pt"], "holds one length"),
        (["save={ckpt}", "lengths=0.1"], "exists already, and no weights are replaced"),
        ([], "train the run with ema=power"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(words, sentence, shared_run, capsys, tmp_path):
    checkpoint = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
    before = checkpoint.read_bytes()
    words = [word.format(ckpt=checkpoint) for word in words]
    assert script.main([f"ckpt={checkpoint}", f"out={tmp_path / 'x.png'}", *words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1 and checkpoint.read_bytes() == before


@pytest.mark.parametrize("length", [0.005, 0.28])
def test_the_longest_and_the_shortest_average_come_back(tmp_path, length):
    write_averages(tmp_path / "step_00000001.pt", {length: {"w": torch.ones(1)}})
    assert read_averages(tmp_path / "step_00000001.pt") == {length: {"w": torch.ones(1)}}


@pytest.mark.parametrize("hostile", ["pipe", "link out"])
def test_averages_that_are_no_files_of_the_run_are_one_sentence(hostile, small_run, capsys, tmp_path):
    folder = small_run("x", "max_steps=2", *POWER)
    (path,) = (folder / "runs/x/averages").glob("*2.pt")
    if hostile == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.rename(tmp_path / "elsewhere.pt")
        path.symlink_to(tmp_path / "elsewhere.pt")
    assert script.main([f"ckpt={folder / 'ckpts/mlp/x_last.pt'}", f"out={tmp_path / 'x.png'}"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and path.name in said and not (tmp_path / "x.png").exists()


def test_an_average_that_is_damaged_or_was_never_kept_is_said(small_run, tmp_path):
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read as averages"):
        read_averages(path)
    weights = {"w": torch.ones(2)}
    torch.save({"averages": {0.1: weights}, "digest": "of others"}, path)
    with pytest.raises(UserError, match="cannot be read as averages"):
        read_averages(path)
    for payload in ({}, {"averages": {"long": weights}}, {"averages": {-0.1: weights}}, {"averages": {0.1: {"w": 1.0}}}):
        write_checkpoint(path, payload)
        with pytest.raises(UserError, match="cannot be read as averages"):
            read_averages(path)
    with pytest.raises(UserError, match="names one length twice"):
        PowerEMA([0.05, 0.05])
    small_run("x", "max_steps=2", "epochs=1")
    with pytest.raises(UserError, match=r"holds no average of ema.lengths=0.05; leave ema"):
        small_run("x", "resume=force", "epochs=2", "max_steps=null", *POWER)

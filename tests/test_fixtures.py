"""A small run of each recipe, as earlier code left it (dev/identity.py --fixtures), loads, goes on and is sampled."""

import shutil
from pathlib import Path

import pytest
import torch

import launcher
from common.command_line import front
from dev import identity
from evaluation.sample import load
from run_files.run_folder import RunFolder

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def identify(words: list[str]) -> int:
    return front(words, None, identity.carry_out)


def places(folder: Path) -> tuple[str, str]:
    return f"output_dir={folder}", f"log.file={folder / 'L.md'}"


def check(folder: Path, name: str) -> None:
    """Resume the run in `folder` by one step, then load it and sample it, or hold a classifier to its accuracy."""
    before = RunFolder(folder / "runs" / name).status.read()
    result = launcher.run(f"run_name={name}", "resume=true", "max_steps=3", *places(folder))
    status = RunFolder(folder / "runs" / name).status.read()
    assert (before["step"], status["step"], result.state) == (2, 3, "finished")
    assert result.checkpoint is not None
    if name.endswith("classifier"):
        assert 0 <= result.scores["eval/accuracy"] <= 1
        return
    model = load(result.checkpoint)
    samples = model.sample(3, seed=0)
    assert samples.shape[1:] == tuple(model.config["dataloaders"]["state_shape"]) and bool(torch.isfinite(samples).all())


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("*")))
def test_a_run_of_an_earlier_version_loads_goes_on_and_is_sampled(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / name)
    check(tmp_path / name, name)


@pytest.mark.slow
@pytest.mark.process
def test_what_is_made_today_is_such_a_run(tmp_path: Path) -> None:
    made = tmp_path / "fixtures"
    assert identify(["--fixtures", str(made), "--only", "finetunable_flow"]) == 0
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 100_000
    check(made / "finetunable_flow", "finetunable_flow")
    assert identify(["--fixtures", str(made), "--only", "finetunable_flow"]) == 1


def test_the_same_run_is_identical_and_a_changed_one_different(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "before.json"
    monkeypatch.setattr(identity, "train", lambda words, place: launcher.run(*words, *places(place)))
    monkeypatch.setattr(identity, "RUNS", {"tiny": "dataloaders=gaussian max_steps=2 evaluation=loss_only model.width=8"})
    assert identify(["--write", str(file)]) == identify(["--compare", str(file)]) == 0
    monkeypatch.setitem(identity.RUNS, "tiny", identity.RUNS["tiny"] + " seed=1")
    assert identify(["--compare", str(file)]) == 1
    said = capsys.readouterr().out
    assert "tiny: identical" in said and "tiny: different: network, ema, metrics" in said
    assert identify(["--compare", str(tmp_path / "none")]) == 1

"""The house: folders resolve to this checkout, every configuration composes and builds, the rules of the house hold."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from training.assemble import build_objective
from training.build import build
from training.config import compose_config, groups, resolved

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("backends", "dataloaders", "evaluation", "losses", "models", "scripts", "solvers", "training", "visualizers")
IMAGE_SETS, META_ABOVE = ("digits",), 20_000_000


@pytest.mark.parametrize("name", [*FOLDERS, "launcher", "train"])
def test_no_installed_package_hides_a_folder_of_ours(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or [str(spec.origin)]]
    assert all(place.resolve().is_relative_to(ROOT) for place in places)


def test_house_rules():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")] + [
        ROOT / "launcher.py",
        ROOT / "train.py",
    ]
    assert not list(ROOT.glob("*/**/__init__.py")) or all(".venv" in str(path) for path in ROOT.glob("*/**/__init__.py"))
    for path in files:
        text = path.read_text()
        assert not re.search(r"\bhasattr\(|os\.path\.|import Protocol", text), path
        assert path.name == "trackers.py" or not re.search(r"except( Exception)?:", text), path


def companions(group: str, choice: str, tmp_path: Path) -> list[str]:
    """Overrides that a choice cannot do without."""
    if group == "dataloaders" and choice == "array":
        import numpy as np

        np.save(tmp_path / "x.npy", np.zeros((20, 2), dtype="float32"))
        return [f"dataloaders.path={tmp_path / 'x.npy'}"]
    if (group, choice) in [("dataloaders", name) for name in IMAGE_SETS]:
        return ["model=cnn"]
    if group == "model":
        try:
            resolved(compose_config(["run_name=x", f"model={choice}"]))
        except Exception:
            return [f"dataloaders={IMAGE_SETS[0]}"]
    return []


EVERY_CHOICE = [(group, choice) for group, choices in groups().items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), EVERY_CHOICE, ids=[f"{g}={c}" for g, c in EVERY_CHOICE])
def test_every_choice_composes_and_builds(group, choice, tmp_path):
    overrides = ["run_name=x", f"{group}={choice}", *companions(group, choice, tmp_path)]
    config = resolved(compose_config(overrides))
    with torch.device("meta"):
        large = build(config["model"]).parameter_count() > META_ABOVE
    if not large:
        build_objective(config, torch.device("cpu"))
    for part in ("dataloaders", "source", "solver", "schedule", "ema", "evaluation", "backend"):
        build(config[part])
    for callback in config["callbacks"].values():
        build(callback)
    text = (ROOT / "configs" / group / f"{choice}.yaml").read_text()
    assert re.search(r"^# python launcher.py ", text, re.MULTILINE), "each file shows a command that uses it"


DATA = groups()["dataloaders"]


@pytest.mark.parametrize("dataset", DATA)
def test_every_dataset_trains_two_steps_and_is_sampled(dataset, small_run, tmp_path):
    extra = companions("dataloaders", dataset, tmp_path)
    words = [f"dataloaders={dataset}", *extra, "max_steps=2"]
    if dataset == "array":
        words.append("dataloaders.epoch_size=null")
    if dataset in IMAGE_SETS:
        words = [*extra, "dataloaders=digits", "dataloaders.epoch_size=1438", "max_steps=2"]
    folder = small_run("x", *words)
    assert (folder / "runs/x/status.json").exists()

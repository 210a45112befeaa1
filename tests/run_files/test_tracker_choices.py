"""Which tracker a run has, and what a choice needs."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from run_files.trackers import GuardedTracker, NullTracker, TensorboardTracker, Tracker, WandbTracker, tracker_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(TensorboardTracker, "torch.utils.tensorboard", "tensorboard"), (WandbTracker, "wandb", "wandb")],
)
def test_missing_package_names_its_extra(
    make: Callable[[], Tracker], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"uv sync --extra {extra}"):
        GuardedTracker(make()).start("x", {}, tmp_path, None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tracker").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_tracker_config_builds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    assert text.startswith("# @package trackio\n# python launcher.py ")
    assert isinstance(tracker_from_config(settings), GuardedTracker)
    assert isinstance(tracker_from_config(settings | {"enabled": False}), NullTracker)

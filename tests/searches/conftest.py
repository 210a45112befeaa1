"""Searches whose runs are faked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from searches import search as module
from searches.plan import Plan, plan_of
from tests.searches.fake_runs import SPACE, FakeRuns


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(module, "started", fake.start)
    monkeypatch.setattr(module, "PAUSE", 0)
    return fake


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """planned(*words, folder="a"): the plan of a search of SPACE in that folder; a word of one of its keys replaces it."""

    def plan(*words: str, folder: str = "a", name: str = "s") -> Plan:
        keys = {word.partition("=")[0] for word in words}
        space = [word for word in SPACE if word.partition("=")[0] not in keys] if "space=own" not in words else []
        said = [word for word in words if word != "space=own"]
        return plan_of([f"run_name={name}", f"output_dir={tmp_path / folder}", "metric=eval/loss", *said, *space])

    return plan

"""The device contract as CUDA and as MPS: every case of contract.py, in one process for each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.emulated.disguise import ROOT
from tests.emulated.rules import TESTED

VERSION = ".".join(torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(
        VERSION not in TESTED, reason=f"the emulated device is written for torch {TESTED}, this is {VERSION}"
    ),
]


KINDS = {kind: ["objectives", "models", "runs", "others", "waits", "planted"] for kind in ("cuda", "mps")}
KINDS["cuda"] += ["tf32", "gpu"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """answers(kind): name -> what differs, of the whole contract, run once in a process."""
    place = tmp_path_factory.mktemp("cpu")

    @cache
    def of(kind: str) -> dict[str, str]:
        command = [sys.executable, "-W", "ignore", "-m", "tests.emulated.contract", kind, str(place)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))

    return of


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in KINDS.items() for part in parts])
def test_a_run_on_the_device_is_the_run_on_the_cpu(kind: str, part: str, answers: Callable[[str], dict[str, str]]) -> None:
    """tf32: differences and adaptive steps compute without it; gpu: the benchmark for a new device runs to its end."""
    found = {name: answer for name, answer in answers(kind).items() if name.startswith(f"{part}: ")}
    assert found and not {name: answer for name, answer in found.items() if answer}

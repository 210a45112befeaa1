"""The device contract as CUDA and as MPS: every case of contract.py, in one process for each."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.emulated.device import TESTED
from tests.emulated.disguise import ROOT

VERSION = ".".join(torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(
        VERSION not in TESTED, reason=f"the emulated device is written for torch {TESTED}, this is {VERSION}"
    ),
]


@cache
def answers(kind: str, part: str) -> dict[str, str]:
    """Return name -> what differs, of one part of the contract."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.emulated.contract", kind, part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("part", ["objectives", "models", "runs", "others", "waits", "planted"])
def test_a_run_on_the_device_is_the_run_on_the_cpu(kind: str, part: str) -> None:
    found = answers(kind, part)
    assert found and not {name: answer for name, answer in found.items() if answer}


def test_differences_and_adaptive_steps_compute_without_tf32() -> None:
    found = answers("cuda", "tf32")
    assert len(found) == 2 and not any(found.values()), found


def test_the_benchmark_for_a_new_device_runs_from_start_to_end() -> None:
    assert answers("cuda", "gpu") == {"gpu: the whole preset": ""}

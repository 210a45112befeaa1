"""Command lines that are wrong by construction, a process each; `python dev/invalid_commands.py` is the long form."""

import subprocess
import sys
from pathlib import Path

import pytest

from dev.invalid_commands import CONTRADICTIONS, EXTREMES, PARTS, drawn

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.process
def test_sixty_wrong_command_lines_are_refused_and_change_nothing():
    """The forks start from a process of their own: this one has threads."""
    command = [sys.executable, str(ROOT / "dev/invalid_commands.py"), "--count", "60", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "60 commands: 0 answered badly" in done.stdout, done.stdout + done.stderr


def test_the_commands_vary():
    words = [" ".join(command) for command in drawn(300)]
    assert len(set(words)) == 300 and len(PARTS) > 500
    assert sum(any(" ".join(c) in word for c in CONTRADICTIONS) for word in words) > 5
    assert sum(any(extreme in word for extreme in EXTREMES) for word in words) > 3

#!/usr/bin/env python
"""Add your own words to a run's section of the experiment log.

    python scripts/log.py note first_flow "the strays sit on the separatrices"
    python scripts/log.py note first_flow "as expected" file=outputs/runs/first_flow/log.md

A note is a dated line under Observations of the run's section; what runs write and what people wrote stays as it is.
"""

import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, front
from common.errors import UserError
from common.files import require
from configuration.settings import known_settings
from run_files.experiment_log import ExperimentLog

USAGE = 'python scripts/log.py note RUN "what you saw" [file=EXPERIMENT_LOG.md]'


@dataclass(frozen=True)
class Settings:
    """The command line, note, run and words aside."""

    file: Path = ROOT / "EXPERIMENT_LOG.md"


def note(words: list[str]) -> Path:
    """Carry out the command; returns the file that was changed."""
    settings, rest = known_settings(words, Settings)
    if len(rest) != 3 or rest[0] != "note" or not rest[2].strip():
        raise UserError(f"say {USAGE}")
    require(
        settings.file, "file= names the log that a run wrote: EXPERIMENT_LOG.md with log.expect=, else log.md in its folder"
    )
    ExperimentLog(settings.file).add_note(rest[1], f"{date.today().isoformat()}: {rest[2].strip()}")
    return settings.file


def main(words: list[str]) -> int:
    return front(words, __doc__, note)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

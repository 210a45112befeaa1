#!/usr/bin/env python
"""Add your own words to a run's section of the experiment log.

    python scripts/log.py note first_flow "the strays sit on the separatrices"
    python scripts/log.py note first_flow "as expected" file=outputs/runs/first_flow/log.md

A note is a dated line under Observations of the run's section; what runs write and what people wrote stays as it is.
"""

import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import UserError
from training.experiment_log import ExperimentLog

ROOT = Path(__file__).resolve().parents[1]
USAGE = 'python scripts/log.py note RUN "what you saw" [file=EXPERIMENT_LOG.md]'


def note(words: list[str]) -> Path:
    """Carry out the command; returns the file that was changed."""
    files = [word.removeprefix("file=") for word in words if word.startswith("file=")]
    rest = [word for word in words if not word.startswith("file=")]
    if len(rest) != 3 or rest[0] != "note" or not rest[2].strip():
        raise UserError(f"say {USAGE}")
    path = Path(files[-1]) if files else ROOT / "EXPERIMENT_LOG.md"
    ExperimentLog(path).add_note(rest[1], f"{date.today().isoformat()}: {rest[2].strip()}")
    return path


def main(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        print(note(words))
    except UserError as error:
        print(f"log.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

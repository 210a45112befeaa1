"""Run dev/benchmark.py: `python scripts/benchmark.py --help`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "dev" / "benchmark.py"), run_name="__main__")

#!/usr/bin/env python
"""Kill a search and its trials again and again with SIGKILL, and compare it with a search that was left alone.

    python dev/search_kills.py                                  # 12 trials, 2 at a time, 10 kills: some minutes
    python dev/search_kills.py --sampler tpe --kills 5 --seed 1

Each kill comes at a random moment and hits the launcher or one of its trials. In the end every trial must have finished
once, and but for TPE every trial's numbers and the best one must be those of the search left alone.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, Parser, count, front
from common.errors import UserError
from dev.kill_test import SMALL, rows
from run_files.run_folder import RunFolder

NAME, METRIC = "s", "eval/loss"
SPACES = {"grid": ["optimizer.lr=choice(1e-4,1e-3,1e-2)", "model.width=choice(4,8,12,16)"]}
SPACE = ["optimizer.lr=interval(1e-4,1e-2)", "model.dropout=interval(0,0.5)", "model.width=choice(8,16)"]


def begun(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Return the process of the search below a folder."""
    space = SPACES.get(options.sampler, SPACE)
    varied = {word.partition("=")[0] for word in space}
    small = [word for word in SMALL if word.partition("=")[0] not in varied]
    search = f"run_name={NAME} n={options.trials} jobs={options.jobs} sampler={options.sampler} metric={METRIC}".split()
    place = [f"output_dir={folder}", f"log.file={folder / 'log.md'}"]
    words = [*search, *place, "epochs=3", "dataloaders.epoch_size=6400", *small, *space]
    with folder.with_suffix(".txt").open("ab") as printed:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launcher.py"), "--search", "optuna", *dict.fromkeys(words)],
            stdout=printed, stderr=printed, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def trials_at_work(folder: Path) -> list[int]:
    """Return the numbers of the processes of trials below a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended
            continue
        if f"output_dir={folder}" in words and "--search" not in words and str(ROOT / "launcher.py") in words:
            found.append(int(place.name))
    return found


def drive(folder: Path, options: argparse.Namespace) -> Counter[str]:
    """Carry out both searches; returns how many kills hit what."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, hits = random.Random(options.seed), Counter[str]()
    search = begun(folder, options)
    while hits.total() < options.kills:
        time.sleep(chance.uniform(0, options.seconds))
        if search.poll() == 0:
            raise UserError(f"the search ended after {hits.total()} kills; give fewer --kills, or fewer --seconds")
        targets = [("a trial", number) for number in trials_at_work(folder)] + [("the launcher", search.pid)]
        what, number = chance.choice(targets)
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
        hits[what] += 1
        if what == "the launcher":
            search.wait()
            search = begun(folder, options)
    if search.wait():
        raise UserError(f"the search failed after its kills: {folder.with_suffix('.txt').read_text()[-2000:]}")
    return hits


def check(killed: Path, alone: Path, options: argparse.Namespace) -> None:
    """Raise UserError for what was lost, done twice, or came out otherwise."""
    names = [f"{NAME}_{number:04d}" for number in range(options.trials)]
    for folder in (killed, alone):
        runs = map(RunFolder, (folder / "runs").iterdir())
        there = sorted(run.name for run in runs if run.status.read().get("state") == "finished")
        if there != names:
            raise UserError(f"{folder} has the finished runs {there}, not each of {options.trials} once")
    for name in names:
        steps = [row["step"] for row in rows(killed, name) if "train/loss" in row]
        if steps != sorted(set(steps)):
            raise UserError(f"{killed}/runs/{name} has steps twice")
        if options.sampler != "tpe" and rows(killed, name) != rows(alone, name):
            raise UserError(f"{killed}/runs/{name} differs from that of the search left alone")
    tables = [(folder / "searches" / NAME / "trials.csv").read_text() for folder in (killed, alone)]
    if options.sampler != "tpe" and tables[0] != tables[1]:
        raise UserError(f"the tables differ:\n{tables[0]}\n{tables[1]}")


def carry_out(words: list[str]) -> str:
    parser = Parser(description=__doc__)
    for key, value, what in (
        ("trials", 12, "of each search"), ("jobs", 2, "trials at a time"), ("kills", 10, "in all"),
        ("seed", 0, "of the moments"),
    ):  # fmt: skip
        parser.add_argument(f"--{key}", type=int if key == "seed" else count, default=value, help=what)
    parser.add_argument("--seconds", type=float, default=5, help="between kills, at most")
    parser.add_argument("--sampler", default="random", choices=["random", "tpe", "grid", "cmaes"])
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as place:
        killed, alone = Path(place) / "killed", Path(place) / "alone"
        hits = drive(killed, options)
        drive(alone, argparse.Namespace(**vars(options) | {"kills": 0}))
        check(killed, alone, options)
        best = (killed / "searches" / NAME / "trials.csv").read_text().splitlines()[1]
    hit = ", ".join(f"{count} of {what}" for what, count in hits.items())
    return f"{options.sampler}: {options.trials} trials finished, each once, in {options.kills} kills ({hit}); best {best}"


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:], None, carry_out))

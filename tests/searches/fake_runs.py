"""A search whose runs are faked: their score is a formula of their parameters, and they end at the second look."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from run_files.run_folder import RunFolder
from searches.plan import Plan
from searches.search import Search, search_of

SPACE = ["optimizer.lr=interval(1e-4,1e-2)", "model.width=choice(64,128,256)", "model.depth=interval(2,5)"]


class Crash(BaseException):
    """Stands for a SIGKILL of the launcher."""


class FakeRuns:
    """Takes the place of processes. endings: how often each run came to its end; until: the operation before which a crash
    comes, of all starts, looks and journal rows.
    """

    def __init__(self) -> None:
        self.endings, self.operations, self.until = Counter[str](), 0, -1
        self.fails: Callable[[str], bool] = lambda name: False

    def operate(self) -> None:
        self.operations += 1
        if self.operations == self.until:
            raise Crash

    def start(self, words: list[str], printed: Path, *_: object) -> "FakeRun":
        self.operate()
        return FakeRun(self, words, printed)


class FakeRun:
    def __init__(self, runs: FakeRuns, words: list[str], printed: Path) -> None:
        self.runs, self.words, self.printed, self.looks = runs, words, printed, 0

    def poll(self) -> int | None:
        self.runs.operate()
        self.looks += 1
        if self.looks < 2:
            return None
        said = dict(word.split("=", 1) for word in self.words)
        name = said["run_name"].strip("'")
        folder = RunFolder(Path(said["output_dir"]) / "runs" / name)
        own = [word for word in self.words if not re.match("(resume|overwrite)=", word)]
        folder.write_config(yaml.dump({"overrides": own}), own)
        if self.runs.fails(name):
            self.printed.write_text("launcher.py: it diverged\n")
            folder.status.write("failed", 3, 0, 1.0, why="it diverged")
            return 1
        lr, depth = float(said.get("optimizer.lr", 1e-3)), float(said.get("model.depth", 3))
        scores = {"eval/loss": (lr - 2e-3) ** 2 * 1e4 + (depth - 3) ** 2 / 10}
        folder.metrics.append(10, 1, 1.0, scores)
        folder.metrics.close()
        folder.status.write("finished", 10, 1, 1.0, scores)
        self.runs.endings[name] += 1
        return 0

    def send_signal(self, number: int) -> None:
        """Nothing: it is no process."""

    def wait(self) -> int:
        return 0


def moved(plan: Plan, folder: str) -> Plan:
    """Return the same search in another folder."""
    place = plan.folder.parents[2] / folder
    words = tuple(f"output_dir={place}" if word.startswith("output_dir=") else word for word in plan.words)
    return replace(plan, words=words, config=plan.config | {"output_dir": str(place)})


def carried_out(plan: Plan) -> Search:
    """Carry out a search to its end."""
    with search_of(plan) as search:
        search.carry_out()
    return search

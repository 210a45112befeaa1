#!/usr/bin/env python
"""Trains every objective on every data set with several seeds, and writes the tables that compare them.

    python scripts/leaderboard.py                                        # all of configs/leaderboard.yaml; again: goes on
    python scripts/leaderboard.py only=meanflow,mse data=kmeans seeds=0 jobs=1
    python scripts/leaderboard.py table=only                             # the tables of what has finished
    python scripts/leaderboard.py redo=true                              # train anew what the settings no longer match
    python scripts/leaderboard.py output_dir=/tmp/trial -- max_steps=100 # a trial with further launcher words for every run

Finished runs are skipped, begun ones go on, failed ones start again; Ctrl-C lets the runs at work save. A run is stale when
its words, or the settings they stand for, are no longer those of the table, or when the run it starts from was trained again
since: it is named, left alone and kept out of the means, until redo=true moves it aside and trains it anew.

only=, data= and seeds= choose what is trained; the tables always show everything. They go into docs/leaderboard.md
(short), EXPERIMENT_LOG.md (in full) and <output_dir>/leaderboard.json; a trial (words after --) is printed instead of the
first two.

Keys: only, data, seeds (comma-separated), jobs, table (true, false, only), redo, output_dir (outputs), config
(configs/leaderboard.yaml), page, log. What each run says is in <output_dir>/leaderboard/<run_name>.log.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from common.errors import UserError
from common.files import write_atomically
from configuration.compose import compose_config, groups, nearest, resolved
from configuration.overrides import differences, flat
from configuration.values import NEUTRAL
from evaluation.leaderboard_table import (
    ENERGY,
    SECONDS,
    Results,
    Row,
    as_json,
    full_text,
    short_text,
    solver_evaluations,
    write_between,
)
from run_files.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
# Settings that neither change what a run learns nor how it is scored.
MEANINGLESS = {*NEUTRAL, "run_name", "seed", "evaluation.samples"}


@dataclass(frozen=True)
class Entry:
    """One run of the table. words: all its launcher words; needs: names of the runs whose checkpoints are among them."""

    objective: str
    dataset: str
    seed: int
    words: tuple[str, ...]
    needs: tuple[str, ...]
    output_dir: Path

    @property
    def name(self) -> str:
        return f"leaderboard_{self.objective}_{self.dataset}_seed={self.seed}"

    @property
    def title(self) -> str:
        return f"{self.objective} {self.dataset} seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.output_dir / "runs" / self.name)

    @property
    def said(self) -> Path:
        """Return what its process printed."""
        return self.output_dir / "leaderboard" / f"{self.name}.log"

    @property
    def facts(self) -> Path:
        """Return where and with what it was trained."""
        return self.said.with_suffix(".json")


@dataclass(frozen=True)
class Board:
    """configs/leaderboard.yaml, read and checked. objectives: name -> launcher words."""

    jobs: int
    seeds: list[int]
    datasets: list[str]
    common: list[str]
    objectives: dict[str, list[str]]


@dataclass
class Options:
    """The command line."""

    only: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    jobs: int = 0
    table: str = "true"
    redo: bool = False
    output_dir: Path = Path("outputs")
    config: Path = ROOT / "configs/leaderboard.yaml"
    page: Path = ROOT / "docs/leaderboard.md"
    log: Path = ROOT / "EXPERIMENT_LOG.md"
    extra: list[str] = field(default_factory=list)


# ---- the command line and the table of runs


def read_words(words: list[str]) -> Options:
    """Return the options of a command line. UserError for a word that is none."""
    split = words.index("--") if "--" in words else len(words)
    options = Options(extra=words[split + 1 :])
    known = [name for name in vars(options) if name != "extra"]
    for word in words[:split]:
        key, equals, value = word.partition("=")
        key = "page" if key == "readme" else key  # its name while the tables stood in the README
        if key not in known or not value:
            raise UserError(
                f"cannot use {word!r}{nearest(key, known) if equals else ''}; the keys are {', '.join(known)}, as "
                "key=value, and launcher words for every run come after --"
            )
        setattr(options, key, read_value(key, value, vars(options)[key]))
    return options


def read_value(key: str, text: str, default: object) -> object:
    """Return the value of one option, of its default's kind. UserError for another."""
    if isinstance(default, list):
        return [part for part in text.split(",") if part]
    if isinstance(default, Path):
        return Path(text)
    if key == "jobs":
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"jobs takes a whole number of at least 1, not {text!r}")
        return int(text)
    choices = ("true", "false", "only") if key == "table" else ("true", "false")
    if text not in choices:
        raise UserError(f"{key} takes {', '.join(choices[:-1])} or {choices[-1]}, not {text!r}")
    return text if key == "table" else text == "true"


def read_board(path: Path) -> Board:
    """Return the table of runs. UserError for a file that is not there or not such a table."""
    if not path.is_file():
        raise UserError(f"config={path} is not a file; leave it out for configs/leaderboard.yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    kinds = {"jobs": int, "seeds": list, "datasets": list, "common": str, "objectives": dict}
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind) or not found[key]:
            raise UserError(f"{path} needs {', '.join(kinds)}; {key} is missing, empty or not of its kind")
    objectives = {str(name): shlex.split(str(words)) for name, words in found["objectives"].items()}
    board = Board(found["jobs"], found["seeds"], found["datasets"], shlex.split(found["common"]), objectives)
    for dataset in board.datasets:
        chosen("dataloaders", [str(dataset)], groups()["dataloaders"])
    return board


def chosen(key: str, asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return what was asked for, all that is known when nothing was. UserError for a word that is not known."""
    for word in asked:
        if word not in known:
            raise UserError(f"{key}={word} is not in the table{nearest(word, list(known))}; it has {', '.join(known)}")
    return list(asked or known)


def entries_of(board: Board, options: Options) -> dict[str, Entry]:
    """Return every run by name, in the order they are trained: all of one seed first, what others need before them.

    UserError when a placeholder names no objective higher up.
    """
    entries: dict[str, Entry] = {}
    for seed in board.seeds:
        for dataset in board.datasets:
            for objective in board.objectives:
                entry = entry_of(board, options, objective, dataset, seed)
                entries[entry.name] = entry
    return entries


def entry_of(board: Board, options: Options, objective: str, dataset: str, seed: int) -> Entry:
    """Return one run, its placeholders replaced by the checkpoints they stand for."""
    needs: list[str] = []
    higher = list(board.objectives)[: list(board.objectives).index(objective)]

    def checkpoint(match: re.Match[str]) -> str:
        if match[1] not in higher:
            raise UserError(f"{{{match[1]}}} in the words of {objective} names no objective higher up in {options.config}")
        teacher = entry_of(board, options, match[1], dataset, seed)
        needs.append(teacher.name)
        arch = settings_of(teacher)["choices"]["model"]
        return f"'{options.output_dir / 'ckpts' / arch / f'{teacher.name}_last.pt'}'"

    own = [re.sub(r"\{(\w+)\}", checkpoint, word) for word in board.objectives[objective]]
    fixed = [f"dataloaders={dataset}", f"seed={seed}", f"output_dir={options.output_dir}"]
    entry = Entry(objective, dataset, seed, (*board.common, *own, *fixed, *options.extra), tuple(needs), options.output_dir)
    return Entry(objective, dataset, seed, (f"run_name={entry.name}", *entry.words), entry.needs, entry.output_dir)


def settings_of(entry: Entry) -> dict[str, Any]:
    """Return what the words of a run compose to, its name and seed aside. UserError for words that compose to nothing."""
    try:
        return composed(tuple(word for word in entry.words if not word.startswith(("run_name=", "seed="))))
    except UserError as error:
        raise UserError(f"{entry.objective} on {entry.dataset}: {error}") from error


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    return resolved(compose_config(["run_name=x", *words]))


# ---- what has been done


def by_key(words: Sequence[str]) -> dict[str, str]:
    """Return words by what they set; how a run was begun and where it lies are no matter."""
    pairs = (word.replace("'", "").partition("=") for word in words)
    return {key: value for key, _, value in pairs if key not in ("resume", "overwrite", "output_dir")}


def why_stale(entry: Entry, entries: dict[str, Entry]) -> str | None:
    """Why the run that bears this name is not the one the table asks for; None when it is."""
    stored = entry.folder.read_config()
    before, now = by_key(stored.get("overrides", [])), by_key(entry.words)
    for key, (old, new) in differences(before, now).items():
        return f"{key} was {old or 'not given'} and is now {new or 'not given'}"
    old_leaves, new_leaves = flat(stored), flat(settings_of(entry))
    for key in old_leaves:
        matters = not MEANINGLESS & {key, key.split(".")[0]} and key not in now
        if matters and key in new_leaves and old_leaves[key] != new_leaves[key]:
            return f"{key}, not among its words, was {old_leaves[key]!r} and is now {new_leaves[key]!r}"
    for need in entry.needs:
        made = entries[need].folder.status.read().get("updated")
        if made and datetime.fromisoformat(made) > datetime.fromisoformat(entry.folder.status.read()["started"]):
            return f"{need}, which it starts from, was trained again since"
    return None


def condition(entry: Entry, entries: dict[str, Entry]) -> str:
    """Return missing, begun, failed, finished, or stale."""
    status = entry.folder.status.read()
    if not entry.folder.config_path.is_file() or not status:
        return "missing"
    if why_stale(entry, entries) is not None:
        return "stale"
    return {"finished": "finished", "failed": "failed"}.get(status["state"], "begun")


def to_train(board: Board, entries: dict[str, Entry], options: Options) -> tuple[list[Entry], int]:
    """Return the runs to carry out, with those they need, and how many of the chosen are not to be, being stale."""
    objectives = chosen("only", options.only, list(board.objectives))
    datasets = chosen("data", options.data, board.datasets)
    seeds = chosen("seeds", options.seeds, list(map(str, board.seeds)))
    wanted = {
        e.name for e in entries.values() if e.objective in objectives and e.dataset in datasets and str(e.seed) in seeds
    }
    queue, left = {}, 0
    for entry in reversed(entries.values()):
        if entry.name not in wanted:
            continue
        state = condition(entry, entries)
        if state == "stale" and not options.redo:
            print(f"{entry.title} is stale: {why_stale(entry, entries)}; redo=true trains it anew")
            left += 1
        elif state != "finished":
            queue[entry.name] = entry
            wanted |= set(entry.needs)
    followers = [e.name for e in entries.values() if e.name in wanted and options.redo and set(e.needs) & set(queue)]
    return [entries[name] for name in entries if name in queue or name in followers], left


# ---- training


class Crew:
    """Carries out runs side by side, each a process of its own. failed: names of those that came to nothing."""

    def __init__(self, entries: dict[str, Entry], jobs: int):
        self.entries, self.jobs = entries, jobs
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.live: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []
        self.done = self.total = 0

    def carry_out(self, queue: list[Entry]) -> None:
        """All of them; KeyboardInterrupt after a signal, once the runs at work have saved."""
        self.total, waiting = len(queue), list(queue)
        try:
            while waiting or self.live:
                for entry in [entry for entry in waiting if not self.held_up(entry, waiting)]:
                    if len(self.live) < self.jobs:
                        waiting.remove(entry)
                        self.begin(entry)
                for name in [name for name, process in self.live.items() if process.poll() is not None]:
                    self.end(self.entries[name], self.live.pop(name).returncode)
                time.sleep(0.1)
        except KeyboardInterrupt:
            self.stop()
            raise

    def held_up(self, entry: Entry, waiting: list[Entry]) -> bool:
        """Whether a run that this one needs is still to end."""
        return any(need in self.live or self.entries[need] in waiting for need in entry.needs)

    def begin(self, entry: Entry) -> None:
        """Start the run's process, or report what it lacks."""
        lacking = [need for need in entry.needs if condition(self.entries[need], self.entries) != "finished"]
        if lacking:
            self.report(entry, f"FAILED: it needs {lacking[0]}, which is not finished", failed=True)
            return
        state = condition(entry, self.entries)
        how = {"begun": ["resume=true"], "missing": []}.get(state, ["overwrite=true"])
        entry.said.parent.mkdir(parents=True, exist_ok=True)
        if state != "begun":
            write_atomically(entry.facts, json.dumps({"hardware": self.hardware(), "torch": version("torch")}) + "\n")
        with entry.said.open("ab" if state == "begun" else "wb") as said:
            # A session of its own: Ctrl-C reaches this process alone, which asks each run to stop once.
            self.live[entry.name] = subprocess.Popen(
                [sys.executable, str(ROOT / "launcher.py"), *entry.words, *how],
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )  # fmt: skip

    def hardware(self) -> str:
        cores, threads = os.cpu_count() or 1, self.threads
        return f"{cores} CPU core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)} a run, {self.jobs} at a time"

    def end(self, entry: Entry, status: int) -> None:
        """Report a run whose process has ended."""
        if status or entry.folder.status.read().get("state") != "finished":
            lines = entry.said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.report(entry, f"FAILED: {lines[-1] if lines else f'status {status}'} ({entry.said})", failed=True)
            return
        scores = scores_of(entry)
        one_step = scores.get(f"{ENERGY}_1nfe")
        told = "not given" if one_step is None else f"{one_step:.4f}"
        self.report(entry, f"{scores.get(SECONDS, math.nan):.0f} s, one-step energy distance {told}")

    def report(self, entry: Entry, words: str, failed: bool = False) -> None:
        self.done += 1
        self.failed += [entry.name] * failed
        print(f"{self.done} of {self.total}  {entry.title}: {words}", flush=True)

    def stop(self) -> None:
        """Ask the runs at work to save, and wait until they have."""
        if self.live:
            print(f"waiting for {len(self.live)} run(s) to save", file=sys.stderr, flush=True)
        for process in self.live.values():
            process.send_signal(signal.SIGTERM)  # SIGINT is ignored by children of a background shell until they train
        for process in self.live.values():
            process.wait()


# ---- the tables


def scores_of(entry: Entry) -> dict[str, float]:
    """Return the last scores of a finished run, what was not a number left out, and the seconds it trained."""
    known = entry.folder.status.read().get("scores", {})
    rows = entry.folder.metrics.read()
    judged = sum(row.get("eval/seconds") or 0.0 for row in rows)
    seconds = {SECONDS: rows[-1]["elapsed_seconds"] - judged} if rows else {}
    return {name: float(value) for name, value in known.items() if value is not None} | seconds


def collect(board: Board, entries: dict[str, Entry]) -> tuple[Results, list[Entry]]:
    """Return every row of every data set, from the files of the runs, and the runs whose scores are in them."""
    done: list[Entry] = []
    results: Results = {d: {o: Row([], len(board.seeds)) for o in board.objectives} for d in board.datasets}
    for entry in entries.values():
        row, state = results[entry.dataset][entry.objective], condition(entry, entries)
        row.failed += state == "failed"
        row.stale += state == "stale"
        if state == "finished":
            row.scores.append(scores_of(entry))
            done.append(entry)
    return results, done


def caption(board: Board, entries: dict[str, Entry], results: Results, done: list[Entry], options: Options) -> str:
    """Return what the figures are, where they were made, and the command that makes them again."""
    chosen = [f"{key}={','.join(vars(options)[key])}" for key in ("only", "data", "seeds") if vars(options)[key]]
    chosen += [] if options.output_dir == Path("outputs") else [f"output_dir={options.output_dir}"]
    command = shlex.join(["python", "scripts/leaderboard.py", *chosen, *(["--", *options.extra] if options.extra else [])])
    if not done:
        return f"No run has finished yet: `{command}` trains them."
    settings = settings_of(done[0])
    points = settings["evaluation"]["metrics"].get("wasserstein", {}).get("points", 0)
    seeds = f"{len(board.seeds)} seeds: mean ± standard error over them" if len(board.seeds) > 1 else "1 seed"
    euler = ", ".join(objective for objective in board.objectives if not learns_flow_map(entries, objective))
    steps = "by the flow map in equal steps" + (f" (Euler steps for {euler})" if euler else "")
    samples, solver = settings["evaluation"]["final_samples"], settings["choices"]["solver"]
    return (
        f"{provenance(done)}; {seeds}. {samples:,} samples a run (W2: exact, of {min(points, samples):,}). The numbers "
        f"after the scores are evaluations a sample: 1, 2 and 4 {steps}, {solver_evaluations(results)} by the solver "
        f"{solver}. Floor: real data against real, mean ± standard deviation over replicates; of the flow-map error: the "
        "solver on the exact field; - where the truth is not known. Bold: the best in one evaluation. Training seconds: the "
        "fastest seed, without imports and evaluation; reflow's with the making of its pairs, without its teacher. "
        f"`{command}`, settings in configs/{options.config.name}."
    )


def provenance(done: list[Entry]) -> str:
    """Return the hardware, days and torch versions that runs were made with."""
    facts = [json.loads(entry.facts.read_text(encoding="utf-8")) for entry in done if entry.facts.is_file()]
    hardware = "; ".join(dict.fromkeys(fact["hardware"] for fact in facts)) or "hardware not recorded"
    torch_versions = " and ".join(dict.fromkeys(fact["torch"] for fact in facts)) or "not recorded"
    days = sorted(entry.folder.status.read()["updated"][:10] for entry in done)
    return f"{hardware}, {' to '.join(dict.fromkeys([days[0], days[-1]]))}, torch {torch_versions}"


def learns_flow_map(entries: dict[str, Entry], objective: str) -> bool:
    """Whether the objective teaches its network maps across time."""
    from hydra.utils import get_class

    entry = next(entry for entry in entries.values() if entry.objective == objective)
    return bool(get_class(settings_of(entry)["loss"]["_target_"]).learns_flow_map)  # type: ignore[attr-defined]


def table(board: Board, entries: dict[str, Entry], options: Options) -> None:
    """Write, or for a trial print, the tables of everything that has finished."""
    results, done = collect(board, entries)
    told = caption(board, entries, results, done, options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output_dir / "leaderboard.json", as_json(results, told))
    if options.extra:
        print(full_text(results, told))
        return
    write_between(options.log, full_text(results, told))
    write_between(options.page, short_text(results, told))
    print(f"tables in {options.page}, {options.log} and {options.output_dir / 'leaderboard.json'}")
    print(f"python visualizers/leaderboard.py log={options.log} out=docs/leaderboard.png  draws them")


def leaderboard(words: list[str]) -> int:
    """Carry out the command; the exit status is 1 when a run failed."""
    options = read_words(words)
    board = read_board(options.config)
    entries = entries_of(board, options)
    queue, stale = to_train(board, entries, options)
    failed: list[str] = []
    if options.table != "only":
        for entry in queue:
            settings_of(entry)  # a mistake is said before the first run
        print(f"{len(queue)} run(s) to carry out" + (f", {stale} stale ones left alone" if stale else ""), flush=True)
        crew = Crew(entries, options.jobs or board.jobs)
        crew.carry_out(queue)
        failed = crew.failed
    if options.table != "false":
        table(board, entries, options)
    if failed:
        print(f"leaderboard.py: {len(failed)} run(s) failed, see above; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(words: list[str]) -> int:
    """Return the exit status: 0, 1 for a mistake or failed runs, 130 when stopped."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a background shell has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        return leaderboard(words)
    except UserError as error:
        print(f"leaderboard.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("leaderboard.py: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Trains every objective on every data set with several seeds, and writes the tables that compare them.

    python scripts/leaderboard.py                                        # all of configs/leaderboard.yaml; again: goes on
    python scripts/leaderboard.py only=meanflow,mse data=kmeans seeds=0 jobs=1
    python scripts/leaderboard.py table=only                             # the tables of what has finished
    python scripts/leaderboard.py redo=true                              # train again what the settings no longer match
    python scripts/leaderboard.py output_dir=/tmp/trial -- max_steps=100 # a trial with further launcher words for every run
    python scripts/leaderboard.py teacher=exact data=kmeans seeds=0      # own loss against loss.teacher=exact

Finished runs are skipped, begun ones go on, failed ones start again, and those that another process trains are waited for;
Ctrl-C lets the runs at work save. After each run it says about how long the others will take. A run is stale when
its words, or the settings they stand for, are no longer those of the table, or when the run it starts from was trained again
since: it is named, left alone and kept out of the means, until redo=true moves it aside and trains it again.

only=, data= and seeds= choose what is trained; the tables always show everything. They go into docs/leaderboard.md
(short), EXPERIMENT_LOG.md (in full) and <output_dir>/leaderboard.json. While runs are missing, and for a trial (words after
--), they are printed instead of the first two; page= and log= name other files.

teacher=exact trains what learns a map twice, on v_c and on the exact velocity, and writes a table of its own, of what only=,
data= and seeds= choose; runs of the other tables are taken over.

Keys: only, data, seeds (comma-separated), jobs, table (true, false, only), redo, teacher (exact), output_dir (outputs),
config (configs/leaderboard.yaml), page, log. What each run says is in <output_dir>/leaderboard/<run_name>.log.
"""

import json
import shlex
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, front
from common.files import write_atomically
from common.ranges import Range
from configuration.settings import read_settings
from evaluation.leaderboard_table import (
    TAUGHT_MARKS,
    Results,
    Row,
    as_json,
    full_text,
    seeds_in_words,
    short_text,
    solver_evaluations,
    taught_text,
    write_between,
)
from scripts.job_pool import JobPool
from scripts.leaderboard_runs import Board, Entry, chosen, read_board, with_teachers


@dataclass(frozen=True)
class Options:
    """The command line before --."""

    only: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    jobs: Annotated[int | None, Range(1)] = None
    table: Literal["true", "false", "only"] = "true"
    redo: bool = False
    teacher: Literal["exact"] | None = None
    output_dir: Path = Path("outputs")
    config: Path = ROOT / "configs/leaderboard.yaml"
    page: Path = ROOT / "docs/leaderboard.md"
    log: Path = ROOT / "EXPERIMENT_LOG.md"


def read_words(words: list[str]) -> tuple[Options, list[str]]:
    """Return the options of a command line, and the launcher words after --. UserError for a word that is none."""
    end = words.index("--") if "--" in words else len(words)
    own = [f"page={word[7:]}" if word.startswith("readme=") else word for word in words[:end]]  # the older name
    options, _ = read_settings(own, Options, others=", and launcher words for every run come after --")
    return options, words[end + 1 :]


def to_train(board: Board, entries: list[Entry], options: Options) -> tuple[list[Entry], int]:
    """Return the runs to carry out, with those they need, and how many of the chosen are not to be, being stale."""
    objectives = chosen("only", options.only, list(board.objectives))
    datasets = chosen("data", options.data, board.datasets)
    seeds = chosen("seeds", options.seeds, list(map(str, board.every_seed)))
    wanted = {e for e in entries if e.objective in objectives and e.dataset in datasets and str(e.seed) in seeds}
    queue, left = set[Entry](), 0
    for entry in reversed(entries):  # those that need others first
        state = entry.condition() if entry in wanted else "finished"
        if state == "stale" and not options.redo:
            print(f"{entry.title} is stale: {entry.why_stale()}; redo=true trains it again")
            left += 1
        elif state != "finished":
            queue.add(entry)
            wanted |= set(entry.needs)
    if options.redo:
        queue |= {entry for entry in wanted if queue & set(entry.needs)}
    return [entry for entry in entries if entry in queue], left


def collect(board: Board, entries: list[Entry]) -> tuple[Results, list[Entry]]:
    """Return every row of every data set, from the files of the runs, and the runs whose scores are in them."""
    done: list[Entry] = []
    results: Results = {d: {o: Row([], len(seeds)) for o in board.objectives} for d, seeds in board.seeds.items()}
    for entry in entries:
        row, state = results[entry.dataset][entry.objective], entry.condition()
        row.failed += state == "failed"
        row.stale += state == "stale"
        if state == "finished":
            row.scores.append(entry.scores())
            row.learns = learned(entry)
            done.append(entry)
    return results, done


def command_of(options: Options, extra: list[str]) -> str:
    """Return the command that makes the tables again."""
    words = ["teacher=exact"] * bool(options.teacher)
    words += [f"{key}={','.join(vars(options)[key])}" for key in ("only", "data", "seeds") if vars(options)[key]]
    words += [] if options.output_dir == Path("outputs") else [f"output_dir={options.output_dir}"]
    return shlex.join(["python", "scripts/leaderboard.py", *words, *(["--", *extra] if extra else [])])


def caption(results: Results, entries: list[Entry], done: list[Entry], command: str, config: str) -> str:
    """Return what the figures are, where they were made, and the command that makes them again."""
    if not done:
        return f"No run has finished yet: `{command}` trains them."
    settings = done[0].settings()
    points = settings["evaluation"]["metrics"].get("wasserstein", {}).get("points", 0)
    euler = ", ".join(dict.fromkeys(entry.objective for entry in entries if learned(entry) == "velocity"))
    steps = "by the flow map in equal steps" + (f" (Euler steps for {euler})" if euler else "")
    samples, solver = settings["evaluation"]["final_samples"], settings["choices"]["solver"]
    return (
        f"{provenance(done)}; {seeds_in_words(seeds_of(entries))}. {samples:,} samples a run (W2: "
        f"exact, of {min(points, samples):,}). The numbers "
        f"after the scores are evaluations a sample: 1, 2 and 4 {steps}, {solver_evaluations(results)} by the solver "
        f"{solver}. Floor: real data against real, mean ± standard deviation over replicates; of the flow-map error: the "
        "solver on the exact field; - where the truth is not known. Bold: the best in one evaluation. Training seconds: the "
        "fastest seed, without imports and evaluation; reflow's with the making of its pairs, without its teacher. "
        f"`{command}`, settings in configs/{config}."
    )


def taught_caption(entries: list[Entry], done: list[Entry], command: str, config: str) -> str:
    """Return `caption` for the table of own loss against exact teacher."""
    if not done:
        return f"No run has finished yet: `{command}` trains them."
    samples = done[0].settings()["evaluation"]["final_samples"]
    return (
        f"{provenance(done)}; {seeds_in_words(seeds_of(entries))}. {samples:,} samples a run, by the "
        "flow map in one evaluation each; the velocity error is that of u(z, r, r). With the exact teacher: the same run "
        "with `loss.teacher=exact`, the data's exact velocity in the place of v_c. Floor: real data against real, mean ± "
        "standard deviation over replicates. Training seconds: the fastest seed, without imports and evaluation. "
        f"`{command}`, settings in configs/{config}."
    )


def seeds_of(entries: list[Entry]) -> dict[str, int]:
    """Return how many seeds each data set has."""
    return {
        dataset: len({e.seed for e in entries if e.dataset == dataset})
        for dataset in dict.fromkeys(e.dataset for e in entries)
    }


def provenance(done: list[Entry]) -> str:
    """Return the hardware, days and torch versions that runs were made with."""
    facts = [json.loads(entry.facts.read_text(encoding="utf-8")) for entry in done if entry.facts.is_file()]
    hardware = "; ".join(dict.fromkeys(fact["hardware"] for fact in facts)) or "hardware not recorded"
    torch_versions = " and ".join(dict.fromkeys(fact["torch"] for fact in facts)) or "not recorded"
    days = sorted(entry.folder.status.read()["updated"][:10] for entry in done)
    return f"{hardware}, {' to '.join(dict.fromkeys([days[0], days[-1]]))}, torch {torch_versions}"


def learned(entry: Entry) -> str:
    """Return what the run's objective teaches its network, see FlowObjective.learns, as its file in configs/loss says."""
    return str(entry.settings()["loss"]["training"].get("learns", "flow_map"))


def write_tables(board: Board, entries: list[Entry], options: Options, extra: list[str]) -> None:
    """Write, or for a trial print, the tables of what has finished; the page that ships, once every run has."""
    results, done = collect(board, entries)
    command = command_of(options, extra)
    above = caption(results, entries, done, command, options.config.name)
    if options.teacher:
        above = taught_caption(entries, done, command, options.config.name)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / ("leaderboard_exact_teacher.json" if options.teacher else "leaderboard.json")
    write_atomically(file, as_json(results, above))
    unfinished = sum(entry.condition() != "finished" for entry in entries)
    shipped = options.page == Options.page and unfinished > 0
    if extra or shipped:
        print((taught_text if options.teacher else full_text)(results, above))
        if shipped and not extra:
            print(f"{unfinished} of {len(entries)} runs are not finished, so {options.page.name} stays; page= names another")
        return
    if options.teacher:
        write_between(options.page, taught_text(results, above), TAUGHT_MARKS, "With the exact teacher")
        print(f"table in {options.page} and {file}")
        return
    write_between(options.log, full_text(results, above))
    write_between(options.page, short_text(results, above))
    print(f"tables in {options.page}, {options.log} and {file}")
    print(f"python visualizers/leaderboard.py log={options.log} out=docs/leaderboard.png  draws them")


def leaderboard(words: list[str]) -> int:
    """Carry out the command; the exit status is 1 when a run failed."""
    options, extra = read_words(words)
    board = read_board(options.config)
    if options.teacher:
        chosen("seeds", options.seeds, list(map(str, board.every_seed)))
        board = with_teachers(board, options.only, options.data, list(map(int, options.seeds)))
    entries = board.entries(options.output_dir, extra)
    queue, stale = to_train(board, entries, replace(options, only=[]) if options.teacher else options)
    failed: list[Entry] = []
    if options.table != "only":
        for entry in queue:
            entry.settings()  # a mistake is said before the first run
        seconds = [entry.folder.status.read()["seconds"] for entry in entries if entry.condition() == "finished"]
        pool = JobPool(queue, options.jobs or board.jobs, seconds)
        left_alone = f", {stale} stale ones left alone" if stale else ""
        print(f"{len(queue)} run(s) to carry out{left_alone}{pool.time_left()}", flush=True)
        pool.carry_out()
        failed = pool.failed
    if options.table != "false":
        write_tables(board, entries, options, extra)
    if failed:
        print(f"leaderboard.py: {len(failed)} run(s) failed, see above; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(words: list[str]) -> int:
    """Return the exit status: 0, 1 for a mistake or failed runs, 130 when stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a background shell has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    return front(words, __doc__, leaderboard)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

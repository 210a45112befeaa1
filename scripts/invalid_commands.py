#!/usr/bin/env python
"""Command lines that are wrong by construction, each given to a real process: what does the launcher say?

    python scripts/invalid_commands.py                 # 500 of them; needs the extra `dev`
    python scripts/invalid_commands.py --count 40 --jobs 2

Each must end with a status other than 0, within a second of processor time, in at most four lines without a traceback,
and leave the folder it runs in, an earlier run included, as it was.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from training.config import CONFIG_DIR, groups

ROOT = Path(__file__).resolve().parents[1]
SECONDS, LINES = 1.0, 4
INTEGERS = (
    "epochs", "batch_size", "gradient_accumulation_steps", "num_workers", "seed", "eval_every", "save_every", "log_every",
    "keep_saves", "solver.steps", "model.width", "model.depth", "evaluation.samples", "evaluation.final_samples",
    "dataloaders.epoch_size",
)  # fmt: skip
NUMBERS = ("optimizer.lr", "optimizer.weight_decay", "grad_clip", "ema.decay", "model.dropout", "dataloaders.std")
BOOLEANS = ("compile", "deterministic", "conditional", "overwrite", "overfit", "trackio.enabled")
WORDS = ("device", "precision", "compile_mode", "resume", "on_save_error")
CONTRADICTIONS = (
    ["model=cnn"], ["model=unet"], ["model=dit_s"], ["dataloaders=digits"], ["dataloaders=random_images"],
    ["dataloaders=array"], ["dataloaders=array", "dataloaders.path=missing.npy"], ["loss=reflow"],
    ["resume=true", "overwrite=true"], ["resume=true", "init_from=x.pt"], ["resume=true"], ["resume=force"],
    ["init_from=missing.pt"], ["eval_checkpoint=missing.pt"], ["guidance=autoguidance"],
    ["guidance=autoguidance", "guidance.checkpoint=missing.pt"], ["guidance=cfg"],
    ["conditional=true", "dataloaders=random_images", "model=cnn"], ["experiment=digits", "model=mlp"],
    ["~model"], ["~loss"], ["~run_name"], ["model=null"], ["loss=null"], ["output_dir=/proc/nowhere"],
    ["source=moons", "dataloaders=digits", "model=cnn"], ["evaluation.final_samples=100000000000"],
    ["batch_size=100000000000000", "dataloaders.epoch_size=100000000000000"], ["seed=1,2"], ["model=mlp,cnn"],
)  # fmt: skip

Command = list[str]
odd = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
letters = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=14)
huge = st.integers(10**19, 10**40)


def known_words() -> set[str]:
    """Every word that is a key or a group somewhere in configs/, so that a made-up one is not."""
    text = " ".join(path.read_text(encoding="utf-8") for path in CONFIG_DIR.rglob("*.yaml"))
    return {word.strip("~:,.{}[]\"'") for word in text.replace("/", " ").replace(".", " ").split()} | {"hydra"}


def set_to(keys: tuple[str, ...], values: st.SearchStrategy[object]) -> st.SearchStrategy[Command]:
    return st.tuples(st.sampled_from(keys), values).map(lambda pair: [f"{pair[0]}={pair[1]}"])


KNOWN, GROUPS = known_words(), groups()
made_up = letters.filter(lambda word: word not in KNOWN)
not_a_number = st.one_of(
    made_up,
    st.sampled_from(["", "1e", "0x", "--1", "1_", "[1]", "[]", "{}", "{a: 1}", "true", "'1 2'", "1.5.2", "1,", "NULL?"]),
)
mistakes: dict[str, st.SearchStrategy[Command]] = {
    "an unknown key": st.tuples(made_up, st.sampled_from(["1", "true", "x", "[1]"])).map(lambda p: [f"{p[0]}={p[1]}"]),
    "an unknown key of a group": st.tuples(st.sampled_from(["model", "optimizer", "solver", "loss"]), made_up).map(
        lambda p: [f"{p[0]}.{p[1]}=1"]
    ),
    "an unknown choice": st.tuples(st.sampled_from(sorted(GROUPS)), made_up).map(lambda p: [f"{p[0]}={p[1]}"]),
    "no whole number": set_to(INTEGERS, st.one_of(not_a_number, st.sampled_from(["1.5", "1e3.2", "nan", "inf"]))),
    "a whole number below the least": set_to(INTEGERS, st.integers(-(10**40), -1)),
    "a huge seed": set_to(("seed",), huge),
    "no number": set_to(NUMBERS, not_a_number),
    "a number out of range": set_to(NUMBERS, st.floats(-1e300, -1e-9) | st.sampled_from(["nan", "-inf", "-1e400"])),
    "neither true nor false": set_to(BOOLEANS, st.one_of(made_up, st.integers(2), st.sampled_from(["", "[true]", "truee"]))),
    "an unknown word": set_to(WORDS, st.one_of(made_up, st.integers(2), st.sampled_from(["", "[cpu]", "{}"]))),
    "a name that is none": st.one_of(
        st.sampled_from(["", ".", "..", "a/b", "/etc/x", "../x", "a\\b", "x\ty", "-x", "_x", "'a b'", "x" * 201, "é"]),
        odd.filter(lambda text: not text.isascii()),
    ).map(lambda name: [f"run_name={name}"]),
    "a name that is taken": st.just(["run_name=taken"]),
    "no name": st.just(["run_name=null"]),
    "odd text": odd.filter(lambda text: "=" not in text and not text.startswith(("-", "~", "+"))).map(lambda text: [text]),
    "odd keys": st.tuples(odd.filter(lambda t: not t.startswith("-") and not set(t) & set("=~+")), odd).map(
        lambda p: [f"{p[0]}={p[1]}"]
    ),
    "broken syntax": st.sampled_from(
        ["=3", "epochs=[1,2", "epochs='3", "epochs={a", "epochs=${nothing}", "epochs=${", "epochs==3", "a=b=c", "loss.=1",
         ".loss=1", "loss..path=1", "~", "+", "++", "~nothing", "@=1", "model@=mlp", "model@x=mlp", "epochs=3 4", "[]", "{}"]
    ).map(lambda word: [word]),
    "an unknown flag": made_up.map(lambda word: [f"--{word}"]),
    "a flag without its value": st.sampled_from([["--device"], ["--backend"], ["--device="], ["--backend", "--device"]]),
    "a sweep with a wrong job": set_to(("seed", "epochs"), st.just("1,two")).map(lambda words: ["-m", *words]),
    "a contradiction": st.sampled_from(CONTRADICTIONS),
}  # fmt: skip


@st.composite
def commands(draw: st.DrawFn) -> Command:
    """One mistake among settings that are right, anywhere on the line; never a run that could start."""
    kind = draw(st.sampled_from(sorted(mistakes)))
    wrong = draw(mistakes[kind])
    right = draw(st.lists(st.sampled_from(["epochs=1", "device=cpu", "trackio.enabled=false"]), unique=True))
    right = [word for word in right if not any(w.startswith(word.partition("=")[0] + "=") for w in wrong)]  # the later wins
    name = [] if wrong[0].startswith(("run_name=", "~run_name")) else draw(st.sampled_from([["run_name=new"]] * 9 + [[]]))
    place = draw(st.integers(0, len(right)))
    return [*name, *right[:place], *wrong, *right[place:]]


def drawn(count: int) -> list[Command]:
    """So many different command lines, the same ones each time."""
    found: dict[tuple[str, ...], Command] = {}

    @settings(max_examples=2 * count, database=None, derandomize=True, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(commands())
    def collect(words: Command) -> None:
        found.setdefault(tuple(words), words)

    collect()
    return list(found.values())[:count]


@dataclass
class Outcome:
    words: Command
    status: int
    said: str
    seconds: float  # of processor time

    def faults(self) -> list[str]:
        """What the launcher should not have done, in words."""
        found = {
            f"status {self.status}": self.status != 1,
            f"{self.said.count(chr(10))} lines": not 1 <= self.said.count("\n") <= LINES,
            "a traceback": "Traceback" in self.said,
        }
        return [name for name, holds in found.items() if holds]


def run_command(words: Command, folder: Path) -> Outcome:
    """The launcher in a process of its own, in `folder`."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launcher.py"), *words],
            cwd=folder,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return Outcome(words, process.returncode, output.read(), usage.ru_utime + usage.ru_stime)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below the folder, with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def earlier_run(folder: Path) -> None:
    """The traces of a run of the name `taken`."""
    for name in ("runs/taken/config.yaml", "runs/taken/metrics.jsonl", "ckpts/mlp/taken_last.pt"):
        path = folder / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious\n")


def try_all(count: int, jobs: int, tell: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """The outcome of each command. AssertionError when one of them changed a file."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        earlier_run(folder)
        before = contents(folder)
        outcomes = []
        for outcome in pool.map(lambda words: run_command(words, folder), drawn(count)):
            tell(outcome)
            outcomes.append(outcome)
        assert contents(folder) == before, f"files changed: {contents(folder).keys() ^ before.keys()}"
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args(arguments)

    def tell(outcome: Outcome) -> None:
        slow = [f"{outcome.seconds:.1f} s"] if outcome.seconds > SECONDS else []
        if found := outcome.faults() + slow:
            print(f"{', '.join(found)}: {outcome.words}\n{outcome.said}", flush=True)

    outcomes = try_all(options.count, options.jobs, tell)
    seconds = sorted(outcome.seconds for outcome in outcomes)
    bad = sum(bool(outcome.faults()) for outcome in outcomes)
    slow = sum(second > SECONDS for second in seconds)
    print(f"{len(outcomes)} commands: {bad} answered badly, {slow} in more than {SECONDS:g} s of processor time; "
          f"median {seconds[len(seconds) // 2]:.2f} s, slowest {seconds[-1]:.2f} s; no file changed")  # fmt: skip
    return int(bad + slow > 0)


if __name__ == "__main__":
    sys.exit(main())

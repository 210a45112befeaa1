#!/usr/bin/env python
"""Command lines that are wrong by construction, each given to the launcher in a process of its own: what does it say?

    python dev/invalid_commands.py                 # 700 of them; needs the extra `dev`
    python dev/invalid_commands.py --count 40 --jobs 2
    python dev/invalid_commands.py -- run_name=x epochs=0      # this one

Each must end with status 1 within two minutes of processor time, in at most four lines without a traceback, and leave the
folder it runs in, an earlier run included, as it was. The processes are forks of this one, which has imported what every
command needs, so that 700 take a minute; one that imports torch as well is counted as late.
"""

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import launcher
from common.command_line import Parser, count, front
from common.ranges import ANY
from configuration.compose import CONFIG_DIR, compose_config, groups
from configuration.values import SETTINGS, Setting, declared, kinds_in, options_of, range_in

LATE, HANG, WALL, LINES = 1.0, 120, 300, 4  # seconds of processor time, twice, and of the clock; lines
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
    ["dataloaders=array"], ["dataloaders=array", "dataloaders.path=missing.npy"], ["loss=reflow"], ["loss=distillation"],
    ["resume=true", "overwrite=true"], ["resume=true", "init_from=x.pt"], ["resume=true"], ["resume=force"],
    ["init_from=missing.pt"], ["eval_checkpoint=missing.pt"], ["guidance=autoguidance"],
    ["loss=meanflow", "loss.teacher=missing.pt"], ["loss=meanflow", "loss.teacher=exact", "dataloaders=moons"],
    ["guidance=autoguidance", "guidance.checkpoint=missing.pt"], ["guidance=cfg"], ["experiment=digits", "model=mlp"],
    ["ema=power", "ema.lengths=[0.05,0.05]"], ["ema=power", "ema.decay=0.9"], ["teacher='loss=mse'"],
    ["~model"], ["~loss"], ["~run_name"], ["model=null"], ["loss=null"], ["output_dir=/proc/nowhere"],
    ["source=moons", "dataloaders=digits", "model=cnn"], ["evaluation.final_samples=100000000000"],
    ["batch_size=100000000000000", "dataloaders.epoch_size=100000000000000"], ["seed=1,2"], ["model=mlp,cnn"],
)  # fmt: skip

Command = list[str]
PACKAGES = {"tracker": "trackio"}  # groups whose settings have another name


def settings_of_parts() -> Iterator[tuple[Command, str, Setting]]:
    """Yield each declared setting of each choice: the words that choose it, its key, and what it may be."""
    for group, choices in groups().items():
        for choice in choices:
            node: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / group / f"{choice}.yaml"))
            for name in node if isinstance(node, dict) and "_target_" in node else ():
                key = f"{PACKAGES.get(group, group).replace('/', '.')}.{name}"
                setting = declared(key, node["_target_"])
                if setting is not None and group != "vae":
                    yield [f"{group}={choice}"], key, setting


def wrong_values(setting: Setting) -> list[str]:
    """Texts of values that the setting may not have."""
    kinds, options, allowed = kinds_in(setting.kind), options_of(setting.kind), range_in(setting.kind)
    wrong = [] if dict in kinds or any(get_origin(k) is dict for k in kinds) else ["{a: 1}"]
    wrong += [] if type(None) in kinds else ["null"]
    lists = any(get_origin(option) in (list, tuple) for option in options)
    if str not in kinds:
        wrong += ["words", "[words]", "''"]
    if not lists:
        wrong += ["[1]", "[]", "[[1]]"]
    if any(get_origin(option) is Literal for option in options):
        return wrong
    if {int, float} & kinds:
        numbers = ["nan", "inf", "-1e400", "1e300"] + ["1.5"] * (float not in kinds)
        numbers += [f"{allowed.low - 1:.0f}"] * (allowed.low > -1e9) + ["-1"] * (allowed != ANY)
        numbers += [f"{10**30}"] * (int in kinds)
        wrong += ["true", *([f"[{number}]" for number in numbers] if lists else numbers)]
        wrong += ["[]"] * (lists and allowed != ANY)
    return wrong


odd = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
letters = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=14)
huge = st.integers(10**19, 10**40)


def known_words() -> set[str]:
    """Return every word that is a key or a group somewhere in configs/, so that a made-up one is not."""
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
PARTS = [(words, key, value) for words, key, setting in settings_of_parts() for value in wrong_values(setting)]
OWN = [(key, value) for key, setting in SETTINGS.items() if key != "guidance.checkpoint" for value in wrong_values(setting)]
EXTREMES = [
    "dataloaders.state_shape=[0]", "dataloaders.state_shape=[-1]", "dataloaders.state_shape=[]",
    "dataloaders.state_shape=[1000000000000]", "dataloaders.state_shape=[1e9]", "evaluation.batch_size=-1",
    "evaluation.batch_size=0", "source.std=-1", "schedule.final=-1", "dataloaders.std=[]", "dataloaders.std=[.1,.2]",
    "dataloaders.weights=[1,2]", "+model.colour=red", "+optimizer.fused=yes", "dataloaders.weights=[1,1,1,1,-1]",
    "dataloaders.std=[.1,.1,.1,.1,0]", "optimizer.lr=1e300", "+optimizer.eps=-1", "model.time_frequencies=[abc]",
    "model.time_frequencies=3", "batch_size=1000000000000000000", "max_steps=1e18", "epochs=1000000000000000000",
    "evaluation.samples=900000000000", "solver.steps=100000000000", "model.width=10000000", "model.depth=1000000000",
    "model.width=90000", "seed=9223372036854775808", "dataloaders.epoch_size=0", "dataloaders.centroids=[[1],[1,2]]",
    "dataloaders.centroids=[]", "dataloaders.centroids=[[]]", "loss_weights={a: b}", "log.targets={eval/loss: abc}",
    "loss_weights=[1]", "tracker.enabled=false", "optimizer.betas=[0.9,0.99,0.999]", "optimizer.betas=0.9",
    *(f"{key}={'n' * 300}" for key in ("output_dir", "init_from", "eval_checkpoint")),
]  # fmt: skip
EXTREMES_OF_CHOICES = [
    ["solver=dopri5", "solver.rtol=1e-300", "solver.atol=1e-300"], ["solver=dopri5", "solver.rtol=0"],
    ["optimizer=sgd", "+optimizer.momentum=-5"], ["optimizer=sgd", "optimizer.momentum=-5"],
    ["dataloaders=gaussian", "dataloaders.mean=[a,b]"], ["dataloaders=gaussian", "dataloaders.mean=[[1]]"],
    ["dataloaders=gaussian", "dataloaders.mean=null"], ["dataloaders=gaussian", "dataloaders.state_shape=[100000000000]"],
    ["dataloaders=checkerboard", "dataloaders.cells=null"], ["solver/grid=dense", "solver.grid.power=0.5"],
    ["solver/grid=dense", "solver.grid.dense=middle"], ["schedule=step", "schedule.milestones=[a]"],
    ["schedule=step", "schedule.milestones=0.5"], ["loss=meanflow", "loss.jvp=magic"],
    ["optimizer=sgd", "optimizer.momentum=0"], ["optimizer=sgd", "+optimizer.dampening=-1"],
    ["-m", "optimizer.lr=interval(1e-4,1e-2)"], ["-m", "seed=glob(*)"], ["-m", "seed=interval(1,3)"],
    ["model=unet", "dataloaders=digits", "model.multipliers=[]"],
]  # fmt: skip
RATE = "optimizer.lr=interval(1e-4,1e-2)"
SEARCHES = [
    [], ["n=0", RATE], ["n=-3", RATE], ["n=two", RATE], ["n=1.5", RATE], ["n=", "jobs=", RATE], [f"n={10**30}", RATE],
    ["jobs=0", RATE], ["jobs=x", RATE], ["sampler=simplex", RATE], ["pruner=axe", RATE], ["metric=nothing", RATE],
    ["metric=train/loss", RATE], ["metric=eval/", RATE], ["sampler=grid", RATE], ["sampler=cmaes", RATE],
    ["sampler=grid", "n=99", "seed=1,2"], ["optimizer.lr=interval(1e-2,1e-4)"], ["optimizer.lr=interval(1e-2,1e-2)"],
    ["optimizer.lr=interval(0,inf)"], ["optimizer.lr=interval(nan,1)"], ["optimizer.lr=interval(-1,1)"],
    ["optimizer.lr=interval(1e-4)"], ["optimizer.lr=interval(a,b)"], ["optimizer.lr=tag(log,interval(0,1))"],
    ["optimizer.lr=tag(log,linear,interval(1,2))"], ["optimizer.lr=tag(cube,interval(1,2))"],
    ["model.width=interval(1.5,8)"],
    ["model.width=interval(0,8)"], ["model.width=choice(0,64)"], ["model.width=choice(64,64)"], ["seed=range(0,1e9)"],
    ["seed=range(5,1)"], ["seed=glob(*)"], ["run_name=choice(a,b)"], ["output_dir=a,b"], ["device=cpu,cuda"],
    ["resume=true", RATE], ["overwrite=true", RATE], ["eval_checkpoint=x.pt", RATE], ["model.colour=interval(0,1)"],
    ["model=choice(mlp,cnn)"], ["model=interval(0,1)"], ["solver=choice(euler,nothing)"], ["-m", RATE],
    [RATE, "--cfg", "job"], [RATE, "optimizer.lr=1e-3"], ["+optimizer.eps=interval(1e-6,1e-8)"],
    ["--backend", "modal", RATE], [RATE, RATE], ["lr=interval(0,1)"], 
]  # fmt: skip
SCALE = ["key=guidance.scale", "low=1", "high=8", "ckpt=missing.pt"]
GOLDENS = [
    SCALE, [], ["key=guidance.scale"], [*SCALE, "low=9"], [*SCALE, "low=a"], [*SCALE, "high=inf"], [*SCALE, "low=-1"],
    [*SCALE, "evaluations=4"], [*SCALE, "evaluations=many"], [*SCALE, "n=1"], [*SCALE, "repeats=1"], [*SCALE, "seed=-1"],
    [*SCALE, "out=picture.jpg"], [*SCALE, "ckpt="], [*SCALE, "epochs=3"], [*SCALE, "colour"], [*SCALE, "--dry-run"],
    [*SCALE, "values=1,2"], [*SCALE, "-m"], ["key=optimizer.lr", *SCALE[1:]], ["key=solver.colour", *SCALE[1:]],
    ["key=solver.steps", "low=1.5", *SCALE[2:]], ["key=solver.steps", "low=0", *SCALE[2:]], ["key=solver", *SCALE[1:]],
    ["key=solver.steps", "values=4", SCALE[3]], ["key=solver.steps", "values=4,4", SCALE[3]],
    ["key=solver.steps", "values=4,words", SCALE[3]], ["key=guidance.interval", "values=[0,2],[0,1]", SCALE[3]],
]  # fmt: skip
PROOFS = [[], ["loss=nothing"], ["missing.py"], ["missing.py:loss"], ["loss=mse", "convention=reversed"], ["loss=mse", "-m"],
          ["loss=reflow"], [f"{'n' * 300}.py:loss"], ["loss=mse", "--dry-run"]]  # fmt: skip
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
    "a value that a part may not have": st.sampled_from(PARTS).map(lambda p: [*p[0], f"{p[1]}={p[2]}"]),
    "a part's value among others": st.sampled_from(PARTS).map(lambda p: [*p[0], f"{p[1]}={p[2]}"]),
    "a value that a key may not have": st.sampled_from(OWN).map(lambda p: [f"{p[0]}={p[1]}"]),
    "an extreme": st.sampled_from(EXTREMES).map(lambda word: [word]),
    "a wrong search": st.sampled_from(SEARCHES).map(lambda words: ["--search", "optuna", *words]),
    "a wrong search of samplers": st.sampled_from(GOLDENS).map(lambda words: ["--search", "golden", *words]),
    "a wrong proof": st.sampled_from(PROOFS).map(lambda words: ["--prove", *words]),
    "no kind of search": st.sampled_from([["--search"], ["--search", "golf"], ["--search="]]).map(lambda w: [*w, RATE]),
    "an extreme of a choice": st.sampled_from(EXTREMES_OF_CHOICES),
}  # fmt: skip


@st.composite
def commands(draw: st.DrawFn) -> Command:
    """Return one mistake among settings that are right, anywhere on the line; never a run that could start."""
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
        """Return what the launcher should not have done, in words."""
        found = {
            f"status {self.status}": self.status != 1,  # -24 or -14: a hang
            f"{self.said.count(chr(10))} lines": not 1 <= self.said.count("\n") <= LINES,
            "a traceback": "Traceback" in self.said,
        }
        return [name for name, holds in found.items() if holds]


def launch_in(folder: Path, words: Command, said: Path) -> int:
    """Return the process id of a fork that carries out the launcher in `folder` and writes what it says to `said`."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["launcher.py", *words]
        resource.setrlimit(resource.RLIMIT_CPU, (HANG, HANG))
        signal.alarm(WALL)
        status = launcher.main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def outcomes_of(commands: list[Command], folder: Path, jobs: int) -> Iterator[Outcome]:
    """Yield what becomes of each command, in the order in which they end; so many at a time."""
    waiting, running = list(enumerate(commands)), dict[int, tuple[Command, Path]]()
    with tempfile.TemporaryDirectory() as outputs:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, words = waiting.pop(0)
                said = Path(outputs) / str(number)
                running[launch_in(folder, words, said)] = words, said
            process, status, usage = os.wait4(-1, 0)
            words, said = running.pop(process)
            seconds = usage.ru_utime + usage.ru_stime
            yield Outcome(words, os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), seconds)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path below the folder, with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def earlier_run(folder: Path) -> None:
    """The traces of a run of the name `taken`."""
    for name in ("runs/taken/config.yaml", "runs/taken/metrics.jsonl", "ckpts/mlp/taken_last.pt"):
        path = folder / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious\n")


def try_all(commands: list[Command], jobs: int, tell: Callable[[Outcome], None]) -> tuple[list[Outcome], set[str]]:
    """Return the outcome of each command, and the paths that they changed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        earlier_run(folder)
        before, outcomes = contents(folder), []
        compose_config([])  # once, for every fork
        for outcome in outcomes_of(commands, folder, jobs):
            tell(outcome)
            outcomes.append(outcome)
        after = contents(folder)
    return outcomes, {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def carry_out(words: list[str]) -> int:
    """Carry out the command; 1 when a command line is answered badly, or changes a file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--count", type=count, default=700)
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("words", nargs="*", help="after --, the words of one command")
    options = parser.parse_args(words)
    commands = [options.words] if options.words else drawn(options.count)

    def tell(outcome: Outcome) -> None:
        late = [f"{outcome.seconds:.1f} s"] if outcome.seconds > LATE else []
        if (found := outcome.faults() + late) or options.words:
            print(f"{', '.join(found)}: {outcome.words}\n{outcome.said}", flush=True)

    outcomes, changed = try_all(commands, options.jobs, tell)
    bad = sum(bool(outcome.faults()) for outcome in outcomes)
    late = sum(outcome.seconds > LATE for outcome in outcomes)
    slowest = max(outcome.seconds for outcome in outcomes)
    print(f"{len(outcomes)} commands: {bad} answered badly, {late} late (more than {LATE:g} s of processor time, slowest "
          f"{slowest:.2f} s), {len(changed)} files changed")  # fmt: skip
    return int(bad > 0 or bool(changed))


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:], None, carry_out))

#!/usr/bin/env python
"""The front door: compose a run, check it, carry it out.

python launcher.py run_name=first_flow                              # 2-D flow matching with oracles, under a minute
python launcher.py run_name=digits dataloaders=digits model=cnn     # real handwritten digits
python launcher.py run_name=first_flow resume=true epochs=20        # go on
python launcher.py -m run_name=sweep seed=0,1,2                     # one run for each; finished ones are skipped
"""

import os
import signal
import sys


def leave(number: int, frame: object) -> None:
    """End a process that has only begun to import its modules."""
    os.write(2, b"launcher.py: stopped before anything was begun\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)  # before the imports that take time

from typing import TYPE_CHECKING, Any  # noqa: E402

from common.errors import UserError, bug_in_words, path_in_words  # noqa: E402
from common.files import outlive_readers  # noqa: E402

if TYPE_CHECKING:
    from run_files.result import RunResult

# Threads that wait sleep soon instead of spinning: no slower on an idle machine, twice as fast on a shared one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

FLAGS = {"--device": "device", "--devices": "devices", "--backend": "backend", "--gpu": "backend.gpu"}
EXAMPLES = {"--device": "cpu", "--devices": "2", "--backend": "local", "--gpu": "H100"}
SWITCHES = {"--detach": "backend.detach=true", "--no-detach": "backend.detach=false"}
HYDRA_FLAGS = (
    "-m", "--multirun", "-c", "--cfg", "-r", "--resolve", "-p", "--package", "-i", "--info", "-sc",
    "--shell-completion", "--hydra-help", "--version",
)  # fmt: skip
HYDRA_VALUES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")), **dict.fromkeys(("-p", "--package"), ()),
    **dict.fromkeys(("-i", "--info"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
}  # fmt: skip
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR"}  # torchrun gives them to each process it starts
PLOT_ORDER = "eval/,oracle/,train/loss,gpu/,cuda/,mps/,epoch"  # of a dashboard, which else has first what has no slash

HELP = """DenoisingZoo: flow-matching experiments from one command, scored against closed-form truth.

  python launcher.py run_name=NAME [group=choice ...] [key=value ...] [flags]

flags (anywhere on the line)
  --device auto|cpu|cuda|mps   short for device=
  --devices N                  N processes, each with its share of every batch: GPUs of this machine, or CPU cores
  --backend local|modal|slurm  where it runs, short for backend=
  --gpu H100                   the GPU to rent, H100:4 for four, short for backend.gpu=
  --no-detach                  wait for a rented GPU and show what it prints, short for backend.detach=false
  -m                           one run for every combination of a=1,2 b=x,y; run again, it skips what has finished
  --search golden              the best key=guidance.scale between low=1 and high=8 of a ckpt=PATH (docs/searches.md)
  --search optuna              try n=40 runs of a=interval(1,2) b=choice(x,y); run again, it goes on (docs/searches.md)
  --dry-run                    print what would run, and where; nothing is started or written
  --prove loss=NAME            is the exact field where this loss is least? Exit status 0 yes, 3 no, 4 undecided
  --prove FILE.py:FUNCTION     the same of a plain loss of (network, x0, x1); convention=reversed: t = 0 is data
  --dashboard                  open the tracker's pages for the project of these runs, until Ctrl-C
  --cfg job                    print the composed configuration and stop (every key there can be set)
  -sc install=bash             shell completion: eval "$(python launcher.py -sc install=bash)"
                               (of `python launcher.py`; with uv: after `source .venv/bin/activate`)

groups and choices
{groups}

examples
  python launcher.py run_name=first_flow
  python launcher.py run_name=ot dataloaders=moons loss/coupling=minibatch_ot batch_size=256
  python launcher.py run_name=digits dataloaders=digits model=cnn
  python launcher.py run_name=first_flow resume=true epochs=20
  python launcher.py run_name=again eval_checkpoint=outputs/ckpts/mlp/first_flow_last.pt solver=euler
  python launcher.py -m run_name=seeds seed=0,1,2
keys that every run has, beside run_name and those of its parts, such as optimizer.lr (docs/cli.md explains them)
{keys}"""


def help_text() -> str:
    """Return what `--help` prints; imports neither torch nor Hydra, so it answers at once."""
    import textwrap

    from configuration.nodes import groups
    from configuration.values import SETTINGS

    choices = groups()
    width = max(map(len, choices))
    lines = (f"  {group:<{width}}  {' | '.join(names)}" for group, names in choices.items())
    keys = textwrap.fill(" ".join(SETTINGS), width=118, initial_indent="  ", subsequent_indent="  ")
    return HELP.format(groups="\n".join(lines), keys=keys)


def with_flags_as_overrides(arguments: list[str]) -> list[str]:
    """`--device X` as device=X, and so each of FLAGS and SWITCHES, in their places, so that the later one wins."""
    words, rest = [], iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            value = value if equals else next(rest, "")
            if not value or value.startswith("-"):
                raise UserError(f"{flag} needs a value, such as {flag} {EXAMPLES[flag]}")
            word = f"{FLAGS[flag]}={value}" if flag != "--gpu" else f"backend.gpu='{value}'"  # H100! wants quotes
        words.append(SWITCHES.get(word, word))
    return words


def launch(overrides: list[str]) -> "RunResult":
    """Check and carry out one run, or this process's part in it; returns what came of it."""
    if os.environ.keys() >= RANK_VARIABLES:
        from backends.workers import run_as_rank

        return run_as_rank(overrides)
    from backends.submission import bring, prepare, submit

    bring(overrides)
    return submit(prepare(overrides))


def dry_run(words: list[str]) -> None:
    """Print what would run, and where, a sweep job by job. UserError for what is wrong with it."""
    from backends.submission import describe, prepare
    from backends.sweep import Sweep

    flags, overrides = ([w for w in words if w.startswith("-") is flag] for flag in (True, False))
    other = [flag for flag in flags if flag not in ("-m", "--multirun")]
    if other or os.environ.keys() >= RANK_VARIABLES:
        raise UserError(f"--dry-run goes with a run or a sweep, not with {other[0] if other else 'torchrun'}")
    if {"-m", "--multirun"} & set(flags):
        print(Sweep(overrides, brings=False).describe())
    else:
        config = prepare(overrides)
        print(describe([config], config["run_name"]))


def run(*overrides: str) -> "RunResult":
    """Carry out a run from Python: `from launcher import run; result = run("run_name=x", "epochs=2")`.

    The result is a number, the best monitored value (infinite where none was found), with .scores, .state, .path and
    .checkpoint. Raises UserError for bad settings.
    """
    return launch(list(overrides))


def in_hydras_order(arguments: list[str]) -> list[str]:
    """Return Hydra's flags with their values, then the other words. UserError for flags that do not go together."""
    flags, words, rest = list[str](), list[str](), list(arguments)
    while rest:
        flag, equals, value = (word := rest.pop(0)).partition("=")
        if flag in ("-i", "--info") and not equals and rest[:1] not in [[known] for known in HYDRA_VALUES[flag]]:
            flags += [flag, "all"]  # Hydra's own default
        elif flag in HYDRA_VALUES:
            value, known = value if equals else "".join(rest[:1]), HYDRA_VALUES[flag]
            rest = rest if equals else rest[1:]
            if not value or (known and value not in known):
                raise UserError(f"{flag} takes {', '.join(known) or 'the name of a group'}, not {value!r}")
            flags += [flag, value]
        else:
            (flags if word.startswith("-") else words).append(word)
    shows = [flag for flag in flags if flag in ("-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")]
    many = [flag for flag in flags if flag in ("-m", "--multirun")]
    if "--hydra-help" in flags or "--version" in flags:
        return flags
    if not shows and not many:
        raise UserError(f"{flags[0]} says how something is shown; add --cfg job")
    if shows and (many or len(shows) > 1):
        raise UserError(f"{shows[0]} shows something and trains nothing; leave {(many or shows[1:])[0]} out")
    if shows[:1] in (["-sc"], ["--shell-completion"]) and not words:
        raise UserError(f"{shows[0]} takes install=bash, install=zsh, install=fish, or uninstall= of the same")
    return [*flags, *words]


def through_hydra(arguments: list[str]) -> None:
    """-m, --cfg, --info and completion are Hydra's own."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from backends.sweep import Sweep
    from configuration.resolvers import register_resolvers

    if os.environ.keys() >= RANK_VARIABLES:
        raise UserError("torchrun carries out one run; for a sweep leave it out, and say devices=N")
    register_resolvers()
    arguments = in_hydras_order(arguments)
    words = [word for word in arguments if not word.startswith("-")]
    sweep = Sweep(words) if {"-m", "--multirun"} & set(arguments) else None
    only_sweep = all(word in ("-m", "--multirun") for word in arguments if word.startswith("-"))
    if sweep is not None and only_sweep and sweep.submit_all():
        return

    @hydra.main(version_base=None, config_path="configs", config_name="train")
    def job(_: Any) -> "RunResult":
        assert sweep is not None
        return sweep.run(HydraConfig.get().overrides.task)

    many = [word for word in arguments if word in ("-m", "--multirun")]  # argparse wants the flag before or after all words
    sys.argv[1:] = [*many[:1], *(word for word in arguments if word not in many)]
    try:
        job()
    finally:
        if sweep is not None and sweep.results:
            print(sweep.closing_table())


def without_search(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the words without --search KIND, and the kind; None where it is not among them."""
    place = next((k for k, word in enumerate(arguments) if word.partition("=")[0] == "--search"), None)
    if place is None:
        return arguments, None
    kind, rest = arguments[place].partition("=")[2], arguments[:place] + arguments[place + 1 :]
    return (rest, kind) if "=" in arguments[place] else (rest[:place] + rest[place + 1 :], "".join(rest[place : place + 1]))


def searched(kind: str, words: list[str], dry_run: bool) -> int:
    """Carry out a search; returns the exit status. UserError for a flag that it does not take."""
    from searches.command import command

    flags = [word for word in words if word.startswith("-")]
    if flags or os.environ.keys() >= RANK_VARIABLES:
        raise UserError(f"--search chooses its runs itself; leave {flags[0] if flags else 'torchrun'} out")
    return command(kind, words, dry_run)


def dashboard(words: list[str]) -> None:
    """Serve the tracker's dashboard on the configured project, and open a browser at it where there is one.

    words: overrides, such as trackio.project=other. UserError for a tracker that has no dashboard of its own.
    """
    import webbrowser

    from configuration.compose import compose_config, resolved

    settings = resolved(compose_config(["run_name=dashboard", *words]))["trackio"]
    if not settings["_target_"].endswith("TrackioTracker"):
        raise UserError("--dashboard shows trackio's pages; see `tensorboard --logdir outputs/runs` or wandb's own site")
    try:
        has_browser = bool(webbrowser.get())
    except webbrowser.Error:
        has_browser = False
    import trackio

    os.environ.setdefault("TRACKIO_PLOT_ORDER", PLOT_ORDER)
    trackio.show(project=settings["project"], open_browser=has_browser, block_thread=True)


class Interrupt:
    """Handles SIGINT as Python does, and remembers it: libraries turn KeyboardInterrupt into errors of their own."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: object) -> None:
        self.came = True
        raise KeyboardInterrupt


def carry_out(arguments: list[str]) -> int:
    """Do what a command line asks for; returns the exit status. UserError for a mistake."""
    if "--dashboard" in arguments:
        dashboard([word for word in arguments if word != "--dashboard"])
        return 0
    if "--prove" in arguments:
        from evaluation.prove_command import command

        return command([word for word in arguments if word != "--prove"])
    arguments, search = without_search(arguments)
    words = [word for word in with_flags_as_overrides(arguments) if word != "--dry-run"]
    if flag := next((word for word in words if word.startswith("-") and word.split("=")[0] not in HYDRA_FLAGS), None):
        raise UserError(f"there is no flag {flag}; `python launcher.py --help` lists them")
    if search is not None:
        return searched(search, words, "--dry-run" in arguments)
    if "--dry-run" in arguments:
        dry_run(words)
    elif any(word.split("=")[0] in HYDRA_FLAGS for word in words):
        through_hydra(words)
    else:
        launch(words)
    return 0


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 1 for a mistake of the user's (one sentence on stderr), 128 + its number for a signal."""
    outlive_readers("the work goes on")
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.default_int_handler, leave):  # not where it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, interrupt)
    try:
        return carry_out(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if interrupt.came:  # whatever became of it on its way here
            print("launcher.py: stopped before anything was begun", file=sys.stderr)
            return 130
        if isinstance(error, KeyboardInterrupt) or (sys.flags.dev_mode and not isinstance(error, UserError)):
            raise
        sentence = str(error) if isinstance(error, UserError) else path_in_words(error)
        print(f"launcher.py: {sentence}" if sentence is not None else bug_in_words(error), file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is leave else before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

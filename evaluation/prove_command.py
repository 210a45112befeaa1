"""`python launcher.py --prove ...`: the proof of a configured loss, or of a function in a file, in words."""

from __future__ import annotations

import ast
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from common.files import require
from common.ranges import CountOr0
from configuration.compose import compose_config, resolved
from configuration.settings import known_settings

if TYPE_CHECKING:  # slow: only once the words are right
    from evaluation.prove import Builder, Plan, Stage
    from losses.paths import ProbabilityPath
    from losses.plain_loss import Function

STATUS = {"stationary": 0, "biased": 3, "undecided": 4}
SECONDS = 60  # at most for a world whose first batches decide nothing
USAGE = "python launcher.py --prove loss=NAME, or --prove path/to/file.py:function convention=forward|reversed"


@dataclass(frozen=True)
class Settings:
    """The command line, the loss and words of a run aside."""

    convention: Literal["forward", "reversed"] | None = None
    seconds: CountOr0 = SECONDS


def function_in(word: str) -> Function:
    """Return the function that path/to/file.py:name says, by running the file. UserError where it is not there."""
    file, _, name = word.rpartition(":")
    try:
        found = runpy.run_path(file).get(name)
    except (Exception, SystemExit) as error:  # whose status would be taken for a verdict
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{file} defines no function {name}; it is called as {name}(network, x0, x1)")
    return found


def functions_of(word: str) -> list[str]:
    """Return the functions a Python file defines, read from its source; a placeholder where it defines none."""
    file = Path(word.rstrip(":"))
    require(file, "write path/to/file.py:function")
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not Python: {error}") from error
    return [node.name for node in body if isinstance(node, ast.FunctionDef)] or ["function"]


def prepared(words: list[str]) -> tuple[str, Builder | str, ProbabilityPath | None, list[str], Plan]:
    """Return a command line's name, its objective's builder or why it has none, its path, the worlds and the plan."""
    settings, words = known_settings(words, Settings)
    files = [word for word in words if re.fullmatch(r"[^=]+\.py:\w+", word)]
    losses = [word for word in words if re.match(r"loss[=/.]", word)]
    bare = next((word for word in words if re.fullmatch(r"[^=]+\.py:?", word)), None)
    if bare is not None:
        raise UserError(f"{bare} names no function; write {bare.rstrip(':')}:{' or '.join(functions_of(bare))}")
    several = len(files) > 1 or sum(word.startswith("loss=") for word in losses) > 1
    if several or not (files or losses):
        raise UserError(f"--prove takes one loss: {USAGE}")
    if settings.convention and not files:
        raise UserError(f"convention={settings.convention}: a convention is of a function in a file; {USAGE}")
    cfg = compose_config(["run_name=prove", *(word for word in words if word not in files)])
    for word in files:
        require(Path(word.rpartition(":")[0]), "write path/to/file.py:function")
    from hydra.utils import get_class

    from configuration.build import build
    from evaluation.prove import WORLDS, Plan
    from losses.objective import FlowObjective
    from losses.plain_loss import PlainLoss

    kind = get_class(cfg.loss["_target_"])
    if not issubclass(kind, FlowObjective):
        why = f"{kind.__name__} learns no flow, so there is no exact field to compare with"
        return " ".join(losses), why, None, [], Plan()
    config = resolved(cfg)
    path: ProbabilityPath = build(config["loss"]["path"])
    plan = Plan(seed=config["seed"], loss_weights=config["loss_weights"], seconds=settings.seconds)
    if files:
        function = function_in(files[0])
        plain = lambda network: PlainLoss(network, function, settings.convention == "reversed", path)  # noqa: E731
        return files[0], plain, path, list(WORLDS)[:2], plan
    worlds = [name for name, (joint, *_) in WORLDS.items() if len(joint) > 1 or not config["loss"].get("guidance")]
    return " ".join(losses), lambda network: build(config["loss"], network=network), path, worlds, plan


def size(seen: float) -> str:
    """Return the least bias that would have been seen."""
    return f"{seen:.1%}" if seen < 1 else "100% or more"


def line(stage: Stage) -> str:
    """Return what one world says, in one line."""
    if stage.reason:
        return f"  {stage.world:<13}{stage.verdict}: {stage.reason}"
    what = f"chi2 {stage.statistic:.1f} in {stage.dof} directions, p = {stage.p:.2g}"
    found = f"would have seen {size(stage.seen)}"
    if stage.verdict == "biased":
        found = f"its optimum is {stage.bias:.1%} ± {stage.spread:.1%} off, {stage.direction}"
    return f"  {stage.world:<13}{stage.verdict}: {what}; {found} ({stage.seconds:.0f} s)"


def summed_up(stages: list[Stage]) -> tuple[str, str]:
    """Return the verdict over all worlds, and what it means."""
    from evaluation.prove import CHANCE

    verdicts = [stage.verdict for stage in stages]
    verdict = next(word for word in ("biased", "undecided", "stationary") if word in verdicts)
    worst = max(stages, key=lambda stage: stage.bias if stage.verdict == "biased" else -1.0)
    least = f"{size(max(stage.seen for stage in stages))} of the field, in any of the directions tried,"
    if verdict == "biased":
        meaning = (
            f"on {worst.world} this loss is least {worst.bias:.1%} ± {worst.spread:.1%} away from the exact field, at one "
            f"that has {worst.direction}"
        )
    elif verdict == "stationary":
        meaning = f"the gradient is zero at the exact field; an error of {least} would have shown in {CHANCE:.0%} of proofs"
    else:
        reasons = [stage.reason for stage in stages if stage.reason]
        seen = f"only an error of {least} would have been seen; more seconds={SECONDS} see more"
        meaning = reasons[0] if reasons else seen
    return verdict, f"{verdict}: {meaning}"


def command(words: list[str]) -> int:
    """Carry out `--prove` with the other words of its line; print the proof; return the exit status.

    0 stationary, 3 biased, 4 undecided. UserError for words that name no loss, or a loss that fails.
    """
    name, build_around, path, worlds, plan = prepared(words)
    from evaluation.prove import Stage, prove

    print(f"{name}: is its gradient zero at the exact field?", flush=True)
    if isinstance(build_around, str):
        stages = [Stage("any data", reason=build_around)]
    else:
        assert path is not None
        stages = []
        for stage in prove(build_around, path, worlds, plan):
            stages.append(stage)
            print(line(stage), flush=True)
    verdict, meaning = summed_up(stages)
    print(meaning)
    return STATUS[verdict]

"""What a value may be: the table of every run's own keys, and the annotations of parts' constructors. No torch here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from common.errors import UserError
from common.ranges import ANY, Count, CountOr0, NotNegative, Positive, Range, Seed, ShareBelow1, Size
from configuration.nodes import nodes_in
from configuration.signatures import Part, parameters

LARGEST = 3.4e38  # that single precision holds
SHOWN = 60  # characters of a refused value
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+\-]{0,199}")


class Name(str):
    """Stands for a text that is not empty."""


class FilePath(str):
    """Stands for the path of a file or folder."""


@dataclass(frozen=True)
class Setting:
    """A key that every run has. kind: its type; free: a run that goes on may change it; neutral: no result hangs on it."""

    kind: Any
    free: bool = False
    neutral: bool = False


SETTINGS: dict[str, Setting] = {
    "output_dir": Setting(FilePath, free=True, neutral=True),
    "seed": Setting(Seed),
    "epochs": Setting(Count, free=True),
    "max_steps": Setting(Count | None, free=True),
    "batch_size": Setting(Count),
    "gradient_accumulation_steps": Setting(Count),
    "limit_data": Setting(Count | None),
    "balanced": Setting(bool),
    "num_workers": Setting(Annotated[int, Range(0, most=1000)], free=True, neutral=True),
    "engine": Setting(Literal["torch", "mlx"], free=True),
    "device": Setting(Literal["auto", "cpu", "cuda", "mps"], free=True),
    "devices": Setting(Size, free=True, neutral=True),
    "sharding": Setting(Literal["none", "full"], free=True, neutral=True),
    "precision": Setting(Literal["fp32", "bf16", "fp16"]),
    "compile": Setting(bool, free=True),
    "compile_mode": Setting(Literal["default", "reduce-overhead", "max-autotune"], free=True, neutral=True),
    "deterministic": Setting(bool),
    "checkpoint_activations": Setting(bool, free=True),
    "base_model": Setting(dict[str, Count] | None),
    "wait": Setting(bool, free=True, neutral=True),
    "grad_clip": Setting(Positive | None),
    "on_nan": Setting(Literal["stop", "skip"], free=True, neutral=True),
    "conditional": Setting(bool),
    "loss_weights": Setting(dict[str, float | list[list[float]]]),
    "overfit": Setting(bool),
    "eval_every": Setting(Count),
    "save_every": Setting(Count, free=True, neutral=True),
    "log_every": Setting(Count, free=True, neutral=True),
    "async_save": Setting(Literal["auto", "always", "never"], free=True, neutral=True),
    "on_save_error": Setting(Literal["stop", "continue"], free=True, neutral=True),
    "keep_saves": Setting(CountOr0, free=True, neutral=True),
    "monitor": Setting(Name, free=True, neutral=True),
    "monitor_mode": Setting(Literal["auto", "min", "max"], free=True, neutral=True),
    "patience": Setting(Count | None, free=True, neutral=True),
    "resume": Setting(Literal[True, False, "force"], free=True, neutral=True),
    "overwrite": Setting(Literal[True, False, "unsaved"], free=True, neutral=True),
    "mirror": Setting(FilePath | None, free=True, neutral=True),
    "init_from": Setting(FilePath | None, free=True),
    "teacher": Setting(Name | None),
    "eval_checkpoint": Setting(FilePath | None, free=True, neutral=True),
    "trust": Setting(list[str] | str | None, free=True, neutral=True),
    "show": Setting(bool, free=True, neutral=True),
    "log.expect": Setting(str | None),
    "log.source": Setting(str | None),
    "log.reason": Setting(str | None),
    "log.targets": Setting(dict[str, float]),
    "log.file": Setting(FilePath),
    "trackio.enabled": Setting(bool),
    "trackio.project": Setting(Name),
    "guidance.checkpoint": Setting(FilePath),
}  # fmt: skip
# Of the groups, and of what is kept beside the keys, a run that goes on may change these, and no result hangs on them.
AROUND = ("log", "trackio", "callbacks", "backend", "command", "changed", "overrides", "choices", "guidance")
FREE = {key for key, setting in SETTINGS.items() if setting.free} | {*AROUND}
NEUTRAL = {key for key, setting in SETTINGS.items() if setting.neutral} | {*AROUND}

# torch's optimizers declare types only.
OF_OPTIMIZERS = {
    "lr": Positive, "eps": Positive, "weight_decay": NotNegative, "momentum": ShareBelow1,
    "betas": tuple[ShareBelow1, ShareBelow1],
}  # fmt: skip


def declared(key: str, target: Any) -> Setting | None:
    """Return what may stand at a dotted key, in a node of this `_target_` or None; None where nothing is declared."""
    if key in SETTINGS:
        return SETTINGS[key]
    name = key.rpartition(".")[2]
    known = parameters(target) if isinstance(target, str) else {}
    if str(target).startswith("torch.optim."):
        known = {parameter: OF_OPTIMIZERS.get(parameter, kind) for parameter, kind in known.items()}
    return Setting(known[name]) if name in known else None


def check_value(key: str, value: Any, setting: Setting) -> None:
    """Raise UserError unless the value is of the kind and in the range of its setting."""
    kind, allowed = setting.kind, range_in(setting.kind)
    numbers = list(numbers_in(value)) if {int, float} & kinds_in(kind) else []
    most = min(allowed.most, LARGEST if float in kinds_in(kind) else 2**63 - 1)
    too_far = any(abs(number) > most for number in numbers)
    in_range = not too_far and all(map(allowed.holds, numbers))
    in_order = not allowed.rising or (len(numbers) == 2 and numbers[0] <= numbers[1])
    if fits(value, kind) and in_range and in_order and (value != [] or allowed == ANY):
        return
    limit = "below 2^63" if most == 2**63 - 1 else f"at most {most:,}" if allowed.words() else f"of at most {most:,}"
    ends = allowed.words() + (f"{' and' * bool(allowed.words())} {limit}" if too_far else "")
    example = ", such as [0.2,0.9]" if allowed.rising else ""
    raise UserError(f"{key} takes {words(kind, ends)}{example}, not {shown(value)}")


def numbers_in(value: Any) -> Iterator[float]:
    """Yield every number of nested lists and dicts."""
    return (inner for inner in nodes_in(value) if isinstance(inner, int | float) and not isinstance(inner, bool))


def kinds_in(kind: Any) -> set[Any]:
    """Return the type and every type it is made of."""
    return {kind}.union(*map(kinds_in, get_args(kind))) if get_origin(kind) is not Literal else {kind}


def range_in(kind: Any) -> Range:
    """Return the range of the numbers of a type: ANY, or the one that its Annotated parts share."""
    return next((inner for inner in kinds_in(kind) if isinstance(inner, Range)), ANY)


def options_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type, without their ranges."""
    if get_origin(kind) is Annotated:
        return options_of(get_args(kind)[0])
    united = get_args(kind) if get_origin(kind) in (Union, type(int | None)) else ()
    return tuple(option for part in united for option in options_of(part)) or (kind,)


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; a whole number is a number, and neither is true or false."""
    kind, *others = options_of(kind)
    if others:
        return any(fits(value, option) for option in (kind, *others))
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (Name, FilePath):
        return isinstance(value, str) and value != ""
    return isinstance(value, dict if kind is Part else kind)


NOUNS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", Name: "a name", FilePath: "a path",
    Part: "a group of settings", type(None): "null", object: "anything",
}  # fmt: skip


def words(kind: Any, allowed: str = "", many: bool = False) -> str:
    """Return a type in words, its numbers qualified by `allowed`."""
    options = [option for option in options_of(kind) if option not in (Part, type(None))] or [Part]
    said = [noun(option, allowed, many) for option in options]
    return " or ".join(said) + (" or null" if len(said) > 1 else ", or null") * (type(None) in options_of(kind))


def noun(kind: Any, allowed: str, many: bool) -> str:
    """Return one type that is no union, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        spoken = [shown(word).strip("'") for word in inner]
        return ", ".join(spoken[:-1]) + f" or {spoken[-1]}" if len(spoken) > 1 else spoken[0]
    if origin is tuple:
        return f"two {words(inner[0], '', many=True)}{allowed}" if len(inner) == 2 else f"{len(inner)} values"
    if origin is list:
        return ("lists of " if many else "a list of ") + words(inner[0], allowed, many=True)
    if origin is dict:
        return "a group of settings" if Part in inner else f"a group of {words(inner[1], allowed, many=True)} by name"
    said = NOUNS[kind] + (allowed if kind in (int, float) else "")
    return said.removeprefix("a ").replace("number", "numbers").replace("text", "words") if many else said


def shown(value: Any) -> str:
    """Return a value as it is typed, cut where it is long."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def as_typed(value: Any, text: str, setting: Setting) -> Any:
    """Return the value a command line gives a setting: where it takes text, any single word as it was typed."""
    takes_text = any(option in (str, Name, FilePath) for option in options_of(setting.kind))
    if not takes_text or isinstance(value, dict | list) or value is None or fits(value, setting.kind):
        return value
    return text


def check_all(node: Any, key: str = "") -> None:
    """Raise UserError for the first value in a resolved configuration that may not stand where it does."""
    target = node.get("_target_")
    for name, value in node.items():
        place = f"{key}.{name}".strip(".")
        setting = declared(place, target)
        if setting is not None:
            check_value(place, value, setting)
        if isinstance(value, dict):
            check_all(value, place)
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{place} takes a whole number below 2^63, not {value}")


def check_run_name(name: Any) -> None:
    """Raise UserError for a run_name that cannot name files safely, or is read as a number."""
    if isinstance(name, int | float):
        raise UserError(f"run_name={shown(name)} is read as {NOUNS[type(name)]}; let a name have a letter, as in run_{name}")
    if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
        raise UserError(
            f"run_name={str(name)[:60]!r} cannot name files; use the letters a to z and A to Z, digits and . _ = + - only, "
            "beginning with a letter or digit, at most 200 characters"
        )
